"""Training runs as cases of an experiment: what is run, where its folder is, and the row that comes of it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import datasets, distributed, files, runs
from .baselines import BASELINES
from .recipes import RunConfig, run_config

HISTORY_POINTS = 400  # of a training curve that go into its row


@dataclass(frozen=True)
class Context:
    """Where and on what an experiment is run."""

    profile: str
    device: torch.device
    root: Path
    code: str  # digest of the source text behind this module

    @property
    def rows_folder(self) -> Path:
        return self.root / ("data/results" if self.profile == "paper" else "runs/smoke/rows")

    @property
    def training_folder(self) -> Path:
        """Of training runs; smoke runs are kept apart by the code they ran."""
        return self.root / "runs" / self.profile / ("training" if self.profile == "paper" else f"training-{self.code}")


SMOKE_RUN = {
    "digits": {"steps": 400, "warm_up": 40, "eval_every": 100, "batch": 4, "rate": 0.006, "switch_at": 100},
    "digits16": {"model": {"block": 16}, "steps": 300, "warm_up": 30, "eval_every": 50, "batch": 16, "rate": 0.006},
    "docstrings": {"model": {"layers": 1}, "steps": 300, "warm_up": 30, "eval_every": 100, "batch": 8, "rate": 0.004},
}

SHORT_RUN = {"steps": 1_000, "eval_every": 50}  # of a text set, for what a user has of it: see experiments.short_cases


def run_case(task_name: str, attention: str, seed: int, profile: str, **changes) -> dict:
    """A case: a run of a task's recipe, or `SMOKE_RUN`'s, with changes by name; `model` holds those of the model."""
    settings = (SMOKE_RUN[task_name] if profile == "smoke" else {}) | changes
    model = settings.pop("model", {})
    if profile == "smoke" and attention in BASELINES:
        model = model | {"implementation": "library"}  # the faster one on a CPU
    return {"task": task_name, "attention": attention, "seed": seed, "model": model, "recipe": settings}


def case_config(case: dict) -> RunConfig:
    """The run that a training case stands for."""
    return run_config(case["task"], case["attention"], model=case["model"], seed=case["seed"], **case["recipe"])


def run_folder(case: dict, context: Context) -> Path | None:
    """The folder of the training run that a case stands for; None of a case that isn't one.

    Where the case says how many processes train it, the folder is its own: another number would go on with the run.
    """
    if "recipe" not in case:
        return None
    by = f"-by-{case['processes']}" if "processes" in case else ""
    return context.training_folder / f"{case_config(case).name}{by}"


def train(case: dict, context: Context, shared: Path | None = None) -> dict:
    """Train a case's run (or go on, or read it if it is finished); its result with a thinned history."""
    config = case_config(case)
    data, folder = load_data(config), run_folder(case, context)
    result = runs.fit(config, data, folder, context.device, shared=shared)
    maps = {name: np.round(np.asarray(value, float), 7).tolist() for name, value in result["maps"].items()}
    return {
        **{name: result[name] for name in ("test_accuracy", "phase", "transition_step", "parameters")},
        "seconds": result["seconds"],
        **{name: result.get(name) for name in ("step", "processes", "by_process")},  # older runs don't tell
        "dense_best": result["best"].get("dense"),
        "sparse_best": result["best"].get("sparse"),
        "test_examples": result["best"][result["phase"]]["test_examples"],
        "train_examples": len(data.train),
        **datasets.provenance(config.recipe.task),
        "maps": maps,
        "history": _thinned(files.read_rows(folder / "metrics.jsonl")),
    }


def load_data(config: RunConfig) -> datasets.Splits:
    """The run's splits. Of several processes the first prepares them where need be."""
    return distributed.first_alone(lambda: datasets.load(config.recipe.task, protocol=config.recipe.protocol))


def _thinned(metrics: list[dict]) -> list[dict]:
    """All evaluations, the dense phase's steps and every n-th other step: about HISTORY_POINTS lines of each."""
    evaluations = [row for row in metrics if "dev_accuracy" in row]
    steps = [row for row in metrics if "loss" in row]
    learning = [row for row in steps if "skewness" in row]
    others = [row for row in steps if "skewness" not in row]
    return sorted(
        (row for part in (evaluations, learning, others) for row in part[:: max(1, len(part) // HISTORY_POINTS)]),
        key=lambda row: row["step"],
    )
