"""The attentions that SAT is compared with: dense, Longformer, BigBird, LSG.

The sparse ones turn q, k and v into block-sparse attention over a layout, which one of two implementations computes:
"library" gathers blocks for PyTorch's dense products, as the published layers do; "kernel" is SAT's fused kernel (on a
CPU, its formula). Both give the same softmax over what is attended to. q, k, v are (B, H, L, D), masks (B, L) bool with
True for real tokens, results (B, H, L, D); a query with no real key to see gives 0. Any L will do, but where published
layers silently switch to full attention, or where the pattern would leave nothing out, InputError is raised.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import require
from .gather import attend, gathered_attention, split
from .layout import BlockLayout
from .ops import block_sparse_attention
from .reference import cast_as_autocast, check_attention_inputs
from .static_patterns import bigbird_layout, check_bigbird, check_size, window_layout

IMPLEMENTATIONS = {"kernel": partial(block_sparse_attention, pruned="drop"), "library": gathered_attention}
BAND_BLOCK = 32  # side of the blocks that Longformer's window is laid out in: a choice of speed alone


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
    """The original Transformer's attention, through PyTorch's scaled_dot_product_attention. Lq and Lk may differ."""
    check_attention_inputs(q, k, v, key_padding_mask)
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    some = key_padding_mask.any(-1, keepdim=True)  # (B, 1); a softmax over nothing would be NaN
    allowed = (key_padding_mask | ~some)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed) * some[:, None, None]


def _checked(implementation: str, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Callable:
    """The implementation of that name, for inputs that it can take."""
    known = sorted(IMPLEMENTATIONS)
    require(implementation in known, f"implementation: wanted one of {known}; got {implementation!r}")
    check_attention_inputs(q, k, v, key_padding_mask)
    require(q.shape == k.shape, f"q, k: wanted as many keys as queries; got {tuple(q.shape)} and {tuple(k.shape)}")
    return IMPLEMENTATIONS[implementation]


def _global_row(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """One query that sees everything, (B, H, 1, D). PyTorch's fused attention would split the keys and use atomics."""
    q, k, v = cast_as_autocast(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        allowed = None if key_padding_mask is None else key_padding_mask[:, None, None]
        return attend(q / math.sqrt(q.shape[-1]), k, v, allowed)


# ---- Longformer ------------------------------------------------------------------------------------------------------


def longformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    window: int = 64,
    dilation: int = 1,
    global_token: bool = False,
    global_qkv: tuple[Tensor, Tensor, Tensor] | None = None,
    implementation: str = "kernel",
) -> Tensor:
    """Longformer (Beltagy et al. 2020): query i sees the keys i + n x dilation, |n| <= window / 2, inside [0, L).

    With `global_token` position 0 sees everything and everything sees it. `global_qkv` are its own projections, which
    its row then takes in place of q, k, v: (B, H, 1, D) and twice (B, H, L, D).

    A dilation is that many windows, each over the positions of one residue. These are computed as heads, which copies
    nothing where heads alternate in memory, or as examples where there is a mask, which heads share. The global key
    stands behind the keys of each residue, outside of the window, and is masked at its own place.

    Raises:
        InputError: the window is odd, or leaves nothing out, which is dense attention.
    """
    compute = _checked(implementation, q, k, v, key_padding_mask)
    length = q.shape[2]
    check_longformer(length, window, dilation, global_token)
    reach = window // 2
    if global_qkv is not None:
        require(global_token, "global_qkv: goes with global_token=True alone")
        _check_global(q, global_qkv)
    mask = key_padding_mask
    if mask is None and (global_token or length % dilation):
        mask = torch.ones(len(q), length, dtype=torch.bool, device=q.device)
    axis = 1 if mask is None else 0
    queries, keys, values = (_split_residues(x, dilation, axis) for x in (q, k, v))
    real = None if mask is None else mask[:, None, :, None]  # (B, 1, L, 1), which is cut as q, k and v are
    if global_token:
        others = real & (torch.arange(length, device=q.device) > 0)[:, None]
        pairs = ((keys, k), (values, v), (_split_residues(others, dilation, 0), real))
        keys, values, real = (_append_first(parts, whole, dilation) for parts, whole in pairs)
    elif real is not None:
        real = _split_residues(real, dilation, 0)
    layout = _band(queries.shape[2], keys.shape[2], reach, q.device)
    real = None if real is None else real[:, 0, :, 0]
    out = compute(queries, keys, values, layout, key_padding_mask=real, window=reach)
    out = _join_residues(out, dilation, axis)[:, :, :length]
    if not global_token:
        return out
    row = _global_row(*(global_qkv or (q[:, :, :1], k, v)), key_padding_mask)
    return torch.cat([row, out[:, :, 1:]], 2)


