"""Means of attention maps against maps that are written out; what a layout keeps of a map."""

import math

import pytest
import torch
from attention_cases import definition, inputs, layouts, padding_mask

from sat_lib.attention.layout import BlockLayout
from sat_lib.attention.statistics import attention_statistics, mass_kept, overlap, sparse_statistics


@pytest.mark.parametrize("mask", ["none", "ragged"])
def test_statistics_equal_the_means_of_the_maps(mask, device):
    q, k, _ = inputs(50, 50, device)
    mask = padding_mask(mask, 3, 50, 16)
    mask = None if mask is None else mask.to(device)
    seen = attention_statistics(q, k, 16, key_padding_mask=mask)
    everything = BlockLayout.full(4, 4, 16).to(device)
    _, attention = definition(q, k, k, everything, mask, "drop")
    mean = attention.mean((0, 1))
    torch.testing.assert_close(seen.mean_map, mean.detach())
    for row in range(4):
        for column in range(4):
            block = mean[row * 16 : (row + 1) * 16, column * 16 : (column + 1) * 16]
            torch.testing.assert_close(seen.pooled[row, column], block.mean().detach())
    assert not seen.mean_map.requires_grad


def test_statistics_do_not_depend_on_the_chunks_they_are_summed_in():
    q, k, _ = inputs(512, 512, batch=20, dtype=torch.float32)  # several chunks of 2^24 scores
    whole = ((q @ k.transpose(-1, -2)) / math.sqrt(8)).softmax(-1).mean((0, 1))
    torch.testing.assert_close(attention_statistics(q, k, 32).mean_map, whole.detach())


@pytest.mark.parametrize("name", ["random", "per head", "nothing"])
def test_sparse_statistics_equal_the_means_of_the_sparse_maps(name):
    layout = layouts(4, 4, 16, 2)[name]
    q, k, v = inputs(50, 50)
    seen = sparse_statistics(q, k, layout)
    mean = definition(q, k, v, layout)[1].mean((0, 1))
    torch.testing.assert_close(seen.mean_map, mean.detach())


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
