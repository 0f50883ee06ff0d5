"""Pairs of texts, and whether the two belong together: MRPC, and halves of docstrings, which need no download.

`prepare_mrpc` puts the corpus into `data/cache/mrpc`, whole or not at all; `load_pairs` reads either set.
"""

import functools
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common import files
from ..common.errors import InputError, require
from . import cache, readers, store
from .downloads import download_all, officials

NAMES = ("mrpc", "docstrings")
_ADDRESS = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
_DIGESTS = {
    "msr_paraphrase_train.txt": "793daf7b6224281e75fe61c1f80afe35",
    "msr_paraphrase_test.txt": "e437fdddb92535b820fe8852e2df8a49",
}
MRPC = dict(zip(("train", "test"), officials(_ADDRESS, _DIGESTS), strict=True))
MRPC_SIZES = {"train": 4_076, "test": 1_725}  # pairs
_HEADER = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """n pairs of texts; label 1 where the second belongs to the first."""

    first: list[str]
    second: list[str]
    labels: np.ndarray  # (n,) int64, 0 or 1

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Pairs":
        """The pairs at these places, in this order."""
        return Pairs([self.first[k] for k in indices], [self.second[k] for k in indices], self.labels[indices])


def _pairs(rows: list[tuple[str, str, int]]) -> Pairs:
    """Pairs from (first, second, label)."""
    first, second, labels = zip(*rows, strict=True)
    return Pairs(list(first), list(second), np.array(labels, np.int64))


class PairSplits(NamedTuple):
    """A set of pairs."""

    train: Pairs
    dev: Pairs
    test: Pairs
    provenance: dict  # what a result says of its data, see `datasets.provenance`


def load_pairs(name: str, seed: int = 0, root: Path | None = None) -> PairSplits:
    """The pairs of `"mrpc"` (prepared before) or `"docstrings"` (made from what is installed).

    Args:
        seed: of the draw of MRPC's dev split, a tenth of train, or of the wrong halves and the order of docstrings.
            The same seed gives the same pairs; runs that are compared share it.
        root: folder of the caches; `data/cache` of the checkout unless given.

    Raises:
        InputError: another name; MRPC isn't prepared, or its files are no longer what was put there.
    """
    require(name in NAMES, f"name: wanted pairs of {' or '.join(NAMES)}; got {name!r}")
    return _load_mrpc(seed, root) if name == "mrpc" else _load_docstrings(seed, root)


def is_ready(name: str, root: Path | None = None) -> bool:
    """Whether `load_pairs` has all it needs: MRPC must be prepared, docstrings always are.

    Raises:
        InputError: another name.
    """
    require(name in NAMES, f"name: wanted pairs of {' or '.join(NAMES)}; got {name!r}")
    folder = store.place("mrpc", root)
    return name == "docstrings" or all((folder / file).is_file() for file in (*_names(), "meta.json"))


def default_pairs(root: Path | None = None) -> str:
    """`"mrpc"` where it is prepared, else `"docstrings"`."""
    return "mrpc" if is_ready("mrpc", root) else "docstrings"


def describe(root: Path | None = None) -> dict:
    """MRPC's row for a list of tasks: name, kind, classes, splits, and the state, `"ready"` or `"not prepared"`."""
    state = "ready" if is_ready("mrpc", root) else "not prepared"
    return {"name": "mrpc", "kind": "pairs", "classes": 2, "splits": dict(MRPC_SIZES), "state": state}


# ---- MRPC ------------------------------------------------------------------------------------------------------------


def prepare_mrpc(source: Path | None = None, root: Path | None = None, progress: bool = True) -> Path:
    """Put MRPC's two files into `root/mrpc` unless they are there; return that folder.

    Args:
        source: a folder that holds the two files under their official names. Files with another checksum are taken if
            every line fits and none is missing; a printed line and `data_official` say so. Without `source` the
            official files are downloaded to `root/downloads/mrpc`.
        root: folder of the caches; `data/cache` of the checkout unless given.

    Raises:
        InputError: files missing, damaged or (downloaded) not the official ones; no network; a full disk; a folder
            made from another source; another process preparing it. Nothing is left half made.
    """
    folder, names = store.place("mrpc", root), " and ".join(sorted(_names()))
    is_folder = source is None or Path(source).is_dir()
    require(is_folder, f"source {source} is not a folder; name the one that holds {names}")
    fill = functools.partial(_fill_mrpc, folder.parent / "downloads" / "mrpc", progress)
    return store.prepared(folder, source, functools.partial(store.verified, folder, _names(), {}), fill)


def _names() -> set[str]:
    return {official.name for official in MRPC.values()}


