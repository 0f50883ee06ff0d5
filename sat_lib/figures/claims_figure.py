"""The figure of the verdicts: our value beside the published one. Nothing here measures or judges."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..training.recipe import PAPER_TASKS
from . import PAGE, PALETTE, new
from .evidence import (
    Frames,
    memory_ratios,
    operation_ratios,
    percent,
    step_memory_ratios,
    step_ratios,
    task_runs,
    where,
    with_sources,
)
from .judge import ENOUGH, gap
from .published import published_value, task_name

MARKS = {  # series of the right panel: mark and colour
    "layer of transformers": ("s", PALETTE["bigbird"]),
    "own gathers and products": ("^", PALETTE["bigbird"]),
    "through SAT's kernel": ("o", PALETTE["sat"]),
    "float32 with TF32": ("v", PALETTE["longformer"]),
    "the most of all cases": ("X", PALETTE["dense"]),
    "bfloat16": ("P", PALETTE["longformer"]),
}
SPARSE_OPERATIONS = {"softmax": "softmax", "QK^T": "SDDMM", "AV": "SpMM"}
_STEP_SERIES = dict(zip(("bigbird, transformers", "bigbird, library", "bigbird, kernel"), MARKS, strict=False))


def verdict_figure(frames: Frames) -> tuple[Figure, pd.DataFrame]:
    """Ours beside the published values: SAT's accuracy less dense attention's by task, and ratios over published."""
    frames = with_sources(frames)
    gains, ratios = _gain_lines(frames), _ratio_lines(frames)
    figure, ((left, right),) = new(PAGE, 3.2, 1, 2)
    _draw_gains(left, gains)
    _draw_ratios(right, ratios)
    for axis, place in ((left, "outside upper left"), (right, "outside upper right")):
        figure.legend(*axis.get_legend_handles_labels(), loc=place, ncols=2, frameon=False)
    return figure, pd.concat([gains, ratios], ignore_index=True)


def figure_rows(frames: Frames) -> pd.DataFrame:
    """The rows behind the figure, for what is said of where it comes from."""
    found = [frames[name] for name in ("accuracy", "accuracy_short", "step", "kernels") if len(frames.get(name, ()))]
    # A column that only some experiments have would say "nan" beside the others' values.
    kept = [part.drop(columns=["maps", "history", "seed", "task", "data_digest"], errors="ignore") for part in found]
    rows = pd.concat(kept, ignore_index=True) if kept else pd.DataFrame()
    if "data_official" in rows:
        rows["data_official"] = rows["data_official"].astype(object).where(rows["data_official"].notna(), True)
    return rows


def _gain_lines(frames: Frames) -> pd.DataFrame:
    """A line per task and seed of SAT, and one with mean and standard error."""
    lines = []
    for name in PAPER_TASKS:
        runs = task_runs(frames, name)
        sat, dense = percent(runs, "sat"), percent(runs, "dense")
        common = {"panel": "accuracy", "name": task_name(name), "published": published_value("gain")[name]}
        common["part"] = len(runs) > 0 and bool(runs["part"].all())
        found = gap(sat, dense)
        measured = {} if found is None else {"ours": found.difference, "error": found.error}
        lines.append(common | {"series": "mean"} | measured)
        if found is not None:
            seeds = zip(runs.loc[sat.index, "seed"], sat - dense.mean(), strict=True)
            lines += [common | {"series": "seed", "seed": seed, "ours": value} for seed, value in seeds]
    columns = ["panel", "name", "series", "seed", "ours", "error", "published", "part"]
    return pd.DataFrame(lines).reindex(columns=columns)


def _ratio_lines(frames: Frames) -> pd.DataFrame:
    """A line per claim and way of measuring it."""
    lines, timed = [], where(operation_ratios(frames), task="cifar10")
    for name in PAPER_TASKS:
        published = published_value("bigbird_over_sat")[name]
        for step, ratio in step_ratios(frames, name).items():
            if step in _STEP_SERIES:
                lines.append((f"step, {task_name(name)}", _STEP_SERIES[step], ratio.value, published))
    for name, label in SPARSE_OPERATIONS.items():
        published = published_value("speed_up")[name]
        lines += [(label, row["arithmetic"], row[name], published) for _, row in timed.iterrows()]
    most = {
        "memory, attention": memory_ratios(frames, "materialised"),
        "memory, step": step_memory_ratios(frames)["ratio"],
    }
    memory = published_value("memory")
    lines += [(label, "the most of all cases", ratios.max(), memory) for label, ratios in most.items()]
    drawn = pd.DataFrame(lines, columns=["name", "series", "ours", "published"]).assign(panel="ratio")
    return drawn.assign(ours_over_published=drawn["ours"] / drawn["published"])


def _draw_gains(axis: Axes, lines: pd.DataFrame) -> None:
    """Seeds and their mean a little above a task's place, the published difference a little below."""
    means = lines[lines["series"] == "mean"]
    names = list(means["name"])
    for label, part, face in (("seeds", False, PALETTE["sat"]), ("seeds, part of the data", True, "none")):
        seeds = lines[(lines["series"] == "seed") & (lines["part"] == part)]
        places = seeds["name"].map(names.index) - 0.15
        if len(seeds):
            settings = {"color": PALETTE["sat"], "markersize": 4, "markerfacecolor": face, "label": label}
            axis.plot(seeds["ours"], places, "o", **settings)
    above, below = np.arange(len(names)) - 0.15, np.arange(len(names)) + 0.15
    settings = {"color": "0.25", "markersize": 9, "capsize": 2.5, "linewidth": 1, "label": "mean, standard error"}
    axis.errorbar(means["ours"], above, xerr=means["error"], fmt="|", **settings)
    settings = {"color": "black", "markersize": 4, "markerfacecolor": "none", "label": "published"}
    axis.plot(means["published"], below, "D", **settings)
    axis.axvline(0, color="0.4", linestyle=":", linewidth=1)
    axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    axis.set(xlabel="test accuracy, SAT less dense (points)")
    axis.margins(x=0.08)
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    sns.despine(ax=axis)


def _draw_ratios(axis: Axes, lines: pd.DataFrame) -> None:
    names = list(dict.fromkeys(lines["name"]))
    for number, (series, (mark, colour)) in enumerate(MARKS.items()):
        part = lines[lines["series"] == series]
        places = part["name"].map(names.index) + 0.2 * (number % 3 - 1)  # so that no mark hides another
        axis.plot(part["ours_over_published"], places, mark, color=colour, markersize=4, label=series)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.axvline(ENOUGH, color="0.4", linestyle=":", linewidth=1)
    axis.set(xscale="log", yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    axis.set(xlabel=f"our ratio / published (line: 1, dotted: {ENOUGH:g})")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    sns.despine(ax=axis)
