"""From case to row: what an experiment is, where it is run, and the file that its rows lie in.

A row is a JSON line, written as soon as it is measured:

    experiment, case     what was measured; a case is told from others by its digest
    resolved             of training runs: the whole model and recipe, presets and defaults filled in
    result, stamp        what came out, and where and when that was
    code, digest_rule    digest of the source text behind it, and by which rule of `sources` it was made

Rows of the `paper` profile lie in data/results and are committed. Rows of the `smoke` profile lie in runs/smoke/rows
and count only for the source text they were measured with. Of several rows of a case and device the newest counts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from ..common import files

PROFILES = ("smoke", "paper")
STAMPED = ("commit", "device", "python", "torch", "numpy", "date", "wall_seconds")  # what a frame has of a stamp


@dataclass(frozen=True)
class Context:
    """Where and on what an experiment is run."""

    profile: str
    device: torch.device
    root: Path
    code: str  # digest of the source text behind all experiments

    @property
    def rows_folder(self) -> Path:
        return self.root / ("data/results" if self.profile == "paper" else "runs/smoke/rows")

    @property
    def training_folder(self) -> Path:
        """Of training runs; smoke runs are kept apart by the code they ran."""
        return self.root / "runs" / self.profile / ("training" if self.profile == "paper" else f"training-{self.code}")


# ---- the file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowFile:
    """The rows of an experiment.

    Args:
        code: rows of another source text don't count; None: all rows do.
    """

    path: Path
    code: str | None = None

    @classmethod
    def of(cls, name: str, context: Context) -> "RowFile":
        """The rows of the experiment of that name at the context's profile."""
        return cls(context.rows_folder / f"{name}.jsonl", None if context.profile == "paper" else context.code)

    def read(self, device: str | None) -> dict[str, dict]:
        """Case digest -> its newest row from a device; nothing for None, see `main_device`."""
        return self._by_device().get(device, {})

    def main_device(self) -> str | None:
        """The device with rows of most cases; None without rows."""
        stored = self._by_device()
        return max(stored, key=lambda device: len(stored[device]), default=None)

    def missing(self, cases: Iterable[dict], devices: Iterable[str]) -> list[dict]:
        """Those of the cases that have no row from any of the devices."""
        stored = self._by_device()
        found = {digest for device in devices for digest in stored.get(device, ())}
        return [case for case in cases if files.digest(case) not in found]

    def append(self, row: dict, again: bool = False) -> None:
        """Add a row, unless its case has one from its device by now and isn't measured `again`."""
        there = lambda: not (again or self.missing([row["case"]], [row["stamp"]["device"]]))
        append_once(self.path, row, there)

    def _by_device(self) -> dict[str, dict[str, dict]]:
        stored: dict[str, dict[str, dict]] = {}
        for row in files.read_rows(self.path):
            if self.code in (None, row["code"]):
                stored.setdefault(row["stamp"]["device"], {})[files.digest(row["case"])] = row
        return stored


def append_once(path: Path, row: dict, there: Callable[[], bool]) -> None:
    """Append a row unless `there()`; processes that end at the same time do so one after another."""
    with files.lock(path.with_name(f".{path.name}.lock"), f"writing {path}", wait=True, quiet=True):
        if not there():
            files.append_row(path, row)


# ---- rows and cases as a reader sees them ----------------------------------------------------------------------------


def frame(rows: Iterable[dict], cases: Iterable[dict]) -> pd.DataFrame:
    """Rows as a table: the columns of `cases`, whether a row has them or not, then those of result and stamp."""
    lines = []
    for row in rows:
        resolved = {"resolved": row["resolved"]} if "resolved" in row else {}
        stamp = {name: row["stamp"][name] for name in STAMPED}
        lines.append(row["case"] | resolved | row["result"] | stamp | {"experiment": row["experiment"]})
    columns = dict.fromkeys(name for one in (*cases, *lines) for name in one)
    return pd.DataFrame(lines, columns=list(columns))


def plain(case: dict) -> dict:
    """What of a case is one value, and not a model or a recipe."""
    return {name: value for name, value in case.items() if not isinstance(value, dict)}


def describe(case: dict) -> str:
    """A case in words, for a line on the terminal."""
    return ", ".join(f"{name} {value}" for name, value in plain(case).items() if value is not None)


def table(rows: pd.DataFrame) -> str:
    """Rows as text, for the terminal: what is a number, a word or a short list."""
    hidden = {"experiment", *STAMPED} - {"device"}
    shown = rows[[name for name in rows.columns if name not in hidden]].dropna(axis=1, how="all")
    nested = [name for name in shown if shown[name].map(lambda cell: isinstance(cell, list | dict)).any()]
    return shown.drop(columns=nested).to_string(index=False, float_format="%.4g")


# ---- the experiment --------------------------------------------------------------------------------------------------

More = Callable[..., pd.DataFrame]  # only={...} -> other rows of the same experiment, measured where they are missing


@dataclass(frozen=True)
class Experiment:
    """What is measured, how, and what the command line prints of it.

    Args:
        cases: profile -> cases, the most important first. measure: case, context -> result. show: rows, `More` -> text.
    """

    cases: Callable[[str], list[dict]]
    measure: Callable[[dict, Context], dict]
    show: Callable[[pd.DataFrame, More], str] = lambda rows, more: table(rows)
