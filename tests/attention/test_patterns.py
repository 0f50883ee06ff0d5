from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sat_lib.attention.patterns import BUDGETS, generate_layout
from sat_lib.attention.static_patterns import (
    global_window_layout,
    nearness,
    random_layout,
    strided_layout,
    window_layout,
)
from sat_lib.common.errors import InputError
from sat_lib.experiments.ablations import diagnose, nearest_form
from sat_lib.model.sparsity import SparsityParameter, sparsity_loss


def test_released_initialisation_is_uniform_on_zero_to_one():
    torch.manual_seed(0)
    weight = SparsityParameter(64, 512).weight
    assert 0 <= weight.min() < 0.001
    assert 0.999 < weight.max() < 1
    assert weight.mean().item() == pytest.approx(0.5, abs=0.01)
    assert SparsityParameter(32, 32)().mean().item() == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize(("blocks", "width"), [(32, 32), (16, 64)])
def test_calibrated_initialisation_starts_the_map_near_one_with_small_differences(blocks, width):
    torch.manual_seed(0)
    entries = SparsityParameter(blocks, width, "calibrated")().detach()
    assert entries.mean().item() == pytest.approx(1, rel=0.02)
    assert 0.005 < entries.std() < 0.05
    assert 0.8 < entries.min() < entries.max() < 1.2


def test_the_map_is_the_symmetric_product():
    parameter = SparsityParameter(6, 4)
    torch.testing.assert_close(parameter(), parameter.weight @ parameter.weight.T)
    assert torch.equal(parameter(), parameter().T)
    with torch.autocast("cpu", torch.bfloat16):
        assert parameter().dtype == torch.float32


def test_loss_has_the_gradient_of_the_mean_over_batch_and_heads_and_reaches_the_parameter_alone():
    torch.manual_seed(0)
    pooled = torch.rand(5, 2, 6, 6, dtype=torch.float64, requires_grad=True)  # (B, H, N, N)
    parameter = SparsityParameter(6, 4).double()
    spelled_out = ((pooled - parameter()) ** 2).mean()
    (wanted,) = torch.autograd.grad(spelled_out, parameter.weight)
    loss = sparsity_loss(parameter, pooled.mean((0, 1)))
    (got,) = torch.autograd.grad(loss, parameter.weight, retain_graph=True)
    torch.testing.assert_close(got, wanted)
    loss.backward()
    assert pooled.grad is None


def test_calibrated_multiplies_the_target_by_the_length_and_released_leaves_it():
    torch.manual_seed(0)
    pooled = torch.rand(6, 6)
    for init, length, scale in (("calibrated", 7, 7), ("calibrated", None, 1), ("released", 7, 1)):
        parameter = SparsityParameter(6, 4, init, length)
        wanted = (scale * pooled - parameter()).square().mean().item()
        assert sparsity_loss(parameter, pooled).item() == pytest.approx(wanted)
        assert sparsity_loss(parameter, parameter().detach() / parameter.scale).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(
    ("blocks", "density", "kept"), [(32, 0.05, 51), (32, 0.04, 40), (32, 0.08, 81), (4, 1.0, 16), (49, 1 / 49, 49)]
)
def test_generator_keeps_the_published_number_of_blocks(blocks, density, kept):
    layout = generate_layout(torch.randn(blocks, blocks), density, 32)
    assert layout.kept_blocks == kept


def test_generator_keeps_the_largest():
    scores = torch.tensor([[1.0, 5.0], [4.0, 2.0]])
    assert torch.equal(generate_layout(scores, 0.5, 8).grid, torch.tensor([[False, True], [True, False]]))


def test_ties_go_to_the_first_entry_row_by_row():
    assert torch.equal(generate_layout(torch.ones(2, 2), 0.75, 8).grid, torch.tensor([[True, True], [True, False]]))
    parameter = SparsityParameter(32, 32)
    first = generate_layout(parameter(), 0.05, 32)
    assert all(first == generate_layout(parameter(), 0.05, 32) for _ in range(3))


def kept_of(scores, kept, budget):
    """The grid of a layout of so many blocks a head."""
    blocks = scores.shape[-2] * scores.shape[-1]
    return generate_layout(scores, min(1, (kept + 0.5) / blocks), 8, budget).grid


def test_rows_budget_keeps_the_largest_of_each_row_and_as_many_from_all():
    torch.manual_seed(0)
    scores = torch.randn(6, 9)
    grid = kept_of(scores, 18, "rows")
    assert torch.equal(grid, torch.zeros(6, 9).bool().scatter(1, scores.topk(3).indices, True))
    fourth, columns = (part[:, 3] for part in scores.topk(4))
    rows = fourth.topk(2).indices  # two are left over for a fourth round: they go to its largest
    grid[rows, columns[rows]] = True
    assert torch.equal(kept_of(scores, 20, "rows"), grid)


