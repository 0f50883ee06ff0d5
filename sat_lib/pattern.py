"""From the sparsity parameter to a layout: R~ = W^P (W^P)^T, its loss, the pattern generator, diagnostics."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import require
from .layout import BlockLayout

INITIALISATIONS = {
    "released": lambda weight: nn.init.uniform_(weight, 0.0, 1.0),  # R~ starts near width / 4, far above its target
}


class SparsityParameter(nn.Module):
    """One layer's sparsity parameter W^P, trained beside the dense phase to foretell the pooled attention map.

    Args:
        blocks: N, block rows (and columns) of the attention map.
        width: columns of W^P; the head size d in the released code, the embedding size D in the paper.
        init: name in `INITIALISATIONS`. "released" draws uniformly from [0, 1).

    Calling it returns R~ = W^P (W^P)^T, (N, N), symmetric to the last bit and in full precision under autocast too:
    its entries differ by less than bfloat16 can tell.
    """

    def __init__(self, blocks: int, width: int, init: str = "released"):
        super().__init__()
        require(init in INITIALISATIONS, f"init: wanted one of {sorted(INITIALISATIONS)}; got {init!r}")
        self.weight = nn.Parameter(torch.empty(blocks, width))
        INITIALISATIONS[init](self.weight)

    def forward(self) -> Tensor:
        with torch.autocast(self.weight.device.type, enabled=False):
            product = self.weight @ self.weight.T
        return (product + product.T) / 2


def sparsity_loss(parameter: SparsityParameter, pooled: Tensor) -> Tensor:
    """Mean square of R_n - R~_n over the N x N blocks; the gradient reaches W^P only.

    `pooled` (N, N) is the batch-and-head mean of the pooled map. The published loss averages the square over batch
    and heads; the two differ by the variance of R_n over batch and heads, which no parameter here can change, so
    the gradients are the same.
    """
    return F.mse_loss(parameter(), pooled.detach())


@torch.no_grad()
def generate_layout(scores: Tensor, density: float, block: int) -> BlockLayout:
    """The sparsity pattern generator: keeps the int(N^2 x density) largest entries of `scores` (R, C), as released.

    Ties go to the entry that comes first row by row, so that the same scores give the same layout on every device:
    R~ is symmetric, and where the count is odd one of two mirror entries is left out. No row is guaranteed a block.

    Raises:
        InputError: scores are not finite, density is outside (0, 1], or so small that no block is kept.
    """
    require(scores.dim() == 2, f"scores: wanted (block rows, block columns); got {tuple(scores.shape)}")
    require(bool(scores.isfinite().all()), "scores: wanted finite numbers; got NaN or infinity. Did training diverge?")
    require(0 < density <= 1, f"density: wanted more than 0 and at most 1; got {density}")
    kept = int(scores.numel() * density)
    require(
        kept > 0,
        f"density: {density} of {scores.numel()} blocks keeps none; wanted at least {1 / scores.numel():.3g}. "
        "Raise the density or lower the block size",
    )
    order = scores.flatten().sort(descending=True, stable=True).indices
    grid = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    grid[order[:kept]] = True
    return BlockLayout(grid.view_as(scores), block)


def random_layout(rows: int, columns: int, density: float, block: int, seed: int) -> BlockLayout:
    """int(rows x columns x density) blocks drawn without replacement: the control for every learned layout."""
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return generate_layout(scores, density, block)


def mass_kept(mean_map: Tensor, layout: BlockLayout) -> float:
    """Share of an attention map's (L, L) mass that lies in kept blocks of a layout that heads share, 0 to 1."""
    layout.check(1, *mean_map.shape)
    queries, keys = mean_map.shape
    kept = layout.entries(max(queries, keys))[:queries, :keys]
    return float(mean_map[kept].double().sum() / mean_map.double().sum())


def overlap(layout: BlockLayout, other: BlockLayout) -> float:
    """Share of `layout`'s blocks that `other` keeps too, 0 to 1."""
    return float((layout.grid & other.grid).sum() / layout.kept_blocks)
