"""Figures and tables of time and memory: whole steps, single operations, kernels beside their peers."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from . import COLUMN, PAGE, PALETTE, cell, document_table, new
from .labels import at_ends, log_ticks
from .published import published_value, task_name

STEP_TASKS = ("cifar10", "agnews")  # an image and a text task: what figure and table show of the steps
METHOD_MARKS = {  # mark and size, so that methods with the same value are all seen
    "fused": ("o", 3),
    "flex 64": ("s", 6),
    "reference": ("D", 4.5),
    "sdpa": ("v", 5),
    "materialised": ("o", 7),
}
WAYS = {  # what computes the attention: mark and name
    "sdpa": ("o", "fused attention"),
    "kernel": ("o", "fused attention"),
    "library": ("s", "gathers and products"),
    "transformers": ("^", "layer of transformers"),
}

# ---- 04, 05: time of steps and operations ----------------------------------------------------------------------------


def attention_label(attention: str, phase: str) -> str:
    """An attention and, of SAT's, the phase: "lsg", "sat, sparse phase"."""
    return f"sat, {phase} phase" if attention == "sat" else attention


def step_labels(rows: pd.DataFrame) -> list[str]:
    """What each row of `step` timed, as readers know it: "sat, sparse phase", "lsg, library", "dense, plain", ...

    Which steps are plain is said where not all of them are; of the layers of transformers it goes without saying.
    """
    tell = rows["step_kind"].eq("plain") & rows["step_kind"].eq("fast").any() & rows["compute"].ne("transformers")
    labels = [_step_label(row) for _, row in rows.iterrows()]
    return [f"{label}, plain" if plain else label for label, plain in zip(labels, tell, strict=True)]


def _step_label(row: pd.Series) -> str:
    if row["preset"] != "released":
        return f"{row['attention']}, {row['preset']}"
    label = attention_label(row["attention"], row["phase"])
    if "dilation" in row["model"]:
        label += f" D = {row['model']['dilation']}"
    return label if row["attention"] in ("sat", "dense") else f"{label}, {row['compute']}"


