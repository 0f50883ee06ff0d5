"""Readers of the corpora: official file formats go in, batches of tokens come out.

Every reader is a generator of `Batch`es and holds one batch at a time, so that a corpus of any size passes through
little memory. `find_files` says which files of a folder a reader needs. What cannot be read raises `InputError`
with the file, what was wanted, what came.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..common.errors import InputError, require

TEXT_BYTES = 1_000  # the first bytes of a text that become tokens; the rest of its row is padding
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError)


class Batch(NamedTuple):
    """Some examples of one split; they follow those before unless `rows` gives their places."""

    split: str
    tokens: np.ndarray  # (b, L), uint8 or uint16
    labels: np.ndarray  # (b,)
    rows: np.ndarray | None = None  # (b,)


# ---- files and archives ----------------------------------------------------------------------------------------------


def is_archive(path: Path) -> bool:
    return path.name.endswith((".tgz", ".tar.gz"))


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn every sign of a damaged file, and whatever the system has against reading it, into an `InputError`."""
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno:  # which damaged archives raise without
            raise InputError(f"{path} can't be read: {error.strerror}. Mend that and run again") from error
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} could not be read to its end ({reason}). It is cut short, damaged or not what its name says: "
            "fetch it again"
        ) from error


CIFAR_FILES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
CSV_FILES = ["train.csv", "test.csv"]
INATURALIST_IMAGES = "train_val2018"
_FILES = {  # by the task's loader: the files it reads, and what may be appended to their names
    "cifar10": (CIFAR_FILES, [""]),
    "csv": (CSV_FILES, ["", ".gz", ".xz"]),
    "inaturalist": (["train2018.json", "val2018.json", INATURALIST_IMAGES], ["", ".tar.gz"]),
}


def find_files(folder: Path, subfolder: str, loader: str, archive: str) -> list[Path]:
    """The files that a loader reads, in `folder/subfolder` or `folder`, packed or not; else `[folder/archive]`.

    Unpacked files go before the packed ones, and all of these before the archive.

    Raises:
        InputError: neither is there, or only some of the files are.
    """
    names, suffixes = _FILES[loader]
    exists = lambda path: path.is_dir() if path.name == INATURALIST_IMAGES else path.is_file()
    way_out = "Put the files there or name the folder they are in"
    wanted = ", ".join(names) + (f" (or with {' or '.join(suffixes[1:])} appended)" if suffixes[1:] else "")
    for base in (folder / subfolder, folder):
        found = {name: [path for end in suffixes if exists(path := base / (name + end))] for name in names}
        if any(found.values()):
            missing = [name for name, paths in found.items() if not paths]
            require(not missing, f"{base} lacks {', '.join(missing)}; wanted {wanted}. {way_out}")
            return [paths[0] for paths in found.values()]
    if archive and (folder / archive).is_file():
        return [folder / archive]
    inside = f", there or in {subfolder}/" if subfolder else ""
    either = f", nor the archive {archive}" if archive else ""
    raise InputError(f"{folder} holds neither {wanted}{inside}{either}. {way_out}")


def _streams(paths: list[Path], members: list[str]) -> Iterator[tuple[str, BinaryIO]]:
    """(place for messages, open binary stream) of plain, gz or xz files, or of the `members` of one archive."""
    if is_archive(paths[0]):
        with reading(paths[0]), tarfile.open(paths[0], "r:gz") as tar:
            present = set(tar.getnames())
            for member in members:
                require(member in present, f"{paths[0]} has no member {member}: it is not the official archive")
                yield f"{paths[0]} ({member})", tar.extractfile(member)
        return
    openers = {".gz": gzip.open, ".xz": lzma.open}
    for path in paths:
        with reading(path), openers.get(path.suffix, open)(path, "rb") as stream:
            yield str(path), stream


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------


class _ArrayUnpickler(pickle.Unpickler):
    """A pickle can run any code when it is read; this one may rebuild NumPy arrays and nothing else."""

    SAFE = frozenset({
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
        ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.numeric", "_frombuffer"),
    })  # fmt: skip

    def find_class(self, module: str, name: str):
        module = module.replace("numpy.core", "numpy._core")  # as NumPy 1 called it
        if (module, name) not in self.SAFE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch holds")
        return super().find_class(module, name)


