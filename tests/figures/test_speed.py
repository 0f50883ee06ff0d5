"""What was timed, in words, and the table of steps, from rows of known content."""

import numpy as np
import pandas as pd
import pytest
from made_rows import steps

from sat_lib import experiments
from sat_lib.experiments.step_time import step_cases
from sat_lib.figures import speed

FAST = [
    *("sat, sparse phase", "sat, dense phase", "sat, best", "dense"),
    *("longformer, kernel", "longformer, library", "longformer D = 2, kernel", "longformer D = 2, library"),
    *("bigbird, kernel", "bigbird, library", "lsg, kernel", "lsg, library"),
]
PLAIN = ["sat, sparse phase, plain", "sat, dense phase, plain", "dense, plain"]
PUBLISHED = ["longformer, transformers", "bigbird, transformers"]


@pytest.mark.parametrize(("profile", "labels"), [("paper", FAST + PLAIN + PUBLISHED), ("smoke", FAST + PUBLISHED)])
def test_every_step_of_a_task_has_words_of_its_own_and_plain_is_said_where_others_are_fast(profile, labels):
    cases = pd.DataFrame(step_cases(profile))
    assert speed.step_labels(cases[cases["task"] == "cifar10"]) == labels


def test_a_step_is_set_beside_sats_of_the_same_kind():
    fast = steps({"sat, sparse phase": 10, "sat, dense phase": 30, "bigbird, library": 40})
    plain = steps({"sat, sparse phase": 20, "bigbird, transformers": 60}, step_kind="plain")
    best = steps({"sat, sparse phase": 15}, preset="best", model={"block": 16})
    rows = pd.concat([fast, plain, best], ignore_index=True)
    assert speed.over_sat(rows).tolist() == [1, 3, 4, 1, 3, 1.5]
    table = speed.step_table(rows, ("agnews",)).set_index("step of")
    assert list(table["AG News time / SAT's"]) == ["1.00", "3.00", "4.00", "1.00", "3.00", "1.50"]
    told = {"sat, sparse phase": "1.00", "sat, dense phase": "-", "bigbird, library": "2.48", "sat, best": "-"}
    assert {label: table["AG News published"][label] for label in told} == told
    assert list(speed.step_table(rows, ("cifar10",))["CIFAR-10 ms"]) == ["-"] * 6
    assert list(speed.step_table(rows, ("imdb",))["IMDB published"]) == ["-"] * 6


def test_a_row_of_the_figure_of_steps_holds_the_ways_of_computing_one_attention():
    fast = steps({"sat, sparse phase": 10, "bigbird, kernel": 15, "bigbird, library": 40})
    plain = steps({"sat, sparse phase": 20, "bigbird, transformers": np.nan}, step_kind="plain")
    figure, drawn = speed.step_time(pd.concat([fast, plain], ignore_index=True).assign(batch=512, precision="bf16"))
    time = figure.axes[0]
    assert [label.get_text() for label in time.get_yticklabels()] == ["sat, sparse phase", "bigbird"]
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in time.lines if line.get_marker() in "os^"]
    assert sorted(marks) == [(10, 0), (15, 1), (20, 0), (40, 1)]
    assert len(drawn) == 5


def test_every_method_is_named_where_its_line_ends_without_covering_another():
    rows = experiments.rows("kernels", "paper", measure=False, only={"sweep": "length"})
    for part in (rows, rows.iloc[:1], rows[rows["method"] == "sdpa"]):
        figure, drawn = speed.scaling(part)
        for axis in figure.axes:
            assert {text.get_text() for text in axis.texts} == set(drawn["method"])
            heights = sorted(text.get_position()[1] for text in axis.texts)
            assert all(np.diff(heights) > 0.08) and heights[-1] <= 1
