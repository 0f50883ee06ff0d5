"""One model on several GPUs: the panel and the tables, drawn from rows of the experiment `data_parallel`."""

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .figures import COLUMN, PALETTE, new

PHASES = ("dense", "sparse")


def steps(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per number of processes, batch and phase.

    Columns:
        median_ms, low_ms, high_ms: of a step. examples_per_second: of all processes together. efficiency: that over
        so many times what one process does at its largest batch, NaN without rows of one. share_ms: where there are
        several, a step of one process that has only its share of the batch: what it would take if sharing cost nothing.
    """
    rows = rows[rows["sweep"] == "step"]
    measures = ["median_ms", "low_ms", "high_ms", "examples_per_second"]
    lines = [
        {"phase": phase, "processes": int(row["processes"]), "batch": int(row["batch"])}
        | {name: row[f"{phase}_{name}"] for name in measures}
        for _, row in rows.iterrows()
        for phase in PHASES
    ]
    lines = pd.DataFrame(lines, columns=["phase", "processes", "batch", *measures])
    lines = lines.sort_values(["phase", "processes", "batch"], ignore_index=True)
    alone = lines[lines["processes"] == 1].set_index(["phase", "batch"])
    one = alone["examples_per_second"].groupby("phase").last()
    lines["efficiency"] = lines["examples_per_second"] / (lines["processes"] * lines["phase"].map(one))
    shares = zip(lines["phase"], lines["batch"] // lines["processes"], strict=True)
    share_ms = pd.Series([alone["median_ms"].get(share, float("nan")) for share in shares], lines.index)
    return lines.assign(share_ms=share_ms.where(lines["processes"] > 1))


def data_parallel(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Throughput against the number of processes, by phase: one batch shared, or as large a one for each.

    Beside a point stands its efficiency; the dotted lines are what one process does, so many times.
    """
    drawn = steps(rows)
    batch, numbers = (drawn["batch"] // drawn["processes"]).max(), sorted(set(drawn["processes"]))
    figure, ((axis,),) = new(COLUMN, 2.4)
    for phase in reversed(PHASES):
        colour, part = PALETTE[f"sat, {phase} phase"], drawn[drawn["phase"] == phase]
        shared, whole = (part[part["batch"] == batch * each] for each in (1, part["processes"]))
        for one in whole.loc[whole["processes"] == 1, "examples_per_second"] / 1000:
            axis.plot(numbers, [one * number for number in numbers], ":", color=colour, linewidth=0.9)
        _line(axis, whole, f"{phase} phase, {batch} each", "-o", "bottom", color=colour)
        _line(axis, shared, f"{phase} phase, {batch} in all", "--o", "top", color=colour, markerfacecolor="white")
    axis.set(xlabel="processes", ylabel="thousand examples / s", xticks=numbers)
    axis.set_ylim(bottom=0)
    axis.margins(x=0.12)
    axis.xaxis.set_minor_locator(NullLocator())
    sns.despine(ax=axis)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure, drawn


def _line(axis: Axes, part: pd.DataFrame, label: str, style: str, side: str, **look) -> None:
    rates = part["examples_per_second"] / 1000
    axis.plot(part["processes"], rates, style, label=label, markersize=4, linewidth=1, **look)
    for line, rate in zip(part.itertuples(), rates, strict=True):
        if line.processes > 1 and not pd.isna(line.efficiency):
            place = {"xytext": (5, 0), "textcoords": "offset points", "va": side, "fontsize": 6}
            axis.annotate(f"{line.efficiency:.0%}", (line.processes, rate), **place)


def steps_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per phase, number of processes and batch."""
    lines = steps(rows)
    return pd.DataFrame(
        {
            "phase": lines["phase"],
            "processes": lines["processes"],
            "batch": lines["batch"],
            "step ms": [f"{value:.3g}" for value in lines["median_ms"]],
            "examples / s": [f"{value:,.0f}" for value in lines["examples_per_second"]],
            "efficiency": [f"{value:.2f}" for value in lines["efficiency"]],
            "one with its share, ms": ["-" if pd.isna(value) else f"{value:.3g}" for value in lines["share_ms"]],
        }
    )


def runs_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per run by several processes, and whether all of them came to the same bits."""
    runs = rows[rows["sweep"] == "training"]
    runs = runs.reindex(columns=["processes", "seed", "transition_step", "test_accuracy", "wall_seconds", "by_process"])
    return pd.DataFrame(
        {
            "processes": runs["processes"].astype(int),
            "seed": runs["seed"].astype(int),
            "switched at step": ["-" if pd.isna(step) else f"{step:.0f}" for step in runs["transition_step"]],
            "test %": [f"{100 * value:.2f}" for value in runs["test_accuracy"]],
            "seconds": [f"{value:.0f}" for value in runs["wall_seconds"]],
            "same step, layouts and weights in all": ["yes" if same else "no" for same in agree(runs)],
        }
    )


def agree(runs: pd.DataFrame) -> list[bool]:
    """Of each run, whether all its processes had the same transition step, layouts and weights at the end."""
    return [all(process == processes[0] for process in processes) for processes in runs.get("by_process", ())]