def assignments(blocks, without=frozenset()):
    """Every choice of one column a row, none twice and no entry of `without`: sets of (row, column)."""
    every = (set(enumerate(order)) for order in permutations(range(blocks)))
    return [some for some in every if not some & without]


def entries(grid):
    return set(map(tuple, grid.nonzero().tolist()))


@pytest.mark.parametrize("seed", range(5))
def test_balanced_budget_takes_the_assignments_of_highest_sum_one_after_another(seed):
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
    total = lambda some: sum(scores[at].item() for at in some)
    first = max(assignments(4), key=total)
    assert entries(generate_layout(scores, 1 / 4, 8, "balanced").grid) == first
    second = max(assignments(4, without=first), key=total)
    assert entries(kept_of(scores, 8, "balanced")) == first | second
    best = sorted(second, key=lambda at: scores[at].item())[-2:]  # of a round for which two are left over
    assert entries(kept_of(scores, 6, "balanced")) == first | set(best)


@pytest.mark.parametrize("kept", [3, 12, 17, 36, 53, 144])
def test_balanced_budget_gives_rows_and_columns_numbers_that_differ_by_one_at_most(kept):
    grid = kept_of(torch.randn(12, 12, generator=torch.Generator().manual_seed(kept)), kept, "balanced")
    assert grid.sum() == kept
    for axis in (0, 1):
        assert set(grid.sum(axis).tolist()) == {kept // 12, -(-kept // 12)}


@pytest.mark.parametrize("budget", BUDGETS)
def test_density_one_keeps_everything_for_every_head(budget):
    for shape in ((5, 5), (3, 5, 5)):
        assert generate_layout(torch.randn(shape), 1.0, 8, budget).grid.all()
    assert budget == "balanced" or generate_layout(torch.randn(3, 7), 1.0, 8, budget).grid.all()


def test_ties_are_broken_the_same_way_every_time_under_every_budget():
    some = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    for budget in BUDGETS:
        for scores in (torch.ones(32, 32), some[0], some):
            first = kept_of(scores, 200, budget)
            assert all(torch.equal(first, kept_of(scores.clone(), 200, budget)) for _ in range(3))
    order = sorted(range(1024), key=lambda at: (-some[0].flatten()[at], at))  # row by row
    assert entries(kept_of(some[0], 200, "blocks")) == {divmod(at, 32) for at in order[:200]}
    tall = torch.randint(0, 3, (300, 4), generator=torch.Generator().manual_seed(0)).float()
    columns = [sorted(range(4), key=lambda column: (-row[column], column)) for row in tall.tolist()]
    last = sorted(range(300), key=lambda row: (-tall[row, columns[row][1]].item(), row))[:80]
    wanted = {(row, column) for row in range(300) for column in columns[row][: 2 if row in last else 1]}
    assert entries(kept_of(tall, 380, "rows")) == wanted


@pytest.mark.parametrize("budget", BUDGETS)
def test_heads_are_dealt_blocks_that_no_other_has_as_long_as_there_are_any(budget):
    scores = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(1))
    scores[1] = scores[0]
    grid = generate_layout(scores, 1 / 4, 8, budget).grid
    assert grid.sum((1, 2)).tolist() == [4] * 6
    assert grid[:4].sum(0).eq(1).all()
    alone = lambda head: generate_layout(scores[head], 1 / 4, 8, budget).grid
    for head in (0, 4, 5):  # the first takes its best; with all taken, the others theirs
        assert torch.equal(grid[head], alone(head))
    assert torch.equal(generate_layout(scores[:1], 1 / 4, 8, budget).grid[0], alone(0))
    even = generate_layout(torch.ones(4, 4, 4), 1 / 4, 8, budget).grid
    assert even.sum(0).eq(1).all()


def test_a_head_for_which_too_few_blocks_are_left_takes_them_and_its_own_best():
    scores = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(2))
    first, second = kept_of(scores, 10, "blocks")
    assert second[~first].all()
    shared = first & second
    assert scores[1][shared].min() > scores[1][first & ~second].max()
    assert shared.sum() == 4


@pytest.mark.parametrize("blocks", [8, 32])
def test_nearness_gives_the_diagonal_to_the_first_head_and_its_neighbours_to_the_second(blocks):
    scores = nearness(blocks).float().expand(2, -1, -1)
    first, second = generate_layout(scores, 1 / blocks, 8, "balanced").grid
    assert torch.equal(first, torch.eye(blocks).bool())
    assert all(abs(row - column) == 1 for row, column in entries(second))
    assert second.sum(0).eq(1).all() and second.sum(1).eq(1).all()


