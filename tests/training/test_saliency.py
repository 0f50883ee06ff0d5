import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from sat_lib.attention.static_patterns import window_layout
from sat_lib.attention.statistics import block_correlation
from sat_lib.common.errors import InputError
from sat_lib.model.encoder import Encoder, ModelConfig
from sat_lib.training import saliency

LENGTH, BLOCK, EXAMPLES = 52, 8, 5  # seven blocks a side, the last of four positions


def small_model(masked=False, attention="sat") -> Encoder:
    torch.manual_seed(0)
    sizes = {"length": LENGTH, "width": 8, "heads": 2, "hidden": 8, "block": BLOCK, "dropout": 0.3}
    model = Encoder(ModelConfig(20, 3, 2, attention=attention, masked_attention=masked, **sizes)).double()
    for layer in model.layers:  # maps that aren't even
        for linear in (layer.attention.query, layer.attention.key):
            torch.nn.init.normal_(linear.weight)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 20, (EXAMPLES, LENGTH), generator=generator)
    tokens[1, 20:] = 0
    tokens[3, 47:] = 0
    return tokens, torch.randint(0, 3, (EXAMPLES,), generator=generator)


def with_gates(model, tokens, factors=None, bias=None) -> torch.Tensor:
    """Logits with every block of A^s multiplied by `factors`, and `bias` added to raw scores: (layers, H, N, N)."""
    spread = lambda x: x.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)[:, :LENGTH, :LENGTH]

    def gated(layer):
        def attend(q, k, v, *, key_padding_mask=None, **_):
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            scores = scores if bias is None else scores + spread(bias[layer])
            if key_padding_mask is not None:
                scores = scores.masked_fill(~key_padding_mask[:, None, None], -torch.inf)
            attention = scores.softmax(-1)
            return (attention if factors is None else attention * spread(factors[layer])) @ v

        return attend

    model.eval()
    for layer, part in enumerate(model.layers):
        part.attention.attend = gated(layer)
    return model(tokens).logits


