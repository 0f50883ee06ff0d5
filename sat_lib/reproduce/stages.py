"""What a stage of the reproduction is made of, and whether it is up to date.

A stage is one notebook. Its key has the notebook's cells, its parameters, the sat_lib files that it imports and, at the
paper profile, the committed rows that it reads; never a time stamp. The state of its last run lies in
runs/<profile>/stages/<stage>.json: the key, the digests of the outputs, versions, seconds. torch isn't imported here.
"""

import ast
import contextlib
import difflib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .. import PUBLIC
from ..common import files
from ..common.errors import InputError, require
from ..common.sources import import_graph, source_files

NOT_A_PART = ("sat_lib.__main__", "sat_lib.reproduce")  # they run the notebooks and give them nothing
DATA = {  # what modules read that isn't Python and isn't measured
    files.PACKAGE / "figures/published.py": files.ROOT / "data/published.toml",
    files.PACKAGE / "figures/claims.py": files.ROOT / "data/claims.toml",
}
LAST_RUN = {"running": "was cut off", "failed": "failed", "changed": "was overtaken by a change of its sources"}


@dataclass(frozen=True)
class Stage:
    """One notebook: the files it writes to figures/<profile>, what to look at there, about how long it takes.

    `rows` are the files (glob patterns from the root) that it reads at the paper profile, `reads` at any.
    """

    name: str
    outputs: tuple[str, ...]
    look: str
    minutes: float
    rows: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a profile's files lie under a root, and the recorded states of its stages."""

    root: Path
    profile: str
    parameters: dict = field(default_factory=dict)  # given to every notebook beside the profile
    draw_only: bool = False  # measure nothing: figures from the rows that are there

    @property
    def given(self) -> dict:
        """The parameters that every notebook is run with."""
        return {**self.parameters, "profile": self.profile} | ({"measure": False} if self.draw_only else {})

    @property
    def runs(self) -> Path:
        """What running leaves behind; not committed."""
        return self.root / "runs" / (f"{self.profile}-figures" if self.draw_only else self.profile)

    @property
    def figures(self) -> Path:
        """Where the notebooks write."""
        return self.root / "figures" / self.profile

    def minutes(self, stage: Stage) -> float:
        """About how long the stage takes."""
        return 0.25 if self.draw_only else stage.minutes

    def notebook(self, stage: Stage) -> Path:
        """The notebook as it is committed, without outputs."""
        return self.root / "notebooks" / f"{stage.name}.ipynb"

    def executed(self, stage: Stage, failed: bool = False) -> Path:
        """Where its executed copy goes."""
        return self.runs / "notebooks" / f"{stage.name}{'.failed' if failed else ''}.ipynb"

    def state(self, stage: Stage) -> dict | None:
        """What `record` wrote last; None if the stage never ran."""
        path = self.runs / "stages" / f"{stage.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def record(self, stage: Stage, status: str, key: dict, **more) -> None:
        """Write a stage's state: "done" or one of LAST_RUN."""
        state = {"status": status, "key": key, "environment": environment(), **more}
        files.write_json(self.runs / "stages" / f"{stage.name}.json", state)

    def outputs(self, stage: Stage) -> dict[str, str | None]:
        """Digest of every declared output; None for an absent one."""
        paths = [self.figures / name for name in stage.outputs]
        return {path.name: files.file_digest(path) if path.exists() else None for path in paths}

    def why_stale(self, stage: Stage, force: bool = False) -> list[str]:
        """The reasons to run a stage; none when it is up to date. Raises what `stage_key` does."""
        key, state = stage_key(stage, self), self.state(stage)
        if state is None:
            return ["never run"]
        why = ["forced"] if force else []
        if state["status"] != "done":
            return [*why, f"its last run {LAST_RUN[state['status']]}", *changes(state["key"], key)]
        why += changes(state["key"], key)
        for name, digest in self.outputs(stage).items():
            if digest is None or digest != state["outputs"].get(name):
                why.append(f"output {name} {'is missing' if digest is None else 'was changed'}")
        return why


