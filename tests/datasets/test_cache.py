"""Loaders on small files in the official formats, the embedded tasks themselves, and every kind of bad input."""

import csv
import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import json
import lzma
import math
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sat_lib import datasets
from sat_lib.common import files
from sat_lib.common.errors import InputError
from sat_lib.datasets import builtin, downloads, readers, store, tasks
from sat_lib.datasets.cache import carve
from sat_lib.datasets.downloads import Official

# ---- small corpora in the official formats ---------------------------------------------------------------------------


def cifar_batch(n: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
    return {b"data": pixels, b"labels": rng.integers(0, 10, n).tolist(), b"batch_label": b"x"}


def write_cifar(folder: Path, n: int = 4) -> Path:
    folder.mkdir(parents=True)
    for seed, name in enumerate(readers.CIFAR_FILES):
        (folder / name).write_bytes(pickle.dumps(cifar_batch(n, seed), protocol=4))
    return folder


def pack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def write_csv(path: Path, rows: list[tuple]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with OPENERS.get(path.suffix, open)(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    return path


def reviews(n: int) -> list[tuple]:
    rng = np.random.default_rng(n)
    return [(1 + k % 2, f"review {k} " + "".join(map(chr, rng.integers(97, 123, 200)))) for k in range(n)]


def write_reviews(folder: Path, suffix: str = "") -> Path:
    write_csv(folder / f"train.csv{suffix}", reviews(40))
    write_csv(folder / f"test.csv{suffix}", reviews(8))
    return folder


VAL_IMAGE = "train_val2018/Aves/1/val0.jpg"


def write_inaturalist(folder: Path) -> Path:
    """Three training and two validation images in the official layout."""
    from PIL import Image

    supers = ["Plantae", "Aves", "Reptilia"]
    categories = [{"id": 10 + k, "name": f"{k}", "supercategory": name} for k, name in enumerate(supers)]
    for split, kinds in (("train", [0, 1, 2]), ("val", [1, 0])):
        images, annotations = [], []
        for k, kind in enumerate(kinds):
            name = f"train_val2018/{supers[kind]}/{kind}/{split}{k}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(k).integers(0, 256, (48, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            images.append({"id": 100 + k, "file_name": name, "license": 1, "width": 80, "height": 48})
            annotations.append({"id": k, "image_id": 100 + k, "category_id": 10 + kind})
        content = {"images": images, "annotations": annotations[::-1], "categories": categories}
        (folder / f"{split}2018.json").write_text(json.dumps(content))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 3])  # not between two equal rows of a csv


def with_official(monkeypatch, name: str, *official: Official) -> None:
    monkeypatch.setitem(tasks.TASKS, name, dataclasses.replace(tasks.TASKS[name], official=official))


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "length", "vocab", "classes", "dtype", "masked"),
    [
        ("cifar10", 1024, 256, 10, np.uint8, False),
        ("inaturalist", 1024, 512, 14, np.uint8, False),
        ("agnews", 1024, 512, 4, np.uint16, True),
        ("yelp", 1024, 512, 2, np.uint16, True),
        ("imdb", 1024, 512, 2, np.uint16, True),
        ("digits", 1024, 256, 10, np.uint8, False),
        ("digits16", 256, 256, 10, np.uint8, False),
        ("docstrings", 1024, 512, 4, np.uint16, True),
        ("listops", 2000, 16, 10, np.uint16, False),
    ],
)
def test_table(name, length, vocab, classes, dtype, masked):
    task = tasks.task(name)
    assert (task.length, task.vocab, len(task.classes), task.dtype) == (length, vocab, classes, dtype)
    assert task.masked_attention is masked
    assert task.name == name and len(set(task.classes)) == classes


def test_unknown_names(tmp_path):
    with pytest.raises(InputError, match=r"no task 'cifar100'; there are cifar10, inaturalist"):
        datasets.load("cifar100", tmp_path)
    with pytest.raises(InputError, match=r"no protocol 'test'; there are dev, published"):
        datasets.load("digits", tmp_path, protocol="test")


def test_not_prepared_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"not prepared.*python -m sat_lib data prepare agnews"):
        datasets.load("agnews", tmp_path)
    with pytest.raises(InputError, match=r"not prepared.*`python -m sat_lib data prepare imdb --source DIR` first$"):
        datasets.load("imdb", tmp_path)
    with pytest.raises(InputError, match=r"not prepared.*`python -m sat_lib data prepare digits16` first$"):
        datasets.provenance("digits16", tmp_path)


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------


def test_gray_is_the_published_formula():
    rgb = np.random.default_rng(0).integers(0, 256, (200, 3))
    wanted = [math.floor(255.5 * (0.2989 * r + 0.5870 * g + 0.1140 * b) / 255) for r, g, b in rgb.tolist()]
    assert readers.gray(*rgb.T).tolist() == wanted
    assert readers.gray(*np.array([[0, 255]] * 3)).tolist() == [0, 255]


@pytest.mark.parametrize("place", [".", "cifar-10-batches-py"])
def test_cifar10_from_unpacked_folder(tmp_path, place):
    folder = write_cifar(tmp_path / "official" / place)
    cache = datasets.prepare("cifar10", tmp_path, tmp_path / "official", progress=False)
    splits = datasets.load("cifar10", tmp_path)
    assert [len(split) for split in (splits.train, splits.dev, splits.test)] == [18, 2, 4]
    assert isinstance(splits.test.tokens, np.memmap) and splits.test.tokens.dtype == np.uint8
    tokens, labels = splits.test.batch(np.array([2, 0]))
    assert tokens.dtype == labels.dtype == np.int64 and tokens.shape == (2, 1024)
    batch = pickle.loads((folder / "test_batch").read_bytes())
    row, column = 5, 7
    red, green, blue = (int(batch[b"data"][2, plane * 1024 + row * 32 + column]) for plane in range(3))
    gray = math.floor(255.5 * (0.2989 * red + 0.5870 * green + 0.1140 * blue) / 255)
    assert tokens[0, row * 32 + column] == gray
    assert labels.tolist() == [batch[b"labels"][2], batch[b"labels"][0]]
    meta = json.loads((cache / "meta.json").read_text())
    assert meta["verified"] is False and len(meta["source_files"]) == 6
    assert meta["splits"]["train"]["rows"] == sum(meta["splits"]["train"]["per_class"]) == 20


