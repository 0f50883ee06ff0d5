"""Training runs as cases of an experiment: what is run, where its folder is, and the row that comes of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .. import datasets
from ..attention import ATTENTION
from ..attention.baselines import BASELINES
from ..common import distributed, files
from ..training.fit import fit
from ..training.recipe import PAPER_TASKS, RunConfig, case_config
from .row_files import Context
from .step_time import throughput

HISTORY_POINTS = 400  # of a training curve that go into its row

SMOKE_RUN = {
    "digits": {"steps": 200, "warm_up": 20, "eval_every": 100, "batch": 4, "rate": 0.006, "switch_at": 100},
    "digits16": {"model": {"block": 16}, "steps": 200, "warm_up": 40, "eval_every": 50, "batch": 16, "rate": 0.004},
    "docstrings": {"model": {"layers": 1}, "steps": 200, "warm_up": 20, "eval_every": 100, "batch": 8, "rate": 0.004},
}

SHORT_RUN = {"steps": 1_000, "eval_every": 50}  # of a text set, for what a user has of it: see short_cases


def run_case(task_name: str, attention: str, seed: int, profile: str, **changes) -> dict:
    """A case: a run of a task's recipe, or `SMOKE_RUN`'s, with changes by name; `model` holds those of the model."""
    settings = (SMOKE_RUN[task_name] if profile == "smoke" else {}) | changes
    model = settings.pop("model", {})
    if profile == "smoke" and attention in BASELINES:
        model = model | {"implementation": "library"}  # the faster one on a CPU
    return {"task": task_name, "attention": attention, "seed": seed, "model": model, "recipe": settings}


def run_folder(case: dict, context: Context) -> Path | None:
    """The folder of the training run that a case stands for; None of a case that isn't one.

    Where the case says how many processes train it, the folder is its own: another number would go on with the run.
    """
    if "recipe" not in case:
        return None
    by = f"-by-{case['processes']}" if "processes" in case else ""
    return context.training_folder / f"{case_config(case).name}{by}"


def train(case: dict, context: Context) -> dict:
    """Train a case's run (or go on, or read it if it is finished); its result with a thinned history."""
    config = case_config(case)
    data, folder = load_data(config), run_folder(case, context)
    result = fit(config, data, folder, context.device)
    return {
        **{name: result[name] for name in ("test_accuracy", "phase", "transition_step", "parameters", "seconds")},
        "step_kind": result["step"],
        **{name: result[name] for name in ("processes", "by_process")},
        "dense_best": result["best"].get("dense"),
        "sparse_best": result["best"].get("sparse"),
        "test_examples": result["best"][result["phase"]]["test_examples"],
        "train_examples": len(data.train),
        **datasets.provenance(config.recipe.task),
        "maps": {name: np.round(np.asarray(value, float), 7).tolist() for name, value in result["maps"].items()},
        "history": _thinned(files.read_rows(folder / "metrics.jsonl")),
    }


def load_data(config: RunConfig) -> datasets.Splits:
    """The run's splits. Of several processes the first prepares them where need be."""
    return distributed.first_alone(lambda: datasets.load(config.recipe.task, protocol=config.recipe.protocol))


def _thinned(metrics: list[dict]) -> list[dict]:
    """All evaluations, the dense phase's steps and every n-th other step: about HISTORY_POINTS lines of each."""
    kinds: dict[tuple, list[dict]] = {}
    for row in metrics:
        kinds.setdefault(("dev_accuracy" in row, "skewness" in row), []).append(row)
    kept = [row for rows in kinds.values() for row in rows[:: max(1, len(rows) // HISTORY_POINTS)]]
    return sorted(kept, key=lambda row: (row["step"], "loss" in row))  # an evaluation comes before its next step


# ---- training: notebooks 02 and 03 -----------------------------------------------------------------------------------


def training_cases(profile: str) -> list[dict]:
    """One SAT run."""
    return [run_case("digits16" if profile == "smoke" else "cifar10", "sat", 0, profile)]


def accuracy_cases(profile: str) -> list[dict]:
    """Every task with every attention and seed, seed by seed."""
    seeds = {"digits16": 2, "docstrings": 1} if profile == "smoke" else dict.fromkeys(PAPER_TASKS, 5)
    return _every_attention(seeds, profile)


def _every_attention(seeds: dict[str, int], profile: str, **changes) -> list[dict]:
    """So many seeds of each task with every attention, seed by seed."""
    return [
        run_case(name, attention, seed, profile, **changes)
        for seed in range(max(seeds.values()))
        for name in seeds
        if seed < seeds[name]
        for attention in ATTENTION
    ]


def short_cases(profile: str) -> list[dict]:
    """IMDB, and the text sets of the paper, in 1,000 steps instead of 30,000; three seeds.

    For what a user has of these sets: a part of AG News or Yelp is overfitted in fewer steps still.
    """
    if profile == "smoke":
        return _every_attention({"docstrings": 1}, profile)
    return _every_attention(dict.fromkeys(("imdb", "agnews", "yelp"), 3), profile, **SHORT_RUN)


# ---- one model on several GPUs: notebook 07 --------------------------------------------------------------------------


def data_parallel_cases(profile: str) -> list[dict]:
    """SAT by 1, 2 and 4 processes: its steps, the published batch shared or one for each; and whole runs by several.

    One process also takes each share alone; its runs are those of `accuracy`.
    """
    smoke = profile == "smoke"
    name, batch, seeds, numbers = ("digits16", 16, 1, (1, 2)) if smoke else ("cifar10", 512, 3, (1, 2, 4))
    changes = {"steps": 60, "warm_up": 6, "eval_every": 20, "switch_at": 20} if smoke else {}
    step = {"precision": "fp32", "step_kind": "plain"} if smoke else {"precision": "bf16", "step_kind": "fast"}
    same = {"task": name, "attention": "sat", **step}
    cases = []
    for processes in numbers:
        batches = {batch // number for number in numbers} if processes == 1 else {batch, batch * processes}
        cases += [{"sweep": "step", "processes": processes, "batch": size, **same} for size in sorted(batches)]
        cases += [
            {"sweep": "training", "processes": processes} | run_case(name, "sat", seed, profile, **changes)
            for seed in range(seeds)
            if processes > 1
        ]
    return cases


def data_parallel(case: dict, context: Context) -> dict:
    """Measure a case in as many new processes as it says, one too."""
    if case["sweep"] == "training":
        load_data(case_config(case))  # what is wrong with them is told here, not in each process
    return distributed.launch(case["processes"], context.device, _as_one_of_several, case, context)


def _as_one_of_several(device: torch.device, case: dict, context: Context) -> dict:
    context = replace(context, device=device)
    return train(case, context) if case["sweep"] == "training" else throughput(case, context)