def check_longformer(length: int, window: int, dilation: int, global_token: bool) -> None:
    """Raise InputError unless Longformer is defined for these sizes, and leaves something out."""
    check_size("window", window, 2)
    check_size("dilation", dilation, 1)
    require(window % 2 == 0, f"window: wanted an even number of positions; got {window}")
    require(
        length - global_token > (window // 2 + 1 if dilation == 1 else 1),
        f"window: {window} leaves none of {length} positions out, which is dense attention. Take a smaller window, "
        "longer input or 'dense'",
    )


def _check_global(q: Tensor, global_qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    batch, heads, length, size = q.shape
    got = [tuple(x.shape) for x in global_qkv]
    wanted = [(batch, heads, positions, size) for positions in (1, length, length)]
    require(got == wanted, f"global_qkv: wanted shapes {wanted}; got {got}")
    same = all(x.dtype == q.dtype and x.device == q.device for x in global_qkv)
    require(same, f"global_qkv: wanted {q.dtype} on {q.device} as q; got {[(x.dtype, x.device) for x in global_qkv]}")


@lru_cache(maxsize=64)
def _band(queries: int, keys: int, reach: int, device: torch.device) -> BlockLayout:
    """The blocks within reach of the diagonal; a key behind the queries' own adds its block to every row."""
    rows = -(-queries // BAND_BLOCK)
    grid = window_layout(rows, -(-reach // BAND_BLOCK), BAND_BLOCK).grid
    if keys > queries:
        grid = F.pad(grid, (0, queries // BAND_BLOCK + 1 - rows))
        grid[:, queries // BAND_BLOCK] = True
    return BlockLayout(grid, BAND_BLOCK).to(device)


def _split_residues(x: Tensor, dilation: int, axis: int) -> Tensor:
    """(B, H, L, D) -> ceil(L / dilation) positions, zeros after the end; B or H, by the axis, times the dilation."""
    if dilation == 1:
        return x
    return split(x, dilation).permute(0, 3, 1, 2, 4).flatten(axis, axis + 1)


def _append_first(parts: Tensor, whole: Tensor, dilation: int) -> Tensor:
    """Add position 0 of the whole sequences (B, H, L, D) behind each residue's."""
    return torch.cat([parts, whole[:, :, :1].repeat_interleave(dilation, 0)], 2)


def _join_residues(x: Tensor, dilation: int, axis: int) -> Tensor:
    if dilation == 1:
        return x
    folded = (-1, dilation) if axis == 0 else (dilation, -1)
    return x.unflatten(axis, folded).permute(0, 2, 3, 1, 4).flatten(2, 3)


# ---- BigBird ---------------------------------------------------------------------------------------------------------


def bigbird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    block: int = 32,
    random_blocks: int = 3,
    seed: int = 0,
    layer: int = 0,
    implementation: str = "kernel",
) -> Tensor:
    """BigBird (Zaheer et al. 2020): global first and last block, a window of 3 blocks, random blocks per head.

    The pattern is `static_patterns.bigbird_layout`, drawn once from (seed, layer): the same in training and evaluation,
    which the layers in transformers are not (in evaluation all their random blocks are block 0).
    """
    compute = _checked(implementation, q, k, v, key_padding_mask)
    check_bigbird(q.shape[2], block, random_blocks)
    layout = _bigbird(q.shape[1], -(-q.shape[2] // block), random_blocks, block, seed, layer, q.device)
    return compute(q, k, v, layout, key_padding_mask=key_padding_mask)


@lru_cache(maxsize=64)
def _bigbird(heads, blocks, random_blocks, block, seed, layer, device) -> BlockLayout:
    return bigbird_layout(heads, blocks, random_blocks, block, seed, layer).to(device)


# ---- LSG -------------------------------------------------------------------------------------------------------------


def lsg_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    block: int = 32,
    factor: int = 2,
    implementation: str = "kernel",
) -> Tensor:
    """LSG (Condevaux and Harispe 2023), with max-norm: local, sparse and global attention. Position 0 is global.

    The L - 1 positions behind the global one are cut into chunks of `block`; each chunk offers its block / factor real
    keys of largest norm, head by head, without a gradient through the choice. Chunk b sees the chunks b - 1 to b + 1 in
    full, what the `factor` chunks further on either side offer, and the global position, which sees and is seen by all.

    Raises:
        InputError: factor doesn't divide block, or two chunks or fewer (at factor 1 three), which see everything.
    """
    compute = _checked(implementation, q, k, v, key_padding_mask)
    length = q.shape[2] - 1
    check_lsg(length, block, factor)
    mask = key_padding_mask
    if mask is None:
        mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    q, k, v = cast_as_autocast(q, k, v)
    chosen, real = _largest(k[:, :, 1:], mask, block, factor)
    keys, values = (_Regroup.apply(x.transpose(1, 2), chosen, block, factor).transpose(1, 2) for x in (k, v))
    first, queries = q.split([1, length], 2)
    layout = _lsg(-(-length // block), block, factor, q.device)
    out = compute(queries, keys, values, layout, key_padding_mask=real)
    return torch.cat([_global_row(first, k, v, key_padding_mask), out], 2)


def check_lsg(length: int, block: int, factor: int) -> None:
    """Raise InputError unless LSG is defined for these sizes, of `length` positions behind the global one."""
    check_size("block", block, 1)
    check_size("factor", factor, 1)
    require(block % factor == 0, f"factor: wanted a divisor of the block {block}; got {factor}")
    full = 3 if factor == 1 else 2
    require(
        length > full * block,
        f"length: LSG wants more than {full} blocks of {block} positions behind the global one; got {length}, which "
        "published layers silently give full attention. Take longer input, smaller blocks or 'dense'",
    )


@lru_cache(maxsize=64)
def _lsg(chunks: int, block: int, factor: int, device: torch.device) -> BlockLayout:
    """Over the keys as `_Regroup` puts them: chunk b sees its neighbours, two sides, and the global key's block."""
    row, side = torch.arange(chunks)[:, None], torch.arange(chunks + factor - 1)
    begins = side - (factor - 1)  # chunk that a side begins with
    sides = (begins == row - 1 - factor) | (begins == row + 2)
    local = window_layout(chunks, 1, block).grid
    return BlockLayout(torch.cat([local, sides, torch.ones_like(row, dtype=torch.bool)], 1), block).to(device)


@torch.no_grad()
def _largest(k: Tensor, mask: Tensor, block: int, factor: int) -> tuple[Tensor, Tensor]:
    """Places within each chunk of its keys of largest norm, (B, C, n, H, 1), padding last; and the mask regrouped."""
    real, missing = mask[:, 1:], -k.shape[2] % block
    norms = torch.linalg.vector_norm(k, dim=-1, dtype=torch.promote_types(k.dtype, torch.float32))
    norms = F.pad(norms.masked_fill(~real[:, None], -1), (0, missing), value=-1)
    chosen = norms.unflatten(2, (-1, block)).topk(block // factor, sorted=True).indices.permute(0, 2, 3, 1)[..., None]
    regrouped = _Regroup.apply(mask[..., None, None], chosen[:, :, :, :1], block, factor)[..., 0, 0]
    return chosen, regrouped  # every head offers as many real keys, so the first speaks for all


class _Regroup(torch.autograd.Function):
    """(B, 1 + L, H, D) keys or values, the global one first, and `chosen` -> (B, (2 C + factor - 1) * block + 1, H, D).

    First the C chunks; then the sides, what any `factor` neighbouring chunks offer together, as long as a chunk, the
    first of them ending with chunk 0; at last the global one. Zeros where there is nothing. One function, because
    autograd would put the gradient together in several passes more over memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, chosen: Tensor, block: int, factor: int) -> Tensor:
        chunks, length = chosen.shape[1], x.shape[1] - 1
        ctx.save_for_backward(chosen)
        ctx.sizes = block, factor, length
        out = x.new_empty(x.shape[0], (2 * chunks + factor - 1) * block + 1, *x.shape[2:])
        local, sides, last = out.split([chunks * block, (chunks + factor - 1) * block, 1], 1)
        local[:, :length] = x[:, 1:]
        local[:, length:] = 0
        last.copy_(x[:, :1])
        offers = local.unflatten(1, (chunks, block)).gather(2, chosen.expand(*chosen.shape[:4], x.shape[3]))
        sides = sides.unflatten(1, (-1, factor, block // factor))
        for place in range(factor):
            before = factor - 1 - place
            sides[:, :before, place] = 0
            sides[:, before : before + chunks, place] = offers
            sides[:, before + chunks :, place] = 0
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (chosen,), (block, factor, length) = ctx.saved_tensors, ctx.sizes
        chunks, size = chosen.shape[1], grad.shape[3]
        local, sides, last = grad.split([chunks * block, (chunks + factor - 1) * block, 1], 1)
        sides = sides.unflatten(1, (-1, factor, block // factor))
        parts = [sides[:, factor - 1 - place :][:, :chunks, place] for place in range(factor)]
        offers = sum(parts[1:], parts[0])
        local = local.clone(memory_format=torch.contiguous_format)
        local.unflatten(1, (chunks, block)).scatter_add_(2, chosen.expand(*chosen.shape[:4], size), offers)
        return torch.cat([last, local[:, :length]], 1), None, None, None


BASELINES = {"longformer": longformer_attention, "bigbird": bigbird_attention, "lsg": lsg_attention}
