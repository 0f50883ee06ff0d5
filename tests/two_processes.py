"""What tests/test_distributed.py lets two processes do: functions that each of them calls."""

import time
from pathlib import Path

import torch
from conftest import tiny_config, tiny_splits

from sat_lib import distributed, runs
from sat_lib.recipes import RunConfig
from sat_lib.train import Trainer

EXACT = {"model": {"dropout": 0.0}, "switch_at": None, "theta": -1e9, "delta": 20.0}  # the rule decides, see the test


def outcome(folder: Path, stop_at: int | None = None, **changes) -> dict:
    """A run, and what this process has of it: losses are in its metrics."""
    models, trainer = [], runs.Trainer

    def noted(*arguments):
        made = trainer(*arguments)
        models.append(made.model)  # its end tests others, the best ones
        return made

    runs.Trainer = noted
    try:
        config, data = tiny_config(**changes), tiny_splits()
        result = runs.fit(config, data, folder, torch.device("cpu"), stop_at=stop_at, progress=False)
    finally:
        runs.Trainer = trainer
    if result is None:
        return {}
    last = runs.load_checkpoint(folder / "last.pt", torch.device("cpu"))["trainer"]
    told = ("transition_step", "test_accuracy", "best", "processes", "by_process")
    return {
        "result": {name: result[name] for name in told},
        "grids": [grid.int().tolist() for grid in last["grids"] or []],
        "own_grids": [layout.grid.int().tolist() for layout in models[0].layouts or []],
        "weights": {name: value.tolist() for name, value in last["model"].items()},
        "own_weights": {name: value.tolist() for name, value in models[0].state_dict().items()},
    }


def see(device: torch.device, folder: Path) -> list[dict]:
    """Runs in a folder, and what each process saw of them and of the others."""
    mine = torch.tensor([distributed.rank() + 1])
    means = distributed.mean([mine.float(), torch.ones(2, 2)])
    copied = mine.clone()
    distributed.copy_first([copied])
    seen = {
        "mean": [x.tolist() for x in means],
        "total": distributed.total(mine).tolist(),
        "copied": copied.tolist(),
        "gathered": distributed.gathered(distributed.rank()),
        "from_first": distributed.from_first(distributed.rank()),
        "exact": outcome(folder / "exact", **EXACT),
        "whole": outcome(folder / "whole"),
    }
    outcome(folder / "cut", stop_at=7)
    seen["cut"] = outcome(folder / "cut")
    try:
        Trainer(tiny_config(batch=5), tiny_splits(), device)
    except Exception as error:
        seen["refused"] = str(error)
    return distributed.gathered(seen)


def train(device: torch.device, config: RunConfig, step: str, folder: Path) -> dict:
    """The result of a run."""
    return runs.fit(config, tiny_splits(), folder, device, step=step, progress=False)


def fail(_device: torch.device) -> None:
    raise ValueError("it failed on purpose")


def tell_and_sleep(_device: torch.device) -> None:
    print(f"rank {distributed.rank()} sleeps", flush=True)
    time.sleep(120)
