"""Block-sparse attention the way the published layers compute it: gather blocks, then dense products, in plain PyTorch.

The kept blocks of K and V are copied side by side for every block row, which then meets them in one batched product, a
softmax and a second product. Block rows that keep everything (BigBird's global ones) take dense products without a
copy. Fast where the other block rows keep about equally many blocks: each is filled up to the longest. Nothing is added
up by atomics, so the same input gives the same bits.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import BlockLayout
from .reference import cast_as_autocast, check_attention_inputs, check_layout, check_rules


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """The attention of `reference.block_sparse_attention` under pruned="drop" and the usual scale, 1 / sqrt(D).

    Arguments, result and errors are the same. Under autocast q, k and v are cast, as for PyTorch's own attention. No
    second derivatives.
    """
    check_attention_inputs(q, k, v, key_padding_mask)
    check_rules("drop", window)
    check_layout(q, layout, k.shape[2])
    queries = q.shape[2]
    sizes = queries, k.shape[2], window
    runs, parts = layout.derived((_plan, *sizes), lambda: _plan(layout, *sizes))
    q, k, v = (x.contiguous() for x in cast_as_autocast(q, k, v))  # once, or every product copies
    with torch.autocast(q.device.type, enabled=False):
        pieces = split(q / math.sqrt(q.shape[-1]), layout.block).split([size for size, _ in runs], 2)
        done = {}
        for full, part in parts.items():
            mine = [i for i, run in enumerate(runs) if run[1] == full]
            rows = _cat([pieces[i] for i in mine])
            out = (_attend_full if full else _attend_gathered)(rows, k, v, key_padding_mask, part)
            done |= zip(mine, out.split([runs[i][0] for i in mine], 2), strict=True)
        return _cat([done[i] for i in range(len(runs))]).flatten(2, 3)[:, :, :queries]


class Part(NamedTuple):
    """Block rows that are computed in one go; G = 1 where the heads share the layout, else H."""

    columns: Tensor | None  # (G, rows, S) int64, the blocks that each row keeps; None where they keep all of them
    incidence: Tensor | None  # (G, C, rows * S) bool: which column each of them is
    allowed: Tensor | None  # bool, ending in (rows, b, keys): which keys each query attends to; None for all of them
    complete: bool  # whether every query attends to some key, but for padding


def _plan(layout: BlockLayout, queries: int, keys: int, window: int | None):
    """Runs of block rows that keep everything or don't, [(block rows, whether)], and the `Part` of each kind."""
    kept = layout.grid.reshape(-1, layout.rows, layout.columns)
    full = kept.all(2).all(0)
    runs = [(len(list(same)), whole) for whole, same in itertools.groupby(full.tolist())]
    places = torch.arange(layout.block, device=kept.device)

    def inside(rows: Tensor, key: Tensor) -> Tensor:  # key (..., rows or 1, 1, K)
        query = (rows.nonzero() * layout.block + places)[..., None]  # (rows, b, 1)
        near = True if window is None else ((query - key).abs() <= window) | (key >= queries)
        return (key < keys) & near

    parts = {}
    if full.any():
        allowed = inside(full, torch.arange(keys, device=kept.device))
        parts[True] = _part(None, None, allowed)
    if not full.all():
        some = kept[:, ~full]
        counts = some.sum(2, keepdim=True)
        slots = torch.arange(max(1, int(counts.max())), device=kept.device)
        columns = some.int().argsort(dim=2, descending=True, stable=True)[:, :, slots]  # the kept ones first
        exists = slots < counts
        incidence = F.one_hot(columns, layout.columns).bool() & exists[..., None]  # (G, rows, S, C)
        key = (columns[..., None] * layout.block + places).flatten(2)[:, :, None]
        allowed = exists.repeat_interleave(layout.block, 2)[:, :, None] & inside(~full, key)
        parts[False] = _part(columns, incidence.flatten(1, 2).mT, allowed)
    return runs, parts


def _part(columns: Tensor | None, incidence: Tensor | None, allowed: Tensor) -> Part:
    return Part(columns, incidence, None if allowed.all() else allowed, bool(allowed.any(-1).all()))


def _attend_full(rows: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, part: Part) -> Tensor:
    """rows (B, H, n, b, D), scaled, against all keys -> (B, H, n, b, D)."""
    mask = None if mask is None else mask[:, None, None]
    allowed = None if part.allowed is None else part.allowed.expand(*rows.shape[2:4], -1).flatten(0, 1)
    out = attend(rows.flatten(2, 3), k, v, _both(allowed, mask), part.complete and mask is None)
    return out.unflatten(2, rows.shape[2:4])


def _attend_gathered(rows: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, part: Part) -> Tensor:
    """The same against each block row's own keys."""
    block = rows.shape[3]
    if mask is not None:
        mask = split(mask[:, None, :, None], block)[:, 0, :, :, 0][:, part.columns].flatten(3)[..., None, :]
    keys, values = (
        GatherBlocks.apply(split(x, block).flatten(3), part.columns, part.incidence).reshape(
            *rows.shape[:3], -1, x.shape[3]
        )
        for x in (k, v)
    )  # (B, H, n, S * b, D)
    return attend(rows, keys, values, _both(part.allowed, mask), part.complete and mask is None)


def _both(allowed: Tensor | None, mask: Tensor | None) -> Tensor | None:
    return mask if allowed is None else allowed if mask is None else allowed & mask


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, complete: bool = False) -> Tensor:
    """Dense attention over the last two axes of scaled queries: (..., Q, D), (..., K, D) -> (..., Q, D).

    `allowed` is bool, broadcast to (..., Q, K): which keys a query attends to. A query without any gives 0; there is
    none if `complete`.
    """
    scores = q @ k.mT
    if allowed is None:
        return scores.softmax(-1) @ v
    some = None if complete else allowed.any(-1, keepdim=True)
    pruned = ~allowed if complete else ~allowed & some  # a softmax over nothing would be NaN
    with torch.no_grad():  # in place, which no gradient needs to know: the softmax passes none to where it is 0
        scores.masked_fill_(pruned, -torch.inf)
    out = scores.softmax(-1) @ v
    return out if complete else out * some


def split(x: Tensor, size: int) -> Tensor:
    """(B, H, L, D) -> (B, H, ceil(L / size), size, D), zeros after the end. No copy where the size divides L."""
    missing = -x.shape[2] % size
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, size))


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class GatherBlocks(torch.autograd.Function):
    """(B, H, C, n) blocks -> (B, H, rows * S, n). Backward is a product with the incidence matrix: no atomics."""

    @staticmethod
    def forward(ctx, blocks: Tensor, columns: Tensor, incidence: Tensor) -> Tensor:
        ctx.save_for_backward(incidence)
        dtype, (heads, count) = blocks.dtype, blocks.shape[1:3]
        if all(n * blocks.itemsize % 8 == 0 for n in (blocks.shape[3], blocks.storage_offset())):
            blocks = blocks.view(torch.int64)  # moved as larger words: index_select takes them one by one
        if len(columns) == 1:
            return blocks.index_select(2, columns.flatten()).view(dtype)
        first = count * torch.arange(heads, device=blocks.device)[:, None, None]
        gathered = blocks.flatten(1, 2).index_select(1, (columns + first).flatten())
        return gathered.unflatten(1, (heads, -1)).view(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (incidence,) = ctx.saved_tensors
        return incidence.to(grad.dtype) @ grad, None, None
