"""What the figure of a training run says of its kept blocks."""

import numpy as np
import pandas as pd
import pytest

from sat_lib.figures import training


@pytest.fixture
def maps() -> dict:
    """Two layers of 2 x 2 blocks, of which one is kept: the largest, and a small one."""
    transition = [[[4.0, 3.0], [2.0, 1.0]], [[1.0, 1.0], [2.0, 4.0]]]
    kept = [[[True, False], [False, False]], [[True, False], [False, False]]]
    return {"start": transition, "transition": transition, "scores": transition, "kept": kept}


def test_kept_mass_stands_beside_the_best_choice_and_chance(maps):
    held = training.kept_mass(maps)
    np.testing.assert_allclose(held["kept"], [0.4, 0.125])
    np.testing.assert_allclose(held["best"], [0.4, 0.5])
    np.testing.assert_allclose(held["density"], [0.25, 0.25])


@pytest.mark.parametrize("switched", [True, False])
def test_the_figure_says_what_the_kept_blocks_hold(maps, switched):
    history = [{"step": step, "phase": "dense", "loss": 2.0, "skewness": [1.0, 1.0], "distance": [0.1, 0.1],
                "change_percent": [None, None]} for step in range(3)]  # fmt: skip
    if not switched:
        maps = {"start": maps["start"]}
    rows = pd.DataFrame([{"history": history, "maps": maps, "transition_step": 2.0 if switched else np.nan}])
    figure, drawn = training.training(rows)
    titles = [axis.get_title() for axis in figure.axes]
    assert ("kept: 12.5% of mass" in titles) == switched
    assert ("best 50.0%, chance 25.0%" in [axis.get_xlabel() for axis in figure.axes]) == switched
    assert len(drawn) == 6