def test_generator_refuses_what_it_cannot_use():
    with pytest.raises(InputError, match=r"0\.001 of 64 blocks keeps none; wanted at least 0\.0156"):
        generate_layout(torch.rand(8, 8), 0.001, 32)
    for density in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="density: wanted more than 0"):
            generate_layout(torch.rand(8, 8), density, 32)
    with pytest.raises(InputError, match="finite"):
        generate_layout(torch.full((8, 8), torch.nan), 0.5, 32)
    with pytest.raises(InputError, match=r"budget: wanted one of \['balanced', 'blocks', 'rows'\]; got 'columns'"):
        generate_layout(torch.rand(8, 8), 0.5, 32, "columns")
    with pytest.raises(InputError, match="'balanced' wants as many block rows as columns; got 4 x 8"):
        generate_layout(torch.rand(2, 4, 8), 0.5, 32, "balanced")
    with pytest.raises(
        InputError, match=r"scores: wanted \(\[heads,\] block rows, block columns\); got \(1, 2, 8, 8\)"
    ):
        generate_layout(torch.rand(1, 2, 8, 8), 0.5, 32)
    with pytest.raises(InputError, match="init: wanted one of"):
        SparsityParameter(8, 8, "xavier")


def test_random_layout_is_repeatable_and_of_the_density_asked_for():
    assert random_layout(16, 16, 0.25, 8, seed=1) == random_layout(16, 16, 0.25, 8, seed=1)
    assert random_layout(16, 16, 0.25, 8, seed=1) != random_layout(16, 16, 0.25, 8, seed=2)
    assert random_layout(16, 16, 0.25, 8, seed=1).kept_blocks == 64


def grid(*rows):
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def test_static_patterns():
    assert torch.equal(window_layout(4, 0, 8).grid, torch.eye(4).bool())
    assert torch.equal(window_layout(4, 1, 8).grid, grid("xx..", "xxx.", ".xxx", "..xx"))
    assert torch.equal(global_window_layout(4, 0, 1, 8).grid, grid("xxxx", "xx..", "x.x.", "x..x"))
    image = grid("xxx...", "xxx...", "xxx...", "...xxx", "...xxx", "...xxx") | torch.eye(6).roll(3, 0).bool()
    assert torch.equal(strided_layout(6, 3, 8).grid, image)
    assert {window_layout(4, 1, 8).block, global_window_layout(4, 1, 1, 8).block, strided_layout(6, 3, 8).block} == {8}
    assert window_layout(32, 1, 32).kept_blocks == 94
    with pytest.raises(InputError, match="stride: wanted 2 or more blocks to an image row; got 1"):
        strided_layout(4, 1, 32)


def test_diagnosis_of_a_map_by_hand():
    scores = torch.tensor([[9.0, 8, 0], [7, 1, 0], [0, 0, 2]])
    pooled = torch.tensor([[6.0, 0, 5], [0, 4, 0], [0, 0, 2]]) / 100
    seen = diagnose(scores, pooled, 0.25, width=3)  # two blocks: (0, 0) and (0, 1) of the scores, (0, 0) and (0, 2)
    assert seen == {
        "correlation": pytest.approx(np.corrcoef(scores.flatten(), pooled.flatten())[0, 1]),
        "scale": pytest.approx(27 / 0.17),
        "mass_kept": pytest.approx(6 / 17),
        "best_mass": pytest.approx(11 / 17),
        "form_mass": pytest.approx(10 / 17),  # (0, 2) shares its 5 with its mirror entry, and (1, 1) comes before it
        "overlap": 0.5,
        "diagonal": 0.5,
        "empty_rows": 2,
    }
    # Of one column, W^P can be but (0, 0), (0, 2), (2, 0) and (2, 2), and two mirror entries are even.
    assert diagnose(scores, pooled, 0.34, width=1)["form_mass"] == pytest.approx(11 / 17)
    best = diagnose(pooled, pooled, 0.25, width=3)
    assert (best["correlation"], best["scale"], best["overlap"]) == (pytest.approx(1), pytest.approx(1), 1)
    assert (best["mass_kept"], best["empty_rows"]) == (best["best_mass"], 2)


@pytest.mark.parametrize("width", [1, 3, 8, 20])
def test_nearest_form_is_the_nearest_of_all_products_of_a_matrix_with_itself(width):
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    target = draw(8, 8) + 0.5
    form = nearest_form(target, width)
    torch.testing.assert_close(form, form.T, rtol=0, atol=1e-12)
    values, vectors = torch.linalg.eigh(form)
    assert values.min() > -1e-12
    assert (values > 1e-9).sum() <= width
    torch.testing.assert_close(nearest_form(form, width), form)
    distance = lambda x: (x - target).norm()
    factor = F.pad(vectors * values.clamp(min=0).sqrt(), (max(0, width - 8), 0))[:, -width:]
    torch.testing.assert_close(factor @ factor.T, form)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(50):
            for start in (factor, 0):
                other = start + size * draw(8, width)
                assert distance(form) < distance(other @ other.T)
    product = draw(8, width)
    torch.testing.assert_close(nearest_form(product @ product.T, width), product @ product.T)