def test_cifar10_train_keeps_the_order_of_the_batches(tmp_path):
    write_cifar(tmp_path / "official")
    datasets.prepare("cifar10", tmp_path, tmp_path / "official", progress=False)
    splits = datasets.load("cifar10", tmp_path)
    together = np.concatenate([splits.train.rows, splits.dev.rows])
    assert sorted(together) == list(range(20))
    labels = np.concatenate([cifar_batch(4, seed)[b"labels"] for seed in range(5)])
    assert splits.train.labels.tolist() == labels[splits.train.rows].tolist()
    assert np.array_equal(splits.dev.tokens, splits.dev.batch(slice(None))[0])
    again = datasets.load("cifar10", tmp_path, protocol="published")
    assert np.array_equal(again.dev.rows, splits.dev.rows)


def test_dev_split_of_a_full_cifar10_is_5000():
    stored = np.zeros((50_000, 1), np.uint8)
    whole = datasets.Split(stored, np.arange(50_000), np.zeros(50_000, np.int64))
    train, dev = carve(whole, tasks.task("cifar10").dev_share)
    assert (len(train), len(dev)) == (45_000, 5_000)
    assert not set(train.rows) & set(dev.rows)


def test_tokens_of_a_reordered_split_are_reordered():
    whole = datasets.Split(np.arange(6).reshape(3, 2), np.arange(3), np.arange(3))
    assert whole.tokens is whole.stored
    assert whole.take(np.array([2, 0, 1])).tokens.tolist() == [[4, 5], [0, 1], [2, 3]]


def test_cifar10_archive_needs_the_official_checksum(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path / "cifar-10-batches-py")
    (tmp_path / "official").mkdir()
    archive = pack(tmp_path / "official" / "cifar-10-python.tar.gz", folder)
    with pytest.raises(InputError, match=r"wanted md5 c58f30108f718f92721af3b95e74349a, got [0-9a-f]{32}.*unpacked"):
        datasets.prepare("cifar10", tmp_path / "cache", archive.parent, progress=False)
    with_official(monkeypatch, "cifar10", Official(archive.name, "http://x", "md5", files.file_digest(archive, "md5")))
    cache = datasets.prepare("cifar10", tmp_path / "cache", archive.parent, progress=False)
    assert json.loads((cache / "meta.json").read_text())["verified"] is True
    shutil.rmtree(tmp_path / "official")
    unpacked = datasets.prepare("cifar10", tmp_path / "cache2", tmp_path, progress=False)
    assert (cache / "train.tokens").read_bytes() == (unpacked / "train.tokens").read_bytes()


def test_cifar10_batch_as_pickled_by_python_2(tmp_path):
    folder = write_cifar(tmp_path / "official")
    old = pickle.dumps(cifar_batch(4, 0), protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in old
    (folder / "data_batch_1").write_bytes(old)
    datasets.prepare("cifar10", tmp_path, folder, progress=False)
    assert len(datasets.load("cifar10", tmp_path).train) == 18


def test_pickles_cannot_run_code(tmp_path):
    folder, ran = write_cifar(tmp_path / "official"), tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return Path.touch, (ran,)

    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Attack(), b"labels": []}))
    with pytest.raises(InputError, match=r"data_batch_1 is not a readable CIFAR-10 batch .*pathlib"):
        datasets.prepare("cifar10", tmp_path, folder, progress=False)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"data": np.zeros((4, 1024), np.uint8)}, r"3072 bytes, got uint8 \(4, 1024\)"),
        ({b"data": np.zeros((4, 3072))}, r"3072 bytes, got float64"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, r"3072 bytes, got uint8 \(0, 3072\)"),
        ({b"data": b"no array"}, r"3072 bytes, got bytes"),
        ({b"data": [[1], [1, 2]]}, r"3072 bytes, got list"),
        ({b"labels": [[1], [1, 2]]}, r"wanted labels 0..9, one an image"),
        ({b"labels": [0, 1, 2]}, r"4 images but labels of shape \(3,\)"),
        ({b"labels": [0, 1, 2, 10]}, r"wanted labels 0..9, got \[0, 1, 2, 10\]"),
        ({b"labels": [0, 1, 2, -1]}, r"wanted labels 0..9, got \[-1, 0, 1, 2\]"),
    ],
)
def test_cifar10_batch_with_wrong_content(tmp_path, change, message):
    folder = write_cifar(tmp_path / "official")
    (folder / "data_batch_3").write_bytes(pickle.dumps(cifar_batch(4, 0) | change))
    with pytest.raises(InputError, match=r"data_batch_3: .*" + message):
        datasets.prepare("cifar10", tmp_path, folder, progress=False)
    assert leftovers(tmp_path) == ["official"]


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1])])
def test_cifar10_batch_that_is_none(tmp_path, content):
    folder = write_cifar(tmp_path / "official")
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(InputError, match=r"test_batch"):
        datasets.prepare("cifar10", tmp_path, folder, progress=False)


