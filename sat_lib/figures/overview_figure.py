"""The figure of the first page: how fast attention is over the length, and how accurate each attention is.

    figure, drawn = overview_figure(frames)     # experiment -> its rows, as experiments.rows returns them

Nothing here measures.
"""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..training.recipe import PUBLISHED
from . import PAGE, PALETTE, ablations, new
from .evidence import Frames, column, task_runs, where, with_sources
from .labels import at_ends, log_ticks
from .published import attention_name
from .training import published_mean

TASK = "cifar10"
SETTING = {"dtype": "bfloat16", "block": 32, "head_size": 32}
DENSITIES = (0.05, 0.25)
SPEED = {"fused": "SAT", "flex": "FlexAttention", "sdpa": "SDPA, dense"}
PAIR = ("best", "best, all blocks")  # of the ablations: nothing but the density differs
SATS = {"sat": "SAT as published", "sat, best": 'SAT "best"*', "sat, best, all blocks": "all blocks kept*"}


def overview_figure(frames: Frames) -> tuple[Figure, pd.DataFrame]:
    """Left, time of attention against the length; right, accuracies of CIFAR-10 with their standard errors.

    The star: the preset "best" was chosen by test accuracies of the same seeds.
    `frames` needs no experiment without rows; those of `ablations` and `best` belong to it too.
    """
    times, runs = attention_times(frames), accuracy_lines(frames)
    figure, ((left, right),) = new(PAGE, 2.9, 1, 2, width_ratios=(1, 1.2))
    _draw_times(left, times)
    _draw_accuracies(right, runs)
    return figure, pd.concat([times.assign(panel="time"), runs.assign(panel="accuracy")], ignore_index=True)


# ---- time ------------------------------------------------------------------------------------------------------------


def attention_times(frames: Frames) -> pd.DataFrame:
    """A line per method, density and length: forward and backward of one example, FlexAttention at its fastest block.

    SDPA computes everything at any density, so it has one.

    Columns:
        method: "fused", "sdpa" or "flex". us_per_example: microseconds. over_sat: as many times as long as "fused" of
        the same length and density takes; NaN without it.
    """
    rows = where(with_sources(frames)["kernels"], **SETTING)
    columns = ["method", "density", "length", "batch", "us_per_example", "over_sat"]
    if not len(rows):
        return pd.DataFrame(columns=columns)
    rows = rows.assign(
        method=rows["method"].str.replace(r"^flex \d+$", "flex", regex=True),
        us_per_example=1000 * column(rows, "forward_backward_ms") / column(rows, "batch"),
    )
    few, more = (np.isclose(rows["density"].astype(float), density) for density in DENSITIES)
    rows = rows[rows["sweep"].isin(["length", "density"]) & (few | more & (rows["method"] != "sdpa"))]
    rows = rows[rows["method"].isin(SPEED)].dropna(subset="us_per_example")
    rows = rows.sort_values(["sweep", "us_per_example"], ascending=[False, True])
    rows = rows.drop_duplicates(["method", "density", "length"])  # the sweep of lengths before that of densities
    fused = where(rows, method="fused").set_index(["length", "density"])["us_per_example"]
    same = pd.MultiIndex.from_frame(rows[["length", "density"]])
    rows["over_sat"] = rows["us_per_example"] / fused.reindex(same).to_numpy()
    return rows.sort_values(["method", "density", "length"])[columns]


def _draw_times(axis: Axes, times: pd.DataFrame) -> None:
    ends = []
    for method, name in SPEED.items():
        few, more = (times[(times["method"] == method) & np.isclose(times["density"], value)] for value in DENSITIES)
        axis.plot(few["length"], few["us_per_example"], "-o", color=PALETTE[method], markersize=3.5, linewidth=1.2)
        look = {"color": PALETTE[method], "markersize": 4, "markerfacecolor": "white"}
        axis.plot(more["length"], more["us_per_example"], "o", **look)
        for line in few.tail(1).itertuples():
            times_sat = "" if method == "fused" or np.isnan(line.over_sat) else f"\n{line.over_sat:.1f} x SAT"
            ends.append((line.us_per_example, name + times_sat, PALETTE[method]))
    axis.set(yscale="log", xlabel="sequence length", ylabel="time of one sequence (µs)")
    axis.set_title("attention, forward + backward, bfloat16")
    log_ticks(axis, times["length"])
    kept = "\n".join(f"{mark} {share:.0%} kept" for mark, share in zip("●○", DENSITIES, strict=True))
    axis.text(0.98, 0.04, kept, ha="right", color="0.3", transform=axis.transAxes)
    axis.yaxis.set_major_formatter("{x:g}")
    at_ends(axis, ends)
    sns.despine(ax=axis)


