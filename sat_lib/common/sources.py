"""The source text behind a module: what a measured row, or a stage of the reproduction, was made with."""

from functools import cache
from itertools import accumulate
from pathlib import Path

from .errors import require
from .files import PACKAGE, digest, file_digest

DIGEST_RULE = 2  # of `source_digest`; rows of rule 1 left out some imported modules, and the kernels


@cache
def import_graph():
    """Which module of the package imports which: a grimp graph of full names, "sat_lib.common.files"."""
    import grimp

    return grimp.build_graph(PACKAGE.name, cache_dir=None)


def source_files(*names: str) -> list[Path]:
    """The files that the named modules (`"sat_lib.training.fit"`, ...) are made of.

    These are their own, those of every module that they import, at the top or inside a function, those of the packages
    around each, which are loaded first; and the kernels, where one of them compiles those.

    Raises:
        InputError: the package has no such module.
    """
    graph, found, queue = import_graph(), set(), set(names)
    while queue:
        name = queue.pop()
        require(name in graph.modules, f"{PACKAGE.name} has no module {name!r}")
        found |= {name, *graph.find_upstream_modules(name)}
        queue |= {around for one in found for around in accumulate(one.split("."), "{}.{}".format)} - found
    stems = [PACKAGE.parent.joinpath(*name.split(".")) for name in found]
    paths = [stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py") for stem in stems]
    if f"{PACKAGE.name}.attention.build" in found:
        paths += [path for path in (PACKAGE / "csrc").iterdir() if path.is_file()]
    return sorted(paths)


def source_digest(*names: str) -> str:
    """Digest of the source text behind the named modules: it changes when any of their `source_files` does."""
    return digest({str(path.relative_to(PACKAGE)): file_digest(path) for path in source_files(*names)})