def test_missing_files_are_named(tmp_path):
    folder = write_cifar(tmp_path / "official")
    (folder / "data_batch_4").unlink()
    with pytest.raises(InputError, match=r"official.* lacks data_batch_4; wanted data_batch_1, "):
        datasets.prepare("cifar10", tmp_path, folder, progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds neither data_batch_1.*nor the archive cifar-10-python.tar.gz"):
        datasets.prepare("cifar10", tmp_path, tmp_path / "empty", progress=False)
    with pytest.raises(InputError, match=r"empty holds neither train.csv, test.csv \(or with .gz or .xz appended\)"):
        datasets.prepare("imdb", tmp_path, tmp_path / "empty", progress=False)
    with pytest.raises(InputError, match=r"empty holds neither train2018.json, .* \(or with .tar.gz appended\). Put"):
        datasets.prepare("inaturalist", tmp_path, tmp_path / "empty", progress=False)
    with pytest.raises(InputError, match=r"nowhere is not a folder"):
        datasets.prepare("imdb", tmp_path, tmp_path / "nowhere", progress=False)


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_text_tokens_are_bytes_plus_one():
    tokens = readers.text_tokens(["aé", "", "é" * 600, "x" * 5_000], 1024)
    assert tokens.dtype == np.uint16 and tokens.shape == (4, 1024)
    assert tokens[0, :5].tolist() == [98, 0xC3 + 1, 0xA9 + 1, 0, 0]
    assert not tokens[1].any()
    assert (tokens > 0).sum(axis=1).tolist() == [3, 0, 1_000, 1_000]
    assert readers.text_tokens(["\U0010ffff"], 8)[0, 0] == 0xF4 + 1


def test_agnews_joins_title_and_description(tmp_path):
    rows = [(3, "A title", r'He said ""no"\n#39; twice'), (4, "T", "é")]
    write_csv(tmp_path / "ag_news_csv" / "train.csv", rows)
    write_csv(tmp_path / "ag_news_csv" / "test.csv", [(1, "x", "y, z")])
    datasets.prepare("agnews", tmp_path, tmp_path, progress=False)
    splits = datasets.load("agnews", tmp_path, protocol="published")
    assert splits.dev is splits.test
    tokens, labels = splits.train.batch(slice(None))
    texts = [bytes((row[row > 0] - 1).tolist()).decode() for row in tokens]
    assert texts == [r'A title He said ""no"\n#39; twice', "T é"]
    assert labels.tolist() == [2, 3] and splits.test.labels.tolist() == [0]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_imdb_in_each_compression(tmp_path, suffix):
    write_reviews(tmp_path / "official", suffix)
    splits = datasets.load("imdb", tmp_path, source=tmp_path / "official")
    assert [len(split) for split in (splits.train, splits.dev, splits.test)] == [38, 2, 8]
    text = splits.test.batch([3])[0][0]
    assert bytes((text[text > 0] - 1).tolist()).decode() == reviews(8)[3][1]
    assert splits.test.labels.tolist() == [0, 1] * 4


def test_yelp_from_its_archive(tmp_path, monkeypatch):
    folder = write_reviews(tmp_path / "yelp_review_polarity_csv")
    archive = pack(tmp_path / "yelp_review_polarity_csv.tgz", folder)
    plain = datasets.prepare("yelp", tmp_path / "plain", tmp_path, progress=False)
    shutil.rmtree(folder)
    with_official(monkeypatch, "yelp", Official(archive.name, "http://x", "sha256", files.file_digest(archive)))
    packed = datasets.prepare("yelp", tmp_path / "packed", tmp_path, progress=False)
    for name in ("train.tokens", "train.labels.npy", "test.tokens", "test.labels.npy"):
        assert (plain / name).read_bytes() == (packed / name).read_bytes()


def test_archive_without_the_wanted_member(tmp_path, monkeypatch):
    archive = pack(tmp_path / "yelp_review_polarity_csv.tgz", write_reviews(tmp_path / "other"))
    with_official(monkeypatch, "yelp", Official(archive.name, "http://x", "sha256", files.file_digest(archive)))
    with pytest.raises(InputError, match=r"has no member yelp_review_polarity_csv/train.csv"):
        datasets.prepare("yelp", tmp_path, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"train.csv is empty; wanted rows of class, text"),
        ('"1","a"\n"2"\n', r"train.csv, line 2: wanted 2 columns \(class, text\), got 1"),
        ('"1","a"\n"2","b"\n"1","c","d"\n', r"train.csv, line 3: wanted 2 columns \(class, text\), got 3"),
        ('"1","a"\n\n', r"train.csv, line 2: wanted 2 columns \(class, text\), got 0"),
        ('"0","a"\n', r"train.csv, line 1: wanted a class 1 to 2, got '0'"),
        ('"1","a\nb"\n"3","c"\n', r"train.csv, line 3: wanted a class 1 to 2, got '3'"),
        ('"label","text"\n', r"line 1: wanted a class 1 to 2, got 'label'"),
        ('"1","a"\n"2","never closed\n', r"line 2: .*cut short"),
        ('"1","a"b"\n', r"line 1: .*not csv"),
        (b'"1","caf\xe9 au lait"\n', r"line 0: 'utf-8' codec can't decode.*not csv in UTF-8"),
    ],
)
def test_csv_with_wrong_content(tmp_path, content, message):
    folder = write_reviews(tmp_path / "official")
    (folder / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        datasets.prepare("imdb", tmp_path, folder, progress=False)
    assert leftovers(tmp_path) == ["official"]


# ---- cut and damaged files -------------------------------------------------------------------------------------------


def test_cut_files_are_named(tmp_path, monkeypatch):
    cut(write_cifar(tmp_path / "cifar") / "data_batch_2")
    with pytest.raises(InputError, match=r"data_batch_2 is not a readable CIFAR-10 batch.*cut short"):
        datasets.prepare("cifar10", tmp_path, tmp_path / "cifar", progress=False)
    for suffix in ("", ".gz", ".xz"):
        folder = write_reviews(tmp_path / f"reviews{suffix}", suffix)
        cut(folder / f"test.csv{suffix}")
        with pytest.raises(InputError, match=rf"test.csv{suffix}.* cut short"):
            datasets.prepare("imdb", tmp_path, folder, progress=False)
    for name, folder in (("cifar10", "cifar-10-batches-py"), ("yelp", "yelp_review_polarity_csv")):
        made = (write_cifar if name == "cifar10" else write_reviews)(tmp_path / name / folder)
        archive = pack(tmp_path / name / tasks.task(name).archive, made)
        shutil.rmtree(made)
        cut(archive)
        digest = files.file_digest(archive, "md5")
        with_official(monkeypatch, name, Official(archive.name, "http://x", "md5", digest))
        with pytest.raises(InputError, match=rf"{archive.name} .*cut short"):
            datasets.prepare(name, tmp_path / "cache", archive.parent, progress=False)
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_damaged_compressed_files_are_named(tmp_path, suffix):
    path = write_reviews(tmp_path / "official", suffix) / f"train.csv{suffix}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"train.csv{suffix}"):
        datasets.prepare("imdb", tmp_path, path.parent, progress=False)
    path.write_bytes(b"neither gz nor xz")
    with pytest.raises(InputError, match=rf"train.csv{suffix} could not be read.*fetch it again"):
        datasets.prepare("imdb", tmp_path, path.parent, progress=False)


# ---- iNaturalist -----------------------------------------------------------------------------------------------------


def test_inaturalist_from_folder_and_from_archives(tmp_path, monkeypatch):
    from PIL import Image

    folder = write_inaturalist(tmp_path / "official")
    cache = datasets.prepare("inaturalist", tmp_path, folder, progress=False)
    classes = tasks.task("inaturalist").classes
    splits = datasets.load("inaturalist", tmp_path, protocol="published")
    assert [classes[k] for k in splits.train.labels] == ["Plantae", "Aves", "Reptilia"]
    assert [classes[k] for k in splits.test.labels] == ["Aves", "Plantae"] and splits.dev is splits.test
    with Image.open(folder / "train_val2018/Aves/1/train1.jpg") as image:
        small = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).reshape(1024, 3).tolist()
    gray = [math.floor(255.5 * (0.2989 * r + 0.5870 * g + 0.1140 * b) / 255) for r, g, b in small]
    assert splits.train.tokens[1].tolist() == gray

    packed = tmp_path / "packed"
    packed.mkdir()
    names = ("train2018.json", "val2018.json", "train_val2018")
    archives = [pack(packed / f"{name}.tar.gz", folder / name) for name in names]
    digests = [Official(path.name, "http://x", "md5", files.file_digest(path, "md5")) for path in archives]
    with_official(monkeypatch, "inaturalist", *digests)
    other = datasets.prepare("inaturalist", tmp_path / "other", packed, progress=False)
    for name in ("train.tokens", "train.labels.npy", "test.tokens", "test.labels.npy"):
        assert (cache / name).read_bytes() == (other / name).read_bytes()
    assert json.loads((other / "meta.json").read_text())["verified"] is True

    cut(archives[2])
    digests[2] = dataclasses.replace(digests[2], digest=files.file_digest(archives[2], "md5"))
    with_official(monkeypatch, "inaturalist", *digests)
    with pytest.raises(InputError, match=r"train_val2018.tar.gz"):
        datasets.prepare("inaturalist", tmp_path / "third", packed, progress=False)


