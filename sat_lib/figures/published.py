"""The paper's numbers: data/published.toml as dictionaries. Nothing is measured or judged here.

    published_value("accuracy")["sat"]["agnews"]  # percent
    published_value("gain.agnews")  # the same, less dense attention's

Keys are those of the file.
"""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from ..common import files
from ..common.errors import require

PATH = files.ROOT / "data/published.toml"


def read_toml(path: Path) -> dict[str, Any]:
    """A file of data/ that is written by hand.

    Raises:
        InputError: it isn't there, as in an installed wheel.
    """
    require(path.exists(), f"{path} isn't there. It is in the repository, not in a wheel: install from a checkout")
    return tomllib.loads(path.read_text())


@cache
def read(path: Path = PATH) -> dict[str, Any]:
    """Everything in the file; and `gain`, SAT's accuracy less dense attention's by task, which the paper doesn't state.

    Raises:
        InputError: the file isn't there, as in an installed wheel.
    """
    numbers = read_toml(path)
    sat, dense = numbers["accuracy"]["sat"], numbers["accuracy"]["dense"]
    return numbers | {"gain": {name: sat[name] - dense[name] for name in sat}}


def published_value(place: str) -> Any:
    """A number or table by its keys in the file, with dots between them.

    Raises:
        InputError: there is no such key.
    """
    found = read()
    for key in place.split("."):
        keys = found if isinstance(found, dict) else ()
        require(key in keys, f"{place}: {PATH.name} has no {key!r} there. It has {', '.join(keys) or 'none'}")
        found = found[key]
    return found


def task_name(name: str) -> str:
    """A task as figures write it; its own name where none is given."""
    return published_value("task_names").get(name, name)


def attention_name(name: str) -> str:
    """An attention as sentences write it."""
    return published_value("attention_names")[name]