def gray(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """Three arrays of 0..255 -> uint8 of the same shape: floor(255.5 (0.2989 R + 0.5870 G + 0.1140 B) / 255)."""
    return np.floor(255.5 * (0.2989 * red + 0.5870 * green + 0.1140 * blue) / 255).astype(np.uint8)


def read_cifar10(paths: list[Path], folder: str) -> Iterator[Batch]:
    """Gray CIFAR-10, (b, 1024) uint8, from the pickled batches of `cifar-10-batches-py` or the archive of them."""
    streams = _streams(paths, [f"{folder}/{name}" for name in CIFAR_FILES])
    for name, (where, stream) in zip(CIFAR_FILES, streams, strict=True):
        pixels, labels = _cifar10_batch(where, stream)
        for start in range(0, len(labels), 1_000):
            red, green, blue = np.split(pixels[start : start + 1_000], 3, axis=1)  # channel planes, each (b, 1024)
            yield Batch("test" if name == "test_batch" else "train", gray(red, green, blue), labels[start:][:1_000])


def _cifar10_batch(where: str, stream: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 3072) uint8 and labels (n,) of one pickled batch."""
    try:
        batch = _ArrayUnpickler(stream, encoding="bytes").load()
    except Exception as error:  # damaged pickles fail in almost any way
        raise InputError(
            f"{where} is not a readable CIFAR-10 batch ({type(error).__name__}: {error}). "
            "It is cut short or damaged: unpack or fetch it again"
        ) from error
    keys = {b"data", b"labels"}
    require(isinstance(batch, dict) and keys <= set(batch), f"{where}: wanted a dict with b'data' and b'labels'")
    pixels, array = batch[b"data"], isinstance(batch[b"data"], np.ndarray)
    good = array and pixels.dtype == np.uint8 and pixels.shape[1:] == (3072,) and len(pixels)
    got = f"{pixels.dtype} {pixels.shape}" if array else type(pixels).__name__
    require(good, f"{where}: wanted images as uint8 rows of 3 x 32 x 32 = 3072 bytes, got {got}")
    try:
        labels = np.asarray(batch[b"labels"])
    except ValueError as error:  # lists of several lengths
        raise InputError(f"{where}: wanted labels 0..9, one an image ({error})") from error
    require(labels.shape == (len(pixels),), f"{where}: {len(pixels)} images but labels of shape {labels.shape}")
    good = np.issubdtype(labels.dtype, np.integer) and labels.min() >= 0 and labels.max() <= 9
    require(good, f"{where}: wanted labels 0..9, got {np.unique(labels)[:20].tolist()}")
    return pixels, labels


# ---- iNaturalist 2018 ------------------------------------------------------------------------------------------------


def read_inaturalist(paths: list[Path], classes: tuple[str, ...]) -> Iterator[Batch]:
    """Gray 32 x 32 thumbnails, (b, 1024) uint8, in the order of the two JSON files; val2018 is the test split.

    Images come from the folder, or straight from the 120 GB tar, which is read once and never unpacked.
    """
    train_json, val_json, images = paths
    places = _inaturalist_places(train_json, "train", classes) | _inaturalist_places(val_json, "test", classes)
    unpacked = ((name, images.parent / name) for name in list(places))
    pictures = unpacked if images.is_dir() else _archive_images(images, places)
    with ThreadPoolExecutor() as pool:
        for chunk in _chunks(pictures, 256):
            for name, pixels in pool.map(_thumbnail, chunk):
                split, row, label = places.pop(name)
                yield Batch(split, pixels[None], np.array([label]), np.array([row]))
    if places:
        raise InputError(f"{images} lacks {len(places):,} images that the JSON files list, first {next(iter(places))}")


def _inaturalist_places(path: Path, split: str, classes: tuple[str, ...]) -> dict[str, tuple[str, int, int]]:
    """Image file name -> (split, row, label), for the images of one COCO-like JSON file."""
    fields = ("images", "annotations", "categories", "id", "file_name", "image_id", "category_id", "supercategory")
    slim = lambda entry: {key: entry[key] for key in fields if key in entry}
    with reading(path):
        for _, stream in _streams([path], [path.name.removesuffix(".tar.gz")]):
            content = json.load(stream, object_hook=slim)
    try:
        supers = {category["id"]: category["supercategory"] for category in content["categories"]}
        category_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
        named = [(image["file_name"], supers[category_of[image["id"]]]) for image in content["images"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: wanted images, annotations and categories as in COCO; missing {error}") from error
    require(bool(named), f"{path} lists no images")
    places = {}
    for row, (file_name, name) in enumerate(named):
        if name not in classes:
            raise InputError(f"{path}: {file_name} is of super-category {name!r}, wanted one of {', '.join(classes)}")
        parts = file_name.split("/")
        if len(parts) != 4 or parts[:2] != [INATURALIST_IMAGES, name] or ".." in parts:
            wanted = f"{INATURALIST_IMAGES}/{name}/<category>/<file>.jpg, as its super-category is {name}"
            raise InputError(f"{path}: wanted {wanted}, got {file_name!r}")
        places[file_name] = (split, row, classes.index(name))
    require(len(places) == len(named), f"{path} lists {len(named) - len(places)} file names more than once")
    return places


def _archive_images(images: Path, wanted: dict) -> Iterator[tuple[str, BinaryIO]]:
    with reading(images), tarfile.open(images, "r|gz") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # or it would keep a record of every member: some 700 MB
            name = member.name.removeprefix("./")
            if member.isfile() and name in wanted:
                yield name, io.BytesIO(tar.extractfile(member).read())


def _thumbnail(picture: tuple[str, Path | BinaryIO]) -> tuple[str, np.ndarray]:
    """One encoded image -> (1024,) uint8: RGB, 32 x 32 by antialiased bilinear filter, then gray."""
    from PIL import Image

    name, encoded = picture
    try:
        with Image.open(encoded) as image:
            small = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{name} is not a readable image ({error}). Unpack or fetch it again") from error
    return name, gray(*small.reshape(1024, 3).T)


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


# ---- texts -----------------------------------------------------------------------------------------------------------


def text_tokens(texts: list[str], length: int) -> np.ndarray:
    """Texts -> (len(texts), length) uint16: UTF-8 byte + 1 for the first 1,000 bytes, then padding 0."""
    tokens = np.zeros((len(texts), length), np.uint16)
    for row, text in zip(tokens, texts, strict=True):
        encoded = np.frombuffer(text[:TEXT_BYTES].encode()[:TEXT_BYTES], np.uint8)
        row[: len(encoded)] = encoded + np.uint16(1)
    return tokens


def read_csv(paths: list[Path], folder: str, columns: tuple[str, ...], classes: int, length: int) -> Iterator[Batch]:
    """Texts of train.csv and test.csv (plain, .gz, .xz, or in the archive): class number from 1, then text columns.

    Text columns are joined by one space and kept as they are: a literal backslash-n, an HTML entity stay.
    """
    streams = _streams(paths, [f"{folder}/{name}" for name in CSV_FILES])
    for split, (where, stream) in zip(("train", "test"), streams, strict=True):
        with reading(where):
            for chunk in _chunks(_csv_examples(where, stream, columns, classes), 2_048):
                labels, texts = zip(*chunk, strict=True)
                yield Batch(split, text_tokens(texts, length), np.array(labels))


def _csv_examples(where: str, stream: BinaryIO, columns: tuple[str, ...], classes: int) -> Iterator[tuple[int, str]]:
    label_of = {str(k + 1): k for k in range(classes)}
    rows = csv.reader(io.TextIOWrapper(stream, encoding="utf-8", newline=""), strict=True)
    try:
        for row in rows:
            if len(row) != len(columns):
                wanted = f"{len(columns)} columns ({', '.join(columns)})"
                raise InputError(f"{where}, line {rows.line_num}: wanted {wanted}, got {len(row)}")
            if row[0] not in label_of:
                raise InputError(f"{where}, line {rows.line_num}: wanted a class 1 to {classes}, got {row[0][:40]!r}")
            yield label_of[row[0]], " ".join(row[1:])
    except (csv.Error, UnicodeDecodeError) as error:
        reason = f"{error}. It is cut short, damaged or not csv in UTF-8: fetch it again"
        raise InputError(f"{where}, at or after line {rows.line_num}: {reason}") from error
    require(rows.line_num > 0, f"{where} is empty; wanted rows of {', '.join(columns)}")
