"""The numbers said of attention maps, against loops over entries and maps made to have them."""

import math

import pytest
import torch

from sat_lib.common.errors import InputError
from sat_lib.maps import describe, offset_profile, patch_maps, stride_mass, stride_peak


def maps_with_padding():
    """(3, 2, 24, 24) maps, the second and third example with padding, whose keys weigh 0."""
    torch.manual_seed(0)
    real = torch.ones(3, 24, dtype=torch.bool)
    real[1, 20:] = real[2, 5:] = False
    scores = 3 * torch.randn(3, 2, 24, 24, dtype=torch.float64)
    return scores.masked_fill(~real[:, None, None], -math.inf).softmax(-1), real


def brute_force(attention, real):
    """`describe` of one map, entry by entry."""
    length, tokens = len(attention), [place for place in range(len(real)) if real[place]]
    entries = [float(attention[i, j]) for i in tokens for j in range(length)]
    inner = [float(attention[i, j]) for i in tokens for j in tokens]
    near = [float(attention[i, j]) for i in tokens for j in tokens if abs(i - j) <= 1]
    return {
        "small_share": sum(x < 1 / (10 * length) for x in entries) / len(entries),
        "small_share_real": sum(x < 1 / (10 * len(tokens)) for x in inner) / len(inner),
        "top5_mass": sum(sorted(entries)[-int(0.05 * len(entries)) :]) / len(tokens),
        "diagonal_mass": sum(near) / len(tokens),
        "diagonal_share": len(near) / len(inner),
        "padding_mass": (sum(entries) - sum(inner)) / len(tokens),
        "padding_share": 1 - len(tokens) / length,
    }


def test_describe_against_brute_force():
    maps, real = maps_with_padding()
    maps[1, 0, 3, 22] = 0.25  # some mass on padding, to be seen
    found = describe(maps, real)
    for example in range(3):
        for head in range(2):
            for name, wanted in brute_force(maps[example, head], real[example]).items():
                assert float(found[name][example, head]) == pytest.approx(wanted, abs=1e-12), name


def test_describe_without_padding():
    maps, _ = maps_with_padding()
    wanted, found = describe(maps, torch.ones(3, 24, dtype=torch.bool)), describe(maps)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert float(found["padding_share"].max()) == 0


def test_uniform_maps():
    found = describe(torch.full((1, 1, 40, 40), 1 / 40))
    assert float(found["small_share"]) == 0
    assert float(found["top5_mass"]) == pytest.approx(0.05)
    assert float(found["diagonal_mass"]) == pytest.approx(float(found["diagonal_share"]))


def image_maps(width, local=0.5):
    """Maps of a width x width grid in which a patch looks at itself and at the patch above and below."""
    place = torch.arange(width * width)
    away = (place[:, None] - place).abs()
    scores = torch.where(away == 0, 3.0, torch.where(away == width, 2.0, 0.0)) + local * torch.exp(-away / width)
    return scores.double().softmax(-1)[None, None]


def test_stride_mass_is_that_of_the_column():
    maps = image_maps(6)
    mass, share = stride_mass(maps, 6)
    wanted = sum(float(maps[0, 0, i, j]) for i in range(36) for j in range(36) if i != j and i % 6 == j % 6) / 36
    assert float(mass) == pytest.approx(wanted)
    assert share == pytest.approx(36 * 5 / 36**2)
    assert wanted > 1.5 * share


@pytest.mark.parametrize("width", [6, 8, 16])
def test_stride_peak_is_the_grid_width(width):
    lag, height = stride_peak(offset_profile(image_maps(width)), most=3 * width // 2)
    assert lag == width and height > 0.1


def test_no_stride_no_peak():
    place = torch.arange(64)
    smooth = (-(place[:, None] - place).abs() / 8).double().exp()
    assert stride_peak(offset_profile((smooth / smooth.sum(1, keepdim=True))[None, None]))[1] < 0.05


def test_nothing_but_rounding_has_no_period():
    fall = (-torch.arange(64, dtype=torch.float64) / 9).exp()
    assert stride_peak(fall) == (0, 0.0)
    assert stride_peak(1 + 1e-9 * torch.randn(64, dtype=torch.float64)) == (0, 0.0)


def test_small_grids():
    lag, _ = stride_peak(offset_profile(image_maps(4)), most=8)
    assert lag == 4


def test_offset_profile_by_hand():
    maps = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])[None, None]
    profile = offset_profile(maps)
    torch.testing.assert_close(profile, torch.tensor([2.5 / 3, 0.5 / 4, 0.0], dtype=torch.float64) / (3 / 9))


def test_patch_maps_leave_the_class_token_out():
    maps = torch.rand(2, 3, 37, 37)
    assert torch.equal(patch_maps(maps, 6), maps[:, :, 1:, 1:])
    with pytest.raises(InputError, match="a grid of 7 x 7 patches wants 49 tokens or more; got 37"):
        patch_maps(maps, 7)


def test_shapes_are_checked():
    with pytest.raises(InputError, match=r"maps: wanted \(B, H, L, L\)"):
        describe(torch.rand(3, 4, 5))
    with pytest.raises(InputError, match="real: wanted bool"):
        describe(torch.rand(1, 1, 4, 4), torch.ones(1, 4))
    with pytest.raises(InputError, match="with a real token in each row"):
        describe(torch.rand(1, 1, 4, 4), torch.zeros(1, 4, dtype=torch.bool))