def _change(key: str, index: int, **values):
    def change(folder: Path) -> None:
        path = folder / "train2018.json"
        content = json.loads(path.read_text())
        content[key][index] |= values
        path.write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_change("categories", 1, supercategory="Birds"), r"super-category 'Birds', wanted one of Actinopterygii, "),
        (
            _change("categories", 1, supercategory="Fungi"),
            r"/Fungi/<category>/.* Fungi, got 'train_val2018/Aves/1/t",
        ),
        (_change("annotations", 0, image_id=7), r"train2018.json: wanted images, annotations .* missing 102"),
        (_change("annotations", 0, category_id=7), r"train2018.json: wanted .* missing 7"),
        (_change("images", 0, file_name="../x/Plantae/x.jpg"), r"wanted train_val2018/Plantae/<category>/<file>.jpg"),
        (lambda folder: cut(folder / "val2018.json"), r"val2018.json could not be read"),
        (lambda folder: (folder / "val2018.json").write_text("{}"), r"val2018.json: wanted .* missing 'categories'"),
        (
            lambda folder: (folder / "val2018.json").unlink(),
            r"lacks val2018.json; wanted .*\.tar\.gz appended.*Put the",
        ),
        (lambda folder: (folder / VAL_IMAGE).unlink(), r"Aves/1/val0.jpg is not a readable image .*No such file"),
        (lambda folder: cut(folder / VAL_IMAGE), r"Aves/1/val0.jpg is not a readable image"),
        (lambda folder: (folder / VAL_IMAGE).write_text("x"), r"Aves/1/val0.jpg is not a readable image"),
    ],
)
def test_inaturalist_bad_input(tmp_path, damage, message):
    folder = write_inaturalist(tmp_path / "official")
    damage(folder)
    with pytest.raises(InputError, match=message):
        datasets.prepare("inaturalist", tmp_path, folder, progress=False)
    assert leftovers(tmp_path) == ["official"]


