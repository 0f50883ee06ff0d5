"""The published layers of transformers give what ours give, from the same parameters."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")

from sat_lib.common.errors import InputError
from sat_lib.experiments import transformers_layers
from sat_lib.experiments.transformers_layers import transformers_version, use_transformers
from sat_lib.model.encoder import Encoder, ModelConfig

BIGBIRD = {"attention": "bigbird", "block": 4, "length": 52}
LONGFORMER = {"attention": "longformer", "window": 8, "length": 48}
CASES = {
    "bigbird": BIGBIRD,
    "bigbird-1024": BIGBIRD | {"block": 32, "length": 1024},  # transformers asks for the plan head by head
    "longformer": LONGFORMER,
    "longformer-global": LONGFORMER | {"global_token": True},
}


def pair(case, **changes):
    """A model, and its copy with the layers of transformers."""
    sizes = {"vocab": 20, "classes": 3, "layers": 2, "width": 16, "hidden": 24, "dropout": 0.0}
    torch.manual_seed(0)
    ours = Encoder(ModelConfig(**(sizes | CASES[case] | changes)))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # large enough that attention isn't a mean
    theirs = copy.deepcopy(ours)
    use_transformers(theirs)
    return ours, theirs


def tokens(config):
    """Padding at the end, at position 0, and none."""
    made = torch.randint(1, config.vocab, (3, config.length), generator=torch.Generator().manual_seed(0))
    made[0, -config.length // 3 :] = 0
    made[1, 0] = made[1, -1] = 0
    return made


@pytest.fixture
def exact_softmax(monkeypatch):
    """Longformer's softmax in the precision of its input; as published it is in float32 in any case."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("implementation", ["library", "kernel"])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_ours(case, implementation, masked, training, exact_softmax):
    ours, theirs = (
        model.double().train(training) for model in pair(case, implementation=implementation, masked_attention=masked)
    )
    ids = tokens(ours.config)
    logits = [model(ids).logits for model in (ours, theirs)]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-12)
    for result in logits:
        result.square().sum().backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs)]
    scale = max(gradient.abs().max() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("implementation", ["library", "kernel"])
@pytest.mark.parametrize("case", CASES)
def test_a_layers_outputs_are_ours_at_real_positions(case, implementation, masked, exact_softmax):
    ours, theirs = (model.double() for model in pair(case, implementation=implementation))
    real = tokens(ours.config) != 0
    x = torch.randn(*real.shape, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, peer in zip(ours.layers, theirs.layers, strict=True):
        wanted, _ = mine.attention(x, real if masked else None, False)
        got, statistics = peer.attention(x, real if masked else None, False)
        assert statistics is None
        kept = real if masked else slice(None)
        torch.testing.assert_close(got[kept], wanted[kept], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_as_published_results_are_ours_to_single_precision(case):
    ours, theirs = pair(case, masked_attention=True)
    ids = tokens(ours.config)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)


def test_bigbirds_random_blocks_follow_the_seed_and_differ_by_layer():
    ids = tokens(pair("bigbird")[0].config)
    first, second = (pair("bigbird", pattern_seed=seed)[1](ids).logits for seed in range(2))
    assert not torch.allclose(first, second, atol=1e-4)
    first, second = pair("bigbird")[1].layers
    x = torch.randn(1, 52, 16)
    assert not torch.allclose(*(p.attention.published[0](x, **p.attention.masks(x, None))[0] for p in (first, second)))


@pytest.mark.parametrize("case", CASES)
def test_parameters_stay_the_same_under_the_same_names(case):
    model = pair(case)[0].eval()
    names, parameters = list(model.state_dict()), list(map(id, model.parameters()))
    use_transformers(model)
    assert not any(module.training for module in model.modules())
    assert (list(model.state_dict()), list(map(id, model.parameters()))) == (names, parameters)
    assert model.layouts is None and model.sparsity_parameters == []


@pytest.mark.parametrize("case", ["bigbird", "longformer"])
def test_masks_are_made_once_per_forward_pass_and_once_without_padding(case):
    for masked, made in {True: 2, False: 1}.items():
        model = pair(case, masked_attention=masked)[1]
        masks, calls = model.layers[0].attention.masks, []
        make = masks.make
        masks.make = lambda real, make=make, calls=calls: calls.append(real.shape) or make(real)
        ids = tokens(model.config)
        model(ids)
        model(ids)
        assert len(calls) == made
        model(ids[:1])
        assert calls[made:] == [(1, model.config.length)]


@pytest.mark.parametrize("case", CASES)
def test_training_may_follow_inference_mode(case):
    model = pair(case)[1]
    ids = tokens(model.config)
    with torch.inference_mode():
        model(ids)
    model(ids).logits.sum().backward()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_autocast_runs_and_is_close(case, masked, device):
    model = pair(case, masked_attention=masked)[1].to(device)
    ids = tokens(model.config).to(device)
    wanted = model(ids).logits
    with torch.autocast(device.type, torch.bfloat16):
        got = model(ids).logits
    torch.testing.assert_close(got.float(), wanted, rtol=0.03, atol=0.03)
    got.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_version_is_known():
    assert transformers_version().split(".")[0].isdigit()


REFUSED = {
    "attention: transformers has layers for .* this model's is 'lsg'": ("bigbird", {"attention": "lsg"}),
    "dilation: .* wanted 1; got 2": ("longformer", {"dilation": 2}),
    r"dilation: .* wanted 1; got \(1, 2\)": ("longformer", {"dilation": (1, 2)}),
    "window: wanted an even number .* got 7": ("longformer", {"window": 7}),
    "length: .* multiple of its window of 8 positions; got 50": ("longformer", {"length": 50}),
    "length: .* multiple of its block of 4 positions; got 54": ("bigbird", {"length": 54}),
    "length: BigBird with 3 random blocks wants more than 11 blocks": ("bigbird", {"length": 44}),
    "random_blocks: .* wants 1 or more; got 0": ("bigbird", {"random_blocks": 0}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_transformers_has_no_layer_for_is_refused(message):
    case, changes = REFUSED[message]
    with pytest.raises(InputError, match=message):
        pair(case, **changes)


def test_another_length_than_the_models_is_refused():
    attention = pair("bigbird")[1].layers[0].attention
    with pytest.raises(InputError, match="x: wanted the model's length of 52 positions; got 48"):
        attention(torch.zeros(1, 48, 16), None, False)


def test_without_transformers_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(transformers_layers, "transformers_version", lambda: None)
    with pytest.raises(InputError, match="pip install transformers"):
        pair("bigbird")