def environment() -> dict[str, str]:
    """Versions that a stage was made with: recorded and warned of, no reason to run again."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    return {"python": platform.python_version(), **versions}


def stage_key(stage: Stage, place: Place) -> dict:
    """What a stage is made of: digests of its cells, values of its parameters, digests of its sources and rows.

    Raises:
        InputError: there is no such notebook, a code cell isn't plain Python, there isn't exactly one cell tagged
            `parameters`, it holds anything but literals, or lacks a parameter that is given.
    """
    path = place.notebook(stage)
    require(path.exists(), f"stage {stage.name} has no notebook {path}")
    cells = [{**cell, "source": "".join(cell["source"])} for cell in json.loads(path.read_text())["cells"]]
    trees = {index: _parse(path, index, cell) for index, cell in enumerate(cells) if cell["cell_type"] == "code"}
    tagged = [index for index in trees if "parameters" in _tags(cells[index])]
    require(len(tagged) == 1, f"{path}: one code cell has to be tagged parameters; {len(tagged)} are")
    parameters = _literals(path, trees[tagged[0]])
    unknown = sorted(place.given.keys() - parameters.keys())
    require(not unknown, f"{path}: no parameter {', '.join(unknown)}; its parameters are {', '.join(parameters)}")
    cells[tagged[0]]["source"] = ""  # its values count, not how they are written
    sources = _sources(trees.values())
    patterns = stage.reads + (stage.rows if place.profile == "paper" else ())
    rows = {row for pattern in patterns for row in place.root.glob(pattern)}
    return {
        "cells": [files.digest([cell["cell_type"], _tags(cell), cell["source"]]) for cell in cells],
        "parameters": {name: repr(value) for name, value in {**parameters, **place.given}.items()},
        "sources": {str(source.relative_to(files.ROOT)): files.file_digest(source) for source in sources},
        "rows": {str(row.relative_to(place.root)): files.file_digest(row) for row in sorted(rows)},
    }


def changes(before: dict, now: dict) -> list[str]:
    """In words, which parts of a key differ."""
    said = []
    cells = difflib.SequenceMatcher(None, before["cells"], now["cells"], autojunk=False)
    for tag, start, end, new_start, new_end in cells.get_opcodes():
        if tag != "equal":
            verb = "is new" if tag == "insert" else "changed"
            said += [f"cell {index + 1} {verb}" for index in range(new_start, new_end)]
            said += [f"the earlier cell {index + 1} is gone" for index in range(start + new_end - new_start, end)]
    for name, old, new in _differing(before["parameters"], now["parameters"]):
        said.append(f"parameter {name}: {old or 'absent'} -> {new or 'absent'}")
    for group in ("sources", "rows"):
        for name, old, new in _differing(before[group], now[group]):
            said.append(f"{name} {'is new' if old is None else 'is gone' if new is None else 'changed'}")
    return said


def _differing(before: dict, now: dict) -> list[tuple]:
    names = sorted(before.keys() | now.keys())
    return [(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


def _tags(cell: dict) -> list[str]:
    return sorted(cell["metadata"].get("tags", ()))


def _parse(path: Path, index: int, cell: dict) -> ast.Module:
    try:
        return ast.parse(cell["source"])
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise InputError(f"{path}, cell {index + 1}: plain Python wanted, no ! or % lines; got {line!r}") from error


def _literals(path: Path, tree: ast.Module) -> dict:
    """The values that a parameters cell sets."""
    values = {}
    for node in tree.body:
        match node:
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, value):
                with contextlib.suppress(ValueError):  # not a literal
                    values[name] = ast.literal_eval(value)
                    continue
        line = ast.unparse(node).splitlines()[0]
        raise InputError(f"{path}: the cell tagged parameters may hold `name = literal` only; got `{line}`")
    return values


def _sources(trees: Iterable[ast.Module]) -> list[Path]:
    """The sat_lib files behind the imports of some cells, and data that they read.

    That is all that notebooks may use where an import names no module of the package.
    """
    modules = import_graph().modules - {"sat_lib"}
    every = {module for module in modules if not module.startswith(NOT_A_PART)}
    named, found = [], set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.Import(names):
                named += [alias.name for alias in names]
            case ast.ImportFrom(module, names):
                named += [f"{module}.{alias.name}" for alias in names]
    for package, _, rest in (name.partition(".") for name in named):
        if package == "sat_lib":
            name = f"sat_lib.{PUBLIC.get(rest, rest)}"
            known = [one for one in (name, name.rpartition(".")[0]) if one in modules]
            found |= set(known[:1]) or every
    sources = source_files(*found)
    return [*sources, *(data for reader, data in DATA.items() if reader in sources and data.exists())]