def test_inaturalist_archive_that_lacks_images(tmp_path):
    folder = write_inaturalist(tmp_path / "official")
    (folder / VAL_IMAGE).unlink()
    archive = pack(tmp_path / "train_val2018.tar.gz", folder / "train_val2018")
    paths = [folder / "train2018.json", folder / "val2018.json", archive]
    with pytest.raises(InputError, match=r"lacks 1 images .* first train_val2018/Aves/1/val0.jpg"):
        list(readers.read_inaturalist(paths, tasks.task("inaturalist").classes))


# ---- embedded tasks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "side"), [("digits", 32), ("digits16", 16)])
def test_digits(tmp_path, name, side):
    splits = datasets.load(name, tmp_path)
    assert [len(split) for split in (splits.train, splits.dev, splits.test)] == [1_293, 144, 360]
    assert splits.test.tokens.shape == (360, side * side) and splits.test.tokens.max() == 255
    share = np.bincount(splits.test.labels) / 360
    assert np.all(abs(share - 0.1) < 0.01)
    from sklearn.datasets import load_digits

    means = {round(float(image.mean()), 6) for image in load_digits().images * (255 / 16)}
    ours = splits.test.tokens.mean(axis=1)  # a bilinear enlargement nearly keeps the mean
    assert max(min(abs(mean - value) for value in means) for mean in ours) < 1.5
    first = (tmp_path / name / "train.tokens").read_bytes()
    shutil.rmtree(tmp_path / name)
    datasets.load(name, tmp_path)
    assert (tmp_path / name / "train.tokens").read_bytes() == first


def test_docstrings_of_installed_libraries(tmp_path, monkeypatch, capsys):
    sizes = {"train": 120, "test": 40}
    cache = datasets.prepare("docstrings", tmp_path, progress=False, sizes=sizes)
    splits = datasets.load("docstrings", tmp_path, protocol="published")
    assert [len(split) for split in (splits.train, splits.dev, splits.test)] == [114, 6, 40]
    assert np.bincount(splits.test.labels).tolist() == [10] * 4
    assert len(set(splits.test.labels[:10].tolist())) > 1  # the classes are mixed
    meta = json.loads((cache / "meta.json").read_text())
    assert set(meta["versions"]) == {"python", "torch", "scipy", "pandas", "matplotlib"}
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sat_lib.datasets.cache._versions", lambda task: meta["versions"] | {"torch": "0.1"})
    datasets.prepare("docstrings", tmp_path, progress=False, sizes=sizes)
    assert "docstrings: " in (printed := capsys.readouterr().out) and "other versions of python, torch" in printed
    assert json.loads((cache / "meta.json").read_text())["versions"]["torch"] == "0.1"
    assert leftovers(tmp_path) == ["docstrings"]


def test_docstrings_rules(tmp_path, monkeypatch):
    """Tests, vendored and short docstrings stay out, duplicates stay once, files go whole, nothing is imported."""
    long = lambda text: f'"""{text} {"." * 320}"""\n'
    source = {}
    for k in range(40):
        body = "raise SystemExit('imported')\n" + f"def f():\n    {long(f'first of {k}')}"
        source[f"m{k}.py"] = long("common to all") + body + f"class C:\n    {long(f'second of {k}')}"
    source |= {"tests/m.py": long("a test"), "externals/m.py": long("vendored"), "test_x.py": long("a test file")}
    source |= {"short.py": '"""Too short' + "." * 280 + '"""\n', "broken.py": "def f(:\n" + long("unparsable")}
    for library in ("liba", "libb"):
        for name, text in source.items():
            path = tmp_path / library / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(" of ", f" of {library} "))
        (tmp_path / library / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    batches = list(builtin.read_docstrings(("liba", "libb"), {"train": 10_000, "test": 10_000}, 1024))
    texts = {
        batch.split: [bytes((row[row > 0] - 1).tolist()).decode().rstrip(". ") for row in batch.tokens]
        for batch in batches
    }
    everything = texts["train"] + texts["test"]
    assert len(everything) == len(set(everything)) > 100
    assert not [text for text in everything if "test" in text or "vendored" in text or "Too short" in text]
    assert sum("common" in text for text in everything) <= 1
    files_of = {split: {text.split(" of ")[1] for text in found if " of " in text} for split, found in texts.items()}
    assert files_of["train"] and files_of["test"] and not files_of["train"] & files_of["test"]
    for batch in batches:
        assert len(set(np.bincount(batch.labels).tolist())) == 1
    with pytest.raises(InputError, match=r"docstrings needs libc_is_no_module"):
        list(builtin.read_docstrings(("liba", "libc_is_no_module"), {"train": 8, "test": 8}, 1024))
    (tmp_path / "libd").mkdir()
    with pytest.raises(InputError, match=r"wanted train examples of every library, found liba 4, libd 0"):
        list(builtin.read_docstrings(("liba", "libd"), {"train": 8, "test": 8}, 1024))


def evaluate(tokens: list[str]) -> int:
    """A list operation read with a stack, independently of the generator."""
    apply = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda values: int(np.median(values)),
        "[SM": lambda values: sum(values) % 10,
    }
    stack = [[]]
    for token in tokens:
        if token in apply:
            stack.append([token])
        elif token == "]":
            operator, *values = stack.pop()
            stack[-1].append(apply[operator](values))
        else:
            stack[-1].append(int(token))
    assert len(stack) == 1 and len(stack[0]) == 1
    return stack[0][0]


