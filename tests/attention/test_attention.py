"""The contract that every entry of ATTENTION keeps, in each of its implementations, on a CPU and on a GPU."""

from typing import NamedTuple

import pytest
import torch
from attention_cases import assert_close, inputs, with_gradients
from definitions import MASKS, masked_attention

from sat_lib.attention import ATTENTION, get_attention
from sat_lib.attention.baselines import IMPLEMENTATIONS
from sat_lib.attention.layout import BlockLayout
from sat_lib.common.errors import InputError


class Case(NamedTuple):
    name: str
    options: dict
    definition: dict  # its options as the definition's mask takes them

    def attend(self, q, k, v, **more):
        return get_attention(self.name, **self.options)(q, k, v, **more)

    def mask(self, q, k, real):
        real = None if real is None else real.cpu()
        return MASKS[self.name](q.detach().cpu(), k.detach().cpu(), real, **self.definition)


PATTERNS = [
    ("longformer", {"window": 64}),
    ("longformer", {"window": 12}),
    ("longformer", {"window": 6, "dilation": 2}),
    ("longformer", {"window": 64, "dilation": 3}),
    ("longformer", {"window": 12, "global_token": True}),
    ("longformer", {"window": 6, "dilation": 3, "global_token": True}),
    ("bigbird", {"block": 16}),
    ("bigbird", {"block": 16, "random_blocks": 1, "seed": 3, "layer": 2}),
    ("lsg", {"block": 32}),
    ("lsg", {"block": 16, "factor": 4}),
    ("lsg", {"block": 16, "factor": 1}),
]
CASES = {
    "dense": Case("dense", {}, {}),
    "sat": Case("sat", {}, {}),
    "sat full": Case("sat", {"layout": BlockLayout.full(13, 13, 16)}, {}),
}
for _name, _options in PATTERNS:
    for _implementation in IMPLEMENTATIONS:
        _words = " ".join([_name, *(f"{key}={value}" for key, value in _options.items()), _implementation])
        CASES[_words] = Case(_name, _options | {"implementation": _implementation}, _options)
LENGTHS = (208, 195, 193)


@pytest.fixture(params=CASES, ids=lambda words: words.replace(" ", "-"))
def case(request):
    return CASES[request.param]


def on(case, device):
    """The case with its layout, if it has one, on a device."""
    options = {name: value.to(device) if name == "layout" else value for name, value in case.options.items()}
    return case._replace(options=options)


