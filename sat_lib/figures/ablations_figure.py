"""The figure of the ablations: which layouts are accurate, and when to switch. From rows of `ablations`."""

from collections.abc import Iterable

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from . import PALETTE, new_halves
from .ablations import CENTRES, summary, switches
from .labels import above, at_ends, list_downward, places_downward, two_errors
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
    layouts = drawn[drawn["group"] == "layout"]
    heights = [1.2 + 0.145 * (layouts["value"].nunique() + len(KINDS)), 2.3]
    figure, (upper, lower) = new_halves(sum(heights) + 0.3, heights)
    _draw_layouts(upper, drawn)
    _draw_switches(lower, drawn)
    return figure, drawn


def _panels(part: SubFigure, drawn: pd.DataFrame, title: str, widths: list[float], share_rows: bool) -> zip:
    """All in one line: of each task two panels of these widths, with its name and its lines of what is drawn."""
    part.suptitle(title, x=0.01, ha="left", fontsize=8, fontweight="bold")
    tasks = list(drawn.groupby("task", sort=False))
    axes = part.subplots(1, 2 * len(tasks), width_ratios=widths * len(tasks), sharey=share_rows, squeeze=False)
    return zip(axes.reshape(-1, 2), tasks, strict=True)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _draw_layouts(part: SubFigure, drawn: pd.DataFrame) -> None:
    """Beyond 1 a layout holds more attention than as many random blocks."""
    places, headings = _layout_places(drawn[drawn["group"] == "layout"])
    for (accurate, held), (task, of_task) in _panels(part, drawn, "Which layouts are accurate?", [1.7, 1], True):
        lines = of_task[of_task["group"] == "layout"]
        held.axvline(1, color="0.6", linewidth=0.8, zorder=0)
        for line, error in zip(lines.itertuples(), two_errors(lines), strict=True):
            row, colour = places[layout_words(line.value)], KINDS[kind_of(line.value)][1]
            face = colour if line.distinct_columns > ALL_USED else "white"
            look = {"fmt": "o", "markersize": 4, "linewidth": 0.9, "color": colour, "markerfacecolor": face}
            accurate.errorbar(line.percent, row, xerr=error, **look)
            held.errorbar(line.mass_kept / line.density, row, **look)
            for axis in (accurate, held):
                axis.axhline(row, color="0.92", linewidth=0.6, zorder=-1)
        for percent in of_task.loc[of_task["group"] == "dense", "percent"]:
            accurate.axvline(percent, color=PALETTE["dense"], linestyle=":", linewidth=1, zorder=0)
            above(accurate, percent, "dense", PALETTE["dense"])
        accurate.set_title(task_name(task), loc="left", pad=12, fontweight="bold")
        accurate.set_xlabel("test accuracy (%)\n± 2 standard errors")
        held.set_xlabel("attention held\n(random blocks: 1)")
        held.set_xlim(0, 1.1 * (lines["mass_kept"] / lines["density"]).max() if len(lines) else None)
        for axis, ticks in ((accurate, 5), (held, 4)):
            axis.locator_params(axis="x", nbins=ticks, integer=True)
            axis.tick_params(axis="y", length=0)
            sns.despine(ax=axis, left=True)
    list_downward(part.axes[0], places, headings)
    dot = {"marker": "o", "markersize": 4, "linestyle": "", "color": "0.3"}
    filled = Line2D([], [], label=f"uses over {100 * ALL_USED:g} % of the key blocks", **dot)
    hollow = Line2D([], [], label="leaves more of them out", markerfacecolor="white", **dot)
    part.legend(handles=[filled, hollow], loc="outside lower center", ncols=2, frameon=False)


def _layout_places(layouts: pd.DataFrame) -> tuple[dict[str, float], dict[str, tuple[float, object]]]:
    """Rows of the layouts, in words, and of the headings of their kinds: the most accurate kind and layout first.

    The first task in which a layout was measured decides; of a kind, the mean over its layouts.
    """
    lines = layouts.drop_duplicates("value").sort_values("percent", ascending=False)
    kinds = lines["value"].map(kind_of)
    ranked = lines.groupby(kinds)["percent"].mean().sort_values(ascending=False).index
    groups = [(kind, KINDS[kind][1], lines.loc[kinds == kind, "value"].map(layout_words)) for kind in ranked]
    return places_downward(groups, apart=1.4)


# ---- when to switch --------------------------------------------------------------------------------------------------


def _draw_switches(part: SubFigure, drawn: pd.DataFrame) -> None:
    """Left, over the step of a forced transition, each line named where it begins; right, by the rules.

    Next to a rule's point stands the mean step at which it came; where none came there is no panel for rules.
    """
    for (forced, by_rule), (task, of_task) in _panels(part, drawn, "When to switch?", [2, 1.3], False):
        by_rule.sharey(forced)
        for name, steps, rules in switches(of_task.dropna(subset="transition_step")):
            steps = steps.sort_values("transition_step")
            _points(forced, steps["transition_step"], steps, name, "-")
            for line in steps[:1].itertuples():
                _beside(forced, (line.transition_step, line.percent), name, name, "left")
            side, aside = {"base": ("left", -0.08), "best": ("right", 0.08)}[name]
            at = [list(RULES).index(rule) + aside for rule in rules["value"]]
            _points(by_rule, at, rules, name)
            for place, line in zip(at, rules.itertuples(), strict=True):
                _beside(by_rule, (place, line.percent), f"{line.transition_step:.0f}", name, side)
        forced.set(xlabel="switched at step", ylabel="test accuracy (%)\n± 2 standard errors")
        left, right = forced.get_xlim()
        forced.set_xlim(left - 0.22 * (right - left), right)
        forced.locator_params(nbins=5, integer=True)
        forced.set_title(task_name(task), loc="left", fontweight="bold")
        by_rule.set_xticks(range(len(RULES)), RULES.values())
        by_rule.set(xlim=(-0.7, len(RULES) - 0.4), xlabel="or by a rule on the loss\n(number: the step)")
        by_rule.tick_params(axis="y", labelleft=False, length=0)
        by_rule.set_visible(bool(by_rule.texts))
        dense = of_task.loc[of_task["group"] == "dense", "percent"]
        for axis in (forced, by_rule):
            sns.despine(ax=axis, left=axis is by_rule)
            for percent in dense:
                axis.axhline(percent, color=PALETTE["dense"], linestyle=":", linewidth=1, zorder=0)
        last = by_rule if by_rule.get_visible() else forced
        at_ends(last, [(percent, "dense", PALETTE["dense"]) for percent in dense])


def _points(axis: Axes, at: Iterable[float], lines: pd.DataFrame, name: str, line: str = "") -> None:
    look = {"fmt": {"base": "o", "best": "s"}[name] + line, "color": CENTRES[name].colour}
    axis.errorbar(at, lines["percent"], yerr=two_errors(lines), markersize=4, linewidth=0.9, **look)


def _beside(axis: Axes, point: tuple[float, float], text: str, name: str, side: str) -> None:
    away, anchor = {"left": (-5, "right"), "right": (5, "left")}[side]
    look = {"color": CENTRES[name].colour, "bbox": {"facecolor": "white", "linewidth": 0, "pad": 0.3}}
    axis.annotate(text, point, (away, 0), textcoords="offset points", va="center", ha=anchor, **look)
