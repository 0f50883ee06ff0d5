"""Figures and tables of time and memory: whole steps, single operations, kernels beside their peers."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from . import COLUMN, PAGE, PALETTE, new
from .published import published_value, task_name

# ---- 04, 05: time of steps and operations ----------------------------------------------------------------------------


def step_time(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Median time and peak memory of a training step, by task and kind of step; quartiles as lines.

    Colours are the attentions'; an implementation in PyTorch's operations is pale, a plain step hatched.
    """
    names = ["task", "kind", "attention", "implementation", "step", "batch", "precision"]
    drawn = rows[[*names, "median_ms", "low_ms", "high_ms", "peak_bytes"]].copy()
    kinds, tasks = list(dict.fromkeys(drawn["kind"])), list(dict.fromkeys(drawn["task"]))
    height = 0.9 + 0.3 * len(kinds)
    figure, axes = new(PAGE, height, 2, len(tasks), sharey=True, sharex="row")
    for column, task in enumerate(tasks):
        part = drawn[drawn["task"] == task].set_index("kind").reindex(kinds)
        spread = np.stack([part["median_ms"] - part["low_ms"], part["high_ms"] - part["median_ms"]]).astype(float)
        _step_bars(axes[0, column], part, part["median_ms"].astype(float), spread)
        _step_bars(axes[1, column], part, part["peak_bytes"].astype(float) / 2**30, None)
        axes[0, column].set_title(task_name(task))
    axes[0, 0].set_ylabel("training step (ms, median)")
    axes[1, 0].set_ylabel("peak memory of a step (GiB)")
    return figure, drawn


def _step_bars(axis: Axes, part: pd.DataFrame, values: pd.Series, spread: np.ndarray | None) -> None:
    faint, hatched = part["implementation"] == "library", part["step"] == "plain"
    for place, (kind, value) in enumerate(values.items()):
        if np.isnan(value):
            continue
        colour = PALETTE[kind] if kind in PALETTE else PALETTE[part["attention"][kind]]
        face = "white" if hatched[kind] else (*colour, 0.5 if faint[kind] else 1.0)
        error, above = (None, 0) if spread is None else (spread[:, place : place + 1], spread[1, place])
        settings = {"edgecolor": colour, "linewidth": 0.6, "hatch": "////" if hatched[kind] else None}
        axis.barh(place, value, 0.75, xerr=error, facecolor=face, error_kw={"linewidth": 0.7}, **settings)
        axis.annotate(f"{value:.3g}", (value + above, place), (3, 0), textcoords="offset points", va="center")
    axis.set(yticks=range(len(part)), yticklabels=list(part.index), ylim=(len(part) - 0.4, -0.6))
    axis.margins(x=0.2)
    sns.despine(ax=axis)


def over_sat(rows: pd.DataFrame) -> pd.Series:
    """Each step's time over that of SAT's sparse phase, of the same task and the same way: fast or plain."""
    sparse = rows[rows["kind"].str.startswith("sat, sparse phase")]
    base = sparse.set_index(["task", "step"])["median_ms"]
    places = pd.MultiIndex.from_frame(rows[["task", "step"]])
    return rows["median_ms"].astype(float) / base.reindex(places).set_axis(rows.index).astype(float)


def step_table(rows: pd.DataFrame, tasks: tuple[str, ...] = ("cifar10", "agnews")) -> pd.DataFrame:
    """Time, peak memory, and `over_sat` beside the published ratio, for some of the tasks."""
    rows, step_ms, lines = rows.assign(over=over_sat(rows)), published_value("step_ms"), []
    for kind, part in rows.groupby("kind", sort=False):
        line = {"step of": kind}
        for name in tasks:
            one = part[part["task"] == name].reindex(columns=["median_ms", "peak_bytes", "over"]).astype(float)
            one = one.iloc[0] if len(one) else pd.Series(np.nan, one.columns)
            published = step_ms.get(part["attention"].iloc[0], {}).get(name)
            told = published is not None and "dense phase" not in kind and not part["model"].iloc[0]
            ratio = f"{published / step_ms['sat'][name]:.2f}" if told else "-"
            line |= {
                f"{task_name(name)} ms": _short(one["median_ms"]),
                f"{task_name(name)} GiB": _short(one["peak_bytes"] / 2**30),
                f"{task_name(name)} time / SAT's": "-" if pd.isna(one["over"]) else f"{one['over']:.2f}",
                f"{task_name(name)} published": ratio,
            }
        lines.append(line)
    return pd.DataFrame(lines)


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
    """Time, peak memory and operations of attention alone against L, with the complexity formula through each.

    The lines are density x L^2 for the operations (exact), and for time the same formula with one factor per
    implementation, fitted at the longest L; memory has no line. Only rows of the first row's head size are drawn, and
    none that ended with an error.
    """
    names = ["implementation", "batch", "length", "density", "forward_backward_ms", "peak_bytes", "operations"]
    drawn = rows[rows["head_size"] == rows["head_size"].iloc[0]].dropna(subset="forward_backward_ms")[names].copy()
    per_example = drawn["batch"]
    drawn["ms_per_example"] = drawn["forward_backward_ms"] / per_example
    drawn["mib_per_example"] = drawn["peak_bytes"] / 2**20 / per_example
    drawn["gflop_per_example"] = drawn["operations"] / 1e9 / per_example
    labels = {
        "ms_per_example": "fwd + bwd (ms / example)",
        "mib_per_example": "peak memory (MiB / example)",
        "gflop_per_example": "forward GFLOP / example",
    }
    figure, (axes,) = new(PAGE, 2.3, 1, 3)
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        for implementation, part in drawn.groupby("implementation", sort=False):
            _log_points(axis, part, name, implementation)
        axis.set(xscale="log", yscale="log", xlabel="length L", ylabel=label, xticks=sorted(set(drawn["length"])))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
        sns.despine(ax=axis)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=5, frameon=False, title="lines: c L²", title_fontsize=7)
    return figure, drawn


