"""Block-sparse attention the way the published layers compute it: gather blocks, then dense products, in plain PyTorch.

The kept blocks of K and V are copied side by side for every block row, which then meets them in one batched product, a
softmax and a second product. Block rows that keep everything (BigBird's global ones) take dense products without a
copy. Fast where the other block rows keep about equally many blocks: each is filled up to the longest.
"""

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import BlockLayout
from .reference import check_attention_inputs, check_layout, check_rules


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """The attention of `reference.block_sparse_attention` under pruned="drop": same arguments, result and errors.

    Under autocast q, k and v are cast, as for PyTorch's own attention. No second derivatives.
    """
    check_attention_inputs(q, k, v, key_padding_mask)
    check_rules("drop", window)
    check_layout(q, layout, k.shape[2])
    device, queries = q.device.type, q.shape[2]
    if torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    with torch.autocast(device, enabled=False):
        rows = split(q / math.sqrt(q.shape[-1]), layout.block)
        runs = _runs(layout, queries, k.shape[2], window)
        pieces = [_attend_run(rows[:, :, run.start : run.stop], k, v, key_padding_mask, layout, run) for run in runs]
        return torch.cat(pieces, 2).flatten(2, 3)[:, :, :queries]


class Run(NamedTuple):
    """Neighbouring block rows that are computed in one go; G = 1 where the heads share the layout, else H."""

    start: int
    stop: int
    columns: Tensor | None  # (G, rows, S) int64, the blocks that each row keeps; None where they keep all of them
    incidence: Tensor | None  # (G, C, rows * S) bool: which column each of them is
    allowed: Tensor | None  # bool, as wide as the gathered keys: what is attended to; None where all is


@lru_cache(maxsize=64)
def _runs(layout: BlockLayout, queries: int, keys: int, window: int | None) -> list[Run]:
    kept = layout.grid.reshape(-1, layout.rows, layout.columns)
    full = kept.all(2).all(0).tolist()
    runs, start = [], 0
    for dense, same in itertools.groupby(full):
        stop = start + len(list(same))
        make = _full_run if dense else _gathered_run
        runs.append(make(kept[:, start:stop], start, stop, layout.block, queries, keys, window))
        start = stop
    return runs


def _full_run(kept: Tensor, start: int, stop: int, block: int, queries: int, keys: int, window: int | None) -> Run:
    key = torch.arange(keys, device=kept.device)
    return Run(start, stop, None, None, _inside(start, stop, block, key, queries, keys, window))


def _gathered_run(kept: Tensor, start: int, stop: int, block: int, queries: int, keys: int, window: int | None) -> Run:
    counts = kept.sum(2, keepdim=True)  # (G, rows, 1)
    slots = torch.arange(max(1, int(counts.max())), device=kept.device)
    columns = kept.int().argsort(dim=2, descending=True, stable=True)[:, :, slots]  # the kept ones first
    exists = slots < counts
    incidence = F.one_hot(columns, kept.shape[2]).bool() & exists[..., None]  # (G, rows, S, C)
    places = torch.arange(block, device=kept.device)
    key = (columns[..., None] * block + places).flatten(2)[:, :, None]  # (G, rows, 1, S * b)
    allowed = exists.repeat_interleave(block, 2)[:, :, None]
    inside = _inside(start, stop, block, key, queries, keys, window)
    allowed = allowed if inside is None else allowed & inside
    return Run(start, stop, columns, incidence.flatten(1, 2).mT, None if allowed.all() else allowed)


def _inside(start: int, stop: int, block: int, key: Tensor, queries: int, keys: int, window: int | None):
    """Which of these keys (..., 1, K) exist and lie in each query's window, (rows, b, 1) queries; None where all do."""
    query = torch.arange(start * block, stop * block, device=key.device).reshape(-1, block, 1)
    inside = key < keys
    if window is not None:
        inside = inside & (((query - key).abs() <= window) | (key >= queries))
    return None if inside.all() else inside


def _attend_run(rows: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layout: BlockLayout, run: Run) -> Tensor:
    """rows (B, H, n, b, D), already scaled -> (B, H, n, b, D)."""
    if run.columns is None:
        # one product for all rows: (B, H, 1, n * b, D) with (B, H, 1, Lk, D)
        allowed = None if run.allowed is None else run.allowed.flatten(0, 1)
        mask = None if mask is None else mask[:, None, None, None]
        out = _attend(rows.flatten(2, 3)[:, :, None], k[:, :, None], v[:, :, None], _both(allowed, mask))
        return out.unflatten(3, rows.shape[2:4])[:, :, 0]
    if mask is not None:
        mask = split(mask[:, None, :, None], layout.block)[:, 0, :, :, 0][:, run.columns].flatten(3)[..., None, :]
    keys, values = (_gather(x, layout.block, run) for x in (k, v))
    return _attend(rows, keys, values, _both(run.allowed, mask))


def _both(allowed: Tensor | None, mask: Tensor | None) -> Tensor | None:
    return mask if allowed is None else allowed if mask is None else allowed & mask


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """Dense attention over the last two axes; queries without any key give 0."""
    scores = q @ k.mT
    if allowed is None:
        return scores.softmax(-1) @ v
    lowest = torch.finfo(q.dtype).min / 2  # a sum with a score stays finite
    bias = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill(~allowed, lowest)
    return (scores + bias).softmax(-1) @ v * allowed.any(-1, keepdim=True)


def split(x: Tensor, size: int) -> Tensor:
    """(B, H, L, D) -> (B, H, ceil(L / size), size, D), zeros after the end. No copy where the size divides L."""
    missing = -x.shape[2] % size
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, size))


def _gather(x: Tensor, block: int, run: Run) -> Tensor:
    """(B, H, Lk, D) -> (B, H, rows, S * b, D): the blocks that each block row keeps."""
    blocks = _GatherBlocks.apply(split(x, block).flatten(3), run.columns, run.incidence)
    return blocks.reshape(*x.shape[:2], run.stop - run.start, -1, x.shape[3])


class _GatherBlocks(torch.autograd.Function):
    """(B, H, C, n) blocks -> (B, H, rows * S, n). Backward is a product with the incidence matrix: no atomics."""

    @staticmethod
    def forward(ctx, blocks: Tensor, columns: Tensor, incidence: Tensor) -> Tensor:
        ctx.save_for_backward(incidence)
        if len(columns) == 1:
            return blocks.index_select(2, columns.flatten())
        heads, count = blocks.shape[1:3]
        first = count * torch.arange(heads, device=blocks.device)[:, None, None]
        return blocks.flatten(1, 2).index_select(1, (columns + first).flatten()).unflatten(1, (heads, -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (incidence,) = ctx.saved_tensors
        return incidence.to(grad.dtype) @ grad, None, None