def test_listops(tmp_path):
    sizes = {"train": 300, "dev": 20, "test": 30}
    datasets.prepare("listops", tmp_path, progress=False, sizes=sizes)
    splits = datasets.load("listops", tmp_path)
    assert {name: len(getattr(splits, name)) for name in sizes} == sizes
    everything = set()
    for split in (splits.train, splits.dev, splits.test):
        for row, label in zip(split.tokens, split.labels, strict=True):
            length = int((row > 0).sum())
            assert 500 < length < 2000 and not row[length:].any()
            words = [builtin.LISTOPS_SYMBOLS[token - 1] for token in row[:length]]
            assert evaluate(words) == label
            arguments, depth, deepest = [0], 0, 0
            for word in words:
                if word == "]":
                    assert 2 <= arguments.pop() <= 10
                    depth -= 1
                    continue
                arguments[-1] += 1
                if word.startswith("["):
                    arguments.append(0)
                    depth += 1
                deepest = max(deepest, depth)
            assert deepest <= 9  # operators stand at depths 1 to 9, values down to 10
            everything.add(row.tobytes())
    assert len(everything) == 350
    assert set(splits.train.labels.tolist()) == set(range(10))
    again = [batch.tokens for batch in builtin.read_listops(sizes, 2000)]
    assert np.array_equal(np.concatenate(again)[:300], splits.train.tokens)


def test_listops_trees_follow_the_definition():
    """A node above depth 10 is an operator with probability 1/4 and has 2 to 10 children: 6 on average."""
    levels, lengths = builtin._draw_shapes(np.random.default_rng(0), 60_000)
    assert len(levels) == 10 and not levels[-1].operator.any()
    assert abs((lengths == 1).mean() - 0.75) < 0.01
    arguments = np.concatenate([level.arguments for level in levels])
    assert set(arguments.tolist()) == set(range(2, 11))
    assert np.all(abs(np.bincount(arguments)[2:] / len(arguments) - 1 / 9) < 0.005)
    nodes = [1.5**depth for depth in range(10)]
    assert abs(lengths.mean() / (sum(nodes) + sum(nodes[:9]) / 4) - 1) < 0.05


def test_listops_operators():
    operators, arguments = np.array([0, 1, 2, 2, 2, 3]), np.array([3, 2, 2, 3, 4, 10])
    values = np.array([7, 2, 5, 1, 8, 4, 9, 9, 0, 5, 3, 0, 4, 9, *[9] * 10])
    assert builtin._apply(operators, values, arguments).tolist() == [2, 8, 6, 5, 3, 0]


def test_listops_repeats_are_dropped_within_and_across_batches():
    seen = set()
    tokens, labels = builtin._distinct(np.array([[1, 2], [3, 4], [1, 2]]), np.array([5, 6, 5]), seen)
    assert tokens.tolist() == [[1, 2], [3, 4]] and labels.tolist() == [5, 6]
    tokens, labels = builtin._distinct(np.array([[3, 4], [7, 8]]), np.array([6, 9]), seen)
    assert tokens.tolist() == [[7, 8]] and labels.tolist() == [9]


def test_sizes_are_checked(tmp_path):
    with pytest.raises(InputError, match=r"task digits has fixed sizes; only docstrings and listops take others"):
        datasets.prepare("digits", tmp_path, sizes={"train": 10, "test": 10})
    for sizes in ({"train": 10, "test": 10}, {"train": 10, "dev": 0, "test": 10}, {"train": 10, "dev": "1", "test": 1}):
        with pytest.raises(InputError, match=r"wanted a positive number for train, dev, test"):
            datasets.prepare("listops", tmp_path, sizes=sizes)
    good = {"train": 3, "dev": 1, "test": 1}
    datasets.prepare("listops", tmp_path, progress=False, sizes=good)
    with pytest.raises(InputError, match=r"made with sizes .*'train': 3.*delete it to make it anew"):
        datasets.prepare("listops", tmp_path, progress=False, sizes=good | {"train": 4})


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def imdb(tmp_path) -> Path:
    """The cache of a small IMDB under `tmp_path`."""
    return datasets.prepare("imdb", tmp_path, write_reviews(tmp_path / "official"), progress=False)


def test_prepare_again_changes_nothing(imdb, tmp_path):
    before = (imdb / "meta.json").stat().st_mtime_ns
    assert datasets.prepare("imdb", tmp_path) == imdb
    assert datasets.prepare("imdb", tmp_path, tmp_path / "official") == imdb
    assert (imdb / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"was made from .*official, not from .*delete it"):
        datasets.prepare("imdb", tmp_path, write_reviews(tmp_path / "elsewhere"))


@pytest.mark.parametrize("name", ["train.tokens", "test.labels.npy", "meta.json"])
def test_cut_or_missing_cache_file_is_refused(imdb, tmp_path, name):
    cut(imdb / name)
    with pytest.raises(InputError, match=r"(damaged|no usable meta.json).*Delete the folder.*data prepare imdb"):
        datasets.load("imdb", tmp_path)
    (imdb / name).unlink()
    for use in (datasets.load, datasets.prepare):
        with pytest.raises(InputError, match=rf"cache .*imdb .*{name}.*Delete the folder"):
            use("imdb", tmp_path)
    assert next(row for row in datasets.describe(tmp_path) if row["name"] == "imdb")["state"] == "damaged"


def test_changed_byte_is_noticed(imdb, tmp_path, monkeypatch):
    content = bytearray((imdb / "train.tokens").read_bytes())
    content[100] ^= 1
    (imdb / "train.tokens").write_bytes(content)
    with pytest.raises(InputError, match=r"train.tokens is not what was written"):
        datasets.load("imdb", tmp_path)
    monkeypatch.setattr("sat_lib.datasets.store.HASHED_BYTES", 0)  # as if the file were large: its date gives it away
    with pytest.raises(InputError, match=r"train.tokens is not what was written"):
        datasets.load("imdb", tmp_path)


