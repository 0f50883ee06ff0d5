"""What tests/test_distributed.py starts under torchrun: trains tiny runs and leaves what each process saw."""

import json
import sys
from pathlib import Path

import torch
from conftest import tiny_config, tiny_splits

from sat_lib import distributed, runs
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
    return {
        "result": {name: result[name] for name in ("transition_step", "test_accuracy", "best", "processes")},
        "grids": [grid.int().tolist() for grid in last["grids"] or []],
        "own_grids": [layout.grid.int().tolist() for layout in models[0].layouts or []],
        "weights": {name: value.tolist() for name, value in last["model"].items()},
        "own_weights": {name: value.tolist() for name, value in models[0].state_dict().items()},
    }


def main(folder: Path) -> None:
    with distributed.joined(torch.device("cpu")):
        seen = {
            "mean": [
                x.tolist() for x in distributed.mean([torch.tensor([distributed.rank() + 1.0]), torch.ones(2, 2)])
            ],
            "total": distributed.total(torch.tensor([distributed.rank() + 1])).tolist(),
            "gathered": distributed.gathered(distributed.rank()),
            "from_first": distributed.from_first(distributed.rank()),
            "exact": outcome(folder / "exact", **EXACT),
            "whole": outcome(folder / "whole"),
        }
        outcome(folder / "cut", stop_at=7)
        seen["cut"] = outcome(folder / "cut")
        try:
            Trainer(tiny_config(batch=5), tiny_splits(), torch.device("cpu"))
        except Exception as error:
            seen["refused"] = str(error)
        (folder / f"{distributed.rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
