"""Steps as CUDA graphs, and results that are read later."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sat_lib.training.cuda_graph import WARM_UP, Captured, Reading


class Result(NamedTuple):
    value: Tensor
    nothing: None
    many: list[Tensor]


@pytest.mark.gpu
def test_a_captured_function_gives_what_it_gives_by_itself_and_its_results_stay():
    device, calls = torch.device("cuda"), []

    def function(x, y):
        calls.append(1)
        return Result((x * y).sum(), None, [x + y])

    captured, kept = Captured(device), []
    for step in range(8):
        x, y = torch.full((5,), float(step), device=device), torch.arange(5.0, device=device)
        kept.append((captured(function, x, y), function(x, y)))
    assert len(calls) == 8 + WARM_UP + 1  # its own 8, the warm-up's and the capture's
    for got, wanted in kept:
        assert isinstance(got, Result) and got.nothing is None
        assert torch.equal(got.value, wanted.value) and torch.equal(got.many[0], wanted.many[0])


@pytest.mark.gpu
def test_gradients_that_it_leaves_follow_its_inputs_and_another_shape_begins_anew():
    weight = torch.ones(3, device="cuda", requires_grad=True)

    def function(x):
        weight.grad = None
        (weight * x.sum(0)).sum().backward()
        return weight.detach() * 1

    captured = Captured(torch.device("cuda"))
    for rows in (2, 2, 2, 2, 2, 5, 5, 5, 5, 5):
        x = torch.rand(rows, 3, device="cuda")
        captured(function, x)
        torch.testing.assert_close(weight.grad, x.sum(0))


def test_a_reading_is_what_the_tensor_was(device):
    tensor = torch.arange(6.0, dtype=torch.float64, device=device).view(2, 3)
    reading = Reading(tensor.clone())
    assert reading.values() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    (nothing,) = Reading(torch.tensor([float("nan")], device=device)).values()
    assert math.isnan(nothing)


@pytest.mark.gpu
def test_a_reading_waits_for_what_was_queued_before_it():
    x = torch.ones(4096, 4096, device="cuda")
    for _ in range(20):
        x = (x @ x).clamp(0, 1)  # tens of milliseconds
    assert Reading(x[0, :3]).values() == [1.0, 1.0, 1.0]
