"""The sparsity pattern generator: a rule that makes a layout of scores. Others are in `static_patterns`."""

from collections.abc import Callable
from functools import partial

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


def _in_rounds(choose: Callable[[np.ndarray], np.ndarray], scores: np.ndarray, kept: int) -> np.ndarray:
    """Take a block of every row in each round, the columns by `choose`; in the last the best of them."""
    grid, rows = np.zeros(scores.shape, bool), np.arange(len(scores))
    while kept > 0:
        columns = choose(_behind(scores, grid))
        best = np.argsort(-scores[rows, columns], kind="stable")[:kept]
        grid[rows[best], columns[best]] = True
        kept -= len(best)
    return grid


BUDGETS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "blocks": _largest,
    "rows": partial(_in_rounds, lambda scores: scores.argmax(1)),
    "balanced": partial(_in_rounds, lambda scores: linear_sum_assignment(scores, maximize=True)[1]),
}
