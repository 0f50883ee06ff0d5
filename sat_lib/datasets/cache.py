"""Tasks by name -> token arrays: download with checksum, one cache folder per task, splits over memory-mapped files.

`prepare` makes a task's cache, `load` opens it, `describe` lists what is there. A cache is `data/cache/<task>/` with
one raw token file and one label file per split, and `meta.json` with sizes and checksums; it appears whole or not at
all. Beside this file: `tasks.py` is the table, `downloads.py` fetches, `readers.py` reads the official formats,
`builtin.py` makes the sets that need no download.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..common import files
from ..common.errors import InputError, require
from . import builtin, readers
from .downloads import download, mismatch
from .tasks import TASKS, Task, task

FORMAT = 1  # of the cache; a cache of another format has to be made again
HASHED_BYTES = 100_000_000  # files up to here are hashed at every load, larger ones only if their date has changed
PROTOCOLS = ("dev", "published")
_SIZED = ("docstrings", "listops")  # loaders that make as many examples as asked for

# ---- splits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """Examples of one split. Tokens stay in the memory-mapped file until `batch` asks for some."""

    stored: np.ndarray  # (m, L) uint8 or uint16, the whole file, memory-mapped
    rows: np.ndarray  # (n,) int64, the rows of `stored` that belong to this split
    labels: np.ndarray  # (n,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (b, L) int64 and labels (b,) int64 of some of the examples 0 .. n - 1."""
        return self.stored[self.rows[indices]].astype(np.int64), self.labels[indices]

    @property
    def tokens(self) -> np.ndarray:
        """All n examples, (n, L) uint8 or uint16: the mapped file itself, or a copy in memory if only part of it."""
        whole = np.array_equal(self.rows, np.arange(len(self.stored)))
        return self.stored if whole else self.stored[self.rows]

    def take(self, indices: np.ndarray) -> "Split":
        """The split of these examples only; no token is copied."""
        return Split(self.stored, self.rows[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Splits:
    """A task's three splits under one protocol."""

    task: Task
    train: Split
    dev: Split
    test: Split
    protocol: str


def load(name: str, root: Path | None = None, protocol: str = "dev", source: Path | None = None) -> Splits:
    """Open a prepared task.

    Embedded tasks are prepared when they are missing, others only if `source` is given (see `prepare`). Processes that
    start together should not all do that: prepare first.

    Args:
        root: folder of the caches; `data/cache` of the checkout unless given.
        protocol: `"dev"` carves the dev split from train with a fixed seed (a tenth of CIFAR-10 and the digits, 5 % of
            the others, at most 10,000), so that test examples choose nothing. `"published"` is how the released code
            evaluated: dev is the test set itself for AG News, Yelp, IMDB and iNaturalist and the best checkpoint is
            chosen on it; CIFAR-10 has 45,000/5,000/10,000 either way. The released code also dropped the last
            incomplete test batch; that is up to whoever makes the batches. ListOps has a dev split of its own and the
            other embedded tasks were never published, so for these the two protocols agree.

    Raises:
        InputError: unknown task or protocol, no cache, or a damaged one.
    """
    chosen = task(name)
    require(protocol in PROTOCOLS, f"no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    folder = _root(root) / name
    if chosen.embedded or source is not None:
        meta = _prepared(chosen, folder, source, progress=True, sizes=None)
    else:
        way_out = f"run `python -m sat_lib data prepare {name}{' --source DIR' if not chosen.official else ''}` first"
        if chosen.official:
            way_out += " (with `--source DIR` if its official files are there already)"
        require(folder.exists(), f"task {name} is not prepared: there is no {folder}; {way_out}")
        meta = _verified(chosen, folder)
    stored = {split: _open_split(chosen, folder, split, entry["rows"]) for split, entry in meta["splits"].items()}
    train, test = stored["train"], stored["test"]
    if "dev" in stored:
        return Splits(chosen, train, stored["dev"], test, protocol)
    if protocol == "published" and chosen.published_dev_is_test:
        return Splits(chosen, train, test, test, protocol)
    return Splits(chosen, *_carve(chosen, train), test, protocol)


def _open_split(chosen: Task, folder: Path, split: str, rows: int) -> Split:
    path = folder / f"{split}.tokens"
    stored = np.memmap(path, chosen.dtype, mode="r", shape=(rows, chosen.length))
    return Split(stored, np.arange(rows), np.load(folder / f"{split}.labels.npy", allow_pickle=False))


def _carve(chosen: Task, train: Split) -> tuple[Split, Split]:
    """Train without dev, and dev: a random part, the same in every run, both in the order of the file."""
    require(len(train) > 1, f"task {chosen.name} has {len(train)} train example; a dev split needs at least 2")
    size = min(max(round(len(train) * chosen.dev_share), 1), 10_000)
    shuffled = np.random.default_rng(0).permutation(len(train))
    return train.take(np.sort(shuffled[size:])), train.take(np.sort(shuffled[:size]))


# ---- preparing a cache -----------------------------------------------------------------------------------------------


def prepare(
    name: str,
    root: Path | None = None,
    source: Path | None = None,
    progress: bool = True,
    sizes: dict[str, int] | None = None,
) -> Path:
    """Make a task's cache unless it is there; return its folder.

    Args:
        root: folder of the caches; `data/cache` of the checkout unless given.
        source: a folder with the official files, unpacked or not. Without it they are downloaded to
            `root/downloads/<task>`; a download that was cut is resumed by the next call. An archive with the official
            name must have the official checksum; other files are taken as they are, and `meta.json` says whether all
            of them are the official ones (`verified`).
        sizes: examples per split, for `listops` and `docstrings` only, where the numbers in `TASKS` are the default.

    Raises:
        InputError: unknown task; files missing, damaged or not the official ones; no network; a full disk; a cache
            that is damaged or was made from another source or in other sizes; another process preparing it.
            Whatever is raised, an earlier cache stays as it was and no new one is left half made.
    """
    chosen = task(name)
    folder = _root(root) / name
    _prepared(chosen, folder, source, progress, sizes)
    return folder


def describe(root: Path | None = None) -> list[dict]:
    """One row per task: name, kind, classes, length, vocab, examples per split, state.

    State is `"ready"` (splits and `verified` are the cache's), `"damaged"`, `"embedded"` (made when first loaded) or
    `"not prepared"`; the last three give the splits of the official set. Sizes are checked, contents are not.
    """
    rows = []
    for entry in TASKS.values():
        row = {"name": entry.name, "kind": entry.kind, "classes": len(entry.classes), "length": entry.length}
        row |= {"vocab": entry.vocab, "splits": dict(entry.sizes), "verified": None}
        row["state"] = "embedded" if entry.embedded else "not prepared"
        folder = _root(root) / entry.name
        if folder.exists():
            try:
                meta = _verified(entry, folder, hashes=False)
            except InputError:
                row["state"] = "damaged"
            else:
                splits = {split: value["rows"] for split, value in meta["splits"].items()}
                row |= {"state": "ready", "splits": splits, "verified": meta["verified"]}
        rows.append(row)
    return rows


def provenance(name: str, root: Path | None = None) -> dict:
    """What a result says of its data: `data_digest` of a prepared cache's files, and `data_official`.

    The latter is whether they come from files whose published checksum held, or are made by the package itself.
    """
    meta = _verified(task(name), _root(root) / name, hashes=False)
    parts = {part: record["sha256"] for part, record in meta["files"].items()}
    return {"data_digest": files.digest(parts), "data_official": task(name).embedded or meta["verified"]}


def _root(root: Path | None) -> Path:
    return Path(root) if root is not None else files.ROOT / "data" / "cache"


def _prepared(chosen: Task, folder: Path, source: Path | None, progress: bool, sizes: dict[str, int] | None) -> dict:
    """`meta.json` of the task's cache, which is made if it isn't there."""
    source = _checked_source(chosen, source)
    sizes = _checked_sizes(chosen, sizes)
    meta = _usable(chosen, folder, source, sizes)
    if meta is not None:
        return meta
    try:
        with files.lock(folder.parent / f".{chosen.name}.lock", f"preparing {chosen.name}"):
            meta = _usable(chosen, folder, source, sizes)  # another process may have made it meanwhile
            return meta if meta is not None else _build(chosen, folder, source, progress, sizes)
    except OSError as error:
        raise InputError(f"{folder.parent} is no place for a cache: {error}. Choose another folder") from error


def _checked_source(chosen: Task, source: Path | None) -> Path | None:
    if source is None:
        return None
    require(not chosen.embedded, f"task {chosen.name} is embedded and takes no source")
    require(Path(source).is_dir(), f"source {source} is not a folder; name the one that holds the official files")
    return Path(source).resolve()


def _checked_sizes(chosen: Task, sizes: dict[str, int] | None) -> dict[str, int] | None:
    if sizes is None:
        return None
    require(chosen.loader in _SIZED, f"task {chosen.name} has fixed sizes; only {' and '.join(_SIZED)} take others")
    good = set(sizes) == set(chosen.sizes) and all(isinstance(n, int) and n > 0 for n in sizes.values())
    require(good, f"sizes of {chosen.name}: wanted a positive number for {', '.join(chosen.sizes)}, got {sizes}")
    return {split: sizes[split] for split in chosen.sizes}


def _usable(chosen: Task, folder: Path, source: Path | None, sizes: dict[str, int] | None) -> dict | None:
    """`meta.json` of a cache that answers the request; None if there is none or installed versions have changed."""
    if not folder.exists():
        return None
    meta = _verified(chosen, folder)
    made = meta["source"]
    if source is not None and made != str(source):
        raise InputError(f"{folder} was made from {made or 'a download'}, not from {source}: delete it to make it anew")
    if sizes is not None and meta["sizes"] != sizes:
        raise InputError(f"{folder} was made with sizes {meta['sizes']}, not {sizes}: delete it to make it anew")
    return meta if not chosen.embedded or meta["versions"] == _versions(chosen) else None


def _build(chosen: Task, folder: Path, source: Path | None, progress: bool, sizes: dict[str, int] | None) -> dict:
    """Make the cache in a folder beside its place, then put it there."""
    if folder.exists():
        print(f"{chosen.name}: {folder} was made with other versions of {', '.join(chosen.packages)}; making it anew")
    building, retired = (folder.with_name(f".{folder.name}.{state}") for state in ("building", "retired"))
    for leftover in (building, retired):  # of a process that was killed; the lock says that none is at work
        shutil.rmtree(leftover, ignore_errors=True)
    sizes = sizes or chosen.sizes
    paths, records, verified = _inputs(chosen, folder.parent / "downloads" / chosen.name, source, progress)
    try:
        building.mkdir(parents=True)
        meta = _kind(chosen) | {
            "sizes": sizes if chosen.loader in _SIZED else None, "source": str(source) if source else None,
            "verified": verified, "source_files": records, "versions": _versions(chosen),
        }  # fmt: skip
        meta["splits"] = _write_splits(chosen, building, _batches(chosen, paths, sizes), sizes, progress)
        meta["files"] = {path.name: _file_record(path) for path in sorted(building.iterdir())}
        files.write_json(building / "meta.json", meta)
        _swap(building, folder, retired)
    except OSError as error:
        state = "The earlier cache is unchanged" if folder.exists() else "Nothing was left behind"
        raise InputError(
            f"could not write the cache of {chosen.name} in {folder.parent}: {error.strerror or error}. {state}. "
            "Free some space, or choose another folder, and run again"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)
    return meta


def _swap(new: Path, folder: Path, retired: Path) -> None:
    """Put `new` in the place of `folder`, which goes to `retired`, or back if that fails."""
    earlier = folder.exists()
    if earlier:
        folder.rename(retired)
    try:
        new.rename(folder)
    except OSError:
        if earlier:
            retired.rename(folder)
        raise


def _batches(chosen: Task, paths: list[Path], sizes: dict[str, int]) -> Iterator[readers.Batch]:
    """The task's examples from its reader."""
    match chosen.loader:
        case "cifar10":
            return readers.read_cifar10(paths, chosen.folder)
        case "inaturalist":
            return readers.read_inaturalist(paths, chosen.classes)
        case "csv":
            return readers.read_csv(paths, chosen.folder, chosen.columns, len(chosen.classes), chosen.length)
        case "digits":
            return builtin.read_digits(round(chosen.length**0.5), sizes)
        case "docstrings":
            return builtin.read_docstrings(chosen.classes, sizes, chosen.length)
        case "listops":
            return builtin.read_listops(sizes, chosen.length)
    raise AssertionError(chosen.loader)


def _write_splits(
    chosen: Task, folder: Path, batches: Iterator[readers.Batch], sizes: dict[str, int], progress: bool
) -> dict[str, dict]:
    """Write tokens and labels of every split, flushed to disk; return rows and class counts per split."""
    labels = {split: [] for split in sizes}  # of each split pairs (rows, labels), batch by batch
    counts = dict.fromkeys(sizes, 0)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(desc=chosen.name, total=sum(sizes.values()), unit=" examples", disable=not progress)
        )
        tokens = {split: stack.enter_context((folder / f"{split}.tokens").open("wb")) for split in sizes}
        for batch in batches:
            assert batch.tokens.dtype == chosen.dtype and batch.tokens.shape == (len(batch.labels), chosen.length)
            start, n = counts[batch.split], len(batch.labels)
            rows = np.arange(start, start + n) if batch.rows is None else batch.rows
            _write_rows(tokens[batch.split], batch)
            labels[batch.split].append((rows, np.asarray(batch.labels, np.int64)))
            counts[batch.split] += n
            bar.update(n)
        for file in tokens.values():
            file.flush()
            os.fsync(file.fileno())
    summary = {}
    for split, pairs in labels.items():
        ordered = np.empty(counts[split], np.int64)
        for rows, values in pairs:
            ordered[rows] = values
        np.save(folder / f"{split}.labels.npy", ordered)
        per_class = np.bincount(ordered, minlength=len(chosen.classes))
        summary[split] = {"rows": counts[split], "per_class": per_class.tolist()}
    return summary


def _write_rows(file, batch: readers.Batch) -> None:
    if batch.rows is None:
        file.write(batch.tokens.tobytes())
        return
    for row, line in zip(batch.rows.tolist(), batch.tokens, strict=True):
        file.seek(row * line.nbytes)
        file.write(line.tobytes())


def _kind(chosen: Task) -> dict:
    """What `meta.json` has to say for this package to read the cache as this task."""
    return {
        "format": FORMAT, "task": chosen.name, "length": chosen.length, "vocab": chosen.vocab,
        "classes": list(chosen.classes), "dtype": chosen.dtype.name,
    }  # fmt: skip


def _versions(chosen: Task) -> dict[str, str]:
    """Versions of what the task's tokens are computed with."""
    version = lambda package: platform.python_version() if package == "python" else importlib.metadata.version(package)
    return {package: version(package) for package in chosen.packages}


def _file_record(path: Path) -> dict:
    stat = path.stat()
    return {"bytes": stat.st_size, "sha256": files.file_digest(path), "mtime_ns": stat.st_mtime_ns}


def _verified(chosen: Task, folder: Path, hashes: bool = True) -> dict:
    """`meta.json` of a cache whose files are as they were written.

    Raises:
        InputError: it is damaged or of another format.
    """
    again = f"Delete the folder and run `python -m sat_lib data prepare {chosen.name}` again"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        kind = _kind(chosen).items()
        differing = [f"{key} {meta[key]}, wanted {wanted}" for key, wanted in kind if meta[key] != wanted]
        parts = {name: (part["bytes"], part["mtime_ns"], part["sha256"]) for name, part in meta["files"].items()}
        needed = {f"{split}{end}" for split in meta["splits"] for end in (".tokens", ".labels.npy")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the cache {folder} has no usable meta.json ({error}). {again}") from error
    require(not differing, f"the cache {folder} is of another kind ({'; '.join(differing)}). {again}")
    require(needed == set(parts), f"the cache {folder} is damaged (meta.json names other files). {again}")
    for name, (size, mtime_ns, digest) in parts.items():
        path = folder / name
        got = path.stat().st_size if path.is_file() else 0
        require(got == size, f"the cache {folder} is damaged ({name}: wanted {size:,} bytes, got {got:,}). {again}")
        if hashes and (size <= HASHED_BYTES or path.stat().st_mtime_ns != mtime_ns):
            good = files.file_digest(path) == digest
            require(good, f"the cache {folder} is damaged ({name} is not what was written). {again}")
    return meta


# ---- source files and downloads --------------------------------------------------------------------------------------


def _inputs(
    chosen: Task, downloads: Path, source: Path | None, progress: bool
) -> tuple[list[Path], list[dict], bool | None]:
    """The files to read, their records for `meta.json`, and whether all are the official ones (None: embedded)."""
    if chosen.embedded:
        return [], [], None
    if source is not None:
        paths = _find(chosen, source)
        records = [_source_record(chosen, path, source) for path in paths]
        return paths, records, all(record["verified"] for record in records)
    if not chosen.official:
        wanted = "train.csv and test.csv, each plain or as .gz or .xz"
        raise InputError(f"task {chosen.name} has no official download in csv form: put {wanted} in a folder and "
                         f"run `python -m sat_lib data prepare {chosen.name} --source DIR`")  # fmt: skip
    if progress:
        size = " (120 GB for the images)" if chosen.name == "inaturalist" else ""
        print(f"{chosen.name}: downloading {len(chosen.official)} file(s){size} to {downloads}", flush=True)
    paths = [download(official, downloads, progress, chosen.name) for official in chosen.official]
    records = [
        {"file": entry.name, "url": entry.url, entry.algorithm: entry.digest, "verified": True}
        for entry in chosen.official
    ]
    return paths, records, True


def _find(chosen: Task, folder: Path) -> list[Path]:
    match chosen.loader:
        case "cifar10":
            return readers.find_files(folder, chosen.folder, readers.CIFAR_FILES, ("",), chosen.archive)
        case "inaturalist":
            return readers.find_inaturalist(folder)
    return readers.find_files(folder, chosen.folder, ["train.csv", "test.csv"], ("", ".gz", ".xz"), chosen.archive)


def _source_record(chosen: Task, path: Path, source: Path) -> dict:
    """What `meta.json` says of a file that the user brought.

    Raises:
        InputError: it bears the name of an official archive but isn't it.
    """
    record = {"file": path.relative_to(source).as_posix(), "verified": False}
    if path.is_dir():
        return record
    official = next((entry for entry in chosen.official if entry.name == path.name), None)
    algorithm = official.algorithm if official else "sha256"
    with readers.reading(path):
        record |= {"bytes": path.stat().st_size, algorithm: files.file_digest(path, algorithm)}
    if official:
        record["verified"] = record[algorithm] == official.digest
        if readers.is_archive(path) and not record["verified"]:
            raise InputError(mismatch(path, official, record[algorithm], "Fetch it again, or give the unpacked files"))
    return record
