"""When to leave the dense phase, as published: by skewness and stability of every layer's mean attention map."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import require


def skewness(values: Tensor) -> Tensor:
    """Population third standardised moment over the last two axes, in float64. 0 where they are all the same.

    Large when a few entries stand out of many small ones: the attention map has become sparse.
    """
    values, axes = values.double(), (-2, -1)
    centred = values - values.mean(axes, keepdim=True)
    variance = centred.square().mean(axes)
    even = variance <= torch.finfo(torch.float64).eps * values.square().mean(axes)
    return torch.where(even, 0.0, centred.pow(3).mean(axes) / variance.pow(1.5))


def distance(mean_map: Tensor, previous: Tensor) -> Tensor:
    """D_t, the Frobenius norm over the last two axes of the change of a map since the step before, in float64."""
    return torch.linalg.matrix_norm(mean_map.double() - previous.double())


class LayerTest(NamedTuple):
    """One layer at one step; distance and change are None until there are two, and three, maps to compare."""

    skewness: float
    distance: float | None
    change_percent: float | None
    passed: bool


@dataclass
class TransitionRule:
    """The transition test, run on the maps of every training step.

    A layer passes when its skewness is at least `theta` and its distance has settled:
    |D_t - D_{t-1}| / D_{t-1} x 100 < `delta` percent. All layers must pass in the same step. Steps 0 and 1 cannot
    pass, for want of D_{t-1}; nor can a step after one in which the map stood still (D_{t-1} = 0).

    `update` does it all. On a GPU `measure` only queues work, so that other work can be queued before `judge` is given
    the numbers.
    """

    theta: float
    delta: float
    maps: Tensor | None = field(default=None, repr=False)  # (layers, L, L) of the step before
    distances: list[float | None] = field(default_factory=list, repr=False)

    def measure(self, mean_maps: Sequence[Tensor]) -> Tensor:
        """Take this step's batch-and-head mean maps, (L, L) per layer -> (2, layers) float64: skewness and distance.

        The first step has no distance: NaN.

        Raises:
            InputError: another number of layers than in the step before.
        """
        maps, layers = torch.stack(list(mean_maps)), len(mean_maps)
        known = layers if self.maps is None else len(self.maps)
        require(known == layers, f"wanted maps of {known} layers; got {layers}")
        skew = skewness(maps)
        moved = torch.full_like(skew, torch.nan) if self.maps is None else distance(maps, self.maps)
        self.maps = maps
        return torch.stack([skew, moved])

    def judge(self, measured: Sequence[Sequence[float]]) -> tuple[bool, list[LayerTest]]:
        """What `measure` gave, as numbers -> whether to switch, and each layer's test."""
        skews, moved = measured
        before, tests = self.distances or [None] * len(skews), []
        for skew, now, earlier in zip(skews, moved, before, strict=True):
            known = None if math.isnan(now) else now
            change = None if known is None or not earlier else abs(now - earlier) / earlier * 100
            passed = skew >= self.theta and change is not None and change < self.delta
            tests.append(LayerTest(skew, known, change, passed))
        self.distances = [test.distance for test in tests]
        return all(test.passed for test in tests), tests

    def update(self, mean_maps: Sequence[Tensor]) -> tuple[bool, list[LayerTest]]:
        """`measure` and `judge` at once."""
        return self.judge(self.measure(mean_maps).tolist())

    def state_dict(self) -> dict:
        """What a resumed run needs: the maps and distances of the last step."""
        return {"maps": self.maps, "distances": self.distances}

    def load_state_dict(self, state: dict) -> None:
        self.maps, self.distances = state["maps"], list(state["distances"])
