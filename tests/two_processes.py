"""What tests/common/test_distributed.py lets two processes do: functions that each of them calls."""

import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
from conftest import tiny_config, tiny_splits

from sat_lib.common import distributed, timing
from sat_lib.experiments import step_time
from sat_lib.training import fit
from sat_lib.training.checkpoint import load_checkpoint
from sat_lib.training.recipe import RunConfig
from sat_lib.training.trainer import Trainer

KEPT = []
EXACT = {"model": {"dropout": 0.0}, "switch_at": None, "theta": -1e9, "delta": 20.0}  # the rule decides, see the test
CUT = {"average": 3, "switch_at": None, "switch_rule": "gap"}


def outcome(folder: Path, stop_at: int | None = None, **changes) -> dict:
    """A run, and what this process has of it: losses are in its metrics."""
    models, trainer = [], fit.Trainer

    def noted(*arguments):
        made = trainer(*arguments)
        models.append(made.model)  # its end tests others, the best ones
        return made

    fit.Trainer = noted
    try:
        config, data = tiny_config(**changes), tiny_splits()
        result = fit.fit(config, data, folder, torch.device("cpu"), stop_at=stop_at, progress=False)
    finally:
        fit.Trainer = trainer
    if result is None:
        return {}
    last = load_checkpoint(folder / "last.pt", torch.device("cpu"))["trainer"]
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
        "whole": outcome(folder / "whole", **CUT),
    }
    patterns = ({}, {"pattern": "random"}, {"pattern": "attention", "pattern_heads": "own"})
    seen |= {"share": share(device), "slowest": slowest(device)}
    seen |= {"unlike": [unlike(device, **changes) for changes in patterns]}
    outcome(folder / "cut", stop_at=7, **CUT)
    seen["cut"] = outcome(folder / "cut", **CUT)
    try:
        Trainer(tiny_config(batch=5), tiny_splits(), device)
    except Exception as error:
        seen["refused"] = str(error)
    return distributed.gathered(seen)


def share(device: torch.device) -> list[int]:
    """How many examples each process has of a batch that is timed."""
    kind = step_time.StepKind("sat", "kernel", "sparse", step_kind="plain", model={"layers": 1})
    case = {"task": "digits16", "batch": 6, "precision": "fp32"} | asdict(kind)
    _, (tokens, labels) = step_time.step_trainer(case, device)
    assert len(tokens) == len(labels)
    return distributed.gathered(len(labels))


def slowest(device: torch.device) -> float:
    """What timing says of a call that takes 1 ms in process 0 and 20 ms in process 1."""
    return timing.time_rounds(
        lambda: time.sleep((0.001, 0.02)[distributed.rank()]), device, rounds=2, calls=3
    ).median_ms


def unlike(device: torch.device, **changes) -> dict:
    """Processes that begin with other weights, measure other maps and find other patterns; what they end with."""
    trainer = Trainer(tiny_config(seed=distributed.rank(), switch_at=3, **changes), tiny_splits(), device)
    weights = [parameter.sum().item() for parameter in trainer.model.parameters()]
    measure = trainer.rule.measure
    trainer.rule.measure = lambda maps: measure(maps) + distributed.rank()
    skewness = trainer.train_step()["skewness"]
    with torch.no_grad():
        queries = [layer.attention.query for layer in trainer.model.layers]  # the maps come from them
        for module in (*trainer.model.sparsity_parameters, *queries):
            module.weight.add_(torch.randn_like(module.weight) * distributed.rank())
    trainer.enter_sparse_phase(list(trainer.rule.maps))
    grids = [layout.grid.int().tolist() for layout in trainer.model.layouts]
    return {"weights": weights, "skewness": skewness, "grids": grids}


def train(device: torch.device, config: RunConfig, step: str, folder: Path) -> dict:
    """The result of a run."""
    return fit.fit(config, tiny_splits(), folder, device, step=step, progress=False)


def fail(_device: torch.device) -> None:
    raise ValueError("it failed on purpose")


def fail_alone(device: torch.device, config: RunConfig) -> None:
    """Process 1 fails after some steps, and the others wait for it."""
    trainer = Trainer(config, tiny_splits(), device)
    for _ in range(10):
        trainer.train_step()
    if distributed.rank() == 1:
        raise ValueError("one of them failed on purpose")
    trainer.train_step()
    distributed.barrier()


def keep(device: torch.device, config: RunConfig) -> str:
    """Ends while a trainer, and on a GPU its graph, is alive."""
    KEPT.append(Trainer(config, tiny_splits(), device))
    for _ in range(10):
        KEPT[0].train_step()
    return KEPT[0].phase


def tell_and_sleep(_device: torch.device) -> None:
    os.write(1, f"rank {distributed.rank()} sleeps\n".encode())  # at once: two processes write to one pipe
    time.sleep(3600)
