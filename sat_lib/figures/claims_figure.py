"""The figure of the verdicts: our value beside the published one. Nothing here measures or judges."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..training.recipe import PAPER_TASKS
from . import PAGE, PALETTE, new
from .claims import claims, verdict
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
from .judge import IN_DIRECTION, NOT_REPRODUCED, NOT_RUN, REPRODUCED, gap
from .published import published_value, task_name

LIKE_FOR_LIKE = "through SAT's kernel"
LABELS = {
    "softmax": "dense softmax",
    "SDDMM": "dense QK^T / SDDMM",
    "SpMM": "dense AV / SpMM",
    "memory, attention": "dense attention's memory",
    "memory, step": "a step's memory",
}
_STEP_SERIES = {
    "bigbird, transformers": "layer of transformers",
    "bigbird, library": "own gathers and products",
    "bigbird, kernel": LIKE_FOR_LIKE,
}
WORD_MARKS = {  # mark and colour
    REPRODUCED: ("o", PALETTE["sat, dense phase"]),
    IN_DIRECTION: ("^", PALETTE["dense"]),
    NOT_REPRODUCED: ("X", PALETTE["longformer"]),
    NOT_RUN: ("s", (0.5, 0.5, 0.5)),
}
PUBLISHED_MARK = {"marker": "|", "color": "black", "markersize": 10, "markeredgewidth": 1.4, "linestyle": ""}
LIKE_FOR_LIKE_MARK = {"marker": "o", "color": "0.3", "markersize": 3.5, "markerfacecolor": "white", "linestyle": ""}
SEED_MARK = {"marker": ".", "color": "0.5", "markersize": 4, "linestyle": ""}
SPARSE_OPERATIONS = {"softmax": "softmax", "QK^T": "SDDMM", "AV": "SpMM"}


def verdict_figure(frames: Frames) -> tuple[Figure, pd.DataFrame]:
    """Ours beside the published values: SAT's accuracy less dense attention's by task, and times as much as SAT.

    Colours and marks are those of the claims' verdicts.
    """
    frames = with_sources(frames)
    gains, ratios = _gain_lines(frames), _ratio_lines(frames)
    words = _words(frames)
    figure, ((left, right),) = new(PAGE, 3.1, 1, 2, width_ratios=(1, 1.3))
    _draw_gains(left, gains, words)
    _draw_ratios(right, ratios, words)
    _legend(figure)
    return figure, pd.concat([gains, ratios], ignore_index=True)


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


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _words(frames: Frames) -> dict[str, str]:
    """The verdict of each claim that the figure shows, by the name of its line."""
    names = {
        "gain": lambda claim: task_name(claim.tasks[0]),
        "step_time": lambda claim: f"step, {task_name(claim.tasks[0])}",
        "operation_time": lambda claim: SPARSE_OPERATIONS[claim.operation],
        "attention_memory": lambda claim: "memory, attention",
        "step_memory": lambda claim: "memory, step",
    }
    shown = [claim for claim in claims() if claim.measure in names]
    return {names[claim.measure](claim): verdict(claim, frames)["verdict"] for claim in shown}


def _judged(ratios: pd.DataFrame) -> pd.DataFrame:
    """Of every name the ratio that its claim is judged by: the smallest of those that the paper could have measured."""
    could = ratios[(ratios["series"] != LIKE_FOR_LIKE) & ratios["ours"].notna()]
    return could.sort_values("ours").drop_duplicates("name")


def _draw_beside(axis: Axes, lines: pd.DataFrame, words: dict[str, str], names: list[str], form: str) -> None:
    """Ours joined with the published value, a row per name, in the colour of the verdict; both values at the edge."""
    for line in lines.itertuples():
        place, (mark, colour) = names.index(line.name), WORD_MARKS[words[line.name]]
        if not np.isnan(line.ours):
            axis.plot([line.published, line.ours], [place, place], color=colour, linewidth=1.2, zorder=1)
            axis.errorbar(line.ours, place, xerr=line.error, color=colour, linewidth=0.8, capsize=2)
            face = "white" if words[line.name] == NOT_RUN else colour
            axis.plot(line.ours, place, mark, color=colour, markersize=5.5, markerfacecolor=face)
        axis.plot(line.published, place, **PUBLISHED_MARK)
        ours = "-" if np.isnan(line.ours) else format(line.ours, form)
        axis.text(1.02, place, f"{ours} ({line.published:{form}})", va="center", transform=axis.get_yaxis_transform())
    axis.text(1.02, 1.02, "ours (published)", transform=axis.transAxes, color="0.35")
    axis.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.6))
    axis.grid(axis="y", color="0.92", linewidth=0.6)
    sns.despine(ax=axis)


def _draw_gains(axis: Axes, gains: pd.DataFrame, words: dict[str, str]) -> None:
    means, seeds = (gains[gains["series"] == series] for series in ("mean", "seed"))
    names = list(means["name"])
    _draw_beside(axis, means, words, names, "+.2f")
    axis.plot(seeds["ours"], seeds["name"].map(names.index) + 0.2, **SEED_MARK)
    axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    axis.set(yticklabels=names, xlabel="accuracy, SAT less dense (points)")


def _draw_ratios(axis: Axes, ratios: pd.DataFrame, words: dict[str, str]) -> None:
    names = list(dict.fromkeys(ratios["name"]))
    _draw_beside(axis, _judged(ratios).assign(error=np.nan), words, names, ".3g")
    same = ratios[ratios["series"] == LIKE_FOR_LIKE]
    axis.plot(same["ours"], same["name"].map(names.index), **LIKE_FOR_LIKE_MARK)
    axis.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    axis.set(xscale="log", yticklabels=list(map(_label, names)), xlabel="times as much as SAT")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _label(name: str) -> str:
    """What is compared with SAT, for a line's name."""
    return LABELS.get(name, name.replace("step, ", "BigBird's step, "))


def _legend(figure: Figure) -> None:
    marks = {word: {"marker": mark, "color": colour} for word, (mark, colour) in WORD_MARKS.items()}
    marks[NOT_RUN] |= {"markerfacecolor": "white"}
    named = {"published": PUBLISHED_MARK, LIKE_FOR_LIKE: LIKE_FOR_LIKE_MARK, "single seeds": SEED_MARK}
    handles = [Line2D([], [], **({"linestyle": ""} | look), label=word) for word, look in (marks | named).items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
