"""From case to row: where an experiment is run, which cases have a row, and how one is added.

A row is {"experiment", "case", "result", "stamp"}, one JSON line, written as soon as it is measured. Rows of the
`paper` profile lie in data/results and are committed; a case that has a row from the same device is not measured
again. Rows of the `smoke` profile lie in runs/smoke and count only for the source text they were measured with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from ..common import distributed, files

PROFILES = ("smoke", "paper")


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


def append_once(path: Path, row: dict, there: Callable[[], bool]) -> None:
    """Append a row unless `there()`; processes that end at the same time do so one after another."""
    with files.lock(path.with_name(f".{path.name}.lock"), f"writing {path}", wait=True, quiet=True):
        if not there():
            files.append_row(path, row)


def _that_fit(todo: list[dict], wanted: list[dict], context: Context) -> list[dict]:
    """Those to do that this machine has the GPUs for; all, where none of the wanted is one: an error then says why."""
    most = distributed.most_processes(context.device)
    if all(case.get("processes", 1) > most for case in wanted):
        return todo
    fitting = [case for case in todo if case.get("processes", 1) <= most]
    if len(fitting) < len(todo):
        print(f"{len(todo) - len(fitting)} cases are left out: they want more than the {most} GPUs here", flush=True)
    return fitting


def describe(case: dict) -> str:
    """A case in words, for a line on the terminal."""
    return ", ".join(f"{key} {value}" for key, value in _plain(case).items())


def _plain(case: dict) -> dict:
    return {name: value for name, value in case.items() if not isinstance(value, dict)}


def _path(name: str, context: Context) -> Path:
    return context.rows_folder / f"{name}.jsonl"


def _stored(name: str, context: Context) -> list[dict]:
    """The rows that count at a profile."""
    stored = files.read_rows(_path(name, context))
    return [row for row in stored if context.profile == "paper" or row["code"] == context.code]


def _by_case(stored: list[dict], device: str | None) -> dict[str, dict]:
    """Case digest -> newest row of that device."""
    return {files.digest(row["case"]): row for row in stored if row["stamp"]["device"] == device}


def _main_device(stored: list[dict]) -> str | None:
    devices = [row["stamp"]["device"] for row in stored]
    return max(devices, key=devices.count) if devices else None


def _flat(row: dict) -> dict:
    stamp = {name: row["stamp"][name] for name in ("commit", "device", "python", "torch", "numpy", "date")}
    taken = {"wall_seconds": row["stamp"].get("wall_seconds")}  # None in rows older than it
    return row["case"] | row["result"] | stamp | taken | {"experiment": row["experiment"]}


def table(frame: pd.DataFrame) -> str:
    """The rows as text, for the terminal: what is a number, a word or a short list."""
    plain = [name for name in frame.columns if not frame[name].map(lambda cell: isinstance(cell, list | dict)).any()]
    hidden = {"experiment", "commit", "python", "torch", "numpy", "date", "wall_seconds"}
    return frame[[name for name in plain if name not in hidden]].to_string(index=False, float_format="%.4g")
