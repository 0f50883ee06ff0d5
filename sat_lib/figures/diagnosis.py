"""What W^P learns in the dense phase: a figure and a table from rows of `diagnosis`."""

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import PAGE, PALETTE, new
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
    parts = []
    for _, row in rows.iterrows():
        place = {"task": row["task"], "init": row["model"]["sparsity_init"], "seed": row["seed"]}
        parts.append(pd.DataFrame(row["columns"]).assign(**place))
    return pd.concat(parts, ignore_index=True)


def diagnosis(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """What R~ has learned over the steps: the mean over seeds and layers, in a band from the least to the most of them.

    Dashed: what the nearest map of its form holds. A line of panels a task.
    """
    drawn = diagnosis_lines(rows)
    shares = drawn.assign(**{name: drawn[name] / drawn["best_mass"] for name in ("mass_kept", "form_mass")})
    tasks = list(dict.fromkeys(drawn["task"]))
    figure, axes = new(PAGE, 0.6 + 1.5 * len(tasks), len(tasks), len(DIAGNOSES), sharex="row",
                       sharey="col")  # fmt: skip
    for line, task in zip(axes, tasks, strict=True):
        of_task = shares[shares["task"] == task]
        for axis, name in zip(line, DIAGNOSES, strict=True):
            ends = _draw_over_steps(axis, of_task, name)
            if axis is line[0]:
                at_ends(axis, [*_draw_form(axis, of_task), *ends])
        line[0].set_ylabel(task_name(task), fontweight="bold")
    for axis, title in zip(axes[0], DIAGNOSES.values(), strict=True):
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("step of the dense phase")
    return figure, drawn


def _draw_over_steps(axis: Axes, of_task: pd.DataFrame, name: str) -> list[tuple[float, str, object]]:
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


def _draw_form(axis: Axes, of_task: pd.DataFrame) -> list[tuple[float, str, object]]:
    """The share that the nearest map of the form W^P (W^P)^T holds, dashed; height, name and colour of its end."""
    of_form = of_task[of_task["init"] == "calibrated"].groupby("step")["form_mass"].mean()
    axis.plot(of_form.index, of_form, "--", color="0.2", linewidth=0.9)
    return [(height, "best of its form", "0.2") for height in of_form.tail(1)]


def diagnosis_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The last step of each task and initialisation: means over layers and seeds."""
    lines = diagnosis_lines(rows)
    last = lines[lines["step"] == lines.groupby("task")["step"].transform("max")]
    table = []
    for (task, init), part in last.groupby(["task", "init"], sort=False):
        mean = part.drop(columns=["task", "init"]).mean()
        table.append(
            {
                "task": task_name(task),
                "W^P starts": init,
                "runs": part["seed"].nunique(),
                "step": int(mean["step"]),
                "mass kept %": f"{100 * mean['mass_kept']:.1f}",
                "best layout %": f"{100 * mean['best_mass']:.1f}",
                "nearest of the form %": f"{100 * mean['form_mass']:.1f}",
                "overlap with the best": f"{mean['overlap']:.2f}",
                "correlation": f"{mean['correlation']:.2f}",
                "mean of R~ / of R": f"{mean['scale']:.3g}",
                "on the diagonal": f"{mean['diagonal']:.2f}",
                "empty rows": f"{mean['empty_rows']:.1f}",
            }
        )
    return pd.DataFrame(table)
