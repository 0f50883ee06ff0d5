from dataclasses import replace

import pytest
import torch

from sat_lib.attention.baselines import IMPLEMENTATIONS
from sat_lib.attention.static_patterns import random_layout
from sat_lib.attention.statistics import attention_statistics, sparse_statistics
from sat_lib.common.errors import InputError
from sat_lib.model.encoder import Encoder, ModelConfig
from sat_lib.training.recipe import model_config

PUBLISHED = {"cifar10": 160_650, "inaturalist": 177_550, "agnews": 245_252, "yelp": 244_994}


def small(**changes):
    settings = {"vocab": 20, "classes": 3, "layers": 2, "length": 40, "width": 16, "hidden": 24, "block": 16}
    return ModelConfig(**(settings | changes))


def tokens(config, batch=3):
    made = torch.randint(1, config.vocab, (batch, config.length), generator=torch.Generator().manual_seed(0))
    made[:, -5:] = 0
    return made


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(name, count):
    assert Encoder(model_config(name)).parameter_count() == count


def test_a_dense_model_has_no_sparsity_parameter():
    difference = PUBLISHED["cifar10"] - Encoder(model_config("cifar10", attention="dense")).parameter_count()
    assert difference == 2 * 32 * 32


@pytest.mark.parametrize(
    ("attention", "settings", "more"),
    [
        ("longformer", {}, 0),
        ("bigbird", {}, 0),
        ("lsg", {}, 64),  # the global token
        ("longformer", {"global_token": True}, 2 * 3 * (64 * 64 + 64)),  # its projections
    ],
    ids=str,
)
def test_baselines_have_the_dense_models_parameters_and_their_global_ones(attention, settings, more):
    dense = Encoder(model_config("cifar10", attention="dense")).parameter_count()
    model = Encoder(model_config("cifar10", attention=attention, **settings))
    assert model.parameter_count() - dense == more
    logits = model(torch.randint(1, 256, (2, 1024))).logits
    logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.dim() == 2)
    assert model.global_token is None or model.global_token.grad.abs().sum() > 0


BASELINES = {
    "longformer": {"window": 8, "dilation": (1, 2), "global_token": True},
    "bigbird": {"block": 4, "random_blocks": 1},
    "lsg": {"block": 8},
}


@pytest.mark.parametrize("attention", BASELINES)
def test_both_implementations_give_the_same_model(attention):
    config = small(attention=attention, masked_attention=True, length=39, **BASELINES[attention])
    ids, outputs = tokens(config), []
    for implementation in IMPLEMENTATIONS:
        torch.manual_seed(0)
        model = Encoder(replace(config, implementation=implementation)).eval()
        logits = model(ids).logits
        logits.sum().backward()
        outputs.append([logits, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_each_layer_has_its_own_random_blocks_and_dilation():
    layers = Encoder(small(attention="bigbird", **BASELINES["bigbird"])).layers
    assert [layer.attention.attend.keywords["layer"] for layer in layers] == [0, 1]
    layers = Encoder(small(attention="longformer", **BASELINES["longformer"])).layers
    assert [layer.attention.attend.keywords["dilation"] for layer in layers] == [1, 2]


def test_lsgs_global_token_takes_the_place_of_position_0_behind_the_last_layer():
    model = Encoder(small(attention="lsg", block=8)).eval()
    seen = {}
    model.layers[-1].register_forward_hook(lambda module, inputs, output: seen.update(last=output[0]))
    model.norm.register_forward_pre_hook(lambda module, inputs: seen.update(norm=inputs[0]))
    model(tokens(model.config))
    assert seen["last"].shape == (3, 41, 16) and seen["norm"].shape == (3, 40, 16)
    assert torch.equal(seen["norm"][:, 0], seen["last"][:, 0])
    assert torch.equal(seen["norm"][:, 1:], seen["last"][:, 2:])


def test_the_papers_sparsity_parameter_is_as_wide_as_the_embedding():
    for width, shape in {"head": (3, 8), "embedding": (3, 16)}.items():
        assert Encoder(small(sparsity_width=width)).sparsity_parameters[0].weight.shape == shape


def test_forward_is_the_published_sequence_of_operations():
    """The whole model written out once more, from its parameters."""
    config = small(masked_attention=True)
    model = Encoder(config).eval()
    ids = tokens(config)
    real = ids != 0
    norm = torch.nn.functional.layer_norm
    x = model.token.weight[ids] + model.position.weight
    for layer in model.layers:
        h = norm(x, (16,), layer.norm_attention.weight, layer.norm_attention.bias)
        a = layer.attention
        q, k, v = (m(h).reshape(3, 40, 2, 8).permute(0, 2, 1, 3) for m in (a.query, a.key, a.value))
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~real[:, None, None], -1e6)
        x = x + a.out((scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(3, 40, 16))
        h = norm(x, (16,), layer.norm_feed_forward.weight, layer.norm_feed_forward.bias)
        first, last = layer.feed_forward[0], layer.feed_forward[3]
        x = x + last(torch.nn.functional.gelu(first(h)))
    pooled = (norm(x, (16,), model.norm.weight, model.norm.bias) * real[..., None]).sum(1) / 40
    wanted = model.head[2](model.head[0](pooled).relu())
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-6)


def test_padding_tokens_drop_out_of_the_mean_in_every_task():
    model = Encoder(small()).eval()
    nothing = model(torch.zeros(2, 40, dtype=torch.int64)).logits
    torch.testing.assert_close(nothing, model.head(torch.zeros(2, 16)))


def test_the_mean_is_over_all_positions_or_over_real_tokens():
    config = small()
    torch.manual_seed(0)
    model = Encoder(config).eval()
    over_real = Encoder(small(mean_over="real")).eval()
    over_real.load_state_dict(model.state_dict())
    some = tokens(config)
    some[0, 5:] = 0
    some[1] = 0
    means = []
    for each in (model, over_real):
        each.head.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0]))
        each(some)
    torch.testing.assert_close(means[1][0], means[0][0] * config.length / 5)
    torch.testing.assert_close(means[1][2], means[0][2] * config.length / (some[2] != 0).sum())
    assert not means[1][1].any()