def test_cache_of_another_format_is_refused(imdb, tmp_path):
    meta = json.loads((imdb / "meta.json").read_text())
    files.write_json(imdb / "meta.json", meta | {"format": 0, "vocab": 300})
    with pytest.raises(InputError, match=r"another kind \(format 0, wanted 1; vocab 300, wanted 512\)"):
        datasets.load("imdb", tmp_path)
    files.write_json(imdb / "meta.json", meta | {"files": {}})
    with pytest.raises(InputError, match=r"meta.json names other files"):
        datasets.load("imdb", tmp_path)


def _no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["store.os.fsync", "cache.np.save", "store.files.write_json"])
def test_full_disk_leaves_nothing_or_the_earlier_cache(tmp_path, monkeypatch, step):
    official = write_reviews(tmp_path / "official")
    with monkeypatch.context() as full:
        full.setattr(f"sat_lib.datasets.{step}", _no_space)
        with pytest.raises(InputError, match=r"could not write .* of imdb .*No space left.*Nothing was left behind"):
            datasets.prepare("imdb", tmp_path, official, progress=False)
    assert leftovers(tmp_path) == ["official"]

    datasets.load("digits16", tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "digits16").iterdir()}
    with monkeypatch.context() as full:
        full.setattr("sat_lib.datasets.cache._versions", lambda task: {"pillow": "0"})  # so that it is made again
        full.setattr(f"sat_lib.datasets.{step}", _no_space)
        with pytest.raises(InputError, match=r"digits16 .*The earlier cache is unchanged"):
            datasets.load("digits16", tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "digits16").iterdir()} == before
    assert leftovers(tmp_path) == ["digits16", "official"]


def test_failed_swap_brings_the_earlier_cache_back(tmp_path, monkeypatch):
    folder, rename = tmp_path / "cache", Path.rename
    folder.mkdir()
    (folder / "file").write_text("earlier")

    def fill(building, _):
        (building / "file").write_text("new")
        return {}

    def refuse(path, target):
        if path.name == ".cache.building":
            assert not folder.exists()  # it has made room by now
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match=r"cache of cache .*The earlier cache is unchanged"):
        store.prepared(folder, None, lambda: None, fill)
    assert (folder / "file").read_text() == "earlier" and leftovers(tmp_path) == ["cache"]


def test_what_a_killed_process_left_never_becomes_the_cache(tmp_path, monkeypatch):
    (tmp_path / ".cache.retired").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # as where it may not be deleted
    with pytest.raises(InputError, match=r"No space left.*Nothing was left behind"):
        store.prepared(tmp_path / "cache", None, lambda: None, _no_space)
    assert not (tmp_path / "cache").exists()


def _no_permission(path, *_):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_what_may_not_be_read_is_not_called_damaged(imdb, tmp_path, monkeypatch):
    with monkeypatch.context() as closed:
        closed.setattr(files, "file_digest", _no_permission)
        with pytest.raises(
            InputError, match=r"cache .*imdb can't be read: .*Permission denied.* Mend that and run again$"
        ):
            datasets.load("imdb", tmp_path)
        with pytest.raises(InputError, match=r"train.csv can't be read: Permission denied. Mend that and run again$"):
            datasets.prepare("imdb", tmp_path / "other", write_reviews(tmp_path / "official2"), progress=False)
    datasets.load("imdb", tmp_path)


def test_a_folder_is_no_file(tmp_path):
    official = write_reviews(tmp_path / "official")
    (official / "train.csv").rename(official / "packed")
    (official / "train.csv.gz").write_bytes(gzip.compress((official / "packed").read_bytes()))
    (official / "train.csv").mkdir()  # as some unpackers make it
    datasets.prepare("imdb", tmp_path, official, progress=False)


def test_root_that_cannot_hold_a_cache(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"could not write .* of digits16 in .*file: .*or choose another folder"):
        datasets.load("digits16", tmp_path / "file")


def test_killed_prepare_leaves_no_cache(tmp_path):
    program = f"from sat_lib import datasets; datasets.prepare('listops', {str(tmp_path)!r}, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=files.ROOT)
    building = tmp_path / ".listops.building" / "train.tokens"
    while not (building.exists() and building.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(InputError, match=r"preparing listops is already running"):
        datasets.load("listops", tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "listops").exists()
    datasets.prepare("listops", tmp_path, progress=False, sizes={"train": 3, "dev": 1, "test": 1})
    assert leftovers(tmp_path) == ["listops"]


def test_describe(imdb, tmp_path):
    rows = {row["name"]: row for row in datasets.describe(tmp_path)}
    assert list(rows) == list(tasks.TASKS)
    assert rows["imdb"] == {
        "name": "imdb", "kind": "text", "classes": 2, "length": 1024, "vocab": 512,
        "splits": {"train": 40, "test": 8}, "verified": False, "state": "ready",
    }  # fmt: skip
    assert rows["digits"]["state"] == "embedded" and rows["yelp"]["state"] == "not prepared"
    assert rows["yelp"]["splits"] == {"train": 560_000, "test": 38_000}


@pytest.mark.parametrize("splits", [None, [], {"train": 40}])
def test_describe_calls_a_cache_damaged_that_says_nothing_of_its_splits(imdb, tmp_path, splits):
    meta = json.loads((imdb / "meta.json").read_text()) | {"splits": splits}
    files.write_json(imdb / "meta.json", meta)
    assert {row["name"]: row["state"] for row in datasets.describe(tmp_path)}["imdb"] == "damaged"


def test_sources_that_do_not_apply(tmp_path):
    with pytest.raises(InputError, match=r"imdb has no official download.*train.csv and test.csv.*--source DIR"):
        datasets.prepare("imdb", tmp_path)
    with pytest.raises(InputError, match=r"digits is embedded and takes no source"):
        datasets.load("digits", tmp_path, source=tmp_path)


def test_one_training_example_is_too_few(tmp_path):
    write_csv(tmp_path / "train.csv", reviews(1))
    write_csv(tmp_path / "test.csv", reviews(2))
    datasets.prepare("imdb", tmp_path, tmp_path, progress=False)
    with pytest.raises(InputError, match=r"imdb has 1 train example; a dev split needs at least 2"):
        datasets.load("imdb", tmp_path)


# ---- downloads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """A local file server with resume; `content`, `cut_at` (bytes sent before it hangs up) and `resumes` can be set."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            web = self.server
            name = self.path.lstrip("/")
            if name not in web.content:
                self.send_error(404)
                return
            body, start = web.content[name], 0
            web.ranges.append(self.headers["Range"])
            if web.resumes and self.headers["Range"]:
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start and start >= len(body):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start : web.cut_at])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.content, web.ranges, web.cut_at, web.resumes = {}, [], None, True
        web.url = f"http://127.0.0.1:{web.server_port}/"
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield web
        web.shutdown()
        thread.join()


