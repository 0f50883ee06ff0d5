"""The figure of the ablations: which layouts are accurate, and when to switch. From rows of `ablations`."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from . import PAGE, PALETTE, style
from .ablations import CENTRES, summary, switches
from .labels import above, at_ends, list_downward, two_errors
from .published import task_name

# What a layout comes from, told by its name or the first word of it, and its colour.
KINDS = {
    "by hand": (("near", "nearest", "diagonal"), PALETTE["longformer"]),
    "learned by $W^P$": (("correlation, learned", "correlation, largest", "released", "calibrated"), PALETTE["sat"]),
    "at random": (("random",), "0.45"),
    "measured on the dense model": ((), PALETTE["bigbird"]),
}
LAYOUTS = {
    "near, own heads": "near, each head its own",
    "nearest": "nearest to the diagonal",
    "correlation, learned": "learned from correlation (base)",
    "correlation, largest": "learned from correlation, largest",
    "released": "learned from attention, as released",
    "calibrated": "learned from attention, calibrated",
    "random": "random",
    "random, balanced": "random, balanced",
    "random, changing": "random, balanced, drawn anew",
    "correlation, refreshed": "correlation, measured anew",
}
CRITERIA = {
    "attention": "most attention",
    "excess": "most attention for its column",
    "content": "most varying attention",
    "value": "largest effect on outputs",
    "taylor": "largest Taylor term",
    "gradient": "largest gradient",
    "fisher": "largest Fisher information",
    "gate": "largest trained gate",
}
RULES = {"gap": "dev above\ntraining", "overfit": "dev\nrising"}  # what of the losses a rule waits for
ALL_USED = 0.9  # share of the block columns from which on a layout counts as one that uses all keys


def kind_of(layout: str) -> str:
    """The key of `KINDS` for a layout's name."""
    for kind, (names, _) in KINDS.items():
        if layout in names or layout.split(",")[0] in names:
            return kind
    return "measured on the dense model"


def layout_words(layout: str) -> str:
    """A layout's name in words: "most attention, by row" for "attention, by row"."""
    criterion, comma, budget = layout.partition(", ")
    return LAYOUTS.get(layout, CRITERIA.get(criterion, criterion) + comma + budget)


