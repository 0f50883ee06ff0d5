"""Pairs of texts, and whether the two belong together: MRPC, and halves of docstrings, which need no download.

`prepare_mrpc` puts the corpus into `data/cache/mrpc`, whole or not at all; `load_pairs` reads either set.
"""

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common import files
from ..common.errors import InputError, require
from . import cache
from .downloads import Official, download

NAMES = ("mrpc", "docstrings")
_ADDRESS = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
_TRAIN, _TEST = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt"
MRPC = {
    "train": Official(_TRAIN, _ADDRESS + _TRAIN, "md5", "793daf7b6224281e75fe61c1f80afe35"),
    "test": Official(_TEST, _ADDRESS + _TEST, "md5", "e437fdddb92535b820fe8852e2df8a49"),
}
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


class PairSplits(NamedTuple):
    """A set of pairs; `provenance` is what a result says of its data, as `datasets.provenance` has it."""

    train: Pairs
    dev: Pairs
    test: Pairs
    provenance: dict  # data_digest and data_official


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
    needed = [*(official.name for official in MRPC.values()), "meta.json"]
    return name == "docstrings" or all((_folder(root) / file).is_file() for file in needed)


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
    folder = _folder(root)
    if source is not None:
        require(Path(source).is_dir(), f"source {source} is not a folder; name the one that holds {_TRAIN} and {_TEST}")
        source = Path(source).resolve()
    try:
        with files.lock(folder.parent / ".mrpc.lock", "preparing mrpc"):
            if folder.exists():
                made = _checked_meta(folder)["source"]
                same = source is None or made == str(source)
                require(same, f"{folder} was made from {made or 'a download'}, not from {source}: delete it to make "
                              "it anew")  # fmt: skip
            else:
                _build(folder, source, progress)
    except OSError as error:
        raise InputError(
            f"could not put mrpc into {folder} ({error}). Nothing was left there: mend that and run again"
        ) from error
    return folder


def read_mrpc(path: Path) -> Pairs:
    """Pairs of a file in MRPC's format: UTF-8, a header, then lines of five columns set apart by tabs, no quoting.

    Raises:
        InputError: with the number of the line that doesn't fit.
    """
    content = Path(path).read_bytes()
    try:
        header, *lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: wanted UTF-8 ({error.reason}). Fetch it again") from error
    columns = header.removesuffix("\r").split("\t")
    require(columns == _HEADER, f"{path}, line 1: wanted the columns {_HEADER}, got {columns}. Fetch it again")
    rows = [_mrpc_row(f"{path}, line {number}", line.removesuffix("\r")) for number, line in enumerate(lines, 2)]
    require(bool(rows), f"{path}: wanted pairs below the header, got none. Fetch it again")
    labels, first, second = zip(*rows, strict=True)
    return Pairs(list(first), list(second), np.array(labels, np.int64))


def _mrpc_row(where: str, line: str) -> tuple[int, str, str]:
    """Label, first and second text of a line."""
    columns = line.split("\t")
    wanted = f"{len(_HEADER)} columns ({', '.join(_HEADER)})"
    require(len(columns) == len(_HEADER), f"{where}: wanted {wanted}, got {len(columns)}. Fetch it again")
    quality, _, _, first, second = columns
    require(quality in ("0", "1"), f"{where}: wanted quality 0 or 1, got {quality[:40]!r}. Fetch it again")
    require(bool(first.strip() and second.strip()), f"{where}: wanted two texts, got {first!r} and {second!r}")
    return int(quality), first, second


def _folder(root: Path | None) -> Path:
    return (Path(root) if root is not None else files.ROOT / "data" / "cache") / "mrpc"


def _build(folder: Path, source: Path | None, progress: bool) -> None:
    """Copy checked files into a folder beside `folder`, then give it that name."""
    given = source
    if source is None:
        source = folder.parent / "downloads" / "mrpc"
        if progress:
            print(f"mrpc: downloading {len(MRPC)} files to {source}", flush=True)
        for official in MRPC.values():
            download(official, source, progress, "mrpc")
    verified = [_fits(source / official.name, split) for split, official in MRPC.items()]
    building = folder.with_name(".mrpc.building")
    shutil.rmtree(building, ignore_errors=True)  # of a process that was killed; the lock says that none is at work
    try:
        for official in MRPC.values():
            files.write(building / official.name, (source / official.name).read_bytes())
        digests = {official.name: files.file_digest(building / official.name) for official in MRPC.values()}
        meta = {"source": str(given) if given else None, "verified": all(verified), "files": digests}
        files.write_json(building / "meta.json", meta)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _fits(path: Path, split: str) -> bool:
    """Whether a file is the official one. Another one has to hold as many pairs, and a line says which it is.

    Raises:
        InputError: it is missing, or isn't MRPC's file of that split.
    """
    official = MRPC[split]
    require(path.is_file(), f"{path.parent} has no {official.name}. Put it there ({official.url}) or name its folder")
    count = len(read_mrpc(path))
    wanted = MRPC_SIZES[split]
    require(count == wanted, f"{path}: wanted {wanted:,} pairs, got {count:,}. Fetch it again ({official.url})")
    found = files.file_digest(path, official.algorithm)
    if found != official.digest:
        print(f"mrpc: {path} has {official.algorithm} {found}, the official file {official.digest}: taken as it is")
    return found == official.digest


def _checked_meta(folder: Path) -> dict:
    """`meta.json` of a prepared folder whose files are as they were put there.

    Raises:
        InputError: they aren't.
    """
    again = f"Delete {folder} and run `python -m sat_lib data prepare mrpc` again"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        found = {official.name: files.file_digest(folder / official.name) for official in MRPC.values()}
        good = meta["files"] == found and {"source", "verified"} <= set(meta)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is not complete ({type(error).__name__}: {error}). {again}") from error
    require(good, f"{folder} is damaged: its files are not what was put there. {again}")
    return meta


def _load_mrpc(seed: int, root: Path | None) -> PairSplits:
    folder = _folder(root)
    way_out = "run `python -m sat_lib data prepare mrpc` first (with `--source DIR` if its files are there already)"
    require(folder.exists(), f"mrpc is not prepared: there is no {folder}; {way_out}")
    meta = _checked_meta(folder)
    whole, test = (read_mrpc(folder / MRPC[split].name) for split in ("train", "test"))
    shuffled, size = np.random.default_rng(seed).permutation(len(whole)), max(round(len(whole) / 10), 1)
    train, dev = whole.take(np.sort(shuffled[size:])), whole.take(np.sort(shuffled[:size]))
    provenance = {"data_digest": files.digest(meta["files"]), "data_official": meta["verified"]}
    return PairSplits(train, dev, test, provenance)


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
    first, second, labels = zip(*(pairs[k] for k in rng.permutation(len(pairs))), strict=True)
    return Pairs(list(first), list(second), np.array(labels, np.int64))


def _text(tokens: np.ndarray) -> str:
    """The text behind a row of `readers.text_tokens`; a character cut at the last byte goes."""
    return (tokens[tokens > 0] - 1).astype(np.uint8).tobytes().decode(errors="ignore")
