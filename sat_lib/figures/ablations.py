"""Where SAT's accuracy comes from: tables and sentences from rows of `ablations` and `best`."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..training.checkpoint import config_from_dict
from ..training.recipe import best_recipe
from . import PALETTE
from .judge import gap
from .published import task_name
from .training import switch_span


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


def switches(lines: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Each centre's name, its lines with a forced transition, and those with one by a rule."""
    for name, centre in CENTRES.items():
        moved = lines["group"].isin(centre.switches)
        by_rule = moved & lines["value"].map(lambda value: isinstance(value, str))
        yield name, pd.concat([centre.of(lines), lines[moved & ~by_rule]]), lines[by_rule]


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
            "to": [number_text(value) for value in lines["value"]],
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
        for name, forced, rules in switches(of_task):
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
    return str(value) if group in ("layout", "dense", "preset") else f"{group} {number_text(value)}"


def number_text(value) -> str:
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
