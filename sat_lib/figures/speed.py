"""Figures and tables of time and memory: whole steps, single operations, kernels beside their peers."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from . import COLUMN, PAGE, PALETTE, new
from .labels import at_ends
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
    shown = drawn.assign(of=[_attention_of(line) for _, line in drawn.iterrows()])
    shown = shown.assign(ms=shown["median_ms"].astype(float), gib=shown["peak_bytes"].astype(float) / 2**30)
    tasks = [task for task in STEP_TASKS if task in set(drawn["task"])] or list(dict.fromkeys(drawn["task"]))[:2]
    shown = shown[shown["task"].isin(tasks)]
    places = list(shown.groupby("of")["ms"].min().sort_values().index)
    figure, axes = new(PAGE, 1.2 + 0.52 * len(places), 2, len(tasks), sharey=True, sharex="row")
    panels = [(axis, shown[shown["task"] == task], name)
              for line, name in zip(axes, ("ms", "gib"), strict=True)
              for axis, task in zip(line, tasks, strict=True)]  # fmt: skip
    for draw in (_step_marks, _step_values):
        for panel in panels:
            draw(*panel, places)
    for column, task in enumerate(tasks):
        axes[0, column].set_title(task_name(task))
        axes[0, column].set_xlabel("training step (ms, median)")
        axes[1, column].set_xlabel("peak memory of a step (GiB)")
    _legend_of_ways(figure, shown)
    return figure, drawn


def _attention_of(line: pd.Series) -> str:
    """What a step is of, whatever computes it: its label without the rest."""
    return line["label"].removesuffix(", plain").removesuffix(f", {line['compute']}")


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
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
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
                place = (value, places.index(label))
                axis.annotate(text, place, (0, 4), textcoords="offset points", ha="center", fontsize=7)


def over_sat(rows: pd.DataFrame) -> pd.Series:
    """Each step's time over that of SAT's sparse phase, of the same task and the same way: fast or plain."""
    sparse = rows[(rows["phase"] == "sparse") & (rows["preset"] == "released")]
    base = sparse.set_index(["task", "step_kind"])["median_ms"]
    places = pd.MultiIndex.from_frame(rows[["task", "step_kind"]])
    return rows["median_ms"].astype(float) / base.reindex(places).set_axis(rows.index).astype(float)


def step_table(rows: pd.DataFrame, tasks: tuple[str, ...] = STEP_TASKS) -> pd.DataFrame:
    """Time, peak memory, and `over_sat` beside the published ratio, for some of the tasks."""
    rows = rows.assign(over=over_sat(rows), label=step_labels(rows))
    lines = []
    for label, part in rows.groupby("label", sort=False):
        line = {"step of": label}
        for name in tasks:
            one = part[part["task"] == name]
            line |= _step_numbers(one.iloc[0] if len(one) else None, task_name(name))
            line[f"{task_name(name)} published"] = _ratio(_published_over_sat(part.iloc[0], name))
        lines.append(line)
    return pd.DataFrame(lines)


def _step_numbers(row: pd.Series | None, task: str) -> dict[str, str]:
    ms, size, over = (np.nan,) * 3 if row is None else row[["median_ms", "peak_bytes", "over"]].astype(float)
    return {
        f"{task} ms": _short(ms),
        f"{task} GiB": _short(size / 2**30),
        f"{task} time / SAT's": _ratio(over),
    }


def _published_over_sat(row: pd.Series, task: str) -> float:
    """The published ratio for what a row timed; NaN where there is none: of SAT's dense phase, of a changed model."""
    told = (row["attention"] != "sat" or row["phase"] == "sparse") and not row["model"]
    step_ms = published_value("step_ms")
    return step_ms.get(row["attention"], {}).get(task, np.nan) / step_ms["sat"][task] if told else np.nan


OPERATIONS = {"QK^T": ("gemm_qk", "sddmm"), "softmax": ("softmax", "sparse_softmax"), "AV": ("gemm_av", "spmm")}


