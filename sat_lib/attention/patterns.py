"""Rules that yield layouts: the sparsity pattern generator, static patterns for study, and those of the baselines."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..common.errors import require
from .layout import BlockLayout


@torch.no_grad()
def generate_layout(scores: Tensor, density: float, block: int, budget: str = "blocks") -> BlockLayout:
    """The sparsity pattern generator: keeps int(N^2 x density) blocks of high score.

    Args:
        scores: (R, C), one pattern for all heads; or (H, R, C), one for each: a head is dealt blocks that no head
            before it has, as far as the budget allows.
        budget: name in `BUDGETS`. "blocks", as released: the largest scores, wherever they are; no row is guaranteed a
            block. "rows": the largest of each row, so many from all of them. "balanced": so many from each row and from
            each column, by one assignment of the highest sum after another; needs as many rows as columns.

    The same scores give the same layout on every device. Ties go to the entry that comes first row by row (in
    "balanced", to SciPy's choice): R~ is symmetric, and where the count is odd one of two mirror entries is left out.

    Raises:
        InputError: scores are not finite, density is outside (0, 1], or so small that no block is kept.
    """
    require(scores.dim() in (2, 3), f"scores: wanted ([heads,] block rows, block columns); got {tuple(scores.shape)}")
    require(bool(scores.isfinite().all()), "scores: wanted finite numbers; got NaN or infinity. Did training diverge?")
    require(0 < density <= 1, f"density: wanted more than 0 and at most 1; got {density}")
    require(budget in BUDGETS, f"budget: wanted one of {sorted(BUDGETS)}; got {budget!r}")
    *_, rows, columns = scores.shape
    square = rows == columns or budget != "balanced"
    require(square, f"budget: 'balanced' wants as many block rows as columns; got {rows} x {columns}")
    kept = int(rows * columns * density + 1e-6)  # 49 x 49 x (1 / 49) is a little less than 49
    require(
        kept > 0,
        f"density: {density} of {rows * columns} blocks keeps none; wanted at least {1 / (rows * columns):.3g}. "
        "Raise the density or lower the block size",
    )
    values = scores.reshape(-1, rows, columns).double().cpu().numpy()
    grid, dealt = np.zeros(values.shape, bool), np.zeros((rows, columns), bool)
    for head, own in enumerate(values):
        grid[head] = BUDGETS[budget](_behind(own, dealt), kept)
        dealt |= grid[head]
    return BlockLayout(torch.from_numpy(grid).view(scores.shape).to(scores.device), block)


def _behind(scores: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Scores in which what is taken comes behind all others, in its own order, whatever else a sum of rows gains."""
    return np.where(taken, scores - (np.ptp(scores) or 1) * (2 + len(scores)), scores)


def _largest(scores: np.ndarray, kept: int) -> np.ndarray:
    grid = np.zeros(scores.size, bool)
    grid[np.argsort(-scores, axis=None, kind="stable")[:kept]] = True
    return grid.reshape(scores.shape)


def _in_rounds(choose: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, int], np.ndarray]:
    """A budget that takes a block of every row in each round, the columns by `choose`; in the last the best of them."""

    def take(scores: np.ndarray, kept: int) -> np.ndarray:
        grid, rows = np.zeros(scores.shape, bool), np.arange(len(scores))
        while kept > 0:
            columns = choose(_behind(scores, grid))
            best = np.argsort(-scores[rows, columns], kind="stable")[:kept]
            grid[rows[best], columns[best]] = True
            kept -= len(best)
        return grid

    return take


BUDGETS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "blocks": _largest,
    "rows": _in_rounds(lambda scores: scores.argmax(1)),
    "balanced": _in_rounds(lambda scores: linear_sum_assignment(scores, maximize=True)[1]),
}


# ---- static patterns: layouts for study, and of the baselines --------------------------------------------------------


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
    check_bigbird_blocks(blocks, random_blocks, block)
    base = global_window_layout(blocks, 1, 1, block).grid.clone()
    base[-1] = base[:, -1] = True
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    chance = torch.rand(heads, blocks, blocks, generator=generator).masked_fill(base, -1)
    drawn = chance.topk(random_blocks).indices  # rows that keep everything draw what they have
    return BlockLayout(base.expand(heads, -1, -1).scatter(2, drawn, True), block)


def check_bigbird_blocks(blocks: int, random_blocks: int, block: int) -> None:
    """Raise InputError where `bigbird_layout` does."""
    full = 5 + 2 * random_blocks
    require(random_blocks >= 0, f"random_blocks: wanted 0 or more; got {random_blocks}")
    require(
        blocks > full,
        f"length: BigBird with {random_blocks} random blocks wants more than {full} blocks of {block} positions; got "
        f"{blocks}, where published layers silently switch to full attention. Take longer input, smaller blocks or "
        "'dense'",
    )


def _distances(blocks: int) -> Tensor:
    place = torch.arange(blocks)
    return (place[:, None] - place).abs()
