"""Figures and tables of training runs: phases, accuracy, and one model on several GPUs."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import COLUMN, PAGE, PALETTE, document_table, new, new_halves
from .labels import list_downward
from .published import attention_name, published_value, task_name

PHASES = ("dense", "sparse")


def steps(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per number of processes, batch and phase.

    Columns:
        median_ms, low_ms, high_ms: of a step. examples_per_second: of all processes together. efficiency:
        throughput / (processes x throughput of one at its largest batch), NaN without rows of one. share_ms: where
        there are several, a step of one process that has only its share of the batch: what it would take if sharing
        cost nothing.
    """
    rows, parts = rows[rows["sweep"] == "step"], []
    measures = ["median_ms", "low_ms", "high_ms", "examples_per_second"]
    for phase in PHASES:
        names = {f"{phase}_{name}": name for name in measures}
        part = rows.reindex(columns=["processes", "batch", *names]).rename(columns=names)
        parts.append(part.astype({"processes": int, "batch": int}).assign(phase=phase))
    lines = pd.concat(parts)[["phase", "processes", "batch", *measures]]
    lines = lines.sort_values(["phase", "processes", "batch"], ignore_index=True)
    alone = lines[lines["processes"] == 1].set_index(["phase", "batch"])
    one = alone["examples_per_second"].groupby("phase").last()
    lines["efficiency"] = lines["examples_per_second"] / (lines["processes"] * lines["phase"].map(one))
    shares = pd.MultiIndex.from_arrays([lines["phase"], lines["batch"] // lines["processes"]])
    return lines.assign(share_ms=np.where(lines["processes"] > 1, alone["median_ms"].reindex(shares), np.nan))


def data_parallel(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Throughput against the number of processes, by phase: one batch shared, or as large a one for each.

    Beside a point stands its efficiency; the dotted lines are the throughput of one process times their number.
    """
    drawn = steps(rows)
    batch, numbers = (drawn["batch"] // drawn["processes"]).max(), sorted(set(drawn["processes"]))
    figure, ((axis,),) = new(COLUMN, 2.4)
    for phase in reversed(PHASES):
        colour, part = PALETTE[f"sat, {phase} phase"], drawn[drawn["phase"] == phase]
        shared, whole = (part[part["batch"] == batch * each] for each in (1, part["processes"]))
        for one in whole.loc[whole["processes"] == 1, "examples_per_second"] / 1000:
            axis.plot(numbers, one * np.array(numbers), ":", color=colour, linewidth=0.9)
        look = {"color": colour, "markersize": 4, "linewidth": 1}
        _line(axis, whole, "-o", "bottom", label=f"{phase} phase, {batch} each", **look)
        _line(axis, shared, "--o", "top", label=f"{phase} phase, {batch} in all", markerfacecolor="white", **look)
    axis.set(xlabel="processes", ylabel="thousand examples / s", xticks=numbers)
    axis.set_ylim(bottom=0)
    axis.margins(x=0.12)
    axis.xaxis.minorticks_off()
    sns.despine(ax=axis)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure, drawn


def _line(axis: Axes, part: pd.DataFrame, form: str, side: str, **look) -> None:
    axis.plot(part["processes"], part["examples_per_second"] / 1000, form, **look)
    for line in part[part["processes"] > 1].dropna(subset="efficiency").itertuples():
        place = line.processes, line.examples_per_second / 1000
        axis.annotate(f"{line.efficiency:.0%}", place, (5, 0), textcoords="offset points", va=side)


def steps_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per phase, number of processes and batch."""
    columns = {
        "phase": "phase",
        "processes": "processes",
        "batch": "batch",
        "step ms": ("median_ms", ".3g"),
        "examples / s": ("examples_per_second", ",.0f"),
        "efficiency": ("efficiency", ".2f"),
        "one with its share, ms": ("share_ms", ".3g"),
    }
    return document_table(steps(rows), columns)


def runs_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per run by several processes, and whether all of them came to the same bits."""
    runs = rows[rows["sweep"] == "training"]
    columns = {
        "processes": ("processes", ".0f"),
        "seed": ("seed", ".0f"),
        "switched at step": ("transition_step", ".0f"),
        "test %": ("test_accuracy", ".2f", 100),
        "seconds": ("wall_seconds", ".0f"),
        "same step, layouts and weights in all": "same",
    }
    return document_table(runs.assign(same=np.where(agree(runs), "yes", "no")), columns)


def agree(runs: pd.DataFrame) -> list[bool]:
    """Of each run, whether all its processes had the same transition step, layouts and weights at the end."""
    outcomes = runs["by_process"] if len(runs) else ()
    return [all(process == processes[0] for process in processes) for processes in outcomes]


# ---- 02: one run through the three phases ----------------------------------------------------------------------------


def training(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Loss, skewness and distance over the steps, the transition, and each layer's maps. Takes the first row."""
    run = rows.iloc[0]
    history, maps = pd.DataFrame(run["history"]), run["maps"]
    layers = len(maps["start"])
    figure, (above, below) = new_halves(1.9 + 1.35 * layers, (1.7, 1.35 * layers))
    _curves(above.subplots(1, 3), history, run["transition_step"])
    _maps(below.subplots(layers, 4, squeeze=False), maps)
    drawn = history.explode(["skewness", "distance", "change_percent"])
    return figure, drawn.reset_index(names="line")


def _curves(axes: np.ndarray, history: pd.DataFrame, transition: float | None) -> None:
    steps = history[history["loss"].notna()]
    loss, skewness, distance = axes
    for phase in PHASES:
        colour, part = PALETTE[f"sat, {phase} phase"], steps[steps["phase"] == phase]
        loss.plot(part["step"], part["loss"], color=colour, linewidth=0.8, label=f"{phase} phase")
    loss.set(xlabel="step", ylabel="training loss")
    learning = steps[steps["skewness"].notna()]
    for axis, name in ((skewness, "skewness"), (distance, "distance")):
        for layer, line in enumerate(np.array(learning[name].tolist(), float).T):
            axis.plot(learning["step"], line, linewidth=0.8, label=f"layer {layer + 1}")
        axis.set(xlabel="step of the dense phase", ylabel=name)
    for axis in axes:
        axis.legend(frameon=False)
        if not pd.isna(transition):
            axis.axvline(transition, color="0.4", linestyle=":", linewidth=1)
        sns.despine(ax=axis)


def kept_mass(maps: dict) -> pd.DataFrame:
    """A line per layer: the share of the map at the transition that its kept blocks hold, beside best and chance.

    Columns:
        kept: of the blocks that were kept. best: of the largest as many. density: what random blocks hold on average.
    """
    lines = []
    for values, grid in zip(maps["transition"], maps["kept"], strict=True):
        mass, grid = np.array(values, float) / np.sum(values), np.array(grid, bool)
        largest = np.sort(mass, axis=None)[::-1][: grid.sum()]
        lines.append({"kept": mass[grid].sum(), "best": largest.sum(), "density": grid.mean()})
    return pd.DataFrame(lines, columns=["kept", "best", "density"])


def _maps(axes: np.ndarray, maps: dict) -> None:
    """A row per layer: pooled map at step 0 and at the transition, R~, and the kept blocks with what they hold."""
    titles = {"start": "map, step 0", "transition": "map, transition", "scores": "R~, transition", "kept": ""}
    held = kept_mass(maps) if "kept" in maps else None
    for layer, line in enumerate(axes):
        for axis, (name, title) in zip(line, titles.items(), strict=True):
            axis.set(xticks=[], yticks=[])
            if name not in maps:
                axis.text(0.5, 0.5, "no transition", ha="center", va="center")
                continue
            look = "Greys" if name == "kept" else "viridis"
            image = axis.imshow(np.array(maps[name][layer], float), cmap=look, interpolation="nearest")
            if name == "kept":
                axis.set_title(f"kept: {held['kept'][layer]:.1%} of mass", fontweight="bold")
                axis.set_xlabel(f"best {held['best'][layer]:.1%}, chance {held['density'][layer]:.1%}")
            else:
                axis.set_title(title)
                axis.figure.colorbar(image, ax=axis, shrink=0.85).formatter.set_powerlimits((-2, 3))
        line[0].set_ylabel(f"layer {layer + 1}, block row")


# ---- 03: accuracy ----------------------------------------------------------------------------------------------------


def accuracy(rows: pd.DataFrame, published: bool = True) -> tuple[Figure, pd.DataFrame]:
    """Test accuracy by attention, a panel a task: every seed a small dot, over it the mean with two standard errors,
    and below it the published mean, a hollow diamond. Axes are cut to what is drawn.

    `published` False leaves that out: for runs that can't be set beside it.
    """
    drawn = rows[["task", "attention", "seed", "test_accuracy", "phase"]].copy()
    drawn["accuracy_percent"] = 100 * drawn.pop("test_accuracy")
    tasks, attentions = (list(dict.fromkeys(drawn[name])) for name in ("task", "attention"))
    width = COLUMN if len(tasks) == 1 else PAGE
    figure, (axes,) = new(width, 0.8 + 0.27 * len(attentions), 1, len(tasks), sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        of_task = drawn[drawn["task"] == task]
        for row, attention in enumerate(attentions):
            values = of_task.loc[of_task["attention"] == attention, "accuracy_percent"]
            _draw_seeds(axis, row, values, PALETTE[attention])
        if published:
            _draw_published(axis, [published_mean(attention, task) for attention in attentions])
        axis.set_title(task_name(task), loc="left", fontweight="bold")
        axis.set_xlabel("test accuracy (%) ± 2 standard errors" if len(tasks) == 1 else "test accuracy (%) ± 2 s.e.")
        axis.tick_params(axis="y", length=0)
        sns.despine(ax=axis, left=True)
    list_downward(axes[0], {attention_name(name): row for row, name in enumerate(attentions)}, {})
    return figure, drawn


def _draw_seeds(axis: Axes, row: int, values: pd.Series, colour) -> None:
    """A line of the figure of accuracies: the seeds above, their mean on it; nothing where there is none."""
    axis.axhline(row, color="0.92", linewidth=0.6, zorder=-1)
    axis.plot(values, [row - 0.25] * len(values), ".", color=colour, markersize=3)
    if len(values):
        axis.errorbar(values.mean(), row, xerr=2 * values.sem(), fmt="o", color=colour, markersize=5, linewidth=1)


def _draw_published(axis: Axes, means: list[float | None]) -> None:
    """A hollow diamond below each line; the lowest is named."""
    places = [(mean, row + 0.28) for row, mean in enumerate(means) if mean is not None]
    for place in places:
        axis.plot(*place, "D", color="black", markersize=3.5, markerfacecolor="white", markeredgewidth=0.8)
    for place in places[-1:]:
        axis.annotate("published", place, (5, 0), textcoords="offset points", va="center")


def accuracy_table(rows: pd.DataFrame, published: bool = True) -> pd.DataFrame:
    """Mean and sample deviation over seeds, in percent, what a run took, and the published mean, where wanted."""
    lines = []
    for (name, attention), part in rows.groupby(["task", "attention"], sort=False):
        percent = 100 * part["test_accuracy"]
        lines.append(
            {
                "task": task_name(name),
                "attention": attention,
                "runs": len(part),
                "mean %": round(percent.mean(), 2),
                "deviation": round(percent.std(), 2),
                "switched at step": switch_span(part),
                "seconds a run": round(run_seconds(part).median()),
                "published mean %": published_mean(attention, name),
            }
        )
    return pd.DataFrame(lines).drop(columns=[] if published else "published mean %")


def published_mean(attention: str, name: str) -> float | None:
    """The published accuracy in percent of an attention on a task, if there is one."""
    return published_value("accuracy").get(attention, {}).get(name)


def switch_span(rows: pd.DataFrame) -> str:
    """The earliest and the latest transition of runs, one number for the same step, a dash where none switched."""
    ends = rows["transition_step"].dropna().agg(["min", "max"]).dropna().unique()
    return " to ".join(f"{step:.0f}" for step in ends) or "-"


def run_seconds(rows: pd.DataFrame) -> pd.Series:
    """Of whole training runs, fast ones where there are any: by the clock, evaluation and compilers included."""
    fast = rows[rows["step_kind"] == "fast"]
    rows = fast if len(fast) else rows
    steps = rows["seconds"].map(lambda phases: sum(phases.values()))
    return rows["wall_seconds"].astype(float).fillna(0).clip(lower=steps)  # a run that went on has many clocks
