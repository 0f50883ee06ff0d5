"""Block-sparse attention as PyTorch operators: compiled CUDA kernels on a GPU, PyTorch's own operations on a CPU.

The functions below have the signatures of `reference` and check their arguments; behind them stand the operators
`torch.ops.sat_lib.*` with fake kernels, autograd and autocast, so they work under torch.compile(fullgraph=True) and in
CUDA graphs. A layout reaches an operator as its five int32 lists. The CUDA kernels (sat_lib/csrc) take

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
from . import build, reference
from .layout import BlockLayout
from .reference import (
    AttentionStatistics,
    cast_as_autocast,
    check_attention_inputs,
    check_layout,
    check_rules,
    outside_window,
)

IMPLEMENTATIONS = ("kernels", "reference")
IMPLEMENTATION = os.environ.get("SAT_LIB_IMPLEMENTATION", "kernels")
require(
    IMPLEMENTATION in IMPLEMENTATIONS,
    f"SAT_LIB_IMPLEMENTATION: wanted one of {IMPLEMENTATIONS}; got {IMPLEMENTATION!r}",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (16, 32, 64, 128)
LONGEST = 65_536
GRID = 65_536  # thread blocks along the grid's second and third axis


# ---- public functions ------------------------------------------------------------------------------------------------


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
    _check_kernels(q, k.shape[2], layout.block)
    scale = _check_scale(scale, q.shape[-1])
    if window is not None and window >= max(q.shape[2], k.shape[2]):
        window = None  # leaves nothing out
    call = torch.ops.sat_lib.attention
    return call(q, k, v, *_lists(layout), key_padding_mask, layout.block, scale, pruned == "zero", window)[0]


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
    _check_kernels(q, k.shape[2], layout.block)
    scale = _check_scale(scale, q.shape[-1])
    return torch.ops.sat_lib.sddmm(q, k, *_lists(layout), key_padding_mask, layout.block, scale)


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
    return call(scores, *_lists(layout), key_padding_mask, layout.block, heads, keys, pruned == "zero")


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
    _check_kernels(v, queries, layout.block)
    return torch.ops.sat_lib.spmm(weights, v, *_lists(layout), None, layout.block, queries, 1.0)


def attention_statistics(
    q: Tensor, k: Tensor, block: int, *, key_padding_mask: Tensor | None = None, scale: float | None = None
) -> AttentionStatistics:
    """Batch-and-head mean of the dense map `A^s` and its block means; see `reference.attention_statistics`.

    No gradient. On a GPU the map is recomputed from q and k piece by piece and added up in registers; beside the
    results it needs (Lq, Lk) floats for each of a few shares of the heads.

    Raises:
        InputError: as for `block_sparse_attention`.
    """
    if IMPLEMENTATION == "reference":
        return reference.attention_statistics(q, k, block, key_padding_mask=key_padding_mask, scale=scale)
    check_attention_inputs(q, k, k, key_padding_mask)
    _check_kernels(q, k.shape[2], block)
    scale = _check_scale(scale, q.shape[-1])
    call = torch.ops.sat_lib.attention_statistics
    return AttentionStatistics(*call(q.detach(), k.detach(), key_padding_mask, block, scale))


def _lists(layout: BlockLayout) -> tuple[Tensor, ...]:
    return tuple(getattr(layout, name) for name in _LISTS)


def _check_values(values: Tensor, layout: BlockLayout, heads: int) -> None:
    blocks = layout.kept_blocks * (heads if layout.heads is None else 1)
    wanted = (blocks, layout.block, layout.block)
    require(
        values.dim() == 4 and values.shape[1:] == wanted and values.device == layout.device,
        f"values: wanted (B, {', '.join(map(str, wanted))}) on {layout.device}; got {tuple(values.shape)} on "
        f"{values.device}",
    )
    if values.device.type == "cuda":
        _check_format(values, layout.block)
        require(len(values) < GRID, f"batch: the kernels take fewer than {GRID}; got {len(values)}")


def _check_format(x: Tensor, block: int) -> None:
    require(x.dtype in DTYPES, f"dtype: the kernels take {DTYPES}; got {x.dtype}. Convert it with .to(...)")
    require(block in BLOCKS, f"block: the kernels take {BLOCKS}; got {block}. {build.WAY_OUT}")


def _check_scale(scale: float | None, size: int) -> float:
    require(scale is None or scale > 0, f"scale: wanted more than 0; got {scale}")
    return 1 / math.sqrt(size) if scale is None else scale


def _check_kernels(x: Tensor, length: int, block: int) -> None:
    """Raise InputError if x is on a GPU and the kernels can't take it; `length` is that of the other operand."""
    if x.device.type != "cuda":
        return
    require(max(x.shape[:2]) < GRID, f"batch, heads: the kernels take fewer than {GRID} each; got {tuple(x.shape[:2])}")
    size, longest = x.shape[-1], max(x.shape[-2], length)
    _check_format(x, block)
    require(
        size % 16 == 0 and 16 <= size <= 128,
        f"head size: the kernels take multiples of 16 up to 128; got {size}. Choose another number of heads",
    )
    require(longest <= LONGEST, f"length: the kernels take at most {LONGEST} positions; got {longest}")


