"""Tasks by name -> token arrays: download with checksum, one cache folder per task, splits over memory-mapped files.

`prepare` makes a task's cache, `load` opens it, `describe` lists what is there. A cache is `data/cache/<task>/` with
one raw token file and one label file per split, and `meta.json` with sizes and checksums.
"""

import functools
import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..common import files
from ..common.errors import InputError, require
from . import builtin, readers, store
from .downloads import download_all, mismatch
from .tasks import TASKS, Task, task

FORMAT = 1  # of the cache; a cache of another format has to be made again
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
    folder = store.place(name, root)
    if chosen.embedded or source is not None:
        prepare(name, root, source)
    else:
        _verified(chosen, folder)
    splits = {}
    for split in chosen.sizes:
        labels = np.load(folder / f"{split}.labels.npy", allow_pickle=False)
        tokens = np.memmap(folder / f"{split}.tokens", chosen.dtype, mode="r", shape=(len(labels), chosen.length))
        splits[split] = Split(tokens, np.arange(len(labels)), labels)
    if protocol == "published" and chosen.published_dev_is_test:
        splits["dev"] = splits["test"]
    elif "dev" not in splits:
        size = len(splits["train"])
        require(size > 1, f"task {name} has {size} train example; a dev split needs at least 2")
        splits["train"], splits["dev"] = carve(splits["train"], chosen.dev_share)
    return Splits(chosen, protocol=protocol, **splits)


def carve(train, share: float, seed: int = 0) -> tuple:
    """Train without dev, and dev: a random `share`, at most 10,000, both in the order of `train`.

    `train` is anything with a length and `take`, as `Split` has them. The same seed draws the same examples.
    """
    size = min(max(round(len(train) * share), 1), 10_000)
    shuffled = np.random.default_rng(seed).permutation(len(train))
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
    chosen, folder = task(name), store.place(name, root)
    require(source is None or not chosen.embedded, f"task {name} is embedded and takes no source")
    if sizes is not None:
        require(chosen.loader in _SIZED, f"task {name} has fixed sizes; only {' and '.join(_SIZED)} take others")
        good = set(sizes) == set(chosen.sizes) and all(isinstance(n, int) and n > 0 for n in sizes.values())
        require(good, f"sizes of {name}: wanted a positive number for {', '.join(chosen.sizes)}, got {sizes}")
    usable = functools.partial(_usable, chosen, folder, sizes)
    fill = functools.partial(_fill, chosen, folder, chosen.sizes | (sizes or {}), progress)
    return store.prepared(folder, source, usable, fill)


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
        folder = store.place(entry.name, root)
        if folder.exists():
            try:
                meta = _verified(entry, folder, hashes=False)
                splits = {split: value["rows"] for split, value in meta["splits"].items()}
                row |= {"state": "ready", "splits": splits, "verified": meta["verified"]}
            except (InputError, KeyError, TypeError, AttributeError):  # the last three of what it says of the splits
                row["state"] = "damaged"
        rows.append(row)
    return rows


def provenance(name: str, root: Path | None = None) -> dict:
    """What a result says of its data: `data_digest` and `data_official`, see `store.provenance`."""
    return store.provenance(_verified(task(name), store.place(name, root), hashes=False))


def _verified(chosen: Task, folder: Path, hashes: bool = True) -> dict:
    """`meta.json` of the task's cache, see `store.verified`."""
    names = {f"{split}{end}" for split in chosen.sizes for end in (".tokens", ".labels.npy")}
    downloads = None if chosen.embedded else bool(chosen.official)
    return store.verified(folder, names, _kind(chosen), downloads, hashes)


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


def _usable(chosen: Task, folder: Path, sizes: dict[str, int] | None) -> dict | None:
    """`meta.json` of a cache that answers the request; None if installed versions have changed."""
    meta = _verified(chosen, folder)
    if sizes is not None and meta["sizes"] != sizes:
        raise InputError(f"{folder} was made with sizes {meta['sizes']}, not {sizes}: delete it to make it anew")
    return meta if not chosen.embedded or meta["versions"] == _versions(chosen) else None


def _fill(
    chosen: Task, folder: Path, sizes: dict[str, int], progress: bool, building: Path, source: Path | None
) -> dict:
    """Write the task's tokens and labels into the folder `building`; return what `meta.json` says of them."""
    if folder.exists():
        print(f"{chosen.name}: {folder} was made with other versions of {', '.join(chosen.packages)}; making it anew")
    paths, records = _inputs(chosen, folder.parent / "downloads" / chosen.name, source, progress)
    return _kind(chosen) | {
        "sizes": sizes if chosen.loader in _SIZED else None,
        "verified": all(record["verified"] for record in records) if records else None,
        "source_files": records,
        "versions": _versions(chosen),
        "splits": _write_splits(chosen, building, _batches(chosen, paths, sizes), sizes, progress),
    }


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
    return builtin.read_listops(sizes, chosen.length)


def _write_splits(
    chosen: Task, folder: Path, batches: Iterator[readers.Batch], sizes: dict[str, int], progress: bool
) -> dict[str, dict]:
    """Write tokens and labels of every split; return rows and class counts per split."""
    labels = {split: {} for split in sizes}  # by row
    for split in sizes:
        (folder / f"{split}.tokens").touch()
    with tqdm(desc=chosen.name, total=sum(sizes.values()), unit=" examples", disable=not progress) as bar:
        for split, tokens, values, places in batches:
            assert tokens.dtype == chosen.dtype and tokens.shape == (len(values), chosen.length)
            places = len(labels[split]) + np.arange(len(values)) if places is None else places
            with (folder / f"{split}.tokens").open("rb+") as file:
                for place, row in zip(places.tolist(), tokens, strict=True):
                    file.seek(place * row.nbytes)
                    file.write(row)
            labels[split].update(zip(places.tolist(), values.tolist(), strict=True))
            bar.update(len(values))
    summary = {}
    for split in sizes:
        ordered = np.array([labels[split][row] for row in range(len(labels[split]))], np.int64)
        np.save(folder / f"{split}.labels.npy", ordered)
        per_class = np.bincount(ordered, minlength=len(chosen.classes))
        summary[split] = {"rows": len(ordered), "per_class": per_class.tolist()}
    return summary


# ---- source files and downloads --------------------------------------------------------------------------------------


def _inputs(chosen: Task, downloads: Path, source: Path | None, progress: bool) -> tuple[list[Path], list[dict]]:
    """The files to read, none for an embedded task, and what `meta.json` says of each."""
    if chosen.embedded:
        return [], []
    if source is not None:
        paths = readers.find_files(source, chosen.folder, chosen.loader, chosen.archive)
        return paths, [_source_record(chosen, path, source) for path in paths]
    wanted = "train.csv and test.csv, each plain or as .gz or .xz"
    way_out = f"put {wanted} in a folder and run `python -m sat_lib data prepare {chosen.name} --source DIR`"
    require(bool(chosen.official), f"task {chosen.name} has no official download in csv form: {way_out}")
    paths = download_all(chosen.official, downloads, progress, chosen.name)
    known = lambda file: {"file": file.name, "url": file.url, file.algorithm: file.digest, "verified": True}
    return paths, [known(file) for file in chosen.official]


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
