"""What claims and their figure are made from: rows chosen and set beside each other. Nothing is judged here.

`frames` are the rows of every experiment in `SOURCES`, by its name; one without rows may have no columns either.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from ..common import files
from ..datasets.tasks import task
from ..training.recipe import PUBLISHED
from . import training
from .judge import WHOLE, Ratio, bench, time_ratio
from .speed import OPERATIONS, beside_sat, step_labels

SOURCES = ("accuracy", "accuracy_short", "training", "step", "kernels", "data_parallel", "motivation", "finetuning",
           "pretrained_step", "patterns")  # fmt: skip
_SAME_METHOD = {"steps", "warm_up", "eval_every"}  # of a recipe: the published method whatever these are
_SAME_MODEL = {"implementation"}  # of a model: how a baseline is computed doesn't matter
_RUN = ["task", "attention", "seed", "model", "recipe"]  # what makes two runs the same

Frames = dict[str, pd.DataFrame]


def with_sources(frames: Frames) -> Frames:
    """The same with a frame, if an empty one, for every experiment that is looked at."""
    return {name: frames.get(name, pd.DataFrame()) for name in SOURCES}


def where(frame: pd.DataFrame, **equal) -> pd.DataFrame:
    """The rows with these values; a frame without rows needs no columns."""
    for name, value in equal.items():
        frame = frame[frame[name] == value] if len(frame) else frame
    return frame


def column(frame: pd.DataFrame, name: str) -> pd.Series:
    """A column of numbers, NaN where none was measured; a frame without rows needs no columns."""
    return frame[name].astype(float) if len(frame) else pd.Series(dtype=float)


def training_runs(frames: Frames, *experiments: str) -> pd.DataFrame:
    """Runs of the published method, each once, whichever experiment has it.

    Neither theta nor the density nor anything else of the method was changed. `part` marks those that can't be set
    beside a published accuracy, for fewer training examples or steps.
    """
    found = [frames[name] for name in experiments if len(frames[name])]
    if not found:
        return pd.DataFrame()
    runs = pd.concat(found, ignore_index=True)
    same_recipe = runs["recipe"].map(lambda recipe: recipe.keys() <= _SAME_METHOD)
    runs = runs[same_recipe & runs["model"].map(lambda model: model.keys() <= _SAME_MODEL)]
    runs = runs[~runs[_RUN].map(files.digest).duplicated()]
    return runs.assign(part=[_is_part(run) for _, run in runs.iterrows()])


def training_commands(runs: pd.DataFrame) -> str:
    """The commands that runs come from."""
    sources = runs[["experiment", "task"]].drop_duplicates()
    return ", ".join(bench(experiment, "task", [name]) for experiment, name in sources.to_numpy())


def _is_part(run: pd.Series) -> bool:
    steps = PUBLISHED[run["task"]].steps
    fewer = run["train_examples"] < WHOLE * task(run["task"]).sizes["train"]
    return bool(fewer or run["recipe"].get("steps", steps) < steps)


def _whole(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs on the whole data; where there are none, those on a part."""
    return where(runs, part=runs["part"].all()) if len(runs) else runs


def _comparable(runs: pd.DataFrame) -> pd.DataFrame:
    """A task's runs of the setting that has most of them: others aren't mixed in."""
    if not len(runs):
        return runs
    settings = runs["recipe"].map(files.digest) + runs["train_examples"].astype(str)
    return runs[settings == settings.value_counts().idxmax()]


def task_runs(frames: Frames, name: str) -> pd.DataFrame:
    """A task's comparable runs: those on the whole data; where there are none, those on a part."""
    return _comparable(_whole(where(training_runs(frames, "accuracy", "accuracy_short"), task=name)))


def switching_runs(frames: Frames, tasks: Iterable[str]) -> pd.DataFrame:
    """SAT's runs of some tasks; those on a part of the data only where there are no others."""
    runs = where(training_runs(frames, "accuracy", "training", "accuracy_short"), attention="sat")
    return _whole(pd.concat([where(runs, task=name) for name in tasks]))


def percent(runs: pd.DataFrame, attention: str) -> pd.Series:
    """Test accuracies of an attention's runs."""
    return 100 * column(where(runs, attention=attention), "test_accuracy")


def runs_by_one(frames: Frames, name: str) -> pd.DataFrame:
    """SAT's runs of a whole task by a single process."""
    runs = where(_comparable(where(training_runs(frames, "accuracy"), task=name, part=False)), attention="sat")
    return runs[~(column(runs, "processes") > 1)]


