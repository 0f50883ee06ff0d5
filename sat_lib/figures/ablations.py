"""Where SAT's accuracy comes from: tables and sentences from rows of `ablations` and `best`."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..training.checkpoint import config_from_dict
from ..training.recipe import best_recipe
from . import PALETTE, cell, document_table
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
    rows = rows.assign(percent=100 * rows["test_accuracy"], step_ms=step_ms(rows), value=rows["value"].astype(object))
    means = ["mass_kept", "density", "distinct_columns", "diagonal", "empty_rows", "transition_step", "step_ms"]
    parts = rows.astype(dict.fromkeys(means, float)).groupby(["task", "group", "value"], sort=False)
    lines = parts["percent"].agg(runs="size", percent=pd.Series.mean, deviation=pd.Series.std)
    return lines.join(parts[means].agg(pd.Series.mean)).reset_index()


def step_ms(rows: pd.DataFrame) -> pd.Series:
    """Milliseconds of a step of each run's last phase."""
    seconds, at, steps = pd.DataFrame(rows["seconds"].tolist(), rows.index), rows["transition_step"], _steps(rows)
    sparse_ms = 1000 * seconds["sparse"] / (steps - at.astype(float) - 1)
    return sparse_ms.where(at.notna() & (seconds["sparse"] > 0), 1000 * seconds["dense"] / steps)


def _steps(rows: pd.DataFrame) -> pd.Series:
    return rows["history"].map(lambda history: max(_dev_losses(history)))


def _dev_losses(history: list[dict]) -> dict[int, float]:
    """Of a run's evaluations, by step."""
    return {line["step"]: line["dev_loss"] for line in history if "dev_loss" in line}


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
    lines = lines.assign(order=pd.factorize(lines["group"])[0], value=lines["value"].map(number_text))
    lines = lines.sort_values(["task", "order", "percent"], ascending=[False, True, False])
    columns = {
        "task": "task",
        "changed": "group",
        "to": "value",
        "runs": "runs",
        "test %": ("percent", ".2f"),
        "deviation": ("deviation", ".2f"),
        "switched at step": ("transition_step", ".0f"),
        "density %": ("density", ".3g", 100),
        "mass kept %": ("mass_kept", ".1f", 100),
        "key blocks used %": ("distinct_columns", ".0f", 100),
        "empty rows": ("empty_rows", ".1f"),
        "step ms": ("step_ms", ".2f"),
    }
    return document_table(lines.assign(task=lines["task"].map(task_name)), columns)


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
                ours, most = 100 * part["test_accuracy"], 100 * best["test_accuracy"]
                ahead = pd.Series([look_ahead(run, dense) for _, run in part.iterrows()], dtype=float)
                lines.append(
                    {
                        "task": task_name(task),
                        "of": name,
                        "step or rule": label,
                        "switched at step": switch_span(part),
                        **_accuracy(ours),
                        "less the best step": "-" if ours.equals(most) else gap(ours, most).numbers,
                        "dev loss less dense": cell(ahead.mean(), "+.3f"),
                    }
                )
    return pd.DataFrame(lines)


def _accuracy(percent: pd.Series) -> dict:
    """The part of a document's line that tells of some runs' test accuracies."""
    return {"runs": len(percent), "test %": f"{percent.mean():.2f}", "deviation": cell(percent.std(), ".2f")}


def look_ahead(run: pd.Series, others: pd.DataFrame) -> float | None:
    """A run's dev loss soon after its switch, less the mean of those others of its seed that are still dense then.

    Soon: at the first evaluation at least one interval after it. None where the run didn't switch, or no other is dense
    then. A run with an average of the weights is evaluated with it, one that is dense without.
    """
    losses, at = _dev_losses(run["history"]), run["transition_step"]
    then = next((step for step in sorted(losses) if step >= at + min(losses)), None)
    if then is None:
        return None
    still = (others["seed"] == run["seed"]) & (others["transition_step"].fillna(np.inf) >= then)
    dense = [_dev_losses(history)[then] for history in others.loc[still, "history"]]
    return losses[then] - float(np.mean(dense)) if dense else None


def conclusions(rows: pd.DataFrame) -> list[str]:
    """Sentences on each task: the base and what is above and below it, and likewise the preset "best"."""
    best, found = CENTRES["best"], []
    for task, of_task in rows.groupby("task", sort=False):
        of_best = of_task["group"].isin([best.group, *best.switches])
        for name, around in (("base", of_task[~of_best]), ("best", of_task[of_best])):
            found += _around(task_name(task), name, around)
    return found


def _around(task: str, name: str, rows: pd.DataFrame) -> list[str]:
    rows, centre = rows.assign(percent=100 * rows["test_accuracy"]), CENTRES[name].of(rows).index
    if centre.empty:
        return []
    base = rows.loc[centre, "percent"]
    parts = rows.drop(index=centre).groupby(["group", "value"], sort=False)["percent"]
    gains = {_name(*key): gap(percent, base) for key, percent in parts}
    told = {changed: f"{changed} {gain.numbers}" for changed, gain in gains.items()}
    order = sorted(gains, key=lambda changed: -gains[changed].difference)
    above = [told[changed] for changed in order if gains[changed].difference > 0]
    below = [told[changed] for changed in order if gains[changed].difference <= 0]
    return [
        f'{task}: {base.mean():.2f} % with "{name}" ({len(base)} {"run" if len(base) == 1 else "runs"}).',
        f"Above it: {'; '.join(above) or 'nothing'}.",
        f"Below it: {'; '.join(below) or 'nothing'}.",
    ]


def _name(group: str, value) -> str:
    return str(value) if group in ("layout", "dense", "preset") else f"{group} {number_text(value)}"


def number_text(value) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


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
    parts = [best, frames["accuracy"], frames["accuracy_short"]]
    rows = pd.concat([part for part in parts if len(part)], ignore_index=True)
    rows = rows.assign(percent=100 * rows["test_accuracy"], step_ms=step_ms(rows))
    lines = []
    for (task, steps), of_task in rows.groupby(["task", _steps(rows)], sort=False):
        if "best" not in set(of_task["experiment"]):
            continue
        of_task = of_task.assign(method=methods(of_task))
        ours = of_task.loc[of_task["method"] == "sat, best", "percent"]
        for method, part in sorted(of_task.groupby("method"), key=lambda named: -named[1]["percent"].mean()):
            gain = gap(ours, part["percent"])
            lines.append(
                {
                    "task": task_name(task),
                    "steps": steps,
                    "attention": method,
                    **_accuracy(part["percent"]),
                    "best gains": "-" if method == "sat, best" or gain is None else gain.numbers,
                    "switched at step": switch_span(part),
                    "step ms": cell(part.loc[part["step_kind"] == "fast", "step_ms"].median(), ".2f"),
                }
            )
    return pd.DataFrame(lines)


def methods(rows: pd.DataFrame) -> list[str]:
    """Each row's attention, and which SAT it is, or whether its weights were averaged."""
    return [_method(row) for _, row in rows.iterrows()]


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
