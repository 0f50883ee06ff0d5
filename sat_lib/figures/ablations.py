"""Where SAT's accuracy comes from: figures and tables from rows of `ablations`, `diagnosis` and `best`."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..training.checkpoint import config_from_dict
from ..training.recipe import best_recipe
from . import PAGE, PALETTE, new, style
from .judge import gap
from .published import task_name
from .training import switch_span

# What a layout comes from, told by the first word of its name, and its colour.
KINDS = {
    "learnt by W^P": (("correlation, learned", "correlation, largest", "released", "calibrated"), PALETTE["sat"]),
    "by hand": (("near", "nearest", "diagonal"), PALETTE["longformer"]),
    "at random": (("random",), "0.6"),
    "measured on the dense model": ((), PALETTE["bigbird"]),
}
OTHERS = ("pruned", "schedule", "rate_after", "average", "dropout", "density", "block", "mean_over", "rule", "theta",
          "delta", "preset")  # fmt: skip


class Centre(NamedTuple):
    """Settings that others are changed from: their group and value, and the groups of other transitions."""

    group: str
    value: str
    switches: tuple[str, ...]
    colour: tuple

    def of(self, lines: pd.DataFrame) -> pd.DataFrame:
        """The lines with nothing changed."""
        return lines[(lines["group"] == self.group) & (lines["value"] == self.value)]


CENTRES = {
    "base": Centre("layout", "correlation, learned", ("switch_at", "rule"), PALETTE["sat"]),
    "best": Centre("preset", "best", ("best, switch_at",), PALETTE["lsg"]),
}
INITS = {"released": PALETTE["sat, dense phase"], "calibrated": PALETTE["sat"]}
DIAGNOSES = {
    "mass_kept": "mass kept / best",
    "correlation": "correlation of R~ and R",
    "diagonal": "share on the diagonal",
    "empty_rows": "empty block rows",
}


def kind_of(layout: str) -> str:
    """The key of `KINDS` for a layout's name."""
    for kind, (names, _) in KINDS.items():
        if layout in names or layout.split(",")[0] in names:
            return kind
    return "measured on the dense model"


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per task, group and value: mean and sample deviation of the accuracy over the seeds, and what was kept.

    Columns:
        runs, percent, deviation (NaN for one run). mass_kept, density, distinct_columns, diagonal: shares, 0 to 1, and
        empty_rows, at the transition. transition_step: mean. step_ms: of the sparse phase (of the dense one where there
        is none), by the clock, without evaluations.
    """
    rows = rows.assign(percent=100 * rows["test_accuracy"], step_ms=step_ms(rows))
    rows["value"] = rows["value"].astype(object)
    means = ["mass_kept", "density", "distinct_columns", "diagonal", "empty_rows", "transition_step", "step_ms"]
    lines = []
    for (task, group, value), part in rows.groupby(["task", "group", "value"], sort=False):
        found = {name: part[name].astype(float).mean() for name in means}
        deviation = part["percent"].std(ddof=1) if len(part) > 1 else np.nan
        lines.append(
            {"task": task, "group": group, "value": value, "runs": len(part), "percent": part["percent"].mean()}
            | {"deviation": deviation}
            | found
        )
    return pd.DataFrame(lines)


def step_ms(rows: pd.DataFrame) -> list[float]:
    """Milliseconds of a step of each run's last phase."""
    found = []
    for row in _each(rows):
        steps, at, seconds = _steps(row), row["transition_step"], row["seconds"]
        sparse = not pd.isna(at) and seconds["sparse"] > 0
        found.append(1000 * seconds["sparse"] / (steps - at - 1) if sparse else 1000 * seconds["dense"] / steps)
    return found


def _each(rows: pd.DataFrame) -> list[pd.Series]:
    return [row for _, row in rows.iterrows()]


def _steps(row: pd.Series) -> int:
    return max(line["step"] for line in row["history"] if "dev_accuracy" in line)


# ---- 06: ablations ---------------------------------------------------------------------------------------------------