def ablations(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Above, layouts by where they come from, with their accuracy and the attention that they hold; below, accuracy
    by the moment of the transition. A column of panels a task; intervals are two standard errors of the mean."""
    drawn = summary(rows)
    tasks = list(dict.fromkeys(drawn["task"]))
    layouts = drawn[drawn["group"] == "layout"]
    heights = [1.2 + 0.145 * (layouts["value"].nunique() + len(KINDS)), 2.3]
    style()
    figure = Figure(figsize=(PAGE, sum(heights) + 0.3), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    _draw_layouts(upper, drawn, tasks)
    _draw_switches(lower, drawn, tasks)
    return figure, drawn


def _by_task(part: SubFigure, tasks: list[str], widths: list[float], share_rows: bool) -> np.ndarray:
    """(tasks, 2) panels in one line: two for each task, of these widths."""
    axes = part.subplots(1, 2 * len(tasks), width_ratios=widths * len(tasks), sharey=share_rows, squeeze=False)
    return axes.reshape(len(tasks), 2)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _draw_layouts(part: SubFigure, drawn: pd.DataFrame, tasks: list[str]) -> None:
    layouts = drawn[drawn["group"] == "layout"]
    places, headings = _layout_places(layouts)
    axes = _by_task(part, tasks, [1.7, 1], share_rows=True)
    for (accurate, held), task in zip(axes, tasks, strict=True):
        lines = layouts[layouts["task"] == task]
        _accuracies(accurate, lines, places)
        _held(held, lines, places)
        for percent in drawn.loc[(drawn["task"] == task) & (drawn["group"] == "dense"), "percent"]:
            accurate.axvline(percent, color=PALETTE["dense"], linestyle=":", linewidth=1, zorder=0)
            above(accurate, percent, "dense", PALETTE["dense"])
        accurate.set_title(task_name(task), loc="left", pad=12, fontweight="bold")
    list_downward(axes[0, 0], places, headings)
    dot = {"marker": "o", "markersize": 4, "linestyle": "", "color": "0.3"}
    filled = Line2D([], [], label=f"uses over {ALL_USED:.0%} of the key blocks".replace("%", " %"), **dot)
    hollow = Line2D([], [], label="leaves more of them out", markerfacecolor="white", **dot)
    part.legend(handles=[filled, hollow], loc="outside lower center", ncols=2, frameon=False)
    part.suptitle("Which layouts are accurate?", x=0.01, ha="left", fontsize=8, fontweight="bold")


def _layout_places(layouts: pd.DataFrame) -> tuple[dict[str, float], dict[str, tuple[float, object]]]:
    """Rows of the layouts, in words, and of the headings of their kinds: the most accurate kind and layout first.

    The first task in which a layout was measured decides; of a kind, the mean over its layouts.
    """
    lines = layouts.drop_duplicates("value").sort_values("percent", ascending=False)
    kinds = lines["value"].map(kind_of)
    places, headings, row = {}, {}, 0
    for kind in lines.groupby(kinds)["percent"].mean().sort_values(ascending=False).index:
        headings[kind] = (row, KINDS[kind][1])
        for value in lines.loc[kinds == kind, "value"]:
            row += 1
            places[layout_words(value)] = row
        row += 1.4
    return places, headings


def _accuracies(axis: Axes, lines: pd.DataFrame, places: dict[str, float]) -> None:
    for line, error in zip(lines.itertuples(), two_errors(lines), strict=True):
        row, look = places[layout_words(line.value)], _look(line)
        axis.errorbar(line.percent, row, xerr=error, fmt="o", markersize=4, linewidth=0.9, **look)
    axis.set_xlabel("test accuracy (%)\n± 2 standard errors")
    axis.locator_params(axis="x", nbins=5, integer=True)
    _as_rows(axis, lines, places)


def _held(axis: Axes, lines: pd.DataFrame, places: dict[str, float]) -> None:
    """Beyond 1 a layout holds more attention than as many random blocks."""
    axis.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    for line in lines.itertuples():
        row = places[layout_words(line.value)]
        axis.plot(line.mass_kept / line.density, row, "o", markersize=4, **_look(line))
    axis.set_xlabel("attention held\n(random blocks: 1)")
    axis.set_xlim(0, 1.1 * (lines["mass_kept"] / lines["density"]).max() if len(lines) else None)
    axis.locator_params(axis="x", nbins=4, integer=True)
    _as_rows(axis, lines, places)


def _look(line) -> dict:
    colour = KINDS[kind_of(line.value)][1]
    return {"color": colour, "markerfacecolor": colour if line.distinct_columns > ALL_USED else "white"}


def _as_rows(axis: Axes, lines: pd.DataFrame, places: dict[str, float]) -> None:
    for value in lines["value"]:
        axis.axhline(places[layout_words(value)], color="0.92", linewidth=0.6, zorder=-1)
    axis.tick_params(axis="y", length=0)
    sns.despine(ax=axis, left=True)


# ---- when to switch --------------------------------------------------------------------------------------------------


def _draw_switches(part: SubFigure, drawn: pd.DataFrame, tasks: list[str]) -> None:
    for (forced, by_rule), task in zip(_by_task(part, tasks, [2, 1.3], share_rows=False), tasks, strict=True):
        by_rule.sharey(forced)
        of_task = drawn[drawn["task"] == task]
        _forced(forced, of_task)
        by_rule.set_visible(_by_rules(by_rule, of_task))
        shown = [axis for axis in (forced, by_rule) if axis.get_visible()]
        dense = of_task.loc[of_task["group"] == "dense", "percent"]
        for percent in dense:
            for axis in shown:
                axis.axhline(percent, color=PALETTE["dense"], linestyle=":", linewidth=1, zorder=0)
        forced.set_title(task_name(task), loc="left", fontweight="bold")
        at_ends(shown[-1], [(percent, "dense", PALETTE["dense"]) for percent in dense])
    part.suptitle("When to switch?", x=0.01, ha="left", fontsize=8, fontweight="bold")


def _forced(axis: Axes, of_task: pd.DataFrame) -> None:
    """Accuracy over the step of a forced transition; each line's name stands where it begins."""
    for name, forced, _ in switches(of_task):
        lines = forced.dropna(subset="transition_step").sort_values("transition_step")
        _points(axis, lines["transition_step"], lines, name, "-")
        for line in lines[:1].itertuples():
            _beside(axis, (line.transition_step, line.percent), name, name, side="left")
    axis.set(xlabel="switched at step", ylabel="test accuracy (%)\n± 2 standard errors")
    left, right = axis.get_xlim()
    axis.set_xlim(left - 0.22 * (right - left), right)
    axis.locator_params(nbins=5, integer=True)
    sns.despine(ax=axis)


def _by_rules(axis: Axes, of_task: pd.DataFrame) -> bool:
    """The rules beside the steps, and next to each point the mean step at which it came; whether any came."""
    for name, _, rules in switches(of_task):
        came, side = rules.dropna(subset="transition_step"), {"base": "left", "best": "right"}[name]
        at = [list(RULES).index(rule) + {"left": -0.08, "right": 0.08}[side] for rule in came["value"]]
        _points(axis, at, came, name)
        for place, line in zip(at, came.itertuples(), strict=True):
            _beside(axis, (place, line.percent), f"{line.transition_step:.0f}", name, side)
    axis.set_xticks(range(len(RULES)), RULES.values())
    axis.set(xlim=(-0.7, len(RULES) - 0.4), xlabel="or by a rule on the loss\n(number: the step)")
    axis.tick_params(axis="y", labelleft=False, length=0)
    sns.despine(ax=axis, left=True)
    return bool(axis.texts)


def _points(axis: Axes, at, lines: pd.DataFrame, name: str, line: str = "") -> None:
    marker = {"base": "o", "best": "s"}[name]
    axis.errorbar(at, lines["percent"], yerr=two_errors(lines), fmt=marker + line, color=CENTRES[name].colour,
                  markersize=4, linewidth=0.9)  # fmt: skip


def _beside(axis: Axes, point: tuple[float, float], text: str, name: str, side: str) -> None:
    away, anchor = {"left": (-5, "right"), "right": (5, "left")}[side]
    axis.annotate(text, point, (away, 0), textcoords="offset points", fontsize=7, va="center", ha=anchor,
                  color=CENTRES[name].colour, bbox={"facecolor": "white", "linewidth": 0, "pad": 0.3})  # fmt: skip
