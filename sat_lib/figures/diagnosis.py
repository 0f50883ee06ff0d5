"""What W^P learns in the dense phase: a figure and a table from rows of `diagnosis`."""

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import ColorType

from . import PAGE, PALETTE, document_table, new
from .labels import at_ends
from .published import task_name

INITS = {"released": PALETTE["sat, dense phase"], "calibrated": PALETTE["sat"]}
DIAGNOSES = {
    "mass_kept": "attention held / best layout's",
    "correlation": "correlation of $\\tilde{R}$ and $R$",
    "diagonal": "share on the diagonal",
    "empty_rows": "empty block rows",
}


def diagnosis_lines(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per task, initialisation, seed, step and layer, with the columns of `ablations.diagnose`."""
    parts = [
        pd.DataFrame(row["columns"]).assign(task=row["task"], init=row["model"]["sparsity_init"], seed=row["seed"])
        for _, row in rows.iterrows()
    ]
    return pd.concat(parts, ignore_index=True)


def diagnosis(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """What R~ has learned over the steps: the mean over seeds and layers, in a band from the least to the most of them.

    Dashed: what the nearest map of the form `W^P (W^P)^T` holds. A line of panels a task.
    """
    drawn = diagnosis_lines(rows)
    shares = drawn.assign(**{name: drawn[name] / drawn["best_mass"] for name in ("mass_kept", "form_mass")})
    tasks = list(dict.fromkeys(drawn["task"]))
    figure, axes = new(PAGE, 0.6 + 1.5 * len(tasks), len(tasks), len(DIAGNOSES), sharex="row", sharey="col")
    for line, task in zip(axes, tasks, strict=True):
        of_task = shares[shares["task"] == task]
        held, *_ = [_draw_over_steps(axis, of_task, name) for axis, name in zip(line, DIAGNOSES, strict=True)]
        form = of_task[of_task["init"] == "calibrated"].groupby("step")["form_mass"].mean()
        line[0].plot(form.index, form, "--", color="0.2", linewidth=0.9)
        at_ends(line[0], [*((height, "best of its form", "0.2") for height in form.tail(1)), *held])
        line[0].set_ylabel(task_name(task), fontweight="bold")
    for axis, title in zip(axes[0], DIAGNOSES.values(), strict=True):
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("step of the dense phase")
    return figure, drawn


def _draw_over_steps(axis: Axes, of_task: pd.DataFrame, name: str) -> list[tuple[float, str, ColorType]]:
    """A mean line and a band for each initialisation; height, name and colour of each line's end."""
    ends = []
    for init, part in of_task.groupby("init", sort=False):
        over = part.groupby("step")[name].agg(["mean", "min", "max"])
        axis.fill_between(over.index, over["min"], over["max"], color=INITS[init], alpha=0.2, linewidth=0)
        axis.plot(over.index, over["mean"], color=INITS[init], linewidth=1.3)
        ends.append((over["mean"].iloc[-1], init, INITS[init]))
    axis.set_ylim(bottom=None if name == "correlation" else 0)
    sns.despine(ax=axis)
    return ends


def diagnosis_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The last step of each task and initialisation: means over layers and seeds."""
    lines = diagnosis_lines(rows)
    last = lines[lines["step"] == lines.groupby("task")["step"].transform("max")]
    parts = last.groupby(["task", "init"], sort=False)
    means = parts.mean().astype({"step": int}).assign(runs=parts["seed"].nunique()).reset_index()
    columns = {
        "task": "task",
        "W^P starts": "init",
        "runs": "runs",
        "step": "step",
        "mass kept %": ("mass_kept", ".1f", 100),
        "best layout %": ("best_mass", ".1f", 100),
        "nearest of the form %": ("form_mass", ".1f", 100),
        "overlap with the best": ("overlap", ".2f"),
        "correlation": ("correlation", ".2f"),
        "mean of R~ / of R": ("scale", ".3g"),
        "on the diagonal": ("diagonal", ".2f"),
        "empty rows": ("empty_rows", ".1f"),
    }
    return document_table(means.assign(task=means["task"].map(task_name)), columns)