@pytest.mark.parametrize("masked", [False, True])
def test_taylor_and_gradient_are_derivatives_of_the_loss_by_gates(batch, masked):
    tokens, labels = batch
    gates = torch.ones(2, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(with_gates(small_model(masked), tokens, factors=gates), labels)
    (wanted,) = torch.autograd.grad(loss, gates)
    got = saliency.block_saliency(small_model(masked).float(), "taylor", tokens, labels)
    torch.testing.assert_close(got.double(), -wanted, rtol=1e-3, atol=1e-6)

    bias = torch.zeros(2, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(with_gates(small_model(masked), tokens, bias=bias), labels)
    (wanted,) = torch.autograd.grad(loss, bias)
    got = saliency.block_saliency(small_model(masked).float(), "gradient", tokens, labels)
    torch.testing.assert_close(got.double(), -wanted, rtol=1e-3, atol=1e-6)


def test_fisher_is_the_mean_square_of_each_examples_derivative(batch):
    tokens, labels = batch
    wanted = 0
    for example in range(EXAMPLES):
        bias = torch.zeros(2, 2, 7, 7, dtype=torch.float64, requires_grad=True)
        some = slice(example, example + 1)
        loss = F.cross_entropy(with_gates(small_model(), tokens[some], bias=bias), labels[some])
        wanted = wanted + torch.autograd.grad(loss, bias)[0].square() / EXAMPLES
    got = saliency.block_saliency(small_model().float(), "fisher", tokens, labels)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=1e-9)


def test_criteria_of_the_map(batch):
    tokens, labels = batch
    model = small_model().float()
    mass = saliency.block_saliency(model, "attention", tokens, labels)
    rows = torch.tensor([8.0] * 6 + [4.0])  # each of a block row's queries gives away a mass of 1
    torch.testing.assert_close(mass.sum(-1), rows.expand(2, 2, 7))
    excess = saliency.block_saliency(model, "excess", tokens, labels)
    torch.testing.assert_close(excess, mass - mass.mean(-2, keepdim=True), rtol=1e-4, atol=1e-4)
    same = tokens[:1].expand(4, -1)
    assert saliency.block_saliency(model, "content", same, labels[:4]).max() < 1e-3  # the same map in every example
    assert saliency.block_saliency(model, "content", tokens, labels).max() > 0.01


def test_value_is_the_distance_that_a_block_moves_the_outputs(batch):
    tokens, labels = batch
    model = small_model()
    with torch.no_grad():
        x = model.eval().parts.embed(model, tokens)
        q, k, v = model.layers[0].attention.heads(model.layers[0].norm_attention(x))
        attention = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        out = attention @ v
        keys = slice(8, 16)
        moved = attention[..., keys] @ v[:, :, keys] - attention[..., keys].sum(-1, keepdim=True) * out
        wanted = moved.norm(dim=-1).mean(0)[:, 16:24].sum(1)  # block row 2, block column 1
    got = saliency.block_saliency(model.float(), "value", tokens, labels)
    torch.testing.assert_close(got[0, :, 2, 1].double(), wanted, rtol=1e-4, atol=1e-6)


def test_correlation_is_that_of_the_blocks_mean_values():
    torch.manual_seed(0)
    v = torch.randn(40, 2, LENGTH, 4)
    v[:, :, 8:16] = v[:, :, :8]  # block 1 repeats block 0
    v[:, :, 16:24] = 3.0  # block 2 is always the same
    got = block_correlation(v, BLOCK)
    means = torch.stack([part.mean(2) for part in v.split(BLOCK, 2)], -1).flatten(1, 2).double()  # (B, H d, N)
    covariance = torch.einsum("bfi,bfj->ij", *(means - means.mean(0),) * 2)
    deviation = covariance.diagonal().clamp(min=1e-9).sqrt()
    wanted = covariance / deviation / deviation[:, None]
    real = [0, 1, 3, 4, 5, 6]
    np.testing.assert_allclose(got[real][:, real], wanted[real][:, real], atol=1e-5)
    assert got[0, 1] == pytest.approx(1)
    assert not got[2].any() and not got[:, 2].any()
    assert torch.equal(got, got.T)
    mask = torch.ones(40, LENGTH, dtype=torch.bool)
    mask[:, 24:32] = False  # block 3 is always padding
    assert not block_correlation(v, BLOCK, mask)[3].any()


@pytest.mark.parametrize("name", saliency.CRITERIA)
@pytest.mark.parametrize("masked", [False, True])
def test_every_criterion_of_both_phases_is_finite_and_leaves_the_model_alone(batch, name, masked, monkeypatch):
    monkeypatch.setattr(saliency, "GATE_STEPS", 3)
    monkeypatch.setattr(saliency, "CHUNK_ENTRIES", 2 * LENGTH**2 * 2)  # two examples at a time
    model = small_model(masked).float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dense = saliency.block_saliency(model, name, *batch)
    model.enter_sparse_phase([window_layout(7, 1, BLOCK)] * 2)
    sparse = saliency.block_saliency(model, name, *batch)
    for scores in (dense, sparse):
        assert scores.shape == (2, 2, 7, 7) and scores.dtype == torch.float32 and scores.isfinite().all()
        assert scores.unique().numel() > 7
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_gate_lowers_the_loss(batch):
    tokens, labels = batch
    model = small_model().float()
    gate = saliency.block_saliency(model, "gate", tokens, labels)
    with torch.no_grad():
        before = F.cross_entropy(with_gates(model, tokens), labels)
        assert F.cross_entropy(with_gates(model, tokens, bias=gate), labels) < before - 0.01


def test_unknown_criteria_and_models_are_refused(batch):
    with pytest.raises(InputError, match="criterion: wanted one of"):
        saliency.block_saliency(small_model(), "importance", *batch)
    with pytest.raises(InputError, match="model: wanted attention 'dense' or 'sat'; got 'longformer'"):
        saliency.block_saliency(Encoder(tiny_config("longformer").model), "taylor", *batch)