def ragged(length, device="cpu"):
    """Real tokens of three examples: all, a few, none of the second half; and a hole."""
    real = torch.arange(length) < torch.tensor([length, 37, length // 2])[:, None]
    real[0, 70:110] = False
    return real.to(device)


def test_every_attention_has_a_case():
    assert {case.name for case in CASES.values()} == set(ATTENTION)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_dense_attention_under_the_definitions_mask(case, length, padded, number_format):
    device, dtype, *_ = number_format
    case, real = on(case, device), ragged(length, device) if padded else None
    given = inputs(length, length, device, dtype, size=16)
    exact = [x.detach().double().requires_grad_() for x in given]
    mask = case.mask(given[0], given[1], real)
    out, gradients = with_gradients(lambda *qkv: case.attend(*qkv, key_padding_mask=real), given)
    want, wanted = with_gradients(lambda *qkv: masked_attention(*qkv, mask, real), exact)
    peer, peers = with_gradients(lambda *qkv: masked_attention(*qkv, mask, real), given)
    assert out.shape == given[0].shape and out.dtype == dtype
    assert_close(out, want, peer, 2, number_format.rounding)
    for gradient, expected, theirs in zip(gradients, wanted, peers, strict=True):
        assert_close(gradient, expected, theirs, 3, number_format.rounding)


def test_views_of_one_projection_give_the_same(case, device):
    case = on(case, device)
    packed = torch.randn(3, 195, 3, 2, 16, device=device)
    views = packed.permute(2, 0, 3, 1, 4)  # three (B, H, L, D) whose heads alternate in memory
    copies = views.contiguous()
    torch.testing.assert_close(case.attend(*views), case.attend(*copies))


def test_what_stands_behind_the_mask_does_not_matter(case, device):
    case, real = on(case, device), ragged(195, device)
    given = [x.detach() for x in inputs(195, 195, device, torch.float32, size=16)]
    other = [torch.where(real[:, None, :, None], x, torch.full_like(x, 50.0)) for x in given]
    out, changed = (case.attend(*x, key_padding_mask=real) for x in (given, other))
    where = real[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[where], changed[where])


def test_an_example_without_real_tokens_gives_0_and_takes_no_gradient(case, device):
    case, real = on(case, device), ragged(195, device)
    real[1] = False
    out, gradients = with_gradients(
        lambda *qkv: case.attend(*qkv, key_padding_mask=real), inputs(195, 195, device, torch.float32, size=16)
    )
    assert (out[1] == 0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()


def test_examples_do_not_meet(case, device):
    case, order, real = on(case, device), torch.tensor([2, 0, 1], device=device), ragged(195, device)
    given = [x.detach() for x in inputs(195, 195, device, torch.float32, size=16)]
    out = case.attend(*given, key_padding_mask=real)
    permuted = case.attend(*(x[order] for x in given), key_padding_mask=real[order])
    torch.testing.assert_close(permuted, out[order])
    alone = case.attend(*(x[1:2] for x in given), key_padding_mask=real[1:2])
    torch.testing.assert_close(alone, out[1:2])


def test_the_same_input_gives_the_same_bits(case, number_format):
    """With PyTorch's own operations asked to be deterministic, as `number_format` does."""
    device, dtype, *_ = number_format
    case = on(case, device)
    given = inputs(195, 195, device, dtype, size=16)
    first, again = (with_gradients(case.attend, given) for _ in range(2))
    for x, y in zip([first[0], *first[1]], [again[0], *again[1]], strict=True):
        assert torch.equal(x, y)


def test_autocast_casts_like_pytorchs_attention(case, device):
    case = on(case, device)
    given = inputs(195, 195, device, torch.float32, size=16)
    with torch.autocast(device.type, torch.bfloat16):
        out = case.attend(*given)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert given[0].grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(case):
    given = inputs(195, 195, size=16)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.attend(*given)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, case.attend(*given))


def test_training_may_follow_inference_mode(case):
    q, k, v = inputs(201, 201, dtype=torch.float32, size=16)  # a length that no other test has prepared
    with torch.inference_mode():
        case.attend(q, k, v)
    case.attend(q, k, v).sum().backward()
    assert q.grad.abs().sum() > 0


@pytest.mark.gpu
def test_a_cpu_and_a_gpu_take_turns(case):
    given = [x.detach() for x in inputs(195, 195, dtype=torch.float32, size=16)]
    out = case.attend(*given)
    on_gpu = on(case, "cuda").attend(*(x.to("cuda") for x in given))
    torch.testing.assert_close(on_gpu.cpu(), out, rtol=1e-3, atol=1e-4)
    assert torch.equal(case.attend(*given), out)


def test_masked_keys_do_not_win_however_large_their_scores(case, device):
    """In float16 a score of 1e4 is not far from what the format can hold."""
    case, real = on(case, device), torch.ones(2, 195, dtype=torch.bool, device=device)
    real[:, 60:] = False
    q = torch.full((2, 2, 195, 16), 100.0, dtype=torch.float16, device=device)
    k, v = torch.zeros_like(q), torch.ones_like(q)
    k[:, :, 60:], v[:, :, 60:] = 100.0, 1000.0
    out = case.attend(q, k, v, key_padding_mask=real)
    assert (out[:, :, :60] - 1).abs().max() < 0.01


def test_tensors_may_begin_anywhere_in_memory(case):
    numbers = torch.randn(3, 1 + 2 * 2 * 195 * 16)
    q, k, v = (x[1:].view(2, 2, 195, 16) for x in numbers)
    torch.testing.assert_close(case.attend(q, k, v), case.attend(q.clone(), k.clone(), v.clone()))


def test_bad_input_is_named(case):
    q, k, v = inputs(195, 195)
    with pytest.raises(InputError, match="q, k, v: wanted"):
        case.attend(q[0], k, v)
    with pytest.raises(InputError, match="key_padding_mask: wanted bool"):
        case.attend(q, k, v, key_padding_mask=torch.ones(3, 195))


@pytest.mark.parametrize("name", ["Dense", "performer", ""])
def test_an_unknown_name_raises_and_lists_the_known(name):
    with pytest.raises(InputError, match=r"wanted one of \['dense', 'longformer', 'bigbird', 'lsg', 'sat'\]"):
        get_attention(name)


def test_an_option_that_an_attention_has_not_raises_and_lists_those_it_has():
    with pytest.raises(InputError, match=r"'dense' takes no layout; its options are \[\]"):
        get_attention("dense", layout=BlockLayout.full(3, 3, 16))
    with pytest.raises(InputError, match=r"'bigbird' takes no window; its options are \['block', 'random_blocks'"):
        get_attention("bigbird", window=64)