def ablations(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """A line of panels a task: layouts in order of accuracy; accuracy against the attention that they hold, and what
    else was changed."""
    drawn = summary(rows)
    tasks = list(dict.fromkeys(drawn["task"]))
    groups = drawn.groupby("task")["group"]
    most = {task: max((found == "layout").sum(), found.isin(OTHERS).sum() + 1) for task, found in groups}
    heights = [0.9 + 0.17 * most[task] for task in tasks]
    style()
    figure = Figure(figsize=(PAGE, sum(heights) + 0.5), layout="constrained")
    for part, task in zip(np.atleast_1d(figure.subfigures(len(tasks), 1, height_ratios=heights)), tasks, strict=True):
        of_task, single = drawn[drawn["task"] == task], rows[rows["task"] == task]
        axes = part.subplots(1, 4, width_ratios=[1.25, 1, 1, 1])
        _layouts(axes[0], of_task, single)
        _mass(axes[1], of_task)
        _switch(axes[2], of_task)
        _others(axes[3], of_task, single)
        part.suptitle(task_name(task), fontsize=8)
    points = {"marker": "o", "markersize": 4, "linestyle": ""}
    handles = [Line2D([], [], color=colour, label=kind, **points) for kind, (_, colour) in KINDS.items()]
    handles.append(Line2D([], [], color=PALETTE["dense"], linestyle=":", label="dense attention"))
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    return figure, drawn


def _dots(axis: Axes, lines: pd.DataFrame, single: pd.DataFrame, colours: list) -> None:
    """Lines from the top downward: a mean with its deviation, and a small dot for each seed."""
    for place, (line, colour) in enumerate(zip(lines.itertuples(), colours, strict=True)):
        same = (single["group"] == line.group) & (single["value"].astype(str) == str(line.value))
        seeds = 100 * single.loc[same, "test_accuracy"]
        deviation = None if np.isnan(line.deviation) else line.deviation
        axis.errorbar(line.percent, place, xerr=deviation, fmt="o", color=colour, markersize=4, linewidth=1)
        axis.plot(seeds, [place] * len(seeds), ".", color="black", markersize=2)
    axis.set(ylim=(len(lines) - 0.4, -0.6), xlabel="test accuracy (%)")
    axis.locator_params(axis="x", nbins=3, integer=True)
    axis.grid(axis="y", color="0.93")
    sns.despine(ax=axis)


def _dense_line(axis: Axes, of_task: pd.DataFrame, along) -> None:
    for percent in of_task.loc[of_task["group"] == "dense", "percent"]:
        along(percent, color=PALETTE["dense"], linestyle=":", linewidth=1, zorder=0)


def _layouts(axis: Axes, of_task: pd.DataFrame, single: pd.DataFrame) -> None:
    lines = of_task[of_task["group"] == "layout"].sort_values("percent", ascending=False)
    _dots(axis, lines, single, [KINDS[kind_of(value)][1] for value in lines["value"]])
    axis.set_yticks(range(len(lines)), lines["value"])
    _dense_line(axis, of_task, axis.axvline)


def _mass(axis: Axes, of_task: pd.DataFrame) -> None:
    """Beyond 1 a layout holds more attention than as many random blocks."""
    lines = of_task[of_task["group"] == "layout"]
    for line in lines.itertuples():
        colour = KINDS[kind_of(line.value)][1]
        filled = colour if line.distinct_columns > 0.9 else "white"
        axis.plot(line.mass_kept / line.density, line.percent, "o", color=colour, markerfacecolor=filled, markersize=4)
    axis.axvline(1, color="0.8", linewidth=0.8, zorder=0)
    _dense_line(axis, of_task, axis.axhline)
    axis.set(xlabel="mass kept / density\n(filled: over 90 % of the key blocks used)", ylabel="test accuracy (%)")
    sns.despine(ax=axis)


def _switches(lines: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Each centre's name, its lines with a forced transition, and those with one by a rule."""
    for name, centre in CENTRES.items():
        moved = lines["group"].isin(centre.switches)
        by_rule = moved & lines["value"].map(lambda value: isinstance(value, str))
        yield name, pd.concat([centre.of(lines), lines[moved & ~by_rule]]), lines[by_rule]


def _switch(axis: Axes, of_task: pd.DataFrame) -> None:
    """The forced steps as lines, and the rules where they came."""
    for name, forced, rules in _switches(of_task):
        lines, colour = forced.sort_values("transition_step"), CENTRES[name].colour
        axis.errorbar(lines["transition_step"], lines["percent"], yerr=lines["deviation"], fmt="o-", color=colour,
                      markersize=3.5, linewidth=1)  # fmt: skip
        for line in lines[:1].itertuples():
            _label(axis, line, name, colour)
        came = rules.dropna(subset="transition_step").sort_values("percent", ascending=False)
        for place, rule in enumerate(came.itertuples()):
            axis.plot(rule.transition_step, rule.percent, "D", color="black", markersize=4)
            _label(axis, rule, rule.value, "black", left=place == 0)  # two rules may come at the same step
    _dense_line(axis, of_task, axis.axhline)
    axis.set(xlabel="transition at step", ylabel="test accuracy (%)")
    axis.margins(x=0.1)
    sns.despine(ax=axis)


def _label(axis: Axes, line, text: str, colour, left: bool = False) -> None:
    at, place, side = (line.transition_step, line.percent), (-4, 3) if left else (4, -8), "right" if left else "left"
    axis.annotate(text, at, place, textcoords="offset points", fontsize=7, color=colour, ha=side)


def _others(axis: Axes, of_task: pd.DataFrame, single: pd.DataFrame) -> None:
    lines = pd.concat([CENTRES["base"].of(of_task), of_task[of_task["group"].isin(OTHERS)]])
    colours = {centre.group: centre.colour for centre in CENTRES.values()}
    _dots(axis, lines, single, [colours.get(group, "0.3") for group in lines["group"]])
    names = ["base" if line.group == "layout" else _name(line.group, line.value) for line in lines.itertuples()]
    axis.set_yticks(range(len(lines)), names)
    _dense_line(axis, of_task, axis.axvline)


def ablation_table(rows: pd.DataFrame) -> pd.DataFrame:
    """`summary` for a document, in the order of the groups, the best of a group first."""
    lines = summary(rows)
    order = {group: number for number, group in enumerate(dict.fromkeys(lines["group"]))}
    lines = lines.assign(order=lines["group"].map(order)).sort_values(
        ["task", "order", "percent"], ascending=[False, True, False], ignore_index=True
    )
    number = lambda name, form, factor=1: _texts(factor * lines[name].astype(float), form)
    return pd.DataFrame(
        {
            "task": [task_name(task) for task in lines["task"]],
            "changed": lines["group"],
            "to": [_number(value) for value in lines["value"]],
            "runs": lines["runs"],
            "test %": number("percent", ".2f"),
            "deviation": number("deviation", ".2f"),
            "switched at step": number("transition_step", ".0f"),
            "density %": number("density", ".3g", 100),
            "mass kept %": number("mass_kept", ".1f", 100),
            "key blocks used %": number("distinct_columns", ".0f", 100),
            "empty rows": number("empty_rows", ".1f"),
            "step ms": number("step_ms", ".2f"),
        }
    )


def switch_table(rows: pd.DataFrame) -> pd.DataFrame:
    """When to switch: forced steps in their order, then the rules, around the base and around the preset "best".

    "less the best step": its mean less that of the best forced step, with the standard error of the difference (which
    takes no notice that the best of several was picked). "dev loss less dense": the mean of `look_ahead` over the runs.
    """
    lines = []
    for task, of_task in rows.groupby("task", sort=False):
        for name, forced, rules in _switches(of_task):
            percent = forced.groupby("transition_step")["test_accuracy"].mean()
            if len(percent) < 2:
                continue
            best = forced[forced["transition_step"] == percent.idxmax()]
            dense = pd.concat([forced, of_task[of_task["group"] == "dense"]])
            parts = [(f"{step:.0f}", part) for step, part in forced.groupby("transition_step")]
            for label, part in [*parts, *rules.groupby("value", sort=False)]:
                place = {"task": task_name(task), "of": name, "step or rule": label}
                lines.append(place | _switch_line(part, best, dense))
    return pd.DataFrame(lines)


def _switch_line(part: pd.DataFrame, best: pd.DataFrame, dense: pd.DataFrame) -> dict:
    ours, most = 100 * part["test_accuracy"], 100 * best["test_accuracy"]
    ahead = [loss for run in _each(part) if (loss := look_ahead(run, dense)) is not None]
    return {
        "switched at step": switch_span(part),
        **_accuracy(ours),
        "less the best step": "-" if ours.equals(most) else gap(ours, most).numbers,
        "dev loss less dense": f"{np.mean(ahead):+.3f}" if ahead else "-",
    }


def _accuracy(percent: pd.Series) -> dict:
    """The part of a document's line that tells of some runs' test accuracies."""
    deviation = f"{percent.std(ddof=1):.2f}" if len(percent) > 1 else "-"
    return {"runs": len(percent), "test %": f"{percent.mean():.2f}", "deviation": deviation}


def look_ahead(run: pd.Series, others: pd.DataFrame) -> float | None:
    """A run's dev loss soon after its switch, less the mean of those others of its seed that are still dense then.

    Soon: at the first evaluation at least one interval after it. None where the run didn't switch, or no other is dense
    then. A run with an average of the weights is evaluated with it, one that is dense without.
    """
    losses, at = _dev_losses(run), run["transition_step"]
    then = next((step for step in sorted(losses) if step >= at + min(losses)), None)
    if then is None:
        return None
    still = (others["seed"] == run["seed"]) & (others["transition_step"].fillna(np.inf) >= then)
    dense = [_dev_losses(other)[then] for other in _each(others[still])]
    return losses[then] - float(np.mean(dense)) if dense else None


def _dev_losses(run: pd.Series) -> dict[int, float]:
    return {line["step"]: line["dev_loss"] for line in run["history"] if "dev_accuracy" in line}


def conclusions(rows: pd.DataFrame) -> list[str]:
    """Sentences on each task: the base and what is above and below it, and likewise the preset "best"."""
    found = []
    for task, of_task in rows.groupby("task", sort=False):
        best = CENTRES["best"]
        of_best = of_task["group"].isin([best.group, *best.switches])
        for name, around in (("base", of_task[~of_best]), ("best", of_task[of_best])):
            found += _around(task_name(task), name, around)
    return found


def _around(task: str, name: str, rows: pd.DataFrame) -> list[str]:
    percent = lambda part: 100 * part["test_accuracy"]
    centre = CENTRES[name].of(rows)
    if centre.empty:
        return []
    parts = rows.drop(index=centre.index).groupby(["group", "value"], sort=False)
    gains = {_name(*key): gap(percent(part), percent(centre)) for key, part in parts}
    order = sorted(gains, key=lambda changed: -gains[changed].difference)
    above = [f"{changed} {gains[changed].numbers}" for changed in order if gains[changed].difference > 0]
    below = [f"{changed} {gains[changed].numbers}" for changed in order if gains[changed].difference <= 0]
    runs = f"{len(centre)} {'run' if len(centre) == 1 else 'runs'}"
    return [
        f'{task}: {percent(centre).mean():.2f} % with "{name}" ({runs}).',
        f"Above it: {'; '.join(above) or 'nothing'}.",
        f"Below it: {'; '.join(below) or 'nothing'}.",
    ]


def _name(group: str, value) -> str:
    return str(value) if group in ("layout", "dense", "preset") else f"{group} {_number(value)}"


def _number(value) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _texts(values: pd.Series, form: str) -> list[str]:
    return ["-" if pd.isna(value) else format(value, form) for value in values]


# ---- 06: the preset "best" -------------------------------------------------------------------------------------------


def best_table(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The preset "best" beside every attention on the same task and in as many steps, from `accuracy`,
    `accuracy_short` and `best`; empty without rows of the last.

    "averaged": with the moving average of the weights, as in "best"; "base": what "best" grew out of. "best gains":
    its mean over that line's, with the standard error of the difference. "step ms": of fast runs, in their last phase.
    """
    best = frames["best"]
    if best.empty:
        return pd.DataFrame()
    rows = pd.concat([frame for frame in (frames["accuracy"], frames["accuracy_short"], best) if len(frame)])
    rows["method"] = methods(rows)
    rows = rows.assign(percent=100 * rows["test_accuracy"], step_ms=step_ms(rows), steps=list(map(_steps, _each(rows))))
    lines = []
    for task, steps in dict.fromkeys(zip(best["task"], map(_steps, _each(best)), strict=True)):
        of_task = rows[(rows["task"] == task) & (rows["steps"] == steps)]
        ours = of_task.loc[of_task["method"] == "sat, best", "percent"]
        means = of_task.groupby("method")["percent"].mean().sort_values(ascending=False)
        for method in means.index:
            part = of_task[of_task["method"] == method]
            fast, gain = part.loc[part["step_kind"] == "fast", "step_ms"], gap(ours, part["percent"])
            lines.append(
                {
                    "task": task_name(task),
                    "steps": steps,
                    "attention": method,
                    **_accuracy(part["percent"]),
                    "best gains": "-" if method == "sat, best" or gain is None else gain.numbers,
                    "switched at step": switch_span(part),
                    "step ms": "-" if fast.empty else f"{fast.median():.2f}",
                }
            )
    return pd.DataFrame(lines)


def methods(rows: pd.DataFrame) -> list[str]:
    """Each row's attention, and which SAT it is, or whether its weights were averaged."""
    return [_method(row) for row in _each(rows)]


def _method(row: pd.Series) -> str:
    config = config_from_dict(row["resolved"])
    recipe = config.recipe
    if row["attention"] != "sat":
        return row["attention"] + (", averaged" if recipe.average else "")
    if not recipe.average:
        return "sat, base" if row["experiment"] == "best" else "sat, released"
    best, name = best_recipe(config), "sat, best"
    if recipe.density != best["density"]:
        name += f", {recipe.density * config.model.blocks:.0f} a row"
    if recipe.switch_at != best.get("switch_at"):
        name += ", switched by its rule" if recipe.switch_at is None else f", switched at {recipe.switch_at}"
    return name


# ---- 06: diagnosis ---------------------------------------------------------------------------------------------------


def diagnosis_lines(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per task, initialisation, seed, step and layer, with the columns of `ablations.diagnose`."""
    parts = []
    for row in _each(rows):
        place = {"task": row["task"], "init": row["model"]["sparsity_init"], "seed": row["seed"]}
        parts.append(pd.DataFrame(row["columns"]).assign(**place))
    return pd.concat(parts, ignore_index=True)


def diagnosis(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """What R~ has learnt over the steps, a line per layer and seed; dashed: the nearest map of its form."""
    drawn = diagnosis_lines(rows)
    tasks = list(dict.fromkeys(drawn["task"]))
    figure, axes = new(PAGE, 0.5 + 1.5 * len(tasks), len(tasks), len(DIAGNOSES), sharex="row")
    for line, task in zip(axes, tasks, strict=True):
        of_task = drawn[drawn["task"] == task]
        for axis, (name, label) in zip(line, DIAGNOSES.items(), strict=True):
            for (init, _, _), part in of_task.groupby(["init", "seed", "layer"]):
                scale = part["best_mass"] if name == "mass_kept" else 1
                axis.plot(part["step"], part[name] / scale, color=INITS[init], linewidth=0.8)
                if name == "mass_kept" and init == "calibrated":
                    axis.plot(part["step"], part["form_mass"] / scale, "--", color="0.5", linewidth=0.7, zorder=0)
            axis.set_title(label)
            axis.set_ylim(bottom=None if name == "correlation" else 0)
            sns.despine(ax=axis)
        line[0].set_ylabel(task_name(task))
    for axis in axes[-1]:
        axis.set_xlabel("step of the dense phase")
    handles = [Line2D([], [], color=colour, label=init) for init, colour in INITS.items()]
    handles.append(Line2D([], [], color="0.5", linestyle="--", label="nearest that W^P (W^P)^T can be"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure, drawn


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
