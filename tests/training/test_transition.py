import math

import numpy as np
import pytest
import scipy.stats
import torch

from sat_lib.common.errors import InputError
from sat_lib.training.transition import TransitionRule, distance, skewness


@pytest.mark.parametrize("seed", range(3))
def test_skewness_is_the_population_moment(seed):
    values = np.random.default_rng(seed).gamma(0.7, size=(40, 50))
    wanted = scipy.stats.skew(values.ravel(), bias=True)
    assert float(skewness(torch.tensor(values))) == pytest.approx(wanted, rel=1e-10)


def test_skewness_of_float32_maps_loses_nothing():
    values = (torch.rand(512, 512) ** 8 / 512).float()
    assert float(skewness(values)) == pytest.approx(scipy.stats.skew(values.double().numpy().ravel()), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 1 / 3, 1 / 1024])
def test_a_constant_map_has_no_skewness(value):
    assert float(skewness(torch.full((64, 64), value))) == 0.0


def test_distance_is_the_frobenius_norm():
    a, b = torch.randn(7, 9), torch.randn(7, 9)
    assert float(distance(a, b)) == pytest.approx(np.linalg.norm((a - b).double().numpy()))


def sparse_map(step):
    """A skewed map that moves by exactly `step` in Frobenius norm from the one at 0."""
    base = torch.zeros(16, 16, dtype=torch.float64)
    base[0, 0] = 1.0
    base[1, 1] += step
    return base


def run(rule, positions):
    """Maps at these positions; whether each step passed."""
    return [rule.update([sparse_map(position)])[0] for position in positions]


def test_steps_0_and_1_cannot_pass_and_step_2_can():
    assert run(TransitionRule(theta=1.0, delta=1.3), [0.0, 0.01, 0.02, 0.03]) == [False, False, True, True]


def test_change_is_relative_to_the_distance_before_in_percent():
    """Distances 0.010, 0.011: a change of 10 percent."""
    rule = TransitionRule(theta=1.0, delta=10.5)
    assert run(rule, [0.0, 0.010, 0.021]) == [False, False, True]
    rule = TransitionRule(theta=1.0, delta=9.5)
    assert run(rule, [0.0, 0.010, 0.021]) == [False, False, False]
    _, (test,) = rule.update([sparse_map(0.021 + 0.011)])
    assert test.change_percent == pytest.approx(0, abs=1e-6)
    assert test.distance == pytest.approx(0.011)


def test_delta_is_exclusive_and_theta_inclusive():
    positions = [0.0, 1.0, 3.0]  # distances 1, 2: a change of exactly 100 percent
    maps = [torch.tensor([[p, 0.0], [0.0, 0.0]], dtype=torch.float64) for p in positions]
    theta = float(skewness(maps[-1]))
    for delta, passes in ((100.0, False), (100.0001, True)):
        rule = TransitionRule(theta=theta, delta=delta)
        assert [rule.update([m])[0] for m in maps][-1] is passes
    rule = TransitionRule(theta=math.nextafter(theta, math.inf), delta=101)
    assert [rule.update([m])[0] for m in maps][-1] is False


def test_all_layers_have_to_pass_in_the_same_step():
    rule = TransitionRule(theta=1.0, delta=1.3)
    flat = torch.full((16, 16), 1 / 16, dtype=torch.float64)
    for position in (0.0, 0.01, 0.02):
        passed, tests = rule.update([sparse_map(position), flat + position * torch.eye(16)])
    assert tests[0].passed
    assert passed == tests[1].passed == (tests[1].skewness >= 1.0)
    rule = TransitionRule(theta=1.0, delta=1.3)
    for position in (0.0, 0.01, 0.02):
        passed, tests = rule.update([sparse_map(position), flat])
    assert (passed, tests[0].passed, tests[1].passed) == (False, True, False)


def test_a_map_that_stands_still_does_not_divide_by_zero():
    assert run(TransitionRule(theta=1.0, delta=1.3), [0.0, 0.0, 0.0, 0.01]) == [False] * 4


def test_nan_maps_never_pass():
    rule = TransitionRule(theta=0.0, delta=1e9)
    assert [rule.update([torch.full((4, 4), torch.nan)])[0] for _ in range(4)] == [False] * 4


def test_state_goes_on_where_it_stopped():
    positions = [0.0, 0.010, 0.021, 0.033, 0.0451]
    whole = TransitionRule(theta=1.0, delta=9.0)
    wanted = run(whole, positions)
    first, second = TransitionRule(theta=1.0, delta=9.0), TransitionRule(theta=1.0, delta=9.0)
    got = run(first, positions[:2])
    second.load_state_dict(first.state_dict())
    assert got + run(second, positions[2:]) == wanted


def test_another_number_of_layers_is_refused():
    rule = TransitionRule(theta=1.0, delta=1.3)
    rule.update([sparse_map(0)])
    with pytest.raises(InputError, match="maps of 1 layers; got 2"):
        rule.update([sparse_map(0), sparse_map(0)])
