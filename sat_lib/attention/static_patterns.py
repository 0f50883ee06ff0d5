"""Layouts that no scores are learned for: the control for every learned one, those for study, and BigBird's."""

from numbers import Integral

import torch
from torch import Tensor

from ..common.errors import require
from .layout import BlockLayout
from .patterns import generate_layout


def random_layout(rows: int, columns: int, density: float, block: int, seed: int) -> BlockLayout:
    """int(rows x columns x density) blocks drawn without replacement: the control for every learned layout."""
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return generate_layout(scores, density, block)


def nearness(blocks: int) -> Tensor:
    """(N, N) scores that fall with the distance from the diagonal; among equals the rows come in a scattered order."""
    place = torch.arange(blocks)
    spread = (place * 0.6180339887498949) % 1  # neighbouring rows come far apart
    return -_distances(blocks).double() - spread[:, None] / 2


def window_layout(blocks: int, reach: int, block: int) -> BlockLayout:
    """Sliding window: block row i keeps blocks i - reach to i + reach; reach 0 is the diagonal, 1 the tridiagonal."""
    return BlockLayout(_distances(blocks) <= reach, block)


def global_window_layout(blocks: int, reach: int, global_blocks: int, block: int) -> BlockLayout:
    """Sliding window and global blocks: the first `global_blocks` block rows and columns are kept whole."""
    edge = torch.arange(blocks) < global_blocks
    return BlockLayout((_distances(blocks) <= reach) | edge | edge[:, None], block)


def strided_layout(blocks: int, stride: int, block: int) -> BlockLayout:
    """Rows and columns of an image whose rows are `stride` blocks long: each block sees its image row and its column.

    Source: the strided pattern of the Sparse Transformer (Child et al. 2019, section 4.2), without its causality.

    Raises:
        InputError: a stride below 2, with which all blocks stand in one column.
    """
    require(stride > 1, f"stride: wanted 2 or more blocks to an image row; got {stride}, which would keep everything")
    place = torch.arange(blocks)
    row, column = place // stride, place % stride
    return BlockLayout((row[:, None] == row) | (column[:, None] == column), block)


def bigbird_layout(heads: int, blocks: int, random_blocks: int, block: int, seed: int, layer: int = 0) -> BlockLayout:
    """BigBird's pattern, one per head: global edges, a tridiagonal window, random blocks.

    The first and last block rows keep everything and every row keeps the first and last block; row i also keeps
    i - 1, i, i + 1 and `random_blocks` others, drawn without replacement from (seed, layer), per head and row.
    Source: Zaheer et al. 2020, appendix D; 302 of 1,024 blocks at 32 blocks a side and 3 random ones.

    Raises:
        InputError: at most 5 + 2 x random_blocks blocks, where the published layers switch to full attention.
    """
    check_bigbird(blocks * block, block, random_blocks)
    base = global_window_layout(blocks, 1, 1, block).grid.clone()
    base[-1] = base[:, -1] = True
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    chance = torch.rand(heads, blocks, blocks, generator=generator).masked_fill(base, -1)
    drawn = chance.topk(random_blocks).indices  # rows that keep everything draw what they have
    return BlockLayout(base.expand(heads, -1, -1).scatter(2, drawn, True), block)


def check_bigbird(length: int, block: int, random_blocks: int) -> None:
    """Raise InputError unless BigBird is defined for these sizes."""
    check_size("block", block, 1)
    check_size("random_blocks", random_blocks, 0)
    blocks, full = -(-length // block), 5 + 2 * random_blocks
    require(
        blocks > full,
        f"length: BigBird with {random_blocks} random blocks wants more than {full} blocks of {block} positions; got "
        f"{blocks}, where published layers silently switch to full attention. Take longer input, smaller blocks or "
        "'dense'",
    )


def check_size(name: str, value: Integral, least: int) -> None:
    """Raise InputError unless `value` is a whole number, `least` or more."""
    whole = isinstance(value, Integral) and value >= least
    require(whole, f"{name}: wanted a whole number, {least} or more; got {value!r}")


def _distances(blocks: int) -> Tensor:
    place = torch.arange(blocks)
    return (place[:, None] - place).abs()