# ---- operators -------------------------------------------------------------------------------------------------------

_library = torch.library.Library("sat_lib", "DEF")
_LISTS = ("row_offsets", "row_columns", "column_offsets", "column_rows", "column_to_row")
_SCHEMAS = {
    "attention": "(Tensor q, Tensor k, Tensor v, {lists}, Tensor? mask, int block, float scale, "
    "bool pruned_weigh, int? window) -> (Tensor, Tensor)",
    "attention_backward": "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {lists}, "
    "Tensor? mask, int block, float scale, int? window) -> (Tensor, Tensor, Tensor)",
    "sddmm": "(Tensor q, Tensor k, {lists}, Tensor? mask, int block, float scale) -> Tensor",
    "spmm": "(Tensor values, Tensor x, {lists}, Tensor? mask, int block, int queries, float scale) -> Tensor",
    "spmm_transposed": "(Tensor values, Tensor x, {lists}, Tensor? mask, int block, int keys, float scale) "
    "-> Tensor",
    "sparse_softmax": "(Tensor scores, {lists}, Tensor? mask, int block, int heads, int keys, "
    "bool pruned_weigh) -> Tensor",
    "sparse_softmax_backward": "(Tensor grad, Tensor weights, {lists}, int block, int heads, int keys) "
    "-> Tensor",
    "attention_statistics": "(Tensor q, Tensor k, Tensor? mask, int block, float scale) -> (Tensor, Tensor)",
}
_SCHEMAS = {
    name: schema.format(lists=", ".join(f"Tensor {name}" for name in _LISTS)) for name, schema in _SCHEMAS.items()
}
_OPERANDS = {"attention": 3, "attention_backward": 6, "sddmm": 2, "spmm": 2, "spmm_transposed": 2}  # before the lists
_OPERANDS |= {"sparse_softmax": 1, "sparse_softmax_backward": 2}
_WITHOUT_PRODUCTS = ("sparse_softmax", "sparse_softmax_backward")
_INPUTS = {"attention": 3, "sddmm": 2, "spmm": 2, "attention_statistics": 2}  # leading arguments that autocast casts


def _on_cuda(name: str):
    """The compiled function, built and loaded at its first call."""

    def call(*arguments):
        function = getattr(build.load(), name)
        if name in _WITHOUT_PRODUCTS:
            return function(*arguments)
        return function(*arguments, torch.backends.cuda.matmul.fp32_precision == "tf32")

    return call


def _grouped(name: str, function):
    """`function`, which takes the five lists as one argument, as it is called by PyTorch."""
    if name not in _OPERANDS:
        return function
    start = _OPERANDS[name]
    end = start + len(_LISTS)
    return lambda *arguments: function(*arguments[:start], arguments[start:end], *arguments[end:])


