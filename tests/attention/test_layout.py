import pytest
import torch

from sat_lib.attention.layout import BlockLayout
from sat_lib.common.errors import InputError


def random_grid(*shape, keep=0.3, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < keep


def lists(offsets, entries):
    return [entries[a:b].tolist() for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 6), (1, 1)])
def test_row_and_column_lists_hold_exactly_the_kept_blocks(shape):
    grid = random_grid(*shape, keep=0.4)
    layout = BlockLayout(grid, 16)
    patterns = grid.reshape(-1, *grid.shape[-2:])
    rows = [row.nonzero().flatten().tolist() for pattern in patterns for row in pattern]
    columns = [column.nonzero().flatten().tolist() for pattern in patterns for column in pattern.T]
    assert lists(layout.row_offsets, layout.row_columns) == rows
    assert lists(layout.column_offsets, layout.column_rows) == columns
    assert layout.kept_blocks == int(grid.sum())
    assert layout.density == pytest.approx(grid.float().mean().item())
    for name in ("row_offsets", "row_columns", "column_offsets", "column_rows", "column_to_row"):
        assert getattr(layout, name).dtype == torch.int32


def test_column_to_row_finds_each_block_in_the_row_lists():
    grid = random_grid(2, 6, 5)
    layout = BlockLayout(grid, 8)
    in_row_order = grid.nonzero()
    columns_of = torch.repeat_interleave(torch.arange(10), layout.column_offsets.diff().long())
    for place, target in enumerate(layout.column_to_row.tolist()):
        pattern, row, column = in_row_order[target].tolist()
        assert (pattern * 5 + column, row) == (columns_of[place].item(), layout.column_rows[place].item())


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_nothing_and_everything(keep):
    layout = BlockLayout(random_grid(4, 4, keep=keep), 32)
    assert layout.density == keep
    assert layout.row_offsets[-1] == layout.column_offsets[-1] == layout.kept_blocks


def test_is_immutable_and_independent_of_the_grid_it_came_from():
    grid = random_grid(4, 4)
    layout = BlockLayout(grid, 32)
    before = layout.grid.clone()
    grid.fill_(True)
    assert torch.equal(layout.grid, before)
    with pytest.raises(AttributeError):
        layout.block = 16


def test_entries_spread_blocks_and_stop_at_the_length():
    layout = BlockLayout(torch.tensor([[True, False], [False, True]]), 4)
    entries = layout.entries(6)
    assert entries.shape == (6, 6)
    assert entries.sum() == 16 + 4
    assert entries[4:, 4:].all()
    assert not entries[:4, 4:].any()


def test_equality_follows_grid_and_block():
    grid = random_grid(4, 4)
    assert BlockLayout(grid, 32) == BlockLayout(grid.clone(), 32)
    assert BlockLayout(grid, 32) != BlockLayout(grid, 16)
    assert BlockLayout(grid, 32) != BlockLayout(~grid, 32)


@pytest.mark.parametrize("grid", [torch.ones(4, 4), torch.ones(4).bool(), torch.ones(0, 4).bool(), [[True]]])
def test_refuses_a_grid_that_is_none(grid):
    with pytest.raises(InputError, match="grid: wanted a bool tensor"):
        BlockLayout(grid, 32)


@pytest.mark.parametrize("block", [0, -1, 1.5])
def test_refuses_a_block_that_is_none(block):
    with pytest.raises(InputError, match="block: wanted a positive integer"):
        BlockLayout(torch.ones(2, 2).bool(), block)


def test_check_names_the_grid_that_a_length_wants():
    layout = BlockLayout(torch.ones(2, 3, 3).bool(), 32)
    layout.check(2, 96, 65)
    with pytest.raises(InputError, match="want a grid of 4 x 3 blocks; got 3 x 3"):
        layout.check(2, 97, 96)
    with pytest.raises(InputError, match="each of 4 heads; got patterns for 2"):
        layout.check(4, 96, 96)
