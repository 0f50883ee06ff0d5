"""The figure of the verdicts: our value beside the published one. Nothing here measures or judges."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from . import PAGE, PALETTE, evidence, new
from .claims import claims, verdict
from .evidence import Frames, percent, task_runs, where
from .judge import IN_DIRECTION, NOT_REPRODUCED, NOT_RUN, REPRODUCED, Claim, gap
from .published import task_name

DRAWN = ("gain", "step_time", "operation_time", "attention_memory", "step_memory")  # measures whose claims are shown
LIKE_FOR_LIKE, MOST = "through SAT's kernel", "the most of all cases"
LABELS = {
    "softmax": "dense softmax",
    "SDDMM": "dense QK^T / SDDMM",
    "SpMM": "dense AV / SpMM",
    "memory, attention": "dense attention's memory",
    "memory, step": "a step's memory",
}
STEP_SERIES = {
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
    frames, lines = evidence.with_sources(frames), []
    for claim in claims():
        if claim.measure in DRAWN:
            common = {"published": claim.value, "word": verdict(claim, frames)["verdict"]}
            of_claim = _gain_lines if claim.measure == "gain" else _ratio_lines
            lines += [common | line for line in of_claim(claim, frames)]
    columns = ["panel", "name", "series", "seed", "ours", "error", "published", "part", "word"]
    drawn = pd.DataFrame(lines, columns=columns)
    drawn["ours_over_published"] = (drawn["ours"] / drawn["published"]).where(drawn["panel"] == "ratio")
    figure, ((left, right),) = new(PAGE, 3.1, 1, 2, width_ratios=(1, 1.3))
    _draw_gains(left, where(drawn, panel="accuracy"))
    _draw_ratios(right, where(drawn, panel="ratio"))
    _legend(figure)
    return figure, drawn.drop(columns="word")


def _gain_lines(claim: Claim, frames: Frames) -> list[dict]:
    """A line with mean and standard error, and one per seed of SAT."""
    runs = task_runs(frames, claim.tasks[0])
    common = {"panel": "accuracy", "name": task_name(claim.tasks[0]), "part": bool(len(runs) and runs["part"].all())}
    sat, dense = percent(runs, "sat"), percent(runs, "dense")
    found = gap(sat, dense)
    if found is None:
        return [common | {"series": "mean"}]
    seeds = zip(runs.loc[sat.index, "seed"], sat - dense.mean(), strict=True)
    mean = common | {"series": "mean", "ours": found.difference, "error": found.error}
    return [mean, *(common | {"series": "seed", "seed": seed, "ours": ours} for seed, ours in seeds)]


def _ratio_lines(claim: Claim, frames: Frames) -> list[dict]:
    """A line per way of measuring what a claim compares with SAT."""
    if claim.measure == "step_time":
        name, steps = f"step, {task_name(claim.tasks[0])}", evidence.step_ratios(frames, claim.tasks[0])
        ours = [(STEP_SERIES[step], ratio.value) for step, ratio in steps.items() if step in STEP_SERIES]
    elif claim.measure == "operation_time":
        name, rows = SPARSE_OPERATIONS[claim.operation], where(evidence.operation_ratios(frames), task=claim.tasks[0])
        ours = [(row["arithmetic"], row[claim.operation]) for _, row in rows.iterrows()]
    elif claim.measure == "attention_memory":
        name, ours = "memory, attention", [(MOST, evidence.memory_ratios(frames, "materialised").max())]
    else:
        name, ours = "memory, step", [(MOST, evidence.step_memory_ratios(frames)["ratio"].max())]
    return [{"panel": "ratio", "name": name, "series": series, "ours": ratio} for series, ratio in ours]


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _draw_beside(axis: Axes, lines: pd.DataFrame, names: list[str], form: str) -> None:
    """Ours joined with the published value, a row per name, in the colour of the verdict; both values at the edge."""
    for line in lines.itertuples():
        place, (mark, colour) = names.index(line.name), WORD_MARKS[line.word]
        if not np.isnan(line.ours):
            axis.plot([line.published, line.ours], [place, place], color=colour, linewidth=1.2, zorder=1)
            axis.errorbar(line.ours, place, xerr=line.error, color=colour, linewidth=0.8, capsize=2)
            face = "white" if line.word == NOT_RUN else colour
            axis.plot(line.ours, place, mark, color=colour, markersize=5.5, markerfacecolor=face)
        axis.plot(line.published, place, **PUBLISHED_MARK)
        ours = "-" if np.isnan(line.ours) else format(line.ours, form)
        axis.text(1.02, place, f"{ours} ({line.published:{form}})", va="center", transform=axis.get_yaxis_transform())
    axis.text(1.02, 1.02, "ours (published)", transform=axis.transAxes, color="0.35")
    axis.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.6))
    axis.grid(axis="y", color="0.92", linewidth=0.6)
    sns.despine(ax=axis)


def _draw_gains(axis: Axes, gains: pd.DataFrame) -> None:
    means, seeds = where(gains, series="mean"), where(gains, series="seed")
    names = list(means["name"])
    _draw_beside(axis, means, names, "+.2f")
    axis.plot(seeds["ours"], seeds["name"].map(names.index) + 0.2, **SEED_MARK)
    axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    axis.set(yticklabels=names, xlabel="accuracy, SAT less dense (points)")


def _draw_ratios(axis: Axes, ratios: pd.DataFrame) -> None:
    """By name the ratio that its claim is judged by: the smallest of those that the paper could have measured."""
    names, same = list(ratios["name"].unique()), ratios["series"] == LIKE_FOR_LIKE
    judged = ratios[~same].dropna(subset="ours").sort_values("ours").drop_duplicates("name")
    _draw_beside(axis, judged, names, ".3g")
    axis.plot(ratios.loc[same, "ours"], ratios.loc[same, "name"].map(names.index), **LIKE_FOR_LIKE_MARK)
    axis.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    labels = [LABELS.get(name, name.replace("step, ", "BigBird's step, ")) for name in names]
    axis.set(xscale="log", yticklabels=labels, xlabel="times as much as SAT")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(figure: Figure) -> None:
    marks = {word: {"marker": mark, "color": colour} for word, (mark, colour) in WORD_MARKS.items()}
    marks[NOT_RUN] |= {"markerfacecolor": "white"}
    named = {"published": PUBLISHED_MARK, LIKE_FOR_LIKE: LIKE_FOR_LIKE_MARK, "single seeds": SEED_MARK}
    handles = [Line2D([], [], **({"linestyle": ""} | look), label=word) for word, look in (marks | named).items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
