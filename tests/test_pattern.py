import pytest
import torch

from sat_lib.errors import InputError
from sat_lib.layout import BlockLayout
from sat_lib.pattern import (
    SparsityParameter,
    generate_layout,
    global_window_layout,
    mass_kept,
    overlap,
    random_layout,
    sparsity_loss,
    strided_layout,
    window_layout,
)


def test_released_initialisation_is_uniform_on_zero_to_one():
    torch.manual_seed(0)
    weight = SparsityParameter(64, 512).weight
    assert 0 <= weight.min() < 0.001
    assert 0.999 < weight.max() < 1
    assert weight.mean().item() == pytest.approx(0.5, abs=0.01)
    assert SparsityParameter(32, 32)().mean().item() == pytest.approx(8, abs=0.5)


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


@pytest.mark.parametrize(("blocks", "density", "kept"), [(32, 0.05, 51), (32, 0.04, 40), (32, 0.08, 81), (4, 1.0, 16)])
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


def test_generator_refuses_what_it_cannot_use():
    with pytest.raises(InputError, match=r"0\.001 of 64 blocks keeps none; wanted at least 0\.0156"):
        generate_layout(torch.rand(8, 8), 0.001, 32)
    for density in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="density: wanted more than 0"):
            generate_layout(torch.rand(8, 8), density, 32)
    with pytest.raises(InputError, match="finite"):
        generate_layout(torch.full((8, 8), torch.nan), 0.5, 32)
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


def test_mass_and_overlap():
    mean_map = torch.zeros(6, 6)
    mean_map[:4, :4] = 3.0
    mean_map[4:, 4:] = 1.0
    corner = BlockLayout(torch.tensor([[True, False], [False, False]]), 4)
    diagonal = BlockLayout(torch.eye(2).bool(), 4)
    assert mass_kept(mean_map, corner) == pytest.approx(48 / 52)
    assert mass_kept(mean_map, diagonal) == pytest.approx(1.0)
    assert overlap(diagonal, corner) == 0.5
    assert overlap(corner, diagonal) == 1.0