def time_breakdown(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Forward time of the three attention operations, dense and sparse, with the ratio over each pair."""
    speed_up = published_value("speed_up")
    lines = [
        {
            "task": row["task"],
            "dtype": row["dtype"],
            "operation": operation,
            "dense_ms": row[f"{dense}_ms"],
            "sparse_ms": row[f"{sparse}_ms"],
            "ratio": row[f"{dense}_ms"] / row[f"{sparse}_ms"],
            "published_ratio": speed_up[operation] if row["task"] == "cifar10" else None,
        }
        for _, row in rows.iterrows()
        for operation, (dense, sparse) in OPERATIONS.items()
    ]
    drawn = pd.DataFrame(lines)
    parts = list(drawn.groupby(["dtype", "task"], sort=False))
    columns = min(4, len(parts))
    figure, axes = new(max(COLUMN, 1.75 * columns), 2.0 * -(-len(parts) // columns), -(-len(parts) // columns), columns)
    for axis in axes.flat[len(parts) :]:
        axis.remove()
    for axis, ((dtype, name), part) in zip(axes.flat, parts, strict=False):
        x = np.arange(len(part))
        axis.bar(x - 0.2, part["dense_ms"], 0.4, color=PALETTE["dense"], label="dense")
        axis.bar(x + 0.2, part["sparse_ms"], 0.4, color=PALETTE["sat"], label="block-sparse")
        for place, ratio in zip(x, part["ratio"], strict=True):
            axis.annotate(f"{ratio:.1f}x", (place, part.iloc[place][["dense_ms", "sparse_ms"]].max()), ha="center",
                          va="bottom", fontsize=7)  # fmt: skip
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
    per_example = drawn["batch"]
    drawn["ms_per_example"] = drawn["forward_backward_ms"] / per_example
    drawn["mib_per_example"] = drawn["peak_bytes"] / 2**20 / per_example
    drawn["gflop_per_example"] = drawn["operations"] / 1e9 / per_example
    labels = {
        "ms_per_example": "forward + backward (ms / example)",
        "mib_per_example": "peak memory (MiB / example)",
        "gflop_per_example": "forward GFLOP / example",
    }
    figure, (axes,) = new(PAGE, 2.6, 1, 3)
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        _log_axes(axis, drawn, label)
        for method, part in drawn.groupby("method", sort=False):
            _log_points(axis, part, name, method)
        _name_methods(axis, drawn, name)
    return figure, drawn


def _log_axes(axis: Axes, drawn: pd.DataFrame, title: str) -> None:
    lengths = sorted(set(drawn["length"]))
    axis.set(xscale="log", yscale="log", xlabel="length L", title=title, xticks=lengths)
    axis.set_xticklabels([f"{length / 1024:g}k" if length >= 1024 else f"{length:g}" for length in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    sns.despine(ax=axis)


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


def _name_methods(axis: Axes, drawn: pd.DataFrame, name: str) -> None:
    """Each method by the height of its last point; those that end at one place share it, the mark tells which."""
    longest = drawn.sort_values("length").drop_duplicates("method", keep="last").dropna(subset=name)
    ends = [(value, method, PALETTE[method]) for method, value in zip(longest["method"], longest[name], strict=True)]
    at_ends(axis, ends, apart=0.085)


# ---- the kernels beside their peers ----------------------------------------------------------------------------------


def kernel_table(lines: pd.DataFrame) -> pd.DataFrame:
    """The main workload: every method, and how many times as long it takes as the fused kernel.

    Args:
        lines: of `experiments.kernel_summary`.

    The ratio is that of forward and backward, in one dtype; of forward where there is no more.
    """
    lines = lines[lines["sweep"] == "main"]
    lines = lines.assign(products=lines["dtype"] + lines["tf32"].map({True: ", TF32"}).fillna(""))
    fused = lines[lines["method"] == "fused"].drop_duplicates("products").set_index("products")
    times = ["forward ms", "forward + backward ms"]
    table = []
    for _, line in lines.iterrows():
        forward, both = line[times] / fused[times].reindex([line["products"]]).iloc[0]
        ratio = f"{forward:.2f} (forward)" if pd.isna(both) else f"{both:.2f}"
        forward_only = pd.isna(line["forward + backward ms"]) and pd.isna(line["note"])
        note = "forward only" if forward_only else line["note"]
        table.append(
            {
                "implementation": line["method"],
                "dtype": line["products"],
                "forward ms": _short(line["forward ms"]),
                "forward x floor": _short(line["forward x floor"]),
                "forward + backward ms": _short(line["forward + backward ms"]),
                "forward + backward x floor": _short(line["forward + backward x floor"]),
                "fused is faster": "-" if pd.isna(forward) else ratio,
                "note": note if pd.isna(note) else note.replace("|", "/")[:90],
            }
        )
    return pd.DataFrame(table)


def _short(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.3g}"


def _ratio(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.2f}"