def test_embeddings_start_at_the_published_scale():
    model = Encoder(model_config("cifar10"))
    assert model.token.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.position.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_are_those_of_each_layers_own_queries_and_keys(masked):
    config = small(masked_attention=masked)
    model = Encoder(config).eval()
    ids = tokens(config)
    seen = []
    for layer in model.layers:
        layer.attention.register_forward_pre_hook(lambda module, inputs: seen.append(module.heads(inputs[0])[:2]))
    mask = ids != 0 if masked else None
    dense = model(ids, statistics=True).statistics
    for (q, k), statistics in zip(seen, dense, strict=True):
        assert statistics.correlation is None
        torch.testing.assert_close(statistics[:2], tuple(attention_statistics(q, k, 16, key_padding_mask=mask)))
    layouts = [random_layout(3, 3, 0.5, 16, seed=seed) for seed in range(2)]
    model.enter_sparse_phase(layouts)
    seen.clear()
    sparse = model(ids, statistics=True).statistics
    for (q, k), layout, statistics in zip(seen, layouts, sparse, strict=True):
        torch.testing.assert_close(statistics[:2], tuple(sparse_statistics(q, k, layout, key_padding_mask=mask)))
        assert (statistics.mean_map[~layout.entries(40)] == 0).all()


def test_the_sparse_phase_freezes_the_sparsity_parameters_and_uses_the_layouts():
    model = Encoder(small()).eval()
    ids = tokens(model.config)
    dense = model(ids).logits
    assert model.layouts is None
    layouts = [random_layout(3, 3, 0.3, 16, seed=seed) for seed in range(2)]
    model.enter_sparse_phase(layouts)
    assert model.layouts == layouts
    sparse = model(ids).logits
    assert not torch.allclose(sparse, dense)
    sparse.sum().backward()
    assert all(p.weight.grad is None and not p.weight.requires_grad for p in model.sparsity_parameters)
    assert model.layers[0].attention.query.weight.grad.abs().sum() > 0


def test_bad_settings_are_refused_at_the_border():
    with pytest.raises(InputError, match="3 heads don't divide a width of 16"):
        small(heads=3)
    with pytest.raises(InputError, match="attention: wanted one of"):
        small(attention="linear")
    with pytest.raises(InputError, match="window: 64 leaves none of 33 positions out"):
        small(attention="longformer", length=33)
    with pytest.raises(InputError, match="BigBird with 3 random blocks wants more than 11 blocks of 16"):
        small(attention="bigbird")
    with pytest.raises(InputError, match="factor: wanted a divisor of the block 16; got 3"):
        small(attention="lsg", sparsity_factor=3)
    with pytest.raises(InputError, match="dilation: wanted a whole number, 1 or more; got '12'"):
        small(attention="longformer", window=4, dilation="12")
    with pytest.raises(InputError, match="dilation: wanted one number, or one for each of 2 layers"):
        small(attention="longformer", dilation=(1, 2, 3))
    for attention in ("dense", "sat"):
        with pytest.raises(InputError, match=f"implementation: wanted one of .* got 'library' for '{attention}'"):
            small(attention=attention, implementation="library")
    with pytest.raises(InputError, match="statistics: there are those of dense and sat models; this one is 'lsg'"):
        model = Encoder(small(attention="lsg", block=8))
        model(tokens(model.config), statistics=True)
    with pytest.raises(InputError, match="length: wanted at least 1"):
        small(length=0)
    with pytest.raises(InputError, match="block: wanted at most the length 40"):
        small(block=64)
    with pytest.raises(InputError, match="sparsity_width"):
        small(sparsity_width="both")
    with pytest.raises(InputError, match="no task 'mnist'"):
        model_config("mnist")
    model = Encoder(small())
    with pytest.raises(InputError, match=r"tokens: wanted \(B, 40\) int64; got \(2, 39\)"):
        model(torch.ones(2, 39, dtype=torch.int64))
    with pytest.raises(InputError, match="layouts: wanted 2, one per layer; got 1"):
        model.enter_sparse_phase([random_layout(3, 3, 0.5, 16, seed=0)])
    with pytest.raises(InputError, match="want a grid of 3 x 3"):
        model.enter_sparse_phase([random_layout(4, 4, 0.5, 16, seed=0)] * 2)
    with pytest.raises(InputError, match="only a 'sat' model has a sparse phase"):
        Encoder(small(attention="dense")).enter_sparse_phase([])
