"""Which blocks of an attention map a pattern keeps, and how much of the map they hold: patterns side by side.

    maps = encoder_maps(model, tokens)                      # A^s of every layer, (B, H, L, L)
    choices = choose(maps[0][0, 0], density=0.05, block=32, scores=scores)
    records = compare(maps[0][0, 0], choices)               # mass kept, overlap, ... by pattern

`experiments.patterns.compare_snapshots` does that for the snapshots of a training run. The second half of this file
describes maps in numbers.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import Polynomial
from scipy.signal import find_peaks
from torch import Tensor

from .attention.layout import BlockLayout
from .attention.patterns import generate_layout
from .attention.static_patterns import bigbird_layout, nearness, random_layout
from .attention.statistics import attention_map, mass_kept, overlap, pool_blocks
from .common.errors import InputError, require
from .model.encoder import Encoder, SelfAttention

PATTERNS = ("learned", "best", "window", "bigbird", "random", "in use")
RANDOM_BLOCKS = 3  # of BigBird's pattern, as published


# ---- maps ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encoder_maps(model: Encoder, tokens: Tensor) -> list[Tensor]:
    """`A^s` of every layer, each (B, H, L, L) float32: the softmax of the raw scores that dense attention would take.

    In the sparse phase too: the layers' inputs are then those of the sparse model. The model runs in evaluation mode.
    Where padding is masked, padding keys and the rows of padding queries are 0.

    Args:
        tokens: (B, L) int64.

    Raises:
        InputError: the attention isn't "dense" or "sat", or tokens don't fit the model.
    """
    name = model.config.attention
    require(name in ("dense", "sat"), f"model: wanted attention 'dense' or 'sat', whose map is A^s; got {name!r}")
    maps, training = [], model.training

    def look(attention: SelfAttention, inputs: tuple) -> None:
        x, mask, _ = inputs
        q, k, _ = attention.heads(x)
        found = attention_map(q, k, mask)
        maps.append(found if mask is None else found.masked_fill(~mask[:, None, :, None], 0.0))

    hooks = [layer.attention.register_forward_pre_hook(look) for layer in model.layers]
    try:
        model.eval()(tokens)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return maps


def block_sums(attention: Tensor, block: int) -> Tensor:
    """(L, L) on the CPU -> (N, N) float64: the mass in every block, those of a partial last block included."""
    edges = np.arange(0, len(attention), block)
    rows = np.add.reduceat(attention.numpy(), edges, 0)  # several times as fast as sums over axes in PyTorch
    return torch.from_numpy(np.add.reduceat(rows, edges, 1, dtype=np.float64))


# ---- choosing blocks -------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A pattern's layout, or None and why there is none."""

    layout: BlockLayout | None
    reason: str = ""