def _fill_mrpc(downloads: Path, progress: bool, building: Path, source: Path | None) -> dict:
    """Copy the two files into the folder `building` if they hold what they should.

    Files other than the official ones have to hold as many pairs, and a line says which it is.
    """
    if source is None:
        download_all(MRPC.values(), downloads, progress, "mrpc")
    verified = True
    for split, official in MRPC.items():
        path = (source or downloads) / official.name
        require(path.is_file(), f"{path.parent} has no {path.name}. Put it there ({official.url}) or name its folder")
        count, wanted = len(read_mrpc(path)), MRPC_SIZES[split]
        require(count == wanted, f"{path}: wanted {wanted:,} pairs, got {count:,}. Fetch it again ({official.url})")
        found = files.file_digest(path, official.algorithm)
        if found != official.digest:
            verified = False
            print(f"mrpc: {path} has {official.algorithm} {found}, the official file {official.digest}: taken as it is")
        shutil.copyfile(path, building / path.name)
    return {"verified": verified}


def read_mrpc(path: Path) -> Pairs:
    """Pairs of a file in MRPC's format: UTF-8, a header, then lines of five columns set apart by tabs, no quoting.

    Raises:
        InputError: with the number of the line that doesn't fit.
    """
    with readers.reading(path):
        content = Path(path).read_bytes()
    try:
        lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: wanted UTF-8 ({error.reason}). Fetch it again") from error
    header, *rows = (line.removesuffix("\r").split("\t") for line in lines)
    require(header == _HEADER, f"{path}, line 1: wanted the columns {_HEADER}, got {header}. Fetch it again")
    require(bool(rows), f"{path}: wanted pairs below the header, got none. Fetch it again")
    pairs = []
    for number, row in enumerate(rows, 2):
        where, wanted = f"{path}, line {number}", f"{len(_HEADER)} columns ({', '.join(_HEADER)})"
        require(len(row) == len(_HEADER), f"{where}: wanted {wanted}, got {len(row)}. Fetch it again")
        quality, _, _, first, second = row
        require(quality in ("0", "1"), f"{where}: wanted quality 0 or 1, got {quality[:40]!r}. Fetch it again")
        require(bool(first.strip() and second.strip()), f"{where}: wanted two texts, got {first!r} and {second!r}")
        pairs.append((first, second, int(quality)))
    return _pairs(pairs)


def _load_mrpc(seed: int, root: Path | None) -> PairSplits:
    folder = store.place("mrpc", root)
    meta = store.verified(folder, _names(), {})
    whole, test = (read_mrpc(folder / MRPC[split].name) for split in ("train", "test"))
    return PairSplits(*cache.carve(whole, 0.1, seed), test, store.provenance(meta))


# ---- halves of docstrings --------------------------------------------------------------------------------------------


def cut_in_half(text: str) -> tuple[str, str] | None:
    """Two halves: cut at the end of a line in the middle half of the text, else at a space there, else None.

    Of several such places the one nearest to the middle is taken; white space around the halves goes.
    """
    middle = len(text) / 2
    for mark in "\n ":
        places = [k for k, character in enumerate(text) if character == mark and abs(k - middle) <= middle / 2]
        if places:
            cut = min(places, key=lambda place: abs(place - middle))
            first, second = text[:cut].strip(), text[cut:].strip()
            return (first, second) if first and second else None
    return None


def _load_docstrings(seed: int, root: Path | None) -> PairSplits:
    """The splits of the `docstrings` task as pairs; a half that occurs twice stays in test, then in dev."""
    splits, rng, seen = cache.load("docstrings", root), np.random.default_rng(seed), set()
    test, dev, train = (_paired(split, rng, seen) for split in (splits.test, splits.dev, splits.train))
    return PairSplits(train, dev, test, cache.provenance("docstrings", root))


def _paired(split: cache.Split, rng: np.random.Generator, seen: set[str]) -> Pairs:
    """Every docstring's first half twice: with its own second half, and with another's of the same library.

    So every half occurs once with each label, and neither half alone tells anything. Adds the halves to `seen`.
    """
    cuts = defaultdict(list)  # library -> halves
    for tokens, library in zip(split.tokens, split.labels.tolist(), strict=True):
        halves = cut_in_half(_text(tokens))
        if halves and halves[0] != halves[1] and not seen & set(halves):
            seen.update(halves)
            cuts[library].append(halves)
    pairs = []
    for library, halves in sorted(cuts.items()):
        require(len(halves) > 1, f"docstrings: wanted 2 or more of library {library} in every split, got 1")
        order = rng.permutation(len(halves))
        for own, other in zip(order, np.roll(order, 1), strict=True):
            pairs += [(*halves[own], 1), (halves[own][0], halves[other][1], 0)]
    return _pairs([pairs[k] for k in rng.permutation(len(pairs))])


def _text(tokens: np.ndarray) -> str:
    """The text behind a row of `readers.text_tokens`; a character cut at the last byte goes."""
    return (tokens[tokens > 0] - 1).astype(np.uint8).tobytes().decode(errors="ignore")
