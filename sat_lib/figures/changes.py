"""What single changes do to SAT's accuracy, as differences: a figure from rows of `ablations`."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import ColorType

from . import PAGE, new
from .ablations import CENTRES, number_text
from .judge import gap
from .labels import list_downward, places_downward
from .published import task_name

FROM_BASE = {  # what is changed of the base, and what a value of it is called
    "dense": "{} attention",
    "pruned": "{}",
    "density": "{} of the blocks",
    "block": "blocks of {}",
    "schedule": "{} schedule afterwards",
    "rate_after": "{} times the peak rate afterwards",
    "average": "moving average of the weights",
    "dropout": "dropout of {}",
    "mean_over": "{}",
    "theta": "switched by the maps, theta {}",
    "delta": "switched by the maps, delta {} %",
}
WORDS = {
    ("pruned", "zero"): "pruned entries count in the softmax",
    ("pruned", "released, zero"): "released layout, pruned entries count",
    ("rate_after", 1.0): "the peak rate afterwards",
    ("mean_over", "real"): "mean over real tokens",
    ("mean_over", "real, dense"): "dense attention, mean over real tokens",
    ("preset", "best"): 'preset "best"',
    ("preset", "best, two a row"): "two blocks a row",
    ("preset", "best, three a row"): "three blocks a row",
    ("preset", "best, one of 32 a row"): "one block of 32 a row",
    ("preset", "best, all blocks"): "all blocks kept",
    ("preset", "best, half the rate"): "half the peak rate afterwards",
    ("preset", "best, schedule goes on"): "the schedule goes on",
    ("preset", "best, no average"): "no average of the weights",
    ("preset", "best, near"): "near blocks, by hand",
    ("preset", "best, random"): "random blocks",
}
HEADINGS = {"base": "changed from the base", "best": 'changed from "best"'}


def change_lines(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per task and change: the mean test accuracy less that of the settings it is changed from. Task by task.

    Columns:
        task, of ("base" or "best"), group, value, runs; difference: percentage points; error: its standard error, NaN
        where one of both has a single run.
    """
    rows = rows.sort_values("task", key=lambda tasks: pd.factorize(tasks)[0], kind="stable")
    preset = rows["group"] == "preset"
    from_base = rows["group"].isin(FROM_BASE) | (preset & (rows["value"] == "best"))
    of = np.select([from_base, preset], ["base", "best"], "")  # "": the layout, or the moment of the transition alone
    lines = []
    for key, part in rows.assign(of=of)[of != ""].groupby(["task", "of", "group", "value"], sort=False):
        unchanged = CENTRES[key[1]].of(rows[rows["task"] == key[0]])
        found = gap(100 * part["test_accuracy"], 100 * unchanged["test_accuracy"])
        if found is not None:
            lines.append((*key, len(part), found.difference, found.error))
    return pd.DataFrame(lines, columns=["task", "of", "group", "value", "runs", "difference", "error"])


def change_words(group: str, value) -> str:
    """What was changed, in words."""
    text = f"{100 * value:.3g} %" if group == "density" else number_text(value)
    return WORDS.get((group, value)) or FROM_BASE.get(group, "{}").format(text)


def changes(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Differences from the base, then from the preset "best", the largest gain first; a panel a task.

    Intervals are two standard errors; a point is filled where they leave out zero.
    """
    drawn = change_lines(rows)
    tasks, (places, headings) = list(dict.fromkeys(drawn["task"])), _places(drawn)
    height = 1.0 + 0.15 * max(places.values(), default=0)
    figure, (axes,) = new(PAGE, height, 1, max(len(tasks), 1), sharex=True, sharey=True)
    for axis, task in zip(axes, tasks, strict=False):
        _draw_differences(axis, drawn[drawn["task"] == task], places)
        axis.set_title(task_name(task), loc="left", fontweight="bold")
    list_downward(axes[0], places, headings)
    return figure, drawn


def _places(drawn: pd.DataFrame) -> tuple[dict[str, float], dict[str, tuple[float, ColorType]]]:
    """Rows of the changes, in words, and of the headings; the first task in which a change was made gives its place."""
    ordered = drawn.drop_duplicates(["group", "value"]).sort_values("difference", ascending=False)
    groups = [
        (HEADINGS[name], CENTRES[name].colour, dict.fromkeys(map(change_words, part["group"], part["value"])))
        for name, part in ordered.groupby("of")
    ]
    return places_downward(groups, apart=1.6)


def _draw_differences(axis: Axes, lines: pd.DataFrame, places: dict[str, float]) -> None:
    axis.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    for line in lines.itertuples():
        row, colour = places[change_words(line.group, line.value)], CENTRES[line.of].colour
        face = colour if abs(line.difference) > 2 * line.error else "white"
        axis.axhline(row, color="0.92", linewidth=0.6, zorder=-1)
        look = {"color": colour, "markerfacecolor": face, "markersize": 4, "linewidth": 0.9}
        axis.errorbar(line.difference, row, xerr=2 * line.error, fmt="o", **look)
    axis.set_xlabel("difference of test accuracy\n(percentage points) ± 2 standard errors")
    axis.locator_params(axis="x", nbins=9, integer=True)
    axis.tick_params(axis="y", length=0)
    sns.despine(ax=axis, left=True)
