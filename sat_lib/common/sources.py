"""The source text behind a module: what a measured row, or a stage of the reproduction, was made with."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .errors import require
from .files import PACKAGE, digest, file_digest

DIGEST_RULE = 2  # of `source_digest`; rows of rule 1 left out some imported modules, and the kernels


def modules() -> set[str]:
    """All modules of the package, by their names below it: "common.files", "training" for the room itself."""
    return {_below(name) for name in _import_graph().modules} - {""}


def source_files(*names: str) -> list[Path]:
    """The files that the named modules (`"training.fit"`, ...) are made of.

    These are their own, those of every module that they import, at the top or inside a function, those of the packages
    around each, which are loaded first; and the kernels, where one of them compiles those.

    Raises:
        InputError: the package has no such module.
    """
    graph, found, queue = _import_graph(), set(), set(names)
    while queue:
        name = queue.pop()
        require(_full(name) in graph.modules, f"{PACKAGE.name} has no module {name!r}")
        reached = {name, *map(_below, graph.find_upstream_modules(_full(name)))}
        around = {parent for one in reached for parent in _parents(one)}
        found |= reached
        queue |= around - found
    paths = [_path(name) for name in found]
    if "attention.build" in found:
        paths += [path for path in (PACKAGE / "csrc").iterdir() if path.is_file()]
    return sorted(paths)


def source_digest(*names: str) -> str:
    """Digest of the source text behind the named modules: it changes when any of their `source_files` does."""
    return digest({str(path.relative_to(PACKAGE)): file_digest(path) for path in source_files(*names)})


@cache
def _import_graph():
    """Which module of the package imports which."""
    import grimp

    return grimp.build_graph(PACKAGE.name, cache_dir=None)


def _full(name: str) -> str:
    return f"{PACKAGE.name}.{name}" if name else PACKAGE.name


def _below(full: str) -> str:
    return full.partition(".")[2]


def _parents(name: str) -> Iterable[str]:
    """The packages around a module, this one ("") included."""
    parts = name.split(".")[:-1]
    return (".".join(parts[:count]) for count in range(len(parts) + 1))


def _path(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split(".")) if name else PACKAGE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