def runs_by_most(frames: Frames) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs by as many processes as possible, and the steps of so many; both empty where one is missing."""
    runs, steps = (where(frames["data_parallel"], sweep=sweep) for sweep in ("training", "step"))
    if not len(runs) or not len(steps):
        return pd.DataFrame(), pd.DataFrame()
    steps = training.steps(steps).dropna(subset=["efficiency", "share_ms"])
    most = max(set(runs["processes"]) & set(steps["processes"]), default=0)
    return where(runs, processes=most), where(steps, processes=most)


def rows_of(frames: Frames, *experiments: str) -> pd.DataFrame:
    """The rows of several experiments, for what a figure says of where it comes from."""
    found = [frames[name] for name in experiments if len(frames.get(name, ()))]
    # A column that only some experiments have would say "nan" beside the others' values.
    kept = [part.drop(columns=["maps", "history", "seed", "task", "data_digest"], errors="ignore") for part in found]
    rows = pd.concat(kept, ignore_index=True) if kept else pd.DataFrame()
    if "data_official" in rows:
        rows["data_official"] = rows["data_official"].ne(False)
    rows.attrs = {name: part.attrs[name] for part in found for name in part.attrs if name == "profile"}
    return rows


# ---- times and memory ------------------------------------------------------------------------------------------------


def step_pairs(frames: Frames) -> list[tuple[pd.Series, pd.Series]]:
    """Rows of steps, each with SAT's, see `speed.beside_sat`.

    Their `name` says what was timed, such as "sat, dense phase" or "bigbird, kernel". Steps without such a row of SAT's
    sparse phase, or without a time, are left out.
    """
    steps = frames["step"]
    if not len(steps):
        return []
    steps = steps.assign(name=step_labels(steps)).dropna(subset="median_ms")
    pairs = zip(steps.iterrows(), beside_sat(steps).iterrows(), strict=True)
    return [(row, sat) for (_, row), (_, sat) in pairs if not pd.isna(sat["median_ms"])]


def step_ratios(frames: Frames, name: str) -> dict[str, Ratio]:
    """Name of a step -> its time over SAT's sparse phase, for one task."""
    return {row["name"]: time_ratio(row, sat) for row, sat in step_pairs(frames) if row["task"] == name}


def operation_ratios(frames: Frames) -> pd.DataFrame:
    """Rows that time single operations, with the arithmetic and, under an operation's name, dense over sparse time."""
    rows = where(frames["kernels"], sweep="operations")
    if not len(rows):
        return rows
    ratios = {name: column(rows, f"{dense}_ms") / column(rows, f"{sparse}_ms")
              for name, (dense, sparse) in OPERATIONS.items()}  # fmt: skip
    return rows.assign(arithmetic=rows["dtype"] + np.where(rows["tf32"].eq(True), " with TF32", ""), **ratios)


def memory_ratios(frames: Frames, method: str) -> pd.Series:
    """Length -> peak memory of attention alone over the fused kernel's, at the same head size."""
    peaks = [where(frames["kernels"], sweep="length", method=name) for name in (method, "fused")]
    if not all(map(len, peaks)):
        return pd.Series(dtype=float)
    both = peaks[0].merge(peaks[1], on=["length", "head_size", "batch"], suffixes=("", "_fused")).sort_values("length")
    return (both["peak_bytes"] / both["peak_bytes_fused"]).set_axis(both["length"]).dropna()


def step_memory_ratios(frames: Frames) -> pd.DataFrame:
    """A line per task and step that isn't SAT's: peak memory over that of SAT's sparse phase."""
    names = ["task", "name", "attention", "compute"]
    pairs = [(row, sat) for row, sat in step_pairs(frames) if row["attention"] != "sat"]
    lines = [(*row[names], row["peak_bytes"] / sat["peak_bytes"]) for row, sat in pairs]
    return pd.DataFrame(lines, columns=[*names, "ratio"]).dropna()


def fine_tuning_ratios(frames: Frames) -> dict[str, list[Ratio]]:
    """Shape -> step time of fused dense attention over SAT's sparse phase, one for each density."""
    steps, ratios = frames["pretrained_step"], {}
    for (name, length), part in steps.groupby(["architecture", "length"], sort=False) if len(steps) else ():
        dense, sat = where(part, attention="sdpa"), where(part, phase="sparse")
        if len(dense) and len(sat):
            ratios[f"{name}, {length} tokens"] = [time_ratio(dense.iloc[-1], line) for _, line in sat.iterrows()]
    return ratios


# ---- mass of attention maps ------------------------------------------------------------------------------------------


def last_masses(frames: Frames) -> pd.DataFrame:
    """A line per run, layer and head: percent of the mass by pattern in the last snapshot, at the run's density."""
    rows = where(frames["patterns"], attention="sat")
    return pd.concat([pd.DataFrame(), *(_masses(row) for _, row in rows.iterrows())], ignore_index=True)


def _masses(row: pd.Series) -> pd.DataFrame:
    lines = pd.DataFrame(row["comparison"])
    lines = lines[np.isclose(lines["asked_density"], row["density"]) & (lines["step"] == lines["step"].max())]
    table = 100 * lines.pivot_table(index=["layer", "head"], columns="pattern", values="mass_kept")
    return table.rename(columns={"in use" if "in use" in table else "learned": "kept"})


def masses_at_transition(frames: Frames) -> list[float]:
    """Percent of the mass in the kept blocks, by layer and seed, of CIFAR-10 runs' mean maps at the transition."""
    runs = where(training_runs(frames, "accuracy", "training"), task="cifar10", attention="sat")
    found = [maps for maps in runs.get("maps", ()) if isinstance(maps, dict) and {"kept", "transition"} <= maps.keys()]
    return [100 * share for maps in found for share in training.kept_mass(maps)["kept"]]
