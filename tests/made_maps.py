"""Attention maps and scores drawn at random, for tests of what is said of maps."""

import torch


def random_maps(length, examples=2, layers=1, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(examples, layers, heads, length, length, generator=generator)).softmax(-1)


def symmetric(blocks, seed=1):
    scores = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(seed))
    return scores + scores.T