def serve(server, name: str, content: bytes) -> Official:
    server.content[name] = content
    return Official(name, server.url + name, "md5", hashlib.md5(content).hexdigest())


def test_cut_download_is_resumed(server, tmp_path):
    content = np.random.default_rng(0).bytes(100_000)
    official = serve(server, "a.bin", content)
    server.cut_at = 30_000
    with pytest.raises(InputError, match=r"could not download http.*30,000 bytes are kept in .*a.bin.part.*again"):
        downloads.download(official, tmp_path, progress=False)
    assert (tmp_path / "a.bin.part").read_bytes() == content[:30_000] and not (tmp_path / "a.bin").exists()
    server.cut_at = None
    assert downloads.download(official, tmp_path, progress=False).read_bytes() == content
    assert server.ranges == [None, "bytes=30000-"] and leftovers(tmp_path) == ["a.bin"]
    downloads.download(official, tmp_path, progress=False)
    assert len(server.ranges) == 2  # nothing is fetched twice


def test_resume_where_the_server_cannot_or_nothing_is_missing(server, tmp_path):
    official = serve(server, "a.bin", b"0123456789")
    (tmp_path / "a.bin.part").write_bytes(b"0123")
    server.resumes = False
    assert downloads.download(official, tmp_path, progress=False).read_bytes() == b"0123456789"
    (tmp_path / "a.bin").rename(tmp_path / "a.bin.part")
    server.resumes = True
    assert downloads.download(official, tmp_path, progress=False).read_bytes() == b"0123456789"


def test_wrong_checksum_is_refused(server, tmp_path):
    official = serve(server, "a.bin", b"good")
    server.content["a.bin"] = b"evil"
    with pytest.raises(InputError, match=rf"wanted md5 {official.digest}, got [0-9a-f]{{32}}. It was removed"):
        downloads.download(official, tmp_path, progress=False)
    assert leftovers(tmp_path) == []
    (tmp_path / "a.bin").write_bytes(b"evil")
    with pytest.raises(InputError, match=r"wanted md5 .* Delete it and run again"):
        downloads.download(official, tmp_path, progress=False)


def test_no_such_file_on_the_server(server, tmp_path):
    official = Official("a.bin", server.url + "a.bin", "md5", "0")
    with pytest.raises(InputError, match=r"could not download .*404"):
        downloads.download(official, tmp_path, progress=False)


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/cifar-10-python.tar.gz"
    with_official(monkeypatch, "cifar10", Official("cifar-10-python.tar.gz", url, "md5", "0"))
    part = tmp_path / "downloads" / "cifar10" / "cifar-10-python.tar.gz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"begun")
    with pytest.raises(InputError) as raised:
        datasets.prepare("cifar10", tmp_path, progress=False)
    for piece in (url, str(part.parent), "data prepare cifar10 --source DIR", "refused"):
        assert piece in str(raised.value)
    assert part.read_bytes() == b"begun" and leftovers(tmp_path) == ["downloads"]


def test_full_disk_during_a_download(server, tmp_path, monkeypatch):
    class FullDisk(io.BytesIO):
        def write(self, _):
            _no_space()

    official = serve(server, "a.bin", b"good")
    monkeypatch.setattr(Path, "open", lambda *_: FullDisk())
    with pytest.raises(InputError, match=r"No space left on device"):
        downloads.download(official, tmp_path, progress=False)


def test_prepare_downloads_verifies_and_reads(server, tmp_path, monkeypatch, capsys):
    folder = write_cifar(tmp_path / "cifar-10-batches-py")
    archive = pack(tmp_path / "packed.tar.gz", folder)
    with_official(monkeypatch, "cifar10", serve(server, "cifar-10-python.tar.gz", archive.read_bytes()))
    cache = datasets.prepare("cifar10", tmp_path / "cache")
    assert "cifar10: downloading 1 file(s) to" in (streams := capsys.readouterr()).out
    assert "cifar-10-python.tar.gz" in streams.err  # the progress bar
    meta = json.loads((cache / "meta.json").read_text())
    assert meta["verified"] is True and meta["source"] is None and meta["source_files"][0]["url"].startswith("http")
    plain = datasets.prepare("cifar10", tmp_path / "plain", folder, progress=False)
    assert (cache / "train.tokens").read_bytes() == (plain / "train.tokens").read_bytes()
