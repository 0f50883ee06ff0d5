"""Block-sparse attention as PyTorch operators: compiled CUDA kernels on a GPU, PyTorch's own operations on a CPU.

The functions below have the signatures of `reference` and `statistics` and check their arguments; behind them stand the
operators `torch.ops.sat_lib.*` with fake kernels, autograd and autocast, so they work under
torch.compile(fullgraph=True) and in CUDA graphs. A layout reaches an operator as one list of its five int32 lists. The
CUDA kernels (sat_lib/csrc) take

    float32 (TF32 products where torch.backends.cuda.matmul.fp32_precision is "tf32"), bfloat16, float16;
    D a multiple of 16, 16 to 128; blocks of 16, 32, 64 or 128; at most 65,536 positions; any strides (a tensor whose
    last axis isn't contiguous, or whose rows aren't at multiples of 16 bytes, is copied first);
    GPUs of compute capability 8.0 or later.

On a CPU any floating dtype, D, block and length will do. Nothing falls back: what the kernels can't take raises
InputError. SAT_LIB_IMPLEMENTATION=reference in the environment, at import, replaces all of this by `reference`.
"""

import math
import os

import torch
from torch import Tensor

from ..common.errors import require
from . import build, reference, statistics
from .layout import BlockLayout
from .reference import check_attention_inputs, check_layout, check_rules, outside_window
from .registration import gradient, library, operator
from .statistics import AttentionStatistics

IMPLEMENTATIONS = ("kernels", "reference")
IMPLEMENTATION = os.environ.get("SAT_LIB_IMPLEMENTATION", "kernels")
require(
    IMPLEMENTATION in IMPLEMENTATIONS,
    f"SAT_LIB_IMPLEMENTATION: wanted one of {IMPLEMENTATIONS}; got {IMPLEMENTATION!r}",
)


def _lists(layout: BlockLayout) -> list[Tensor]:
    """A layout as the operators take it. csrc/bindings.cpp knows the order too."""
    return [layout.row_offsets, layout.row_columns, layout.column_offsets, layout.column_rows, layout.column_to_row]


def _index(layout: list[Tensor], block: int, heads: int, keys: int) -> reference.Index:
    row_offsets, row_columns, column_offsets, *_ = layout
    patterns = (len(column_offsets) - 1) // -(-keys // block)
    return reference.index_of(row_offsets, row_columns, block, (len(row_offsets) - 1) // patterns, heads, keys)


def _check_scale(scale: float | None, size: int) -> float:
    require(scale is None or scale > 0, f"scale: wanted more than 0; got {scale}")
    return 1 / math.sqrt(size) if scale is None else scale


def _check_values(values: Tensor, layout: BlockLayout, heads: int) -> None:
    blocks = layout.kept_blocks * (heads if layout.heads is None else 1)
    wanted = (blocks, layout.block, layout.block)
    require(
        values.dim() == 4 and values.shape[1:] == wanted and values.device == layout.device,
        f"values: wanted (B, {', '.join(map(str, wanted))}) on {layout.device}; got {tuple(values.shape)} on "
        f"{values.device}",
    )
    build.check_values(values, layout.block)


# ---- attention -------------------------------------------------------------------------------------------------------


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    key_padding_mask: Tensor | None = None,
    pruned: str = "zero",
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """SAT's sparse attention in one kernel forward and one backward, without writing the scores.

    Arguments, result and rules are those of `reference.block_sparse_attention`; q, k and v may be views. The result has
    q's order of axes in memory. The backward pass uses no atomics: the same input gives the same bits.

    Raises:
        InputError: arguments don't fit together, or the kernels can't take them (see the module's text).
    """
    if IMPLEMENTATION == "reference":
        return reference.block_sparse_attention(
            q, k, v, layout, key_padding_mask=key_padding_mask, pruned=pruned, scale=scale, window=window
        )
    check_attention_inputs(q, k, v, key_padding_mask)
    check_rules(pruned, window)
    check_layout(q, layout, k.shape[2])
    build.check_operand(q, k.shape[2], layout.block)
    scale = _check_scale(scale, q.shape[-1])
    if window is not None and window >= max(q.shape[2], k.shape[2]):
        window = None  # leaves nothing out
    rules = scale, pruned == "zero", window
    return torch.ops.sat_lib.attention(q, k, v, _lists(layout), key_padding_mask, layout.block, *rules)[0]


@operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] layout, Tensor? mask, int block, float scale, bool pruned_weigh, "
    "int? window) -> (Tensor, Tensor)",
    autocast=3,
    tf32=True,
)
def _attention(q, k, v, layout, mask, block, scale, pruned_weigh, window):
    (_, heads, queries, _), keys = q.shape, k.shape[2]
    index = _index(layout, block, heads, keys)
    scores, outside = reference.indexed_sddmm(q, k, index, scale), outside_window(index, queries, window)
    weights, lse = reference.indexed_softmax(scores, index, heads, keys, mask, pruned_weigh, outside)
    out = torch.empty_like(q).copy_(reference.indexed_spmm(weights, v, index, queries))
    return out, lse.reshape(len(q), heads, -1)[:, :, :queries].contiguous()


