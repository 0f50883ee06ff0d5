"""Which blocks of the attention map are kept: an immutable index over a boolean block grid."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..common.errors import require


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The kept blocks of an attention map, listed by block row and by block column.

    A map of Lq queries by Lk keys is cut into R x C blocks of `block` x `block` entries, R = ceil(Lq / block) and
    C = ceil(Lk / block); the last row and column of blocks may be partial. Everything is built once from the grid.

    Args:
        grid: (R, C) bool, one pattern for all heads, or (H, R, C) bool, one per head. True keeps a block.
        block: entries per block side, at least 1.

    Attributes (G = 1 for a shared pattern, H for one per head; n = kept blocks over all G patterns):
        row_offsets: (G * R + 1,) int32. Block row r of pattern g keeps blocks `row_offsets[g*R + r]` up to the next.
        row_columns: (n,) int32, the block column of each kept block, ascending within its row.
        column_offsets: (G * C + 1,) int32, the same for block columns.
        column_rows: (n,) int32, the block row of each kept block, column by column.
        column_to_row: (n,) int32, where the kept block at each place of the column lists stands in the row lists.

    Raises:
        InputError: the grid is not a bool tensor of 2 or 3 non-empty axes, or `block` is not positive.
    """

    grid: Tensor
    block: int
    row_offsets: Tensor = field(init=False, repr=False)
    row_columns: Tensor = field(init=False, repr=False)
    column_offsets: Tensor = field(init=False, repr=False)
    column_rows: Tensor = field(init=False, repr=False)
    column_to_row: Tensor = field(init=False, repr=False)
    kept_blocks: int = field(init=False)
    _derived: dict = field(init=False, repr=False, default_factory=dict)

    @torch.inference_mode(False)  # the lists have to serve training too
    def __post_init__(self):
        grid, block = self.grid, self.block
        require(
            isinstance(grid, Tensor) and grid.dtype == torch.bool and grid.dim() in (2, 3) and grid.numel() > 0,
            "grid: wanted a bool tensor (rows, columns) or (heads, rows, columns), none of them 0; got "
            + (f"{grid.dtype} {tuple(grid.shape)}" if isinstance(grid, Tensor) else type(grid).__name__)
            + ". A 0/1 grid becomes one with grid.bool()",
        )
        require(isinstance(block, int) and block >= 1, f"block: wanted a positive integer; got {block!r}")
        grid = grid.detach().clone()
        kept = grid.reshape(-1, *grid.shape[-2:])
        column_lists = kept.transpose(1, 2).nonzero()  # (n, 3): pattern, column, row
        places = torch.zeros(kept.shape, dtype=torch.int32, device=grid.device)
        places[kept] = torch.arange(int(kept.sum()), dtype=torch.int32, device=grid.device)
        pattern, column, row = column_lists.unbind(1)
        for name, value in {
            "grid": grid,
            "row_offsets": _offsets(kept.sum(2)),
            "row_columns": kept.nonzero()[:, 2].int(),
            "column_offsets": _offsets(kept.sum(1)),
            "column_rows": row.int(),
            "column_to_row": places[pattern, row, column],
            "kept_blocks": len(row),
        }.items():
            object.__setattr__(self, name, value)

    @classmethod
    def full(cls, rows: int, columns: int, block: int) -> "BlockLayout":
        """The layout that keeps everything: block-sparse attention under it is dense attention."""
        return cls(torch.ones(rows, columns, dtype=torch.bool), block)

    @property
    def rows(self) -> int:
        """Block rows R."""
        return self.grid.shape[-2]

    @property
    def columns(self) -> int:
        """Block columns C."""
        return self.grid.shape[-1]

    @property
    def heads(self) -> int | None:
        """Number of heads with a pattern of their own, or None where all heads share one."""
        return self.grid.shape[0] if self.grid.dim() == 3 else None

    @property
    def density(self) -> float:
        """Kept blocks / all blocks, over all heads."""
        return self.kept_blocks / self.grid.numel()

    @property
    def empty_rows(self) -> int:
        """Block rows without a kept block, over all heads."""
        return int((~self.grid.any(-1)).sum())

    @property
    def device(self) -> torch.device:
        return self.grid.device

    def to(self, device: torch.device | str) -> "BlockLayout":
        """The same layout on another device; itself where it is there already."""
        moved = self.grid.to(device)
        return self if moved.device == self.grid.device else BlockLayout(moved, self.block)

    @torch.inference_mode(False)
    def derived(self, key: tuple, make: Callable[[], Any]) -> Any:
        """`make()`, called once per key: what an implementation derives from the layout, kept as long as it lives."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def entries(self, length: int) -> Tensor:
        """(L, L) or (H, L, L) bool: the layout spread over single entries, the last blocks cut off at L."""
        spread = self.grid.repeat_interleave(self.block, -2).repeat_interleave(self.block, -1)
        return spread[..., :length, :length]

    def check(self, heads: int, queries: int, keys: int) -> None:
        """Raise InputError unless the layout fits `heads` heads and a map of `queries` x `keys` entries."""
        wanted = (-(-queries // self.block), -(-keys // self.block))
        require(
            (self.rows, self.columns) == wanted,
            f"layout: {queries} queries and {keys} keys in blocks of {self.block} want a grid of "
            f"{wanted[0]} x {wanted[1]} blocks; got {self.rows} x {self.columns}. Build it for this length and block",
        )
        require(
            self.heads in (None, heads),
            f"layout: wanted one pattern, or one for each of {heads} heads; got patterns for {self.heads} heads",
        )

    def __eq__(self, other):
        if not isinstance(other, BlockLayout):
            return NotImplemented
        return self.block == other.block and torch.equal(self.grid, other.grid.to(self.device))

    def __hash__(self):
        return hash((self.block, tuple(self.grid.shape), self.kept_blocks))


def _offsets(counts: Tensor) -> Tensor:
    """(G, lists) counts -> (G * lists + 1,) int32 running sums from 0."""
    flat = counts.reshape(-1)
    return torch.cat([flat.new_zeros(1), flat.cumsum(0)]).int()
