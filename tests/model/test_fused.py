"""The operators of the fast step against float64, and a fast model and step against the plain ones."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_splits
from torch import nn

from sat_lib.attention.static_patterns import random_layout
from sat_lib.common.errors import InputError
from sat_lib.datasets.cache import Split, Splits
from sat_lib.datasets.tasks import task
from sat_lib.model import fused
from sat_lib.model.encoder import PLAIN, Encoder
from sat_lib.model.fused import HIDDEN, WIDTH, after_attention, before_attention, embedding
from sat_lib.training.recipe import model_config, run_config
from sat_lib.training.trainer import Trainer

ROWS = (1, 15, 16, 17, 1000, 4099)
SHAPES = ((WIDTH, WIDTH), (WIDTH,), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,))
EPS = 1e-5


def attended_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random(shape, device, std=1.0, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).to(device)


def weights(device):
    return [random(shape, device, 0.2 if len(shape) > 1 else 0.5, seed) for seed, shape in enumerate(SHAPES)]


def masks_of(rows, device, seed, dropout):
    """The three masks that a seed draws, read off the operator itself, scaled."""
    keep = 1 - round(dropout * 65_536) / 65_536
    call, zeros = torch.ops.sat_lib.after_attention, [torch.zeros(shape, device=device) for shape in SHAPES]
    x = torch.zeros(rows, WIDTH, device=device)

    def run(**changed):
        given = [changed.get(f"w{place}", zero) for place, zero in enumerate(zeros)]
        return call(x, x.to(attended_dtype(device)), *given, seed, dropout, EPS) > 0.5

    ones = torch.ones(WIDTH, device=device)
    hidden = torch.zeros(rows, HIDDEN, dtype=torch.bool, device=device)
    for half in (0, WIDTH):
        for shift in range(0, WIDTH, 8):  # out of a hidden unit through several outputs, since these drop too
            column, to = torch.arange(WIDTH), (torch.arange(WIDTH) + shift) % WIDTH
            down = torch.zeros(WIDTH, HIDDEN)
            down[to, half + column] = 1
            seen = run(w3=torch.full((HIDDEN,), 10.0, device=device), w4=down.to(device))
            hidden[:, half : half + WIDTH] |= seen[:, to.to(device)]
    return [mask.double() / keep for mask in (run(w1=ones), hidden, run(w5=ones))]


def definition(x, attended, out, out_bias, up, up_bias, down, down_bias, masks=(1, 1, 1)):
    residual = x + F.linear(attended, out, out_bias) * masks[0]
    hidden = F.gelu(F.linear(F.layer_norm(residual, (WIDTH,), eps=EPS), up, up_bias)) * masks[1]
    return residual + F.linear(hidden, down, down_bias) * masks[2]


def results(function, tensors, grad):
    """Value and gradients of a function of these tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    value.backward(grad.to(value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def check_errors(got, plain, exact, slack=1e-6):
    """At most as far from float64 as PyTorch's own operations: twice the value's error, three times a gradient's."""
    for place, (mine, theirs, true) in enumerate(zip(got, plain, exact, strict=True)):
        assert mine.isfinite().all()
        size = true.norm() + 1e-30
        bound = (2 if place == 0 else 3) * (theirs.double() - true).norm() / size + slack
        assert (mine.double() - true).norm() / size <= bound, place


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rows", ROWS)
def test_after_attention_is_its_definition(rows, dropout, device):
    inputs = [random((rows, WIDTH), device, seed=7), random((rows, WIDTH), device, seed=8)]
    inputs[1] = inputs[1].to(attended_dtype(device))
    inputs += weights(device)
    grad = random((rows, WIDTH), device, seed=9)
    seed = torch.tensor([2**40 + 5], device=device) if dropout else None
    masks = masks_of(rows, device, seed, dropout) if dropout else (1, 1, 1)
    exact = results(lambda *a: definition(*a, masks=masks), [t.double() for t in inputs], grad)

    def plainly(*tensors):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return definition(*tensors, masks=[m.float() if torch.is_tensor(m) else m for m in masks])

    got = results(lambda *a: torch.ops.sat_lib.after_attention(*a, seed, dropout, EPS), inputs, grad)
    check_errors(got, results(plainly, inputs, grad), exact)


@pytest.mark.parametrize("rows", ROWS)
def test_before_attention_is_its_definition_and_adds_the_gradient_that_comes_past(rows, device):
    torch.manual_seed(0)
    norm, linears = nn.LayerNorm(WIDTH).to(device), [nn.Linear(WIDTH, WIDTH).to(device) for _ in range(3)]
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    modules = nn.ModuleList([norm, *linears])
    x, grads = random((rows, WIDTH), device, 2.0), [random((rows, WIDTH), device, seed=s) for s in range(4)]

    def outcome(function, modules, x, autocast=False):
        modules.zero_grad()
        x = x.detach().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            values = function(modules, x)
        torch.autograd.backward(values, [grad.to(value.dtype) for grad, value in zip(grads, values, strict=True)])
        value = torch.cat([value.detach().double() for value in values])
        return [value, x.grad, *(parameter.grad.clone() for parameter in modules.parameters())]

    def plain(modules, x):
        return [*(linear(modules[0](x)) for linear in modules[1:]), x * 1]

    exact = outcome(plain, copy.deepcopy(modules).double(), x.double())
    got = outcome(lambda modules, x: before_attention(x, modules[0], tuple(modules[1:])), modules, x)
    check_errors(got, outcome(plain, modules, x, autocast=device.type == "cuda"), exact)


@pytest.mark.parametrize(("rows", "width"), [(3, 64), (256, 64), (512, 64), (1700, 64), (20, 33)])
def test_the_embedding_gradient_sums_over_every_occurrence(rows, width, device):
    tokens = torch.randint(0, rows, (3, 701), generator=torch.Generator().manual_seed(0)).to(device)
    table, grad = random((rows, width), device).requires_grad_(), random((3, 701, width), device, seed=1)
    value = embedding(tokens, table)
    assert torch.equal(value, F.embedding(tokens, table))
    value.backward(grad)
    exact = torch.zeros(rows, width, dtype=torch.float64, device=device)
    exact.index_add_(0, tokens.flatten(), grad.double().flatten(0, 1))
    torch.testing.assert_close(table.grad.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_operators_repeat_bit_for_bit_and_other_seeds_drop_others(device):
    x, attended = random((999, WIDTH), device), random((999, WIDTH), device, seed=1).to(attended_dtype(device))
    given, call = weights(device), torch.ops.sat_lib
    seeds = [torch.tensor([seed], device=device) for seed in (1, 1, 2)]
    first, again, other = (call.after_attention_backward(x, x, attended, *given, seed, 0.1, EPS) for seed in seeds)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    tokens = torch.arange(999, device=device) % 7
    assert torch.equal(call.embedding_gradient(x, tokens, 7), call.embedding_gradient(x, tokens, 7))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_keeps_its_share_independently(dropout, device):
    rows = 2000
    masks = [mask > 0 for mask in masks_of(rows, device, torch.tensor([3], device=device), dropout)]
    for mask in masks:
        wide = 5 * (dropout * (1 - dropout) / mask.numel()) ** 0.5
        assert abs(mask.double().mean() - (1 - dropout)) < wide
        rows_apart = (mask[1:] == mask[:-1]).double().mean()
        assert abs(rows_apart - (1 - 2 * dropout * (1 - dropout))) < 0.01
    same = (masks[0] == masks[2]).double().mean()
    assert abs(same - (1 - 2 * dropout * (1 - dropout))) < 0.01


def test_gradients_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for shape in ((3, 5, WIDTH),) * 2 + SHAPES
    ]
    seed = torch.tensor([5])
    inputs = [tensor.requires_grad_() for tensor in tensors]
    call = torch.ops.sat_lib.after_attention
    assert torch.autograd.gradcheck(lambda *a: call(*a, seed, 0.3, EPS)[:, :2, ::9], inputs, fast_mode=True)


def test_the_operators_are_whole(device):
    x, attended = random((2, 9, WIDTH), device), random((2, 9, WIDTH), device, seed=1).to(attended_dtype(device))
    given = [weight.requires_grad_() for weight in weights(device)]
    seed = torch.tensor([5], device=device)
    torch.library.opcheck(torch.ops.sat_lib.after_attention, (x, attended, *given, seed, 0.3, EPS))
    plain = [weight.detach() for weight in given]
    torch.library.opcheck(torch.ops.sat_lib.after_attention_backward, (x, x, attended, *plain, seed, 0.3, EPS))
    weight, bias = random((3 * WIDTH, WIDTH), device), random((3 * WIDTH,), device)
    torch.library.opcheck(torch.ops.sat_lib.before_attention, (x, weight, bias, EPS))
    grads = torch.ops.sat_lib.before_attention(x, weight, bias, EPS)
    torch.library.opcheck(torch.ops.sat_lib.before_attention_backward, (*grads, x, x, weight, bias, EPS))
    tokens = torch.arange(18, device=device).view(2, 9)
    torch.library.opcheck(torch.ops.sat_lib.embedding_gradient, (x, tokens, 18))


def test_what_the_operators_cannot_take_is_refused(device):
    x, table = torch.zeros(2, WIDTH, device=device), torch.zeros(1701, WIDTH, device=device)
    norm, linear = nn.LayerNorm(WIDTH).to(device), nn.Linear(WIDTH, WIDTH).to(device)
    up, down = nn.Linear(WIDTH, HIDDEN).to(device), nn.Linear(HIDDEN, WIDTH).to(device)
    tokens = torch.zeros(2, dtype=torch.int64, device=device)
    wide, many = (Encoder(model_config("cifar10", **size)).to(device) for size in ({"width": 128}, {"vocab": 1701}))
    for call, message in (
        (lambda: embedding(tokens, table), r"V at most 1700; got \(1701, 64\)"),
        (lambda: embedding(tokens, table[:9].double()), "wanted .*float32.*; got .*float64"),
        (lambda: embedding(tokens.int(), table[:9]), "tokens: wanted int64; got torch.int32"),
        (lambda: before_attention(x[:, :32], norm, (linear,) * 3), r"x: wanted \(..., 64\) float32; got \(2, 32\)"),
        (lambda: before_attention(x.half(), norm, (linear,) * 3), "float32; got .*float16"),
        (lambda: after_attention(x, x[:1], linear, norm, up, down, 0.0), r"attended: wanted \(2, 64\)"),
        (lambda: after_attention(x, x, linear, norm, linear, down, 0.0), r"wanted weights and biases .*\(128, 64\)"),
        (lambda: after_attention(x, x, linear, norm, up, down, 1.0), "dropout: wanted 0 to 0.99; got 1.0"),
        (lambda: before_attention(x, norm, (linear, linear, up)), r"got .*\(128, 64\)"),
        (lambda: fused.fuse(wide, compiled=False), "fused layer is for 64 and 128; got 128 and 128"),
        (lambda: fused.fuse(many, compiled=False), "vocab: .* up to 1700 tokens; got 1701"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# ---- the model and the step ------------------------------------------------------------------------------------------

ATTENTIONS = {
    "sat": {},
    "dense": {},
    "longformer": {},
    "bigbird": {"implementation": "library"},
    "lsg": {},
}


def outcome(model, tokens, labels, autocast):
    model.zero_grad()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        logits = model(tokens).logits
    F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return [logits.detach(), torch.cat(grads)]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["cifar10", "agnews"])
def test_a_fused_model_computes_what_the_modules_do(name, attention, device):
    torch.manual_seed(0)
    config = model_config(name, attention=attention, layers=2, dropout=0.0, **ATTENTIONS[attention])
    model = Encoder(config).to(device)
    if attention == "sat":
        model.enter_sparse_phase([random_layout(32, 32, 0.1, 32, seed) for seed in range(2)])
    tokens = torch.randint(0, 256, (3, 1024), generator=torch.Generator().manual_seed(0)).to(device)
    tokens[0, -300:] = 0
    labels = torch.arange(3, device=device)
    autocast = device.type == "cuda"
    plain = outcome(model, tokens, labels, autocast)
    on_cpu = copy.deepcopy(model).double().cpu()
    if attention == "sat":
        for layer in on_cpu.layers:
            layer.attention.layout = layer.attention.layout.to("cpu")
    exact = [value.to(device) for value in outcome(on_cpu, tokens.cpu(), labels.cpu(), False)]
    fused.fuse(model, compiled=False)
    # In bfloat16 a unit of the head may end above 0 instead of below, which moves a small batch's gradient.
    check_errors(outcome(model, tokens, labels, autocast), plain, exact, slack=0.02 if autocast else 1e-6)


def flat(values):
    return torch.cat([value.detach().flatten() for value in values])


def steps_side_by_side(attention, device, count=14):
    """For each step of a fast and of a plain trainer, both from the weights of the fast one, a pair of what they have:
    record, gradients, how far the weights moved, layouts. Each goes on with its own optimiser.

    Steps that went on from their own weights would part: rounding turns the sign of small gradients, which is what
    Adam's first steps are made of, and a few steps at the published rate make much of that.
    """
    settings = {"switch_at": 6} if attention == "sat" else {}
    model = {"dropout": 0.0} | ATTENTIONS[attention]
    config = run_config("cifar10", attention, model=model, batch=16, steps=100, warm_up=10, **settings)
    trainers = [Trainer(config, cifar_like(), device, step) for step in ("fast", "plain")]
    fast, plain = (trainer.model for trainer in trainers)
    assert [trainer.fast for trainer in trainers] == [True, False]
    for _ in range(count):
        with torch.no_grad():
            for mine, theirs in zip(plain.parameters(), fast.parameters(), strict=True):
                mine.copy_(theirs)
        start, pair = flat(fast.parameters()), []
        for trainer in trainers:
            record = trainer.train_step()
            gradients = flat(weight.grad for weight in trainer.model.parameters() if weight.grad is not None)
            pair.append((record, gradients, flat(trainer.model.parameters()) - start, trainer.model.layouts))
        yield pair


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_compiling_and_capturing_a_step_change_nothing_but_rounding(attention):
    """Fourteen steps without dropout, SAT's over both phases: the graph is captured in the fourth of each. What belongs
    to another batch or to other weights would differ: successive batches' gradients have cosines of -0.6 to 0.7, and
    their losses are up to 10 % apart."""
    records, movements = [], []
    for (fast, gradients, moved, layouts), (plain, wanted, should_move, plain_layouts) in steps_side_by_side(
        attention, torch.device("cuda")
    ):
        for name in {"loss", "sparsity_loss"} & plain.keys():
            assert float(fast[name]) == pytest.approx(float(plain[name]), rel=0.005), (fast["step"], name)
        assert torch.cosine_similarity(gradients, wanted, 0) > 0.95, fast["step"]
        assert (gradients.norm() / wanted.norm()).item() == pytest.approx(1, abs=0.1), fast["step"]
        assert layouts == plain_layouts
        if "skewness" in plain:
            np.testing.assert_allclose(fast["skewness"], plain["skewness"], rtol=0.05)
        records.append(fast)
        movements.append((moved, should_move))
    for first, last in ((0, 7), (7, 14)):  # SAT's phases: the optimiser is given the gradients of that step
        moved, should_move = (sum(some) for some in zip(*movements[first:last], strict=True))
        assert torch.cosine_similarity(moved, should_move, 0) > 0.9
    phases = ["dense"] * 7 + ["sparse"] * 7 if attention == "sat" else ["dense"] * 14
    assert [record["phase"] for record in records] == phases


@pytest.mark.gpu
def test_a_captured_step_draws_new_masks_and_evaluation_none():
    config = run_config("cifar10", "dense", batch=16, steps=100, warm_up=10, rate=1e-12)
    trainer = Trainer(config, cifar_like(), torch.device("cuda"))
    batch = trainer.examples.batch(np.arange(16))
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(8)]
    assert len(set(losses)) == 8
    assert trainer.evaluate(cifar_like().dev) == trainer.evaluate(cifar_like().dev)


def test_a_fast_step_averages_the_weights_and_evaluates_them_under_refreshed_layouts(device):
    """On a GPU the graph of the sparse phase is captured in its fourth step."""
    changes = {"switch_at": 1, "average": 4, "pattern": "random", "pattern_refresh": 6}
    config = run_config("cifar10", "sat", "best", batch=4, steps=100, warm_up=10, **changes)
    trainer, wanted = Trainer(config, cifar_like(8), device, "fast"), None
    for step in range(10):
        trainer.train_step()
        if step >= 1:
            now = flat(trainer.model.parameters())
            wanted = now if wanted is None else 0.75 * wanted + 0.25 * now
            torch.testing.assert_close(flat(trainer.evaluated.parameters()), wanted, rtol=1e-5, atol=1e-6)
            assert trainer.evaluated.layouts == trainer.model.layouts
    assert trainer.evaluated is not trainer.model and trainer.evaluated.parts.layer is not PLAIN.layer
    seen, dev = trainer.evaluate(trainer.data.dev), trainer.data.dev
    trainer.average = None
    assert trainer.evaluate(dev).loss != seen.loss


def cifar_like(examples=64):
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 256, (examples, 1024)).astype(np.uint8)
    split = Split(tokens, np.arange(examples), generator.integers(0, 10, examples))
    return Splits(task("cifar10"), split, split, split, "dev")


def test_the_fast_step_is_refused_where_it_is_not_made_for_and_auto_says_what_it_took(device):
    small = run_config("digits16", "sat", model={"width": 32, "hidden": 16}, precision="bf16", batch=6)
    with pytest.raises(InputError, match="fused layer is for 64 and 128; got 32 and 16"):
        Trainer(small, tiny_splits(), device, "fast")
    assert not Trainer(small, tiny_splits(), device).fast
    with pytest.raises(InputError, match="precision: the fast step is for bf16"):
        Trainer(run_config("cifar10", "sat", precision="fp32"), cifar_like(), device, "fast")
    own = run_config("cifar10", "longformer", model={"global_token": True})
    with pytest.raises(InputError, match="without a global token's own projections"):
        Trainer(own, cifar_like(), device, "fast")
    with pytest.raises(InputError, match="step: wanted one of"):
        Trainer(small, tiny_splits(), device, "quick")
    assert Trainer(run_config("cifar10", "sat"), cifar_like(), device).fast == (device.type == "cuda")