def choose(
    attention: Tensor,
    density: float,
    block: int,
    scores: Tensor | None = None,
    trained_block: int | None = None,
    in_use: BlockLayout | None = None,
    layer: int = 0,
) -> dict[str, Choice]:
    """The layout of every pattern in `PATTERNS`, each but "bigbird" and "in use" with int(N^2 x density) blocks.

    learned: the largest R~. best: the blocks that hold most of this map. window: the blocks nearest to the diagonal.
    bigbird: one head of BigBird's pattern, at its own density. random: the control. in use: the layout of the sparse
    phase, in its own blocks.

    Args:
        attention: (L, L). scores: R~ in blocks of `trained_block` (None: of `block`), or None where none was trained.
        layer: for BigBird's draw.

    Raises:
        InputError: a block outside 1 to L, a density outside (0, 1] or so small that no block is kept.
    """
    length = len(attention)
    require(1 <= block <= length, f"block: wanted 1 to the length of {length} positions; got {block}")
    blocks = -(-length // block)
    top = lambda values: Choice(generate_layout(values, density, block))
    absent = "no sparsity parameter was trained here"
    learned, why = (None, absent) if scores is None else resize_scores(scores, trained_block or block, block, length)
    return {
        "learned": Choice(None, why) if learned is None else top(learned),
        "best": top(block_sums(attention, block)),
        "window": top(nearness(blocks)),
        "bigbird": _bigbird(blocks, block, layer),
        "random": Choice(random_layout(blocks, blocks, density, block, seed=0)),
        "in use": Choice(in_use, "" if in_use is not None else "no layout in the dense phase"),
    }


def resize_scores(scores: Tensor, trained: int, block: int, length: int) -> tuple[Tensor | None, str]:
    """R~ in blocks of `trained` positions for blocks of `block`: averaged over larger ones, repeated for smaller ones.

    Returns:
        (N, N) scores and how they came about; or None and the reason, where neither size divides the other.
    """
    blocks = -(-length // block)
    if block == trained:
        return scores, f"blocks of {trained}, as trained"
    if block % trained == 0:
        return pool_blocks(scores, block // trained), f"mean of the trained blocks of {trained}"
    if trained % block == 0:
        times = trained // block
        repeated = scores.repeat_interleave(times, 0).repeat_interleave(times, 1)
        return repeated[:blocks, :blocks], f"trained blocks of {trained}, repeated"
    return None, f"blocks of {block} neither divide the trained {trained} nor are a multiple of it"


def _bigbird(blocks: int, block: int, layer: int) -> Choice:
    try:
        layout = bigbird_layout(1, blocks, RANDOM_BLOCKS, block, 0, layer)
    except InputError:
        return Choice(None, f"wants more than {5 + 2 * RANDOM_BLOCKS} blocks a side; there are {blocks}")
    return Choice(BlockLayout(layout.grid[0], block))


# ---- comparing -------------------------------------------------------------------------------------------------------


def compare(attention: Tensor, choices: Mapping[str, Choice]) -> list[dict]:
    """A record a pattern: density, mass_kept (0 to 1), overlap (its blocks that "best" keeps too), empty_rows, note.

    `overlap` is None for a layout in other blocks than "best"; an absent pattern has None everywhere and the reason.

    Args:
        attention: (L, L), some of it above 0.

    Raises:
        InputError: an empty map: every query is padding.
    """
    best = choices["best"].layout
    sums = {best.block: block_sums(attention, best.block)}
    require(bool(sums[best.block].any()), "map: wanted attention above 0; all queries of this one are padding")
    records = []
    for name, (layout, reason) in choices.items():
        found = dict.fromkeys(("density", "mass_kept", "overlap", "empty_rows"))
        if layout is not None:
            if layout.block not in sums:
                sums[layout.block] = block_sums(attention, layout.block)
            found = {
                "density": layout.density,
                "mass_kept": mass_kept(sums[layout.block], BlockLayout(layout.grid, 1)),  # its "entries" are blocks
                "overlap": overlap(layout, best) if layout.block == best.block else None,
                "empty_rows": layout.empty_rows,
            }
        records.append({"pattern": name, **found, "note": reason})
    return records


def shrink(attention: Tensor, side: int) -> Tensor:
    """(L, L) -> at most (side, side): maxima of squares, so that a single large entry stays visible."""
    factor = -(-len(attention) // side)
    return F.max_pool2d(attention[None, None], factor, ceil_mode=True)[0, 0] if factor > 1 else attention


def describe(maps: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
    """Every number that needs no grid, by name, each (B, H) float64, shares from 0 to 1. Padding queries don't count.

    small_share: entries below 1 / (10 L), of all that real queries have, padding keys among them.
    small_share_real: the same of real keys alone, below 1 / (10 times their number).
    top5_mass: mass of the largest 5 % of all entries of real queries.
    diagonal_mass: mass on keys at most one position away; diagonal_share: share of the entries that these are.
    padding_mass: mass on padding keys; padding_share: share of the keys that are padding.

    Args:
        maps: (B, H, L, L), rows summing to 1. real: (B, L) bool, True for real tokens; None where there is no padding.

    Raises:
        InputError: other shapes, or an example without a real token.
    """
    _check(maps, real)
    length = maps.shape[-1]
    real = torch.ones(len(maps), length, dtype=torch.bool, device=maps.device) if real is None else real
    queries, keys = real[:, None, :, None], real[:, None, None, :]
    both = queries & keys
    count = real.sum(1).double()[:, None]  # (B, 1) real tokens
    mass = lambda where: (maps * where).sum((2, 3), dtype=torch.float64) / count
    share = lambda where, of: (where & of).sum((2, 3)).double() / of.sum((2, 3))
    near = _distances(maps) <= 1
    every = queries.expand(-1, -1, -1, length)
    top = []
    for some, entries in zip(maps * queries, (count * length).flatten().tolist(), strict=True):
        largest = some.flatten(1).topk(max(1, int(0.05 * entries))).values
        top.append(largest.sum(1, dtype=torch.float64))
    return {
        "small_share": share(maps < 1 / (10 * length), every),
        "small_share_real": share(maps < 1 / (10 * count)[:, :, None, None], both),
        "top5_mass": torch.stack(top) / count,
        "diagonal_mass": mass(both & near),
        "diagonal_share": share(near, both).expand(maps.shape[:2]),
        "padding_mass": mass(queries & ~keys),
        "padding_share": (1 - count / length).expand(maps.shape[:2]),
    }


def stride_mass(maps: Tensor, width: int) -> tuple[Tensor, float]:
    """Mass on the same column of other rows of an image: keys a multiple of `width` away, but not the query itself.

    Args:
        maps: of image patches alone, (B, H, P, P), see `patch_maps`. width: patches in a row of the grid.

    Returns:
        Their share of the mass, and their share of the entries.
    """
    _check(maps)
    away = _distances(maps)
    strided = (away % width == 0) & (away > 0)
    mass = (maps * strided).sum((2, 3), dtype=torch.float64) / maps.sum((2, 3), dtype=torch.float64)
    return mass, float(strided.double().mean())


def patch_maps(maps: Tensor, width: int) -> Tensor:
    """The part of maps that image patches attend to patches: what stands before the last width^2 tokens is cut off."""
    patches = width * width
    require(
        maps.shape[-1] >= patches,
        f"width: a grid of {width} x {width} patches wants {patches} tokens or more; got {maps.shape[-1]}",
    )
    return maps[..., -patches:, -patches:]


def offset_profile(maps: Tensor) -> Tensor:
    """Mean entry by distance between query and key, over batch and heads: (L,) float64, relative to the mean entry."""
    _check(maps)
    mean = maps.mean((0, 1), dtype=torch.float64)
    away = _distances(maps).flatten()
    return away.bincount(mean.flatten()) / away.bincount() / mean.mean()


def stride_peak(profile: Tensor, most: int | None = None) -> tuple[int, float]:
    """The period of an offset profile: the lag from 2 to `most` at which its autocorrelation peaks highest.

    The profile's logarithm without its parabola is correlated; a lag counts only where the correlation is higher than
    at its two neighbours.

    Args:
        profile: (L,) from `offset_profile`. most: L / 4 unless given, and at most L / 2 - 2.

    Returns:
        The lag and the correlation there; 0 and 0.0 where there is no peak above 0, or nothing but the parabola.
    """
    half = profile[: len(profile) // 2]  # further out few entries are left
    half = half.clamp(min=1e-12).log().detach().cpu().numpy()
    most = min(len(profile) // 4 if most is None else most, len(half) - 2)
    place = np.arange(len(half))
    rest = torch.from_numpy(half - Polynomial.fit(place, half, 2)(place))
    if float(rest.std()) < 1e-6:  # rounding alone
        return 0, 0.0
    shifted = [(rest[: len(rest) - lag], rest[lag:]) for lag in range(most + 2)]
    correlation = [F.cosine_similarity(*pair, dim=0).item() for pair in shifted]
    peaks, _ = find_peaks(correlation, height=0)
    best = max(peaks, key=correlation.__getitem__, default=0)
    return (int(best), correlation[best]) if best else (0, 0.0)


def _distances(maps: Tensor) -> Tensor:
    """(L, L): positions between query and key."""
    place = torch.arange(maps.shape[-1], device=maps.device)
    return (place[:, None] - place).abs()


def _check(maps: Tensor, real: Tensor | None = None) -> None:
    require(
        maps.dim() == 4 and maps.shape[2] == maps.shape[3] and maps.numel() > 0,
        f"maps: wanted (B, H, L, L), none of them 0; got {tuple(maps.shape)}",
    )
    if real is not None:
        wanted = (len(maps), maps.shape[-1])
        require(
            real.dtype == torch.bool and tuple(real.shape) == wanted and bool(real.any(1).all()),
            f"real: wanted bool {wanted} with a real token in each row; got {real.dtype} {tuple(real.shape)}",
        )
