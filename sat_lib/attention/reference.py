"""The specification: block-sparse attention in plain PyTorch.

Any device, any floating dtype, gradients by autograd, work and memory proportional to the kept blocks. Axes: B batch,
H heads, L positions, D head size, b block side, T kept blocks over all heads (a layout that heads share counts H
times). The values of a sparse map are (B, T, b, b), head by head, and within a head in the order of the layout's row
lists. Source: the SAT paper (doi 10.1109/ACCESS.2024.3425638); the sparse softmax is that of its authors' kernels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import require
from .layout import BlockLayout

PRUNED_RULES = ("zero", "drop")


class Index(NamedTuple):
    """Where the kept blocks of all H heads stand among the H * R block rows and H * C block columns."""

    rows: Tensor  # (T,) int64
    columns: Tensor  # (T,) int64
    kept_keys: Tensor  # (H * R,) int64: keys that each query of a block row keeps, n_i
    block: int
    block_rows: int  # R
    block_columns: int  # C


def index_of(row_offsets: Tensor, row_columns: Tensor, block: int, block_rows: int, heads: int, keys: int) -> Index:
    """The index of a layout's row lists, shared by the heads or one a head."""
    block_columns, patterns = -(-keys // block), (len(row_offsets) - 1) // block_rows
    lists = torch.arange(len(row_offsets) - 1, device=row_offsets.device)
    rows = lists.repeat_interleave(row_offsets.diff(), output_size=len(row_columns))
    columns = row_columns + rows // block_rows * block_columns
    missing = block_columns * block - keys
    sizes = block - missing * (row_columns == block_columns - 1)
    kept_keys = torch.zeros_like(lists).index_add(0, rows, sizes)
    if patterns != heads:
        head = torch.arange(heads, device=rows.device)[:, None]
        rows, columns = (rows + head * block_rows).flatten(), (columns + head * block_columns).flatten()
        kept_keys = kept_keys.repeat(heads)
    return Index(rows, columns, kept_keys, block, block_rows, block_columns)


def layout_index(layout: BlockLayout, heads: int, keys: int) -> Index:
    """The index of a layout, made once for each number of heads and keys."""
    lists = layout.row_offsets, layout.row_columns, layout.block, layout.rows
    return layout.derived((index_of, heads, keys), lambda: index_of(*lists, heads, keys))


def _to_blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, L, D) -> (B, H * ceil(L / block), block, D), zeros after the end."""
    batch, _, length, size = x.shape
    padded = F.pad(x, (0, 0, 0, -length % block))
    return padded.reshape(batch, -1, block, size)


def sddmm(
    q: Tensor, k: Tensor, layout: BlockLayout, scale: float | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    """Sampled dense-dense matrix product: raw scores `S^r` = scale * Q K^T of the kept blocks only.

    Args:
        q: (B, H, Lq, D), k: (B, H, Lk, D), same dtype and device as the layout's device.
        scale: 1 / sqrt(D) if None.
        key_padding_mask: (B, Lk) bool, True for real tokens; scores of padding keys are -inf.

    Returns:
        (B, T, b, b). Entries of queries or keys beyond the end are 0.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return indexed_sddmm(q, k, layout_index(layout, q.shape[1], k.shape[2]), scale, key_padding_mask)


def indexed_sddmm(q: Tensor, k: Tensor, index: Index, scale: float, key_padding_mask: Tensor | None = None) -> Tensor:
    """`sddmm` of an index."""
    rows = _to_blocks(q * scale, index.block).index_select(1, index.rows)
    columns = _to_blocks(k, index.block).index_select(1, index.columns)
    scores = rows @ columns.transpose(-1, -2)
    if key_padding_mask is None:
        return scores
    padding = ~_spread_keys(key_padding_mask, index, q.shape[1], beyond=True)
    return scores.masked_fill(padding.index_select(1, index.columns), -torch.inf)


