"""Folders of data that are whole or absent: filled under another name, put in place, checked when they are opened.

Beside its data files such a folder has `meta.json`: the folder they were made from (`source`, null for a download),
whether all of that were the official files (`verified`, null where the package makes the data itself), and bytes,
SHA-256 and date of each data file (`files`). Whoever fills the folder may add more.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..common import files
from ..common.errors import InputError, require

HASHED_BYTES = 100_000_000  # files up to here are hashed at every load, larger ones only if their date has changed


def place(name: str, root: Path | None) -> Path:
    """The folder of that name in `root`, which is `data/cache` of the checkout unless given."""
    return (Path(root) if root is not None else files.ROOT / "data" / "cache") / name


def prepared(
    folder: Path,
    source: Path | None,
    usable: Callable[[], dict | None],
    fill: Callable[[Path, Path | None], dict],
) -> Path:
    """Make a folder unless it is there; return it.

    Args:
        source: the folder with the official files, if there is one; a folder that is there has to be made from it.
        usable: reads the `meta.json` of a folder that is there; None to have it made anew.
        fill: writes the data files into a new folder from `source` and returns what else belongs in `meta.json`.

    Raises:
        InputError: a source that isn't a folder, or another one; no space, or no place to write; another process
            preparing it; what `usable` and `fill` raise. Whatever is raised, an earlier folder stays as it was and no
            new one is left half made.
    """
    if source is not None:
        require(Path(source).is_dir(), f"source {source} is not a folder; name the one that holds the official files")
        source = Path(source).resolve()
    there = lambda: usable() if folder.exists() else None
    meta = there()
    if meta is None:
        try:
            with files.lock(folder.parent / f".{folder.name}.lock", f"preparing {folder.name}"):
                meta = there() or _build(folder, source, fill)  # another process may have made it meanwhile
        except OSError as error:
            state = "The earlier cache is unchanged" if folder.exists() else "Nothing was left behind"
            raise InputError(
                f"could not write the cache of {folder.name} in {folder.parent}: {error}. {state}. "
                "Free some space, or choose another folder, and run again"
            ) from error
    made = meta["source"]
    same = source is None or made == str(source)
    require(same, f"{folder} was made from {made or 'a download'}, not from {source}: delete it to make it anew")
    return folder


def _build(folder: Path, source: Path | None, fill: Callable[[Path, Path | None], dict]) -> dict:
    """Make the folder beside its place, then put it there."""
    building, retired = (folder.with_name(f".{folder.name}.{state}") for state in ("building", "retired"))
    for leftover in (building, retired):  # of a process that was killed; the lock says that none is at work
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        building.mkdir()
        meta = {"source": str(source) if source else None} | fill(building, source)
        meta["files"] = {path.name: _flushed(path) for path in sorted(building.iterdir())}
        files.write_json(building / "meta.json", meta)
        earlier = folder.exists()
        if earlier:
            folder.rename(retired)
        try:
            building.rename(folder)
        except OSError:
            if earlier:
                retired.rename(folder)
            raise
    finally:
        for leftover in (building, retired):
            shutil.rmtree(leftover, ignore_errors=True)
    return meta


def _flushed(path: Path) -> dict:
    """What `meta.json` says of a data file, which is on disk by then."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    stat = path.stat()
    return {"bytes": stat.st_size, "sha256": files.file_digest(path), "mtime_ns": stat.st_mtime_ns}


def verified(folder: Path, names: set[str], kind: dict, downloads: bool | None = True, hashes: bool = True) -> dict:
    """`meta.json` of a folder whose data files, `names`, are as they were written.

    Args:
        kind: what `meta.json` has to say besides.
        downloads: whether the official files can be downloaded; None where the package makes the data itself.
        hashes: False to check the files' sizes alone.

    Raises:
        InputError: it isn't there, can't be read, is damaged or of another kind.
    """
    command = f"`python -m sat_lib data prepare {folder.name}{' --source DIR' if downloads is False else ''}`"
    hint = " (with `--source DIR` if its official files are there already)" if downloads else ""
    require(folder.exists(), f"{folder.name} is not prepared: there is no {folder}; run {command} first{hint}")
    try:
        return _verified(folder, names, kind, hashes, f"Delete the folder and run {command} again")
    except OSError as error:
        raise InputError(f"the cache {folder} can't be read: {error}. Mend that and run again") from error


def _verified(folder: Path, names: set[str], kind: dict, hashes: bool, again: str) -> dict:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        differing = [f"{key} {meta[key]}, wanted {wanted}" for key, wanted in kind.items() if meta[key] != wanted]
        for name, part in meta["files"].items():
            if isinstance(part, str):  # folders of MRPC once had the SHA-256 alone
                part = {"bytes": None, "sha256": part, "mtime_ns": None}
            meta["files"][name] = {key: part[key] for key in ("bytes", "sha256", "mtime_ns")}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the cache {folder} has no usable meta.json ({error}). {again}") from error
    require(not differing, f"the cache {folder} is of another kind ({'; '.join(differing)}). {again}")
    whole = names == set(meta["files"]) and {"source", "verified"} <= set(meta)
    require(whole, f"the cache {folder} is damaged (meta.json names other files, or no source). {again}")
    for name, part in meta["files"].items():
        path = folder / name
        require(path.is_file(), f"the cache {folder} is damaged ({name} is gone). {again}")
        got = path.stat().st_size
        size = got if part["bytes"] is None else part["bytes"]
        require(got == size, f"the cache {folder} is damaged ({name}: wanted {size:,} bytes, got {got:,}). {again}")
        if hashes and (size <= HASHED_BYTES or path.stat().st_mtime_ns != part["mtime_ns"]):
            good = files.file_digest(path) == part["sha256"]
            require(good, f"the cache {folder} is damaged ({name} is not what was written). {again}")
    return meta


def provenance(meta: dict) -> dict:
    """What a result says of its data, from their `meta.json`: `data_digest` of the files, and `data_official`.

    The latter is whether they come from files whose published checksum held, or are made by the package itself.
    """
    parts = {name: part["sha256"] for name, part in meta["files"].items()}
    return {"data_digest": files.digest(parts), "data_official": meta["verified"] is not False}