def _autocast(name: str, device: str):
    """Cast the operands to autocast's dtype, as it does for PyTorch's own attention."""
    operator = getattr(torch.ops.sat_lib, name)
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def call(*arguments):
        count = _INPUTS[name]
        cast = cast_as_autocast(*arguments[:count])
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operator(*cast, *arguments[count:])

    return call


# On a CPU: explicit formulas in PyTorch's operations, from the same lists.


def _index(lists, block, heads, keys):
    patterns = (len(lists[2]) - 1) // -(-keys // block)
    return reference.index_of(lists[0], lists[1], block, (len(lists[0]) - 1) // patterns, heads, keys)


def _attention(q, k, v, lists, mask, block, scale, pruned_weigh, window):
    (_, heads, queries, _), keys = q.shape, k.shape[2]
    index = _index(lists, block, heads, keys)
    scores, outside = reference.indexed_sddmm(q, k, index, scale), outside_window(index, queries, window)
    weights, lse = reference.indexed_softmax(scores, index, heads, keys, mask, pruned_weigh, outside)
    out = torch.empty_like(q).copy_(reference.indexed_spmm(weights, v, index, queries))
    return out, lse.reshape(len(q), heads, -1)[:, :, :queries].contiguous()


def _attention_backward(grad, q, k, v, out, lse, lists, mask, block, scale, window):
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    index = _index(lists, block, heads, keys)
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


def _sddmm(q, k, lists, mask, block, scale):
    return reference.indexed_sddmm(q, k, _index(lists, block, q.shape[1], k.shape[2]), scale, mask)


def _spmm(values, x, lists, mask, block, queries, scale):
    real = x if mask is None else x * mask[:, None, :, None]
    out = reference.indexed_spmm(values, real, _index(lists, block, *x.shape[1:3]), queries)
    return (out * scale).contiguous()


def _spmm_transposed(values, x, lists, mask, block, keys, scale):
    out = reference.indexed_spmm_transposed(values, x, _index(lists, block, x.shape[1], keys), keys) * scale
    return (out if mask is None else out * mask[:, None, :, None]).contiguous()


def _sparse_softmax(scores, lists, mask, block, heads, keys, pruned_weigh):
    return reference.indexed_softmax(scores, _index(lists, block, heads, keys), heads, keys, mask, pruned_weigh)[0]


def _sparse_softmax_backward(grad, weights, lists, block, heads, keys):
    index = _index(lists, block, heads, keys)
    wide = torch.promote_types(grad.dtype, torch.float32)
    products = weights.to(wide) * grad
    totals = products.new_zeros(len(grad), heads * index.block_rows, block).index_add(1, index.rows, products.sum(-1))
    return (products - weights * totals.index_select(1, index.rows)[..., None]).to(grad.dtype)


def _attention_statistics(q, k, mask, block, scale):
    return tuple(reference.attention_statistics(q, k, block, key_padding_mask=mask, scale=scale))


# Shapes, dtypes and strides alone, for torch.compile.


def _fake_attention(q, k, v, lists, mask, block, scale, pruned_weigh, window):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_attention_backward(grad, q, k, v, out, lse, lists, mask, block, scale, window):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _fake_sddmm(q, k, lists, mask, block, scale):
    columns = -(-k.shape[2] // block)
    shared = len(lists[2]) - 1 == columns
    blocks = lists[1].shape[0] * (q.shape[1] if shared else 1)
    return q.new_empty(q.shape[0], blocks, block, block)


def _fake_spmm(values, x, lists, mask, block, length, scale):
    return x.new_empty(x.shape[0], x.shape[1], length, x.shape[3])


def _fake_softmax(scores, *arguments):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _fake_attention_statistics(q, k, mask, block, scale):
    dtype = torch.promote_types(q.dtype, torch.float32)
    (queries, keys), blocks = (q.shape[2], k.shape[2]), (-(-q.shape[2] // block), -(-k.shape[2] // block))
    return q.new_empty(queries, keys, dtype=dtype), q.new_empty(blocks, dtype=dtype)


_ON_CPU = {
    "attention": (_attention, _fake_attention),
    "attention_backward": (_attention_backward, _fake_attention_backward),
    "sddmm": (_sddmm, _fake_sddmm),
    "spmm": (_spmm, _fake_spmm),
    "spmm_transposed": (_spmm_transposed, _fake_spmm),
    "sparse_softmax": (_sparse_softmax, _fake_softmax),
    "sparse_softmax_backward": (_sparse_softmax_backward, _fake_softmax),
    "attention_statistics": (_attention_statistics, _fake_attention_statistics),
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _on_cpu, _fake = (_grouped(_name, _function) for _function in _ON_CPU[_name])
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_cuda(_name), "CUDA")
    torch.library.register_fake(f"sat_lib::{_name}", _fake, lib=_library)
for _name in _INPUTS:
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _autocast(_name, _device), f"Autocast{_device}")


# ---- gradients -------------------------------------------------------------------------------------------------------


_NO_LISTS = (None,) * len(_LISTS)  # gradients of a layout's lists


def _save_attention(ctx, inputs, output):
    q, k, v, *lists, mask, block, scale, _, window = inputs
    ctx.save_for_backward(q, k, v, *output, *lists, mask)
    ctx.mark_non_differentiable(output[1])
    ctx.settings = block, scale, window


def _differentiate_attention(ctx, grad, _):
    q, k, v, out, lse, *lists, mask = ctx.saved_tensors
    grads = torch.ops.sat_lib.attention_backward(grad, q, k, v, out, lse, *lists, mask, *ctx.settings)
    return *grads, *_NO_LISTS, None, None, None, None, None


def _save_sddmm(ctx, inputs, output):
    q, k, *lists, mask, block, scale = inputs
    ctx.save_for_backward(q, k, *lists, mask)
    ctx.block, ctx.scale = block, scale


def _differentiate_sddmm(ctx, grad):
    q, k, *lists, mask = ctx.saved_tensors
    grad_q = grad_k = None
    if ctx.needs_input_grad[0]:
        grad_q = torch.ops.sat_lib.spmm(grad, k, *lists, mask, ctx.block, q.shape[2], ctx.scale)
    if ctx.needs_input_grad[1]:
        grad_k = torch.ops.sat_lib.spmm_transposed(grad, q, *lists, mask, ctx.block, k.shape[2], ctx.scale)
    return grad_q, grad_k, *_NO_LISTS, None, None, None


def _save_spmm(ctx, inputs, output):
    values, x, *lists, mask, block, _, scale = inputs
    require(mask is None, "spmm: has no gradient where a key mask is given")
    ctx.save_for_backward(values, x, *lists)
    ctx.block, ctx.scale = block, scale


def _differentiate_spmm(ctx, grad):
    values, x, *lists = ctx.saved_tensors
    grad_values = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_values = torch.ops.sat_lib.sddmm(grad, x, *lists, None, ctx.block, ctx.scale)
    if ctx.needs_input_grad[1]:
        grad_x = torch.ops.sat_lib.spmm_transposed(values, grad, *lists, None, ctx.block, x.shape[2], ctx.scale)
    return grad_values, grad_x, *_NO_LISTS, None, None, None, None


def _save_softmax(ctx, inputs, output):
    _, *lists, _, block, heads, keys, _ = inputs
    ctx.save_for_backward(output, *lists)
    ctx.block, ctx.heads, ctx.keys = block, heads, keys


def _differentiate_softmax(ctx, grad):
    weights, *lists = ctx.saved_tensors
    grad = torch.ops.sat_lib.sparse_softmax_backward(grad, weights, *lists, ctx.block, ctx.heads, ctx.keys)
    return grad, *_NO_LISTS, None, None, None, None, None


for _name, _differentiate, _save in (
    ("attention", _differentiate_attention, _save_attention),
    ("sddmm", _differentiate_sddmm, _save_sddmm),
    ("spmm", _differentiate_spmm, _save_spmm),
    ("sparse_softmax", _differentiate_softmax, _save_softmax),
):
    torch.library.register_autograd(f"sat_lib::{_name}", _differentiate, setup_context=_save, lib=_library)
