"""Rules that yield layouts: R~ = W^P (W^P)^T with its loss and generator, static patterns; and diagnostics."""

from collections.abc import Iterable, Sequence

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


LOSS_WEIGHT = 0.01  # per layer, of the sparsity losses beside the task loss, as released


def sparsity_loss(parameter: SparsityParameter, pooled: Tensor) -> Tensor:
    """Mean square of R_n - R~_n over the N x N blocks; the gradient reaches W^P only.

    `pooled` (N, N) is the batch-and-head mean of the pooled map. The published loss averages the square over batch
    and heads; the two differ by the variance of R_n over batch and heads, which no parameter here can change, so
    the gradients are the same.
    """
    return F.mse_loss(parameter(), pooled.detach())


def model_sparsity_loss(parameters: Iterable[SparsityParameter], pooled: Iterable[Tensor]) -> Tensor:
    """The sum of `sparsity_loss` over the layers, without its weight: `LOSS_WEIGHT` x layers."""
    return sum(sparsity_loss(parameter, target) for parameter, target in zip(parameters, pooled, strict=True))


def freeze(
    parameters: Sequence[SparsityParameter], layouts: Sequence[BlockLayout], heads: int, length: int
) -> list[BlockLayout]:
    """End the learning of W^P: the layouts, one per layer, on the parameters' device, for the sparse phase.

    Raises:
        InputError: another number of layouts, or one that doesn't fit the heads or the length. Nothing is frozen then.
    """
    require(
        len(layouts) == len(parameters),
        f"layouts: wanted {len(parameters)}, one per layer; got {len(layouts)}",
    )
    for layout in layouts:
        layout.check(heads, length, length)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.weight.grad = None
    return [layout.to(parameter.weight.device) for layout, parameter in zip(layouts, parameters, strict=True)]


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


# ---- static patterns: layouts for study, and of the baselines --------------------------------------------------------


def random_layout(rows: int, columns: int, density: float, block: int, seed: int) -> BlockLayout:
    """int(rows x columns x density) blocks drawn without replacement: the control for every learned layout."""
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return generate_layout(scores, density, block)


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


# ---- diagnostics -----------------------------------------------------------------------------------------------------


def mass_kept(mean_map: Tensor, layout: BlockLayout) -> float:
    """Share of an attention map's (L, L) mass that lies in kept blocks of a layout that heads share, 0 to 1."""
    layout.check(1, *mean_map.shape)
    queries, keys = mean_map.shape
    kept = layout.entries(max(queries, keys))[:queries, :keys]
    return float(mean_map[kept].double().sum() / mean_map.double().sum())


def overlap(layout: BlockLayout, other: BlockLayout) -> float:
    """Share of `layout`'s blocks that `other` keeps too, 0 to 1."""
    return float((layout.grid & other.grid).sum() / layout.kept_blocks)
