"""Block-sparse attention against a dense one that spells the definition out entry by entry, in float64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from attention_cases import LAYOUTS, definition, inputs, layouts, padding_mask, with_gradients

from sat_lib.attention.layout import BlockLayout
from sat_lib.attention.reference import block_sparse_attention, sddmm, sparse_softmax, spmm
from sat_lib.common.errors import InputError


@pytest.mark.parametrize("pruned", ["zero", "drop"])
@pytest.mark.parametrize("mask", ["none", "ragged", "block"])
@pytest.mark.parametrize("shape", [(64, 64, 16), (50, 50, 16), (33, 70, 32)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_output_and_gradients_equal_the_definition(name, shape, mask, pruned, device):
    queries, keys, block = shape
    layout = layouts(-(-queries // block), -(-keys // block), block, 2)[name].to(device)
    q, k, v = inputs(queries, keys, device)
    mask = padding_mask(mask, 3, keys, block)
    mask = None if mask is None else mask.to(device)
    weight = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(9)).to(device)

    got = block_sparse_attention(q, k, v, layout, key_padding_mask=mask, pruned=pruned)
    gradients = torch.autograd.grad((got * weight).sum(), (q, k, v), allow_unused=True)
    want, _ = definition(q, k, v, layout, mask, pruned)
    wanted = torch.autograd.grad((want * weight).sum(), (q, k, v))

    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for gradient, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pruned", ["zero", "drop"])
def test_error_in_lower_precision_is_at_most_twice_that_of_dense_pytorch(dtype, pruned, device):
    layout = layouts(4, 4, 16, 2)["everything"].to(device)
    exact = inputs(64, 64, device, size=32)
    rounded = [x.detach().to(dtype).requires_grad_() for x in exact]
    want, wanted = with_gradients(F.scaled_dot_product_attention, exact)
    peer, peers = with_gradients(F.scaled_dot_product_attention, rounded)
    got, gradients = with_gradients(partial(block_sparse_attention, layout=layout, pruned=pruned), rounded)
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert (got - want).norm() <= 2 * (peer - want).norm() + torch.finfo(dtype).eps
    for gradient, theirs, exact_gradient in zip(gradients, peers, wanted, strict=True):
        assert gradient.isfinite().all()
        assert (gradient - exact_gradient).norm() <= 3 * (theirs - exact_gradient).norm() + torch.finfo(dtype).eps


@pytest.mark.parametrize("pruned", ["zero", "drop"])
def test_large_scores_stay_finite_and_right(pruned):
    layout = layouts(4, 4, 16, 2)["random"]
    q, k, v = inputs(64, 64, scale=30.0)
    got = block_sparse_attention(q, k, v, layout, pruned=pruned)
    shifted = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~layout.entries(64), -torch.inf)
    if pruned == "zero":
        shifted = torch.where(layout.entries(64), shifted, 0.0)  # pruned entries: raw score 0 ...
    weights = shifted.softmax(-1).nan_to_num(0.0) * layout.entries(64)  # ... and value 0
    torch.testing.assert_close(got, weights @ v, rtol=1e-9, atol=1e-11)
    got.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_zero_rule_is_a_softmax_with_one_null_logit():
    layout = layouts(4, 4, 16, 2)["random"]
    q, k, v = inputs(64, 64)
    kept = layout.entries(64)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~kept, -torch.inf)
    null = (64 - kept.sum(-1)).double().log()[None, None, :, None].expand(3, 2, -1, 1)
    weights = torch.cat([scores, null], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout), weights @ v, rtol=1e-10, atol=1e-12)


def test_kept_padding_keys_count_as_kept_and_pruned_ones_as_pruned():
    layout = BlockLayout(torch.tensor([[True, False], [True, False]]), 4)
    q, k, v = inputs(8, 8, batch=1)
    mask = torch.tensor([[True, True, False, False, True, True, True, False]])
    raw = (q @ k.transpose(-1, -2) / math.sqrt(8)).exp()[..., :2]
    expected = (raw / (raw.sum(-1, keepdim=True) + 4)) @ v[:, :, :2]  # 2 real kept keys, 4 pruned, 1 of them padding
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout, key_padding_mask=mask), expected)


def test_the_three_operations_equal_their_dense_counterparts():
    layout = layouts(4, 4, 16, 2)["per head"]
    q, k, v = inputs(50, 50)
    kept = layout.entries(50)
    scores = sddmm(q, k, layout, scale=1.0)
    weights = sparse_softmax(scores, layout, heads=2, keys=50, pruned="drop")
    assert scores.shape == weights.shape == (3, layout.kept_blocks, 16, 16)
    dense = q @ k.transpose(-1, -2)
    head, row, column = (x.tolist() for x in layout.grid.nonzero().unbind(1))
    for place, (h, r, c) in enumerate(zip(head, row, column, strict=True)):
        block = dense[:, h, r * 16 : (r + 1) * 16, c * 16 : (c + 1) * 16]
        torch.testing.assert_close(scores[:, place, : block.shape[1], : block.shape[2]], block)
    out = spmm(weights, v, layout, queries=50)
    expected = dense.masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num(0.0) @ v
    torch.testing.assert_close(out, expected)


def test_non_contiguous_inputs_and_stride_zero_gradients():
    layout = layouts(4, 4, 16, 2)["random"]
    packed = torch.randn(3, 64, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    assert not q.is_contiguous()
    out = block_sparse_attention(q, k, v, layout)
    torch.testing.assert_close(out, definition(q, k, v, layout)[0])
    out.sum().backward()  # the gradient of a sum is expanded: all strides 0
    assert packed.grad.isfinite().all()


def test_no_tensor_of_the_full_map_is_made():
    """At 1.6 % density the largest allocation stays far below one head's L x L map."""
    length, block = 2048, 32
    layout = BlockLayout(torch.eye(length // block).bool(), block)
    q, k, v = inputs(length, length, dtype=torch.float32, batch=1, heads=1)
    with torch.profiler.profile(profile_memory=True) as profile:
        block_sparse_attention(q, k, v, layout).sum().backward()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert 0 < max(sizes) < length * length * 4 / 8


def test_autocast_leaves_the_input_dtype():
    layout = layouts(4, 4, 16, 2)["random"]
    q, k, v = inputs(64, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(q, k, v, layout)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_bad_input_is_named():
    layout = layouts(4, 4, 16, 2)["random"]
    q, k, v = inputs(64, 64)
    with pytest.raises(InputError, match="q, k, v: wanted"):
        block_sparse_attention(q[0], k, v, layout)
    with pytest.raises(InputError, match="one floating dtype"):
        block_sparse_attention(q, k.float(), v, layout)
    with pytest.raises(InputError, match="key_padding_mask: wanted bool"):
        block_sparse_attention(q, k, v, layout, key_padding_mask=torch.ones(3, 64))
    with pytest.raises(InputError, match="pruned: wanted one of"):
        block_sparse_attention(q, k, v, layout, pruned="keep")
    with pytest.raises(InputError, match="want a grid of 4 x 4"):
        block_sparse_attention(q, k, v, BlockLayout.full(2, 2, 16))