# ---- accuracy --------------------------------------------------------------------------------------------------------


def accuracy_lines(frames: Frames) -> pd.DataFrame:
    """A line per attention and number of steps, with averaged weights or without, best first.

    Columns:
        attention: or SAT's preset, which has averaged weights by itself. percent, error: mean over seeds and its
        standard error, NaN of a single run. published_percent: of the same attention, NaN for averaged weights.
    """
    lines = []
    for (attention, averaged, steps), part in _runs(frames).groupby(["line", "averaged", "steps"]):
        percent, published = 100 * part["test_accuracy"], None if averaged else published_mean(attention, TASK)
        lines.append((attention, averaged, steps, len(part), percent.mean(), percent.sem(), published))
    columns = ["attention", "averaged", "steps", "runs", "percent", "error", "published_percent"]
    lines = pd.DataFrame(lines, columns=columns).astype({"published_percent": float})
    return lines.sort_values(["steps", "percent"], ascending=False, ignore_index=True)


def _runs(frames: Frames) -> pd.DataFrame:
    """The runs on the whole data that are drawn; `line` names the attention or the preset."""
    published, best = task_runs(with_sources(frames), TASK), where(frames.get("best", pd.DataFrame()), task=TASK)
    changed = where(frames.get("ablations", pd.DataFrame()), task=TASK, group="preset")
    parts = []
    if len(published):
        parts.append(published[~published["part"]].assign(line=published["attention"]))
    if len(best):
        names = pd.Series(ablations.methods(best), best.index)
        drawn = best.assign(line=names.str.removesuffix(", averaged"))
        parts.append(drawn[names.str.endswith(", averaged") | (names == "sat, best")])
    if len(changed):
        parts.append(changed.assign(line="sat, " + changed["value"])[changed["value"].isin(PAIR)])
    runs = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["line", "resolved"])
    recipes = [config["recipe"] for config in runs["resolved"]]
    averaged = [bool(recipe["average"]) for recipe in recipes]
    return runs.assign(averaged=averaged, steps=[recipe["steps"] for recipe in recipes])


def _draw_accuracies(axis: Axes, lines: pd.DataFrame) -> None:
    """A row per attention, the most accurate on top; the first mark of a kind is named."""
    rows = list(dict.fromkeys(zip(lines["attention"], lines["steps"], strict=True)))
    named = set()
    for line in lines.itertuples():
        place, colour = rows.index((line.attention, line.steps)), PALETTE[line.attention.split(",")[0]]
        kind, face = ("averaged weights", "white") if line.averaged else ("ours", colour)
        look = {"fmt": "s" if line.averaged else "o", "color": colour, "markerfacecolor": face}
        axis.errorbar(line.percent, place, xerr=line.error, markersize=5, linewidth=1, **look)
        axis.plot(line.published_percent, place, "D", color="0.3", markersize=4, markerfacecolor="none", zorder=4)
        for name, value in ((kind, line.percent), ("published", line.published_percent)):
            if name not in named and not pd.isna(value):
                named.add(name)
                axis.annotate(name, (value, place), (0, 5), textcoords="offset points", ha="center")
    axis.set(yticks=range(len(rows)), yticklabels=[_row_name(*row) for row in rows], ylim=(len(rows) - 0.4, -0.8))
    axis.set(xlabel="test accuracy (%), standard errors", title="CIFAR-10 (* chosen by these accuracies)")
    for place in np.flatnonzero(np.diff([steps for _, steps in rows])):
        axis.axhline(place + 0.5, color="0.6", linewidth=0.6, linestyle=":")
    axis.margins(x=0.12)
    axis.grid(axis="y", color="0.92", linewidth=0.6)
    sns.despine(ax=axis)


def _row_name(attention: str, steps: int) -> str:
    name = SATS.get(attention) or attention_name(attention)
    return name if steps == PUBLISHED[TASK].steps else f"{name}, {steps:,} steps"
