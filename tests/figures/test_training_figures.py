import numpy as np
import pandas as pd
import pytest

from sat_lib import figures
from sat_lib.figures import labels, training
from sat_lib.figures.published import published_value


@pytest.fixture
def rows():
    accuracies = {("cifar10", "dense"): (0.40, 0.42), ("cifar10", "sat"): (0.44,), ("imdb", "sat"): (0.60, 0.61, 0.65)}
    return pd.DataFrame(
        [
            {"task": task, "attention": attention, "seed": seed, "test_accuracy": accuracy, "phase": "dense"}
            for (task, attention), seeds in accuracies.items()
            for seed, accuracy in enumerate(seeds)
        ]
    )


def marks(axis, marker):
    """(x, y) of the points with this marker, intervals' ends aside."""
    found = [line for line in axis.lines if line.get_marker() == marker]
    return [point for line in found for point in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_seeds_stand_above_their_mean_and_its_interval_and_the_published_mean_below(rows):
    figure, drawn = training.accuracy(rows)
    cifar, imdb = figure.axes
    assert len(drawn) == 6 and [label.get_text() for label in cifar.get_yticklabels()] == ["dense", "SAT"]
    assert marks(cifar, "o") == [(pytest.approx(41), 0), (pytest.approx(44), 1)]
    assert [x for x, y in marks(cifar, ".") if y < 0] == [pytest.approx(40), pytest.approx(42)]
    low, high = cifar.collections[0].get_segments()[0][:, 0]
    assert high - low == pytest.approx(4 * np.std([40, 42], ddof=1) / np.sqrt(2))
    published = published_value("accuracy")
    diamonds = [(published["dense"]["cifar10"], 0.28), (published["sat"]["cifar10"], 1.28)]
    assert marks(cifar, "D") == [pytest.approx(diamond) for diamond in diamonds]
    assert marks(imdb, "D") == [] and len(marks(imdb, ".")) == 3
    assert [text.get_text() for text in cifar.texts] == ["published"]


def test_the_axis_of_accuracies_is_cut_and_the_published_means_can_be_left_out(rows):
    figure, _ = training.accuracy(rows, published=False)
    assert all(not marks(axis, "D") and not axis.texts for axis in figure.axes)
    assert 35 < figure.axes[0].get_xlim()[0] < 40


def test_labels_at_the_ends_of_lines_are_moved_apart_in_their_order_and_stay_beside_the_panel():
    _, ((axis,),) = figures.new(2, 2)
    axis.set_ylim(0, 10)
    ends = [(10, "first"), (9.9, "second"), (2, "third"), (float("nan"), "nowhere")]
    labels.at_ends(axis, [(*end, "black") for end in ends])
    found = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert found.keys() == {"first", "second", "third"}
    assert found["first"] == pytest.approx(1) and found["third"] == pytest.approx(0.2)
    assert found["second"] == pytest.approx(1 - 0.13)


def test_an_axis_of_lengths_has_a_tick_at_each_and_no_others():
    _, ((axis,),) = figures.new(2, 2)
    labels.log_ticks(axis, [2048, 512, 2048, 1024])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["512", "1k", "2k"]
    assert axis.get_xscale() == "log" and not len(axis.xaxis.get_minorticklocs())


def test_a_document_has_dashes_where_numbers_are_absent():
    lines = pd.DataFrame({"runs": [1, 2], "share": [0.1234, None]}, index=[7, 3])
    table = figures.document_table(lines, {"runs": "runs", "share %": ("share", ".1f", 100), "ms": ("ms", ".2f")})
    assert table.to_dict("list") == {"runs": [1, 2], "share %": ["12.3", "-"], "ms": ["-", "-"]}
