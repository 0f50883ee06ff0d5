"""The paper's claims beside our rows: data/claims.toml, measured, judged, a line each. No number stands here.

    frames = {"accuracy": ..., "step": ...}     # experiment -> its rows, cases, results and stamps side by side
    verdict_table(frames)

A claim names its measure, in measures.py, and its rule, in judge.py.
"""

from collections.abc import Iterable
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd

from ..common import files
from ..common.errors import InputError, require
from ..datasets.tasks import TASKS
from .evidence import Frames, column, with_sources
from .judge import NOT_RUN, RULES, Claim, judge, span
from .measures import MEASURES
from .published import published_value, read_toml
from .speed import OPERATIONS

PATH = files.ROOT / "data/claims.toml"


@cache
def claims(path: Path = PATH) -> tuple[Claim, ...]:
    """The claims of a file, in its order.

    Raises:
        InputError: the file isn't there; a claim lacks a key, has an unknown one, or names a rule, a measure or a
            published number that isn't there.
    """
    return tuple(map(_claim, read_toml(path)["claims"]))


def _claim(table: dict[str, Any]) -> Claim:
    name, keys = f"claim {table.get('text', table)!r}", signature(Claim).parameters
    for key in table:
        _require_known(f"{name}: key", key, keys)
    _require_keys(name, [key for key, each in keys.items() if each.default is each.empty], table)
    attentions = published_value("attention_names")
    known = {"rule": RULES, "measure": MEASURES, "tasks": TASKS, "similar": TASKS}
    known |= {"attention": attentions, "against": attentions, "operation": OPERATIONS}
    for key in filter(table.__contains__, known):
        several, value = key in ("tasks", "against"), table[key]
        wanted = "a list of names" if several else "one name"
        require(isinstance(value, list) == several, f"{name}: {key}: wanted {wanted}; got {value!r}")
        for each in value if several else [value]:
            _require_known(f"{name}: {key}", each, known[key])
    _require_keys(f"{name}, measured by {table['measure']}", MEASURES[table["measure"]][1], table)
    claim = Claim(**table)
    try:
        claim.published_text  # noqa: B018
    except (InputError, LookupError, ValueError) as error:
        raise InputError(f"{name}: {claim.shown!r} can't show {claim.published!r} ({error})") from error
    return claim


def _require_known(what: str, name: str, known: Iterable[str]) -> None:
    require(name in known, f"{what} must be one of {', '.join(known)}; got {name!r}")


def _require_keys(name: str, needed: Iterable[str], table: dict[str, Any]) -> None:
    absent = ", ".join(key for key in needed if key not in table)
    require(not absent, f"{name}: wanted {absent} too")


def verdict_table(frames: Frames, path: Path = PATH) -> pd.DataFrame:
    """A line per claim; `frames` needs no experiment without rows."""
    frames = with_sources(frames)
    return pd.DataFrame([verdict(claim, frames) for claim in claims(path)])


def verdict(claim: Claim, frames: Frames) -> dict[str, str]:
    """What the rows say of one claim, every command as code."""
    found = MEASURES[claim.measure][0](claim, frames)
    return {
        "claim": claim.text,
        "command": f"`{(found.command or claim.command).replace(', ', '`, `')}`",
        "output": claim.figure,
        "hardware": ", ".join(sorted({name.removeprefix("NVIDIA ") for name in found.rows.get("device", ())})) or "-",
        "minutes": _minutes(found.rows),
        "published": claim.published_text,
        "ours": found.ours,
        "verdict": judge(claim.rule, found),
        "why": found.why,
    }


def short_table(table: pd.DataFrame) -> pd.DataFrame:
    """What of `verdict_table` fits a first page: the claims that something was run for."""
    return table.loc[table["verdict"] != NOT_RUN, ["claim", "published", "ours", "verdict"]]


def _minutes(rows: pd.DataFrame) -> str:
    """From the shortest to the longest training run; else what measuring took in all, as far as the rows tell."""
    if "seconds" in rows:
        return f"{span((sum(seconds.values()) / 60 for seconds in rows['seconds']), '.1f')} a run"
    seconds = column(rows, "wall_seconds")
    if seconds.isna().all():
        return "-"
    return f"{'at least ' if seconds.isna().any() else ''}{seconds.sum() / 60:.1f}"
