"""What the paper says of attention maps in words, in numbers: small entries, diagonals, strides, padding.

Maps are (B, H, L, L), rows summing to 1; `real` is (B, L) bool, True for real tokens, None where there is no padding.
Queries that are padding are left out everywhere. Results are (B, H) in float64, shares from 0 to 1.
"""

import math

import torch
from torch import Tensor

from .errors import require


def describe(maps: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
    """Every number that needs no grid, by name:

    small_share: entries below 1 / (10 L), of all that real queries have, padding keys among them.
    small_share_real: the same of real keys alone, below 1 / (10 times their number).
    top5_mass: mass of the largest 5 % of all entries of real queries.
    diagonal_mass: mass on keys at most one position away; diagonal_share: share of the entries that these are.
    padding_mass: mass on padding keys; padding_share: share of the keys that are padding.
    """
    _check(maps, real)
    length = maps.shape[-1]
    real = torch.ones(len(maps), length, dtype=torch.bool, device=maps.device) if real is None else real
    queries, keys = real[:, None, :, None], real[:, None, None, :]
    both = queries & keys
    count = real.sum(1).double()[:, None]  # (B, 1) real tokens
    mass = lambda where: (maps * where).sum((2, 3), dtype=torch.float64) / count
    share = lambda where, of: (where & of).sum((2, 3)).double() / of.sum((2, 3))
    place = torch.arange(length, device=maps.device)
    near = (place[:, None] - place).abs() <= 1
    every = queries.expand(-1, -1, -1, length)
    heads = torch.ones(1, maps.shape[1], 1, 1, dtype=torch.bool, device=maps.device)
    return {
        "small_share": share(maps < 1 / (10 * length), every & heads),
        "small_share_real": share(maps < 1 / (10 * count)[:, :, None, None], both & heads),
        "top5_mass": _top_mass(maps * queries, count * length, 0.05) / count,
        "diagonal_mass": mass(both & near),
        "diagonal_share": share(near & heads, both & heads),
        "padding_mass": mass(queries & ~keys),
        "padding_share": (1 - count / length).expand(maps.shape[:2]),
    }


def _top_mass(maps: Tensor, entries: Tensor, share: float) -> Tensor:
    """Sum of the largest `share` of `entries` (B, 1) numbers of each map."""
    return torch.stack(
        [
            some.flatten(1).topk(max(1, int(share * float(number)))).values.sum(1, dtype=torch.float64)
            for some, number in zip(maps, entries, strict=True)
        ]
    )


def stride_mass(maps: Tensor, width: int) -> tuple[Tensor, float]:
    """Mass on the same column of other rows of an image: keys a multiple of `width` away, but not the query itself.

    Args:
        maps: of image patches alone, (B, H, P, P), see `patch_maps`. width: patches in a row of the grid.

    Returns:
        Their share of the mass, and their share of the entries.
    """
    _check(maps, None)
    place = torch.arange(maps.shape[-1], device=maps.device)
    away = (place[:, None] - place).abs()
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
    _check(maps, None)
    mean = maps.mean((0, 1), dtype=torch.float64)
    length = len(mean)
    profile = [
        (mean.diagonal(offset).sum() + mean.diagonal(-offset).sum()) / (2 * (length - offset))
        for offset in range(length)
    ]
    return torch.stack(profile) / mean.mean()


def stride_peak(profile: Tensor, most: int | None = None) -> tuple[int, float]:
    """The period of an offset profile: the lag from 2 to `most` at which its autocorrelation peaks highest.

    The profile's logarithm without its parabola is correlated; a lag counts only where the correlation is higher than
    at its two neighbours.

    Args:
        profile: (L,) from `offset_profile`. most: L / 4 unless given, and at most L / 2 - 2.

    Returns:
        The lag and the correlation there; 0 and 0.0 where there is no peak above 0, or nothing but the parabola.
    """
    half = profile[: len(profile) // 2].clamp(min=1e-12).log()  # further out few entries are left
    most = min(len(profile) // 4 if most is None else most, len(half) - 2)
    place = torch.linspace(-1, 1, len(half), dtype=half.dtype, device=half.device)
    basis = torch.stack([torch.ones_like(place), place, place**2], 1)
    rest = half - basis @ torch.linalg.lstsq(basis, half[:, None]).solution[:, 0]
    if float(rest.std()) < 1e-6:  # rounding alone
        return 0, 0.0
    correlation = torch.stack([_correlation(rest, lag) for lag in range(most + 2)])
    best, height = 0, 0.0
    for lag in range(2, most + 1):
        if correlation[lag] > max(correlation[lag - 1], correlation[lag + 1], height):
            best, height = lag, float(correlation[lag])
    return best, height


def _correlation(values: Tensor, lag: int) -> Tensor:
    first, second = values[: len(values) - lag], values[lag:]
    scale = math.sqrt(float(first.square().sum() * second.square().sum()))
    return (first * second).sum() / max(scale, 1e-300)


def _check(maps: Tensor, real: Tensor | None) -> None:
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