def _log_points(axis: Axes, part: pd.DataFrame, name: str, implementation: str) -> None:
    colour = PALETTE[implementation]
    axis.plot(part["length"], part[name], "o", color=colour, markersize=3.5, label=implementation)
    if name != "mib_per_example":
        longest = part.loc[part["length"].idxmax()]
        formula = longest[name] * (part["length"] / longest["length"]) ** 2
        axis.plot(part["length"], formula, "-", color=colour, linewidth=0.8)


# ---- the kernels beside their peers ----------------------------------------------------------------------------------

SHAPE = ["batch", "heads", "length", "head_size", "dtype", "tf32"]  # what dense attention depends on


def kernel_summary(rows: pd.DataFrame, bandwidth_tb_s: float) -> pd.DataFrame:
    """One line per implementation, and per operation: times in ms, and how many times its byte floor it takes.

    Args:
        rows: of the experiment `kernels`, any sweeps. bandwidth_tb_s: of its copy, which turns bytes into time.

    "sdpa" and "flex" are their forward and backward time over the line's, at the same shape (flex: and layout, at its
    fastest block side). A time that wasn't or couldn't be measured is NaN, with the reason under "note".
    """
    measured = ["forward_ms", "forward_backward_ms", "floor_bytes_forward", "floor_bytes_backward", "error"]
    wanted = ["sweep", "implementation", *SHAPE, "block", "density", *measured]
    whole = rows[~rows["sweep"].isin(["copy", "operations"])].reindex(columns=wanted)
    floor = whole["floor_bytes_forward"].astype(float), whole["floor_bytes_backward"].astype(float)
    forward, both = whole["forward_ms"].astype(float), whole["forward_backward_ms"].astype(float)
    per_ms = bandwidth_tb_s * 1e9  # bytes
    dense = _best(whole[whole["implementation"] == "sdpa"], SHAPE, whole)
    flex = _best(whole[whole["implementation"].str.startswith("flex", na=False)], [*SHAPE, "block", "density"], whole)
    lines = whole[["sweep", "implementation", *SHAPE, "block", "density"]].assign(
        **{
            "forward ms": forward,
            "forward x floor": forward * per_ms / floor[0],
            "forward + backward ms": both,
            "forward + backward x floor": both * per_ms / (floor[0] + floor[1]),
            "sdpa": dense / both,
            "flex": flex / both,
            "note": whole["error"],
        }
    )
    return pd.concat([lines, _operation_lines(rows, per_ms)], ignore_index=True).astype(
        dict.fromkeys(["batch", "heads", "length", "head_size", "block"], "Int64")
    )


def _best(peers: pd.DataFrame, keys: list[str], lines: pd.DataFrame) -> np.ndarray:
    """The shortest forward and backward time (ms) among peers of the same keys, for each line; NaN where none.

    Peers of the line's own sweep come first, then those of any sweep.
    """
    found = {}
    for *key, sweep, time in peers[[*keys, "sweep", "forward_backward_ms"]].itertuples(index=False):
        for place in ((*_key(key), sweep), _key(key)):
            found[place] = min(found.get(place, np.inf), np.inf if pd.isna(time) else time)
    places = [(_key(key), sweep) for *key, sweep in lines[[*keys, "sweep"]].itertuples(index=False)]
    times = np.array([found.get((*key, sweep), found.get(key, np.inf)) for key, sweep in places])
    return np.where(np.isinf(times), np.nan, times)


def _key(values: list) -> tuple:
    return tuple(None if pd.isna(value) else value for value in values)


def _operation_lines(rows: pd.DataFrame, bytes_per_ms: float) -> pd.DataFrame:
    """A line per operation of the sweep `operations`."""
    some = rows[rows["sweep"] == "operations"]
    names = [name.removesuffix("_floor_bytes") for name in some.columns if name.endswith("_floor_bytes")]
    shape = ["sweep", *SHAPE, "block", "density"]
    lines = [
        some.reindex(columns=shape).assign(
            implementation=name,
            **{
                "forward ms": some[f"{name}_ms"],
                "forward x floor": some[f"{name}_ms"] * bytes_per_ms / some[f"{name}_floor_bytes"],
            },
        )
        for name in names
    ]
    return pd.concat(lines) if lines else pd.DataFrame()


def kernel_table(rows: pd.DataFrame, bandwidth_tb_s: float) -> pd.DataFrame:
    """The main workload: every implementation, and how many times as long it takes as the fused kernel.

    The ratio is that of forward and backward, in one dtype; of forward where there is no more.
    """
    lines = kernel_summary(rows[rows["sweep"] == "main"], bandwidth_tb_s)
    lines["products"] = lines["dtype"] + lines["tf32"].map({True: ", TF32"}).fillna("")
    fused = lines[lines["implementation"] == "fused"].drop_duplicates("products").set_index("products")
    times = ["forward ms", "forward + backward ms"]
    table = []
    for _, line in lines.iterrows():
        forward, both = line[times] / fused[times].reindex([line["products"]]).iloc[0]
        ratio = f"{forward:.2f} (forward)" if pd.isna(both) else f"{both:.2f}"
        forward_only = pd.isna(line["forward + backward ms"]) and pd.isna(line["note"])
        note = "forward only" if forward_only else line["note"]
        table.append(
            {
                "implementation": line["implementation"],
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