def step_time(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Median time and peak memory of a training step, for an image and a text task; all tasks are in what is drawn.

    A row per attention, the fastest on top, a mark per way of computing it; quartiles of the time as lines.
    """
    names = ["task", "label", "attention", "compute", "phase", "step_kind", "preset", "batch", "precision"]
    drawn = rows.assign(label=step_labels(rows))[[*names, "median_ms", "low_ms", "high_ms", "peak_bytes"]]
    ways = zip(drawn["label"], drawn["compute"], strict=True)
    shown = drawn.assign(
        of=[label.removesuffix(", plain").removesuffix(f", {compute}") for label, compute in ways],
        ms=drawn["median_ms"].astype(float),
        gib=drawn["peak_bytes"].astype(float) / 2**30,
    )
    tasks = [task for task in STEP_TASKS if task in set(drawn["task"])] or list(dict.fromkeys(drawn["task"]))[:2]
    shown = shown[shown["task"].isin(tasks)]
    places = list(shown.groupby("of")["ms"].min().sort_values().index)
    figure, axes = new(PAGE, 1.2 + 0.52 * len(places), 2, len(tasks), sharey=True, sharex="row")
    labels = {"ms": "training step (ms, median)", "gib": "peak memory of a step (GiB)"}
    for line, (name, label) in zip(axes, labels.items(), strict=True):
        for draw in (_step_marks, _step_values):
            for axis, task in zip(line, tasks, strict=True):
                draw(axis, shown[shown["task"] == task], name, places)
        for axis in line:
            axis.set_xlabel(label)
    for axis, task in zip(axes[0], tasks, strict=True):
        axis.set_title(task_name(task))
    _legend_of_ways(figure, shown)
    return figure, drawn


def _look(compute: str, step_kind: str, colour) -> dict:
    """Marks tell what computes the attention; those of plain steps are hollow."""
    face = "white" if step_kind == "plain" else colour
    return {"marker": WAYS[compute][0], "color": colour, "markerfacecolor": face, "markersize": 5, "linestyle": ""}


def _legend_of_ways(figure: Figure, lines: pd.DataFrame) -> None:
    ways = dict.fromkeys(zip(lines["compute"].replace("sdpa", "kernel"), lines["step_kind"], strict=True))
    handles = [Line2D([], [], **_look(*way, "0.3"), label=f"{WAYS[way[0]][1]}, {way[1]} step") for way in ways]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)


def _step_marks(axis: Axes, part: pd.DataFrame, name: str, places: list[str]) -> None:
    for label, lines in part.dropna(subset=name).groupby("of"):
        place, colour = places.index(label), PALETTE.get(label, PALETTE[lines["attention"].iloc[0]])
        axis.plot(lines[name], [place] * len(lines), color=colour, linewidth=0.8, alpha=0.6)
        for line in lines.itertuples():
            value = getattr(line, name)
            axis.plot(value, place, **_look(line.compute, line.step_kind, colour))
            if name == "ms":
                axis.plot([line.low_ms, line.high_ms], [place, place], color="0.2", linewidth=0.8, zorder=1)
    axis.set(xscale="log", yticks=range(len(places)), yticklabels=places, ylim=(len(places) - 0.5, -0.8))
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.minorticks_off()
    axis.grid(axis="y", color="0.92", linewidth=0.6)
    axis.margins(x=0.06)
    sns.despine(ax=axis)


def _step_values(axis: Axes, part: pd.DataFrame, name: str, places: list[str]) -> None:
    """The numbers above the marks, once all panels are drawn; one that would cover another is left out."""
    low, high = np.log(axis.get_xlim())
    for label, lines in part.dropna(subset=name).groupby("of"):
        last = -np.inf
        for value in sorted(lines[name]):
            if (np.log(value) - last) / (high - low) > 0.13:
                last, text = np.log(value), f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
                axis.annotate(text, (value, places.index(label)), (0, 4), textcoords="offset points", ha="center")


def beside_sat(rows: pd.DataFrame) -> pd.DataFrame:
    """For each row of steps that of SAT's sparse phase of the same task, both fast or both plain: else the ratio would
    be that of the ways. NaN where there is none."""
    sparse = rows[(rows["phase"] == "sparse") & (rows["preset"] == "released")]
    places = pd.MultiIndex.from_frame(rows[["task", "step_kind"]])
    return sparse.set_index(["task", "step_kind"], drop=False).reindex(places).set_axis(rows.index)


def over_sat(rows: pd.DataFrame) -> pd.Series:
    """Each step's time over that of SAT's, see `beside_sat`."""
    return rows["median_ms"].astype(float) / beside_sat(rows)["median_ms"].astype(float)


def step_table(rows: pd.DataFrame, tasks: tuple[str, ...] = STEP_TASKS) -> pd.DataFrame:
    """Time, peak memory, and `over_sat` beside the published ratio, for some of the tasks."""
    rows = rows.assign(over=over_sat(rows), label=step_labels(rows))
    kinds = rows.drop_duplicates("label")
    parts = [kinds["label"].rename("step of").reset_index(drop=True)]
    for task in tasks:
        lines = rows[rows["task"] == task].drop_duplicates("label").set_index("label").reindex(kinds["label"])
        lines["published"] = [_published_over_sat(kind, task) for _, kind in kinds.iterrows()]
        columns = {
            "ms": ("median_ms", ".3g"),
            "GiB": ("peak_bytes", ".3g", 1 / 2**30),
            "time / SAT's": ("over", ".2f"),
            "published": ("published", ".2f"),
        }
        parts.append(document_table(lines, columns).add_prefix(f"{task_name(task)} "))
    return pd.concat(parts, axis=1)


def _published_over_sat(row: pd.Series, task: str) -> float:
    """The published ratio for what a row timed; NaN for other tasks, SAT's dense phase and a changed model."""
    told = (row["attention"] != "sat" or row["phase"] == "sparse") and not row["model"]
    step_ms = published_value("step_ms")
    ours, sat = (step_ms.get(attention, {}).get(task, np.nan) for attention in (row["attention"], "sat"))
    return ours / sat if told else np.nan


OPERATIONS = {"QK^T": ("gemm_qk", "sddmm"), "softmax": ("softmax", "sparse_softmax"), "AV": ("gemm_av", "spmm")}


def time_breakdown(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Forward time of the three attention operations, dense and sparse, with the ratio over each pair."""
    parts = []
    for operation, (dense, sparse) in OPERATIONS.items():
        times = {"dense_ms": rows[f"{dense}_ms"], "sparse_ms": rows[f"{sparse}_ms"]}
        parts.append(rows[["task", "dtype"]].assign(operation=operation, **times))
    drawn = pd.concat(parts).sort_index(kind="stable", ignore_index=True)
    drawn["ratio"] = drawn["dense_ms"] / drawn["sparse_ms"]
    published = drawn["operation"].map(published_value("speed_up"))
    drawn["published_ratio"] = published.where(drawn["task"] == "cifar10")
    parts = list(drawn.groupby(["dtype", "task"], sort=False))
    columns = min(4, len(parts))
    lines = -(-len(parts) // columns)
    figure, axes = new(max(COLUMN, 1.75 * columns), 2.0 * lines, lines, columns)
    for axis in axes.flat[len(parts) :]:
        axis.remove()
    for axis, ((dtype, name), part) in zip(axes.flat, parts, strict=False):
        x = np.arange(len(part))
        axis.bar(x - 0.2, part["dense_ms"], 0.4, color=PALETTE["dense"], label="dense")
        axis.bar(x + 0.2, part["sparse_ms"], 0.4, color=PALETTE["sat"], label="block-sparse")
        tops = part[["dense_ms", "sparse_ms"]].max(axis=1)
        for place, top, ratio in zip(x, tops, part["ratio"], strict=True):
            axis.text(place, top, f"{ratio:.1f}x", ha="center", va="bottom")
        axis.set(xticks=x, xticklabels=part["operation"], title=f"{task_name(name)}, {dtype}")
        axis.margins(y=0.15)
        sns.despine(ax=axis)
    for axis in axes[:, 0]:
        axis.set_ylabel("forward (ms, median)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure, drawn


# ---- 07: scaling -----------------------------------------------------------------------------------------------------


def scaling(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Time, peak memory and operations of attention alone against L, each method named where its line ends.

    Thin lines are the complexity formula: density x L^2 for the operations (exact), and for time the same formula with
    one factor per method, fitted at the longest L; memory has no formula. Only rows of the first row's head size are
    drawn, and none that ended with an error.
    """
    names = ["method", "batch", "length", "density", "forward_backward_ms", "peak_bytes", "operations"]
    drawn = rows[rows["head_size"] == rows["head_size"].iloc[0]].dropna(subset="forward_backward_ms")[names].copy()
    panels = {  # what is drawn: what it is made from, in which unit, and its title
        "ms_per_example": ("forward_backward_ms", 1, "forward + backward (ms / example)"),
        "mib_per_example": ("peak_bytes", 2**20, "peak memory (MiB / example)"),
        "gflop_per_example": ("operations", 1e9, "forward GFLOP / example"),
    }
    figure, (axes,) = new(PAGE, 2.6, 1, 3)
    for axis, (name, (measured, unit, title)) in zip(axes, panels.items(), strict=True):
        drawn[name] = drawn[measured] / unit / drawn["batch"]
        axis.set(yscale="log", xlabel="length L", title=title)
        log_ticks(axis, drawn["length"])
        for method, part in drawn.groupby("method", sort=False):
            _log_points(axis, part, name, method)
        last = drawn.sort_values("length").drop_duplicates("method", keep="last").dropna(subset=name)
        ends = zip(last[name], last["method"], last["method"].map(PALETTE), strict=True)
        at_ends(axis, ends, apart=0.085)  # where lines end at one place, their marks tell which is which
        sns.despine(ax=axis)
    return figure, drawn


def _log_points(axis: Axes, part: pd.DataFrame, name: str, method: str) -> None:
    colour, (mark, size) = PALETTE[method], METHOD_MARKS.get(method, ("o", 3))
    face = colour if method == "fused" else "none"
    axis.plot(part["length"], part[name], mark, color=colour, markersize=size, markerfacecolor=face)
    if name == "mib_per_example":
        axis.plot(part["length"], part[name], ":", color=colour, linewidth=0.7)
    else:
        longest = part.loc[part["length"].idxmax()]
        formula = longest[name] * (part["length"] / longest["length"]) ** 2
        axis.plot(part["length"], formula, "-", color=colour, linewidth=0.8)


# ---- the kernels beside their peers ----------------------------------------------------------------------------------


def kernel_table(lines: pd.DataFrame) -> pd.DataFrame:
    """The main workload: every method, and how many times as long it takes as the fused kernel.

    Args:
        lines: of `experiments.kernel_summary`.

    The ratio is that of forward and backward, in one dtype; of forward where there is no more.
    """
    lines = lines[lines["sweep"] == "main"].reset_index(drop=True)
    lines["products"] = lines["dtype"] + lines["tf32"].map({True: ", TF32"}).fillna("")
    fused = lines[lines["method"] == "fused"].drop_duplicates("products").set_index("products")
    times = ["forward ms", "forward + backward ms"]
    over = lines[times] / fused[times].reindex(lines["products"]).set_axis(lines.index)
    forward, both = over["forward ms"], over["forward + backward ms"]
    ratios, marks = both.fillna(forward), np.where(both.isna() & forward.notna(), " (forward)", "")
    lines["over fused"] = [cell(ratio, ".2f") + mark for ratio, mark in zip(ratios, marks, strict=True)]
    measured = ["forward ms", "forward x floor", "forward + backward ms", "forward + backward x floor"]
    columns = {"implementation": "method", "dtype": "products"}
    columns |= {name: (name, ".3g") for name in measured} | {"fused is faster": "over fused", "note": "note"}
    complete = lines["note"].notna() | lines["forward + backward ms"].notna()
    lines["note"] = lines["note"].astype(object).where(complete, "forward only").str.replace("|", "/").str[:90]
    return document_table(lines, columns)