def sparse_softmax(
    scores: Tensor,
    layout: BlockLayout,
    heads: int,
    keys: int,
    key_padding_mask: Tensor | None = None,
    pruned: str = "zero",
) -> Tensor:
    """Sparse attention map `S^s`: a softmax over the kept keys of every query.

    `pruned="zero"` (released, SAT's default) leaves the pruned keys in the denominator with raw score 0:
    p_ij = exp(s_ij) / (sum over kept j of exp(s_ij) + (Lk - n_i)), n_i the kept keys of row i, padding included.
    `pruned="drop"` normalises over the kept keys alone. Padding keys weigh 0 under both rules (the released code
    gives them -1e6, which comes to the same); a row without any key to attend to is 0, with zero gradients.

    Args:
        scores: (B, T, b, b) from `sddmm`.
        heads, keys: H and Lk, which the values alone don't tell.
        key_padding_mask: (B, Lk) bool, True for real tokens.

    Returns:
        (B, T, b, b), scores' dtype.
    """
    index = layout_index(layout, heads, keys)
    return indexed_softmax(scores, index, heads, keys, key_padding_mask, pruned == "zero")[0]


def indexed_softmax(
    scores: Tensor,
    index: Index,
    heads: int,
    keys: int,
    key_padding_mask: Tensor | None,
    pruned_weigh: bool,
    outside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sparse_softmax` of an index, and the logarithm of its denominators (B, H * R, b), +inf for rows without keys.

    `outside` (T, b, b) bool marks further entries that aren't attended to, see `outside_window`.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if key_padding_mask is not None or keys % index.block:
        mask = scores.new_ones(1, keys, dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        allowed = _spread_keys(mask, index, heads, beyond=False)
        wide = wide.masked_fill(~allowed.index_select(1, index.columns), -torch.inf)
    if outside is not None:
        wide = wide.masked_fill(outside, -torch.inf)
    pruned_keys = (keys - index.kept_keys).to(wide.dtype)[None, :, None]  # (1, H * R, 1)

    peaks = wide.detach().amax(-1)  # (B, T, b)
    highest = peaks.new_full((len(peaks), heads * index.block_rows, index.block), -torch.inf)
    highest.scatter_reduce_(1, index.rows[None, :, None].expand_as(peaks), peaks, "amax")
    if pruned_weigh:
        highest = torch.where(pruned_keys > 0, highest.clamp(min=0), highest)
    highest = highest.masked_fill(highest == -torch.inf, 0)  # a row without keys: exp(-inf - 0) = 0

    weights = (wide - highest.index_select(1, index.rows)[..., None]).exp()
    total = torch.zeros_like(highest).index_add(1, index.rows, weights.sum(-1))
    if pruned_weigh:
        total = total + pruned_keys * (-highest).exp()
    lse = torch.where(total == 0, torch.inf, total.log() + highest)
    total = total.masked_fill(total == 0, 1)
    return (weights / total.index_select(1, index.rows)[..., None]).to(scores.dtype), lse


def outside_window(index: Index, queries: int, window: int | None) -> Tensor | None:
    """(T, b, b) bool: entries of the kept blocks that lie outside the window; None without one."""
    if window is None:
        return None
    places = torch.arange(index.block, device=index.rows.device)
    query = (index.rows % index.block_rows * index.block)[:, None, None] + places[:, None]
    key = (index.columns % index.block_columns * index.block)[:, None, None] + places
    return ((query - key).abs() > window) & (key < queries)


def _spread_keys(mask: Tensor, index: Index, heads: int, beyond: bool) -> Tensor:
    """(B, Lk) bool of keys -> (B, H * C, 1, b), with `beyond` for keys that don't exist."""
    mask = F.pad(mask, (0, -mask.shape[1] % index.block), value=beyond)
    return mask.reshape(len(mask), 1, index.block_columns, 1, index.block).expand(-1, heads, -1, -1, -1).flatten(1, 2)


def spmm(weights: Tensor, v: Tensor, layout: BlockLayout, queries: int) -> Tensor:
    """Sparse-dense matrix product: `S^s` V, block rows without a block giving 0.

    Args:
        weights: (B, T, b, b) from `sparse_softmax`.
        v: (B, H, Lk, D).
        queries: Lq.

    Returns:
        (B, H, Lq, D).
    """
    return indexed_spmm(weights, v, layout_index(layout, *v.shape[1:3]), queries)


def indexed_spmm(values: Tensor, x: Tensor, index: Index, queries: int) -> Tensor:
    """`spmm` of an index."""
    batch, heads, _, size = x.shape
    products = values @ _to_blocks(x, index.block).index_select(1, index.columns)  # (B, T, b, D)
    out = products.new_zeros(batch, heads * index.block_rows, index.block, size).index_add(1, index.rows, products)
    return out.reshape(batch, heads, -1, size)[:, :, :queries]  # what lies after the end cut off


def indexed_spmm_transposed(values: Tensor, x: Tensor, index: Index, keys: int) -> Tensor:
    """The transposed map times x: (B, T, b, b) and (B, H, Lq, D) -> (B, H, Lk, D)."""
    flipped = index._replace(
        rows=index.columns, columns=index.rows, block_rows=index.block_columns, block_columns=index.block_rows
    )
    return indexed_spmm(values.transpose(-1, -2), x, flipped, keys)


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
    """SAT's sparse attention: SDDMM, sparse softmax, SpMM.

    Args:
        q: (B, H, Lq, D), k and v: (B, H, Lk, D), one dtype, on the layout's device.
        layout: kept blocks of the Lq x Lk map, shared by the heads or one pattern per head.
        key_padding_mask: (B, Lk) bool, True for real tokens; None where there is no padding.
        pruned: "zero" or "drop", see `sparse_softmax`.
        scale: factor of the raw scores, 1 / sqrt(D) if None.
        window: of keys 0 to Lq - 1, each query attends only to those at most so many positions away, whatever more the
            layout keeps; keys from Lq on, where there are more keys than queries, it attends to in any case. Wants
            pruned="drop". None: all keys of the layout.

    Returns:
        (B, H, Lq, D), q's dtype.

    Raises:
        InputError: shapes, dtypes, devices, the layout or the rule don't fit together.
    """
    check_attention_inputs(q, k, v, key_padding_mask)
    check_rules(pruned, window)
    check_layout(q, layout, k.shape[2])
    with torch.autocast(q.device.type, enabled=False):  # the products keep q's dtype, the softmax is float32 or wider
        index = layout_index(layout, q.shape[1], k.shape[2])
        outside = outside_window(index, q.shape[2], window)
        weights, _ = indexed_softmax(
            sddmm(q, k, layout, scale), index, q.shape[1], k.shape[2], key_padding_mask, pruned == "zero", outside
        )
        return spmm(weights, v, layout, q.shape[2])


def check_rules(pruned: str, window: int | None) -> None:
    """Raise InputError unless there is such a rule, and it goes with the window."""
    require(pruned in PRUNED_RULES, f"pruned: wanted one of {PRUNED_RULES}; got {pruned!r}")
    require(window is None or window >= 0, f"window: wanted a number of positions, 0 or more; got {window}")
    require(window is None or pruned == "drop", f"window: goes with pruned='drop' alone; got pruned={pruned!r}")


def check_layout(q: Tensor, layout: BlockLayout, keys: int) -> None:
    """Raise InputError unless the layout is on q's (B, H, Lq, D) device and fits its heads, its length and Lk."""
    require(layout.device == q.device, f"layout: wanted it on {q.device}; it is on {layout.device}. Use layout.to(...)")
    layout.check(q.shape[1], q.shape[2], keys)


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
    """Raise InputError unless q (B, H, Lq, D), k, v (B, H, Lk, D) and the mask (B, Lk) bool fit together."""
    shapes = {"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape)}
    fits = all(len(shape) == 4 for shape in shapes.values()) and (
        q.shape[:2] == k.shape[:2] and k.shape == v.shape and q.shape[3] == k.shape[3] and q.numel() and k.numel()
    )
    require(fits, f"q, k, v: wanted (B, H, Lq, D) and twice (B, H, Lk, D), none of them 0; got {shapes}")
    same = q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    require(
        same and q.is_floating_point(),
        f"q, k, v: wanted one floating dtype on one device; got {q.dtype} {k.dtype} {v.dtype} on "
        f"{q.device} {k.device} {v.device}",
    )
    if key_padding_mask is not None:
        wanted = (q.shape[0], k.shape[2])
        require(
            key_padding_mask.dtype == torch.bool
            and key_padding_mask.shape == wanted
            and key_padding_mask.device == q.device,
            f"key_padding_mask: wanted bool {wanted} on {q.device}, True for real tokens; got "
            f"{key_padding_mask.dtype} {tuple(key_padding_mask.shape)} on {key_padding_mask.device}",
        )


def cast_as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, those in float32 in autocast's dtype where it is on for their device."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)