@torch.library.register_fake("sat_lib::attention", lib=library)
def _(q, k, v, layout, mask, block, scale, pruned_weigh, window):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@operator(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] layout, "
    "Tensor? mask, int block, float scale, int? window) -> (Tensor, Tensor, Tensor)",
    tf32=True,
)
def _attention_backward(grad, q, k, v, out, lse, layout, mask, block, scale, window):
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    index = _index(layout, block, heads, keys)
    wide = torch.promote_types(q.dtype, torch.float32)
    padding = (0, -queries % block)
    bases = torch.nn.functional.pad(lse.to(wide), padding, value=torch.inf).reshape(batch, -1, block)
    scores, outside = reference.indexed_sddmm(q, k, index, scale, mask).to(wide), outside_window(index, queries, window)
    if outside is not None:
        scores = scores.masked_fill(outside, -torch.inf)
    weights = (scores - bases.index_select(1, index.rows)[..., None]).exp()
    delta = torch.nn.functional.pad((grad.to(wide) * out.to(wide)).sum(-1), padding).reshape(batch, -1, block)
    grad_weights = reference.indexed_sddmm(grad, v, index, 1.0).to(wide)
    grad_scores = weights * (grad_weights - delta.index_select(1, index.rows)[..., None]) * scale
    weights, grad_scores = weights.to(q.dtype), grad_scores.to(q.dtype)
    results = (
        reference.indexed_spmm(grad_scores, k, index, queries),
        reference.indexed_spmm_transposed(grad_scores, q, index, keys),
        reference.indexed_spmm_transposed(weights, grad, index, keys),
    )
    return tuple(torch.empty_like(x).copy_(result) for x, result in zip((q, k, v), results, strict=True))


@torch.library.register_fake("sat_lib::attention_backward", lib=library)
def _(grad, q, k, v, *others):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_attention(ctx, inputs, output):
    q, k, v, layout, mask, block, scale, _, window = inputs
    ctx.save_for_backward(q, k, v, *output, mask, *layout)
    ctx.mark_non_differentiable(output[1])
    ctx.settings = block, scale, window


@gradient("attention", _save_attention)
def _differentiate_attention(ctx, grad, _):
    q, k, v, out, lse, mask, *layout = ctx.saved_tensors
    grads = torch.ops.sat_lib.attention_backward(grad, q, k, v, out, lse, layout, mask, *ctx.settings)
    return *grads, None, None, None, None, None, None


# ---- raw scores of the kept blocks -----------------------------------------------------------------------------------


