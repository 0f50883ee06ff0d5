"""What is looked at in an attention map: its means over batch and heads, its blocks, what a layout keeps of it.

Plain PyTorch, on any device, in any floating dtype. Axes: B batch, H heads, L positions, D head size,
R and C block rows and columns.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import BlockLayout
from .reference import check_attention_inputs, layout_index, sddmm, sparse_softmax


class AttentionStatistics(NamedTuple):
    """What the dense phase looks at, of one layer. Means over batch and heads, without gradient, float32 or wider."""

    mean_map: Tensor  # (Lq, Lk), mean of A^s
    pooled: Tensor  # (R, C), its average over blocks


def attention_map(q: Tensor, k: Tensor, key_padding_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The dense map `A^s`, written out: (B, H, Lq, Lk), float32 or wider. Padding keys weigh 0; a query without any
    real key is a row of zeros. Arguments as for `sddmm`."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q * scale) @ k.transpose(-1, -2)
    if key_padding_mask is not None:
        scores = scores.masked_fill(~key_padding_mask[:, None, None], -torch.inf)
    attention = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return attention if key_padding_mask is None else attention.nan_to_num(nan=0.0)


@torch.no_grad()
def attention_statistics(
    q: Tensor, k: Tensor, block: int, *, key_padding_mask: Tensor | None = None, scale: float | None = None
) -> AttentionStatistics:
    """The batch-and-head mean of the attention map `A^s` and its block means, a few examples at a time.

    Memory stays at about 64 MiB of scores beside the (Lq, Lk) mean, whatever the batch. Entries of a partial last
    block are averaged over those that exist. A query with no real key counts as a row of zeros.

    Args:
        q: (B, H, Lq, D), k: (B, H, Lk, D), key_padding_mask (B, Lk) bool as for attention; block: side of the blocks.
    """
    check_attention_inputs(q, k, k, key_padding_mask)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    total = torch.zeros(queries, keys, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    chunk = max(1, 2**24 // (heads * queries * keys))
    for start in range(0, batch, chunk):
        part = slice(start, start + chunk)
        mask = None if key_padding_mask is None else key_padding_mask[part]
        total += attention_map(q[part], k[part], mask, scale).sum((0, 1))
    mean_map = total / (batch * heads)
    return AttentionStatistics(mean_map, pool_blocks(mean_map, block))


@torch.no_grad()
def sparse_statistics(
    q: Tensor, k: Tensor, layout: BlockLayout, *, key_padding_mask: Tensor | None = None, pruned: str = "zero"
) -> AttentionStatistics:
    """The same two means of the sparse attention map `S^s`, pruned entries counted as 0."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        weights = sparse_softmax(sddmm(q, k, layout), layout, heads, keys, key_padding_mask, pruned)
    index = layout_index(layout, heads, keys)
    rows, columns = index.rows % layout.rows, index.columns % layout.columns
    blocks = weights.to(torch.promote_types(q.dtype, torch.float32)).mean(0) / heads  # (T, b, b)
    grid = blocks.new_zeros(layout.rows, layout.columns, layout.block, layout.block)
    grid.index_put_((rows, columns), blocks, accumulate=True)
    mean_map = grid.transpose(1, 2).flatten(2).flatten(0, 1)[:queries, :keys]
    return AttentionStatistics(mean_map, pool_blocks(mean_map, layout.block))


@torch.no_grad()
def block_correlation(v: Tensor, block: int, key_padding_mask: Tensor | None = None) -> Tensor:
    """Correlation of the blocks' mean values over the batch, (N, N) float32: symmetric, no negative eigenvalues.

    v is (B, H, L, d), padding tokens counted as zeros; covariances are summed over heads and head size before they are
    divided. A block that is the same in all examples but for rounding, such as one that is always padding, has no
    correlation: 0.
    """
    values = v.float()
    if key_padding_mask is not None:
        values = values * key_padding_mask[:, None, :, None]
    means = F.avg_pool1d(values.transpose(2, 3).flatten(0, 1), block, ceil_mode=True)  # (B * H, d, N)
    means = means.reshape(len(v), -1, means.shape[-1])
    rounding = 1e-6 * means.square().sum((0, 1)).max().sqrt()
    means = (means - means.mean(0)).flatten(0, 1)  # (B * H * d, N)
    with torch.autocast(v.device.type, enabled=False):
        covariance = means.T @ means
    deviation = covariance.diagonal().sqrt()
    varies = deviation > rounding
    scale = torch.where(varies, 1 / deviation.where(varies, 1), 0)
    return (covariance + covariance.T) / 2 * (scale * scale[:, None])


def pool_blocks(mean_map: Tensor, block: int) -> Tensor:
    """(Lq, Lk) -> (R, C) block means; a partial last block is averaged over the entries it has."""
    return F.avg_pool2d(mean_map[None, None], block, ceil_mode=True)[0, 0]


def mass_kept(mean_map: Tensor, layout: BlockLayout) -> float:
    """Share of an attention map's (L, L) mass that lies in kept blocks of a layout that heads share, 0 to 1."""
    layout.check(1, *mean_map.shape)
    queries, keys = mean_map.shape
    kept = layout.entries(max(queries, keys))[:queries, :keys]
    return float(mean_map[kept].double().sum() / mean_map.double().sum())


def overlap(layout: BlockLayout, other: BlockLayout) -> float:
    """Share of `layout`'s blocks that `other` keeps too, 0 to 1."""
    return float((layout.grid & other.grid).sum() / layout.kept_blocks)
