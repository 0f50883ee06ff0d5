"""When to leave the dense phase: skewness and stability of every layer's mean attention map."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import require


def skewness(values: Tensor) -> float:
    """Population third standardised moment of all values, in float64. 0 where they are all the same.

    Large when a few entries stand out of many small ones: the attention map has become sparse.
    """
    centred = values.double() - values.double().mean()
    variance = centred.square().mean()
    if variance <= torch.finfo(torch.float64).eps * values.double().square().mean():
        return 0.0
    return float(centred.pow(3).mean() / variance.pow(1.5))


def distance(mean_map: Tensor, previous: Tensor) -> float:
    """D_t, the Frobenius norm of the change of a map since the step before, in float64."""
    return float((mean_map.double() - previous.double()).norm())


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
    """

    theta: float
    delta: float
    maps: list[Tensor] = field(default_factory=list, repr=False)
    distances: list[float | None] = field(default_factory=list, repr=False)

    def update(self, mean_maps: list[Tensor]) -> tuple[bool, list[LayerTest]]:
        """Take this step's batch-and-head mean maps, (L, L) per layer; return whether to switch, and each layer's test.

        Raises:
            InputError: another number of layers than in the step before.
        """
        layers = len(mean_maps)
        require(not self.maps or len(self.maps) == layers, f"wanted maps of {len(self.maps)} layers; got {layers}")
        earlier = self.maps or [None] * layers
        before = self.distances or [None] * layers
        tests = [self._test(*layer) for layer in zip(mean_maps, earlier, before, strict=True)]
        self.maps, self.distances = list(mean_maps), [test.distance for test in tests]
        return all(test.passed for test in tests), tests

    def _test(self, mean_map: Tensor, earlier: Tensor | None, before: float | None) -> LayerTest:
        skew = skewness(mean_map)
        now = None if earlier is None else distance(mean_map, earlier)
        change = None if now is None or not before else abs(now - before) / before * 100
        passed = skew >= self.theta and change is not None and change < self.delta
        return LayerTest(skew, now, change, passed)

    def state_dict(self) -> dict:
        """What a resumed run needs: the maps and distances of the last step."""
        return {"maps": self.maps, "distances": self.distances}

    def load_state_dict(self, state: dict) -> None:
        self.maps, self.distances = list(state["maps"]), list(state["distances"])