def sddmm(
    q: Tensor, k: Tensor, layout: BlockLayout, scale: float | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    """Raw scores `S^r` of the kept blocks; see `reference.sddmm`. Gradients go to q and k.

    Raises:
        InputError: as for `block_sparse_attention`.
    """
    if IMPLEMENTATION == "reference":
        return reference.sddmm(q, k, layout, scale, key_padding_mask)
    check_attention_inputs(q, k, k, key_padding_mask)
    check_layout(q, layout, k.shape[2])
    build.check_operand(q, k.shape[2], layout.block)
    scale = _check_scale(scale, q.shape[-1])
    return torch.ops.sat_lib.sddmm(q, k, _lists(layout), key_padding_mask, layout.block, scale)


@operator(
    "sddmm(Tensor q, Tensor k, Tensor[] layout, Tensor? mask, int block, float scale) -> Tensor", autocast=2, tf32=True
)
def _sddmm(q, k, layout, mask, block, scale):
    return reference.indexed_sddmm(q, k, _index(layout, block, q.shape[1], k.shape[2]), scale, mask)


@torch.library.register_fake("sat_lib::sddmm", lib=library)
def _(q, k, layout, mask, block, scale):
    _, row_columns, column_offsets, *_ = layout
    shared = len(column_offsets) - 1 == -(-k.shape[2] // block)
    return q.new_empty(q.shape[0], len(row_columns) * (q.shape[1] if shared else 1), block, block)


def _save_sddmm(ctx, inputs, output):
    q, k, layout, mask, *ctx.settings = inputs
    ctx.save_for_backward(q, k, mask, *layout)


@gradient("sddmm", _save_sddmm)
def _differentiate_sddmm(ctx, grad):
    q, k, mask, *layout = ctx.saved_tensors
    block, scale = ctx.settings
    grad_q = grad_k = None
    if ctx.needs_input_grad[0]:
        grad_q = torch.ops.sat_lib.spmm(grad, k, layout, mask, block, q.shape[2], scale)
    if ctx.needs_input_grad[1]:
        grad_k = torch.ops.sat_lib.spmm_transposed(grad, q, layout, mask, block, k.shape[2], scale)
    return grad_q, grad_k, None, None, None, None


# ---- sparse softmax --------------------------------------------------------------------------------------------------


def sparse_softmax(
    scores: Tensor,
    layout: BlockLayout,
    heads: int,
    keys: int,
    key_padding_mask: Tensor | None = None,
    pruned: str = "zero",
) -> Tensor:
    """Sparse attention map `S^s` of raw scores; see `reference.sparse_softmax`.

    Raises:
        InputError: shapes or the rule don't fit.
    """
    if IMPLEMENTATION == "reference":
        return reference.sparse_softmax(scores, layout, heads, keys, key_padding_mask, pruned)
    check_rules(pruned, None)
    _check_values(scores, layout, heads)
    layout.check(heads, layout.rows * layout.block, keys)
    call = torch.ops.sat_lib.sparse_softmax
    return call(scores, _lists(layout), key_padding_mask, layout.block, heads, keys, pruned == "zero")


@operator(
    "sparse_softmax(Tensor scores, Tensor[] layout, Tensor? mask, int block, int heads, int keys, bool pruned_weigh) "
    "-> Tensor"
)
def _sparse_softmax(scores, layout, mask, block, heads, keys, pruned_weigh):
    return reference.indexed_softmax(scores, _index(layout, block, heads, keys), heads, keys, mask, pruned_weigh)[0]


@operator(
    "sparse_softmax_backward(Tensor grad, Tensor weights, Tensor[] layout, int block, int heads, int keys) -> Tensor"
)
def _sparse_softmax_backward(grad, weights, layout, block, heads, keys):
    index = _index(layout, block, heads, keys)
    wide = torch.promote_types(grad.dtype, torch.float32)
    products = weights.to(wide) * grad
    totals = products.new_zeros(len(grad), heads * index.block_rows, block).index_add(1, index.rows, products.sum(-1))
    return (products - weights * totals.index_select(1, index.rows)[..., None]).to(grad.dtype)


@torch.library.register_fake("sat_lib::sparse_softmax", lib=library)
@torch.library.register_fake("sat_lib::sparse_softmax_backward", lib=library)
def _(values, *others):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _save_softmax(ctx, inputs, output):
    _, layout, _, *ctx.settings, _ = inputs
    ctx.save_for_backward(output, *layout)


@gradient("sparse_softmax", _save_softmax)
def _differentiate_softmax(ctx, grad):
    weights, *layout = ctx.saved_tensors
    grad = torch.ops.sat_lib.sparse_softmax_backward(grad, weights, layout, *ctx.settings)
    return grad, None, None, None, None, None, None


# ---- attention map times values, and its transpose -------------------------------------------------------------------


def spmm(weights: Tensor, v: Tensor, layout: BlockLayout, queries: int) -> Tensor:
    """`S^s` V; see `reference.spmm`. Gradients go to the weights and to v.

    Raises:
        InputError: shapes or dtypes don't fit, or the kernels can't take them.
    """
    if IMPLEMENTATION == "reference":
        return reference.spmm(weights, v, layout, queries)
    check_attention_inputs(v, v, v, None)
    _check_values(weights, layout, v.shape[1])
    require(weights.dtype == v.dtype, f"weights, v: wanted one dtype; got {weights.dtype} and {v.dtype}")
    layout.check(v.shape[1], queries, v.shape[2])
    build.check_operand(v, queries, layout.block)
    return torch.ops.sat_lib.spmm(weights, v, _lists(layout), None, layout.block, queries, 1.0)


@operator(
    "spmm(Tensor values, Tensor x, Tensor[] layout, Tensor? mask, int block, int queries, float scale) -> Tensor",
    autocast=2,
    tf32=True,
)
def _spmm(values, x, layout, mask, block, queries, scale):
    real = x if mask is None else x * mask[:, None, :, None]
    out = reference.indexed_spmm(values, real, _index(layout, block, *x.shape[1:3]), queries)
    return (out * scale).contiguous()


@operator(
    "spmm_transposed(Tensor values, Tensor x, Tensor[] layout, Tensor? mask, int block, int keys, float scale) "
    "-> Tensor",
    tf32=True,
)
def _spmm_transposed(values, x, layout, mask, block, keys, scale):
    out = reference.indexed_spmm_transposed(values, x, _index(layout, block, x.shape[1], keys), keys) * scale
    return (out if mask is None else out * mask[:, None, :, None]).contiguous()


@torch.library.register_fake("sat_lib::spmm", lib=library)
@torch.library.register_fake("sat_lib::spmm_transposed", lib=library)
def _(values, x, layout, mask, block, length, scale):
    return x.new_empty(x.shape[0], x.shape[1], length, x.shape[3])


def _save_spmm(ctx, inputs, output):
    values, x, layout, mask, block, _, scale = inputs
    require(mask is None, "spmm: has no gradient where a key mask is given")
    ctx.save_for_backward(values, x, *layout)
    ctx.settings = block, scale


@gradient("spmm", _save_spmm)
def _differentiate_spmm(ctx, grad):
    values, x, *layout = ctx.saved_tensors
    block, scale = ctx.settings
    grad_values = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_values = torch.ops.sat_lib.sddmm(grad, x, layout, None, block, scale)
    if ctx.needs_input_grad[1]:
        grad_x = torch.ops.sat_lib.spmm_transposed(values, grad, layout, None, block, x.shape[2], scale)
    return grad_values, grad_x, None, None, None, None, None


# ---- statistics of the dense phase -----------------------------------------------------------------------------------


def attention_statistics(
    q: Tensor, k: Tensor, block: int, *, key_padding_mask: Tensor | None = None, scale: float | None = None
) -> AttentionStatistics:
    """Batch-and-head mean of the dense map `A^s` and its block means; see `statistics.attention_statistics`.

    No gradient. On a GPU the map is recomputed from q and k piece by piece and added up in registers; beside the
    results it needs (Lq, Lk) floats for each of a few shares of the heads.

    Raises:
        InputError: as for `block_sparse_attention`.
    """
    if IMPLEMENTATION == "reference":
        return statistics.attention_statistics(q, k, block, key_padding_mask=key_padding_mask, scale=scale)
    check_attention_inputs(q, k, k, key_padding_mask)
    build.check_operand(q, k.shape[2], block)
    scale = _check_scale(scale, q.shape[-1])
    call = torch.ops.sat_lib.attention_statistics
    return AttentionStatistics(*call(q.detach(), k.detach(), key_padding_mask, block, scale))


@operator(
    "attention_statistics(Tensor q, Tensor k, Tensor? mask, int block, float scale) -> (Tensor, Tensor)",
    autocast=2,
    tf32=True,
)
def _attention_statistics(q, k, mask, block, scale):
    return tuple(statistics.attention_statistics(q, k, block, key_padding_mask=mask, scale=scale))


@torch.library.register_fake("sat_lib::attention_statistics", lib=library)
def _(q, k, mask, block, scale):
    dtype = torch.promote_types(q.dtype, torch.float32)
    (queries, keys), blocks = (q.shape[2], k.shape[2]), (-(-q.shape[2] // block), -(-k.shape[2] // block))
    return q.new_empty(queries, keys, dtype=dtype), q.new_empty(blocks, dtype=dtype)
