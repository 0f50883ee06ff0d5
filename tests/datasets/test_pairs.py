"""MRPC from small files in its format, every kind of bad input, and what holds for the halves of docstrings."""

import errno
import functools
import http.server
import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sat_lib import datasets
from sat_lib.__main__ import main
from sat_lib.common import files
from sat_lib.common.errors import InputError
from sat_lib.datasets import cache, readers, tasks
from sat_lib.datasets.downloads import Official
from sat_lib.datasets.pairs import (
    MRPC,
    MRPC_SIZES,
    cut_in_half,
    default_pairs,
    is_ready,
    load_pairs,
    prepare_mrpc,
    read_mrpc,
)

HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
NAMES = {"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt"}
SIZES = {"train": 40, "test": 8}


def mrpc_text(n, seed=0):
    labels = np.random.default_rng(seed).integers(0, 2, n)
    return HEADER + "".join(f'{label}\t{k}\t{k + 1}\tIt said "{k}, {seed}\té {k}.\n' for k, label in enumerate(labels))


def write_mrpc(folder):
    folder.mkdir(parents=True)
    for seed, (split, name) in enumerate(NAMES.items()):
        (folder / name).write_bytes(mrpc_text(SIZES[split], seed).encode())
    return folder


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder with a small MRPC, which the table takes for the official one."""
    folder = write_mrpc(tmp_path / "source")
    for split, name in NAMES.items():
        digest = files.file_digest(folder / name, "md5")
        monkeypatch.setitem(MRPC, split, Official(name, f"http://127.0.0.1:9/{name}", "md5", digest))
        monkeypatch.setitem(MRPC_SIZES, split, SIZES[split])
    return folder


def left(root):
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


# ---- MRPC's format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_become_pairs_as_they_are(tmp_path, end):
    text = HEADER + '1\t7\t8\tHe "quoted\x85 half\t a\u2028b \n0\t9\t10\té’\tz\n'
    (tmp_path / "a.txt").write_bytes(text.replace("\n", end).encode())
    pairs = read_mrpc(tmp_path / "a.txt")
    assert (pairs.first, pairs.second) == (['He "quoted\x85 half', "é’"], [" a\u2028b ", "z"])
    assert pairs.labels.tolist() == [1, 0] and pairs.labels.dtype == np.int64 and len(pairs) == 2


GOOD = "1\t7\t8\ta\tb\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + GOOD + "1\t7\t8\ta\n", r"line 3: wanted 5 columns .*got 4"),
        (HEADER + GOOD + "1\t7\t8\ta\tb\tc\n", r"line 3: wanted 5 columns .*got 6"),
        (HEADER + GOOD + "\n" + GOOD, r"line 3: wanted 5 columns .*got 1"),
        (HEADER + "2\t7\t8\ta\tb\n", r"line 2: wanted quality 0 or 1, got '2'"),
        (HEADER + GOOD * 3 + "1\t7\t8\t \tb\n", r"line 5: wanted two texts, got ' ' and 'b'"),
        (GOOD, r"line 1: wanted the columns \['Quality'"),
        ("", r"line 1: wanted the columns"),
        (HEADER, r"wanted pairs below the header, got none"),
        ((HEADER + GOOD).encode() + b"1\t7\t8\t\xff\tb\n", r"line 3: wanted UTF-8"),
    ],
)
def test_lines_that_do_not_fit_are_numbered(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"a\.txt.*" + message):
        read_mrpc(tmp_path / "a.txt")


# ---- preparing and loading MRPC --------------------------------------------------------------------------------------


def test_official_files_from_a_folder(source, tmp_path, capsys):
    root = tmp_path / "cache"
    assert default_pairs(root) == "docstrings" and not is_ready("mrpc", root)
    folder = prepare_mrpc(source, root)
    assert folder == root / "mrpc" and left(folder) == ["meta.json", NAMES["test"], NAMES["train"]]
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in NAMES.values())
    assert default_pairs(root) == "mrpc" and is_ready("mrpc", root)
    provenance = load_pairs("mrpc", root=root).provenance
    assert provenance["data_official"] is True and len(provenance["data_digest"]) == 16
    assert capsys.readouterr().out == ""


def test_dev_is_a_tenth_of_train_and_the_same_every_time(source, tmp_path):
    prepare_mrpc(source, tmp_path / "cache")
    load = functools.partial(load_pairs, "mrpc", root=tmp_path / "cache")
    train, dev, test, _ = load()
    assert (len(train), len(dev), len(test)) == (36, 4, 8)
    whole = read_mrpc(source / NAMES["train"])
    assert sorted(train.first + dev.first) == sorted(whole.first) and not set(train.first) & set(dev.first)
    label_of = dict(zip(whole.first, whole.labels, strict=True))
    second_of = dict(zip(whole.first, whole.second, strict=True))
    for part in (train, dev):
        assert [label_of[text] for text in part.first] == part.labels.tolist()
        assert [second_of[text] for text in part.first] == part.second
    assert load().dev.first == dev.first and load(seed=1).dev.first != dev.first
    assert test.first == read_mrpc(source / NAMES["test"]).first == load(seed=1).test.first


def test_other_files_are_taken_but_not_called_official(source, tmp_path, capsys):
    path = source / NAMES["test"]
    path.write_text(path.read_text().replace("It said", "It says"))
    prepare_mrpc(source, tmp_path / "cache")
    out = capsys.readouterr().out
    assert f"{NAMES['test']} has md5 {files.file_digest(path, 'md5')}, the official file" in out
    assert NAMES["train"] not in out
    pairs = load_pairs("mrpc", root=tmp_path / "cache")
    assert pairs.provenance["data_official"] is False and pairs.test.first[0].startswith("It says")


def test_cut_or_missing_source(source, tmp_path):
    path, root = source / NAMES["train"], tmp_path / "cache"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(InputError, match=r"wanted 40 pairs, got 37. Fetch it again \(http"):
        prepare_mrpc(source, root)
    path.unlink()
    with pytest.raises(InputError, match=r"source has no msr_paraphrase_train.txt. Put it there \(http"):
        prepare_mrpc(source, root)
    with pytest.raises(
        InputError, match=r"nowhere is not a folder; name the one that holds msr_paraphrase_test.txt and"
    ):
        prepare_mrpc(tmp_path / "nowhere", root)
    assert left(root) == [] and not is_ready("mrpc", root)


def test_prepared_once_and_from_one_source(source, tmp_path):
    root = tmp_path / "cache"
    folder = prepare_mrpc(source, root)
    before = (folder / "meta.json").stat().st_mtime_ns
    assert prepare_mrpc(source, root) == prepare_mrpc(root=root) == folder
    assert (folder / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"was made from .*source, not from .*elsewhere: delete it"):
        prepare_mrpc(write_mrpc(tmp_path / "elsewhere"), root)


@pytest.mark.parametrize("name", [*NAMES.values(), "meta.json"])
def test_damaged_or_missing_file_is_noticed(source, tmp_path, name):
    root = tmp_path / "cache"
    path = prepare_mrpc(source, root) / name
    path.write_bytes(path.read_bytes().replace(b"1", b"0"))
    for use in (functools.partial(load_pairs, "mrpc"), prepare_mrpc):
        with pytest.raises(InputError, match=r"(is damaged|no usable meta.json).*Delete .*data prepare mrpc"):
            use(root=root)
    path.unlink()
    assert not is_ready("mrpc", root) and default_pairs(root) == "docstrings"
    with pytest.raises(InputError, match=rf"cache .*{name}.*Delete .*data prepare mrpc"):
        load_pairs("mrpc", root=root)


def test_what_may_not_be_read_is_not_called_damaged(source, tmp_path, monkeypatch):
    def no_permission(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as closed:
        closed.setattr(Path, "read_bytes", no_permission)
        with pytest.raises(
            InputError, match=r"paraphrase_train.txt can't be read: Permission denied. Mend that and run"
        ):
            prepare_mrpc(source, tmp_path)
    prepare_mrpc(source, tmp_path)
    monkeypatch.setattr(files, "file_digest", no_permission)
    for use in (functools.partial(load_pairs, "mrpc"), prepare_mrpc):
        with pytest.raises(
            InputError, match=r"cache .*mrpc can't be read: .*Permission denied.* Mend that and run again$"
        ):
            use(root=tmp_path)


def test_folder_whose_meta_has_the_digests_alone(source, tmp_path):
    root = tmp_path / "cache"
    path = prepare_mrpc(source, root) / "meta.json"
    provenance, meta = load_pairs("mrpc", root=root).provenance, json.loads(path.read_text())
    meta["files"] = {name: part["sha256"] for name, part in meta["files"].items()}
    files.write_json(path, meta)
    assert load_pairs("mrpc", root=root).provenance == provenance and prepare_mrpc(source, root) == path.parent
    (root / "mrpc" / NAMES["test"]).write_text(mrpc_text(SIZES["test"], seed=5))
    with pytest.raises(InputError, match=r"msr_paraphrase_test.txt is not what was written"):
        load_pairs("mrpc", root=root)


@pytest.mark.parametrize("step", ["pairs.shutil.copyfile", "store.files.write_json"])
def test_full_disk_leaves_nothing(source, tmp_path, monkeypatch, step):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    root = tmp_path / "cache"
    with monkeypatch.context() as full:
        full.setattr(f"sat_lib.datasets.{step}", no_space)
        with pytest.raises(InputError, match=r"could not write .* of mrpc .*No space left.*Nothing was left behind"):
            prepare_mrpc(source, root)
    assert left(root) == []
    (root / ".mrpc.building").mkdir()  # as a killed process leaves it
    (root / ".mrpc.building" / NAMES["train"]).write_text("half")
    prepare_mrpc(source, root)
    assert left(root) == ["mrpc"] and len(load_pairs("mrpc", root=root).test) == 8


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def web(source, monkeypatch):
    """A server of the files in `source`, which the table names as the official address."""
    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(_Quiet, directory=source)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        for split, name in NAMES.items():
            url = f"http://127.0.0.1:{server.server_port}/{name}"
            known = Official(name, url, "md5", MRPC[split].digest)
            monkeypatch.setitem(MRPC, split, known)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield source
        server.shutdown()
        thread.join()


def test_download(web, tmp_path, capsys):
    root = tmp_path / "cache"
    folder = prepare_mrpc(root=root)
    assert "mrpc: downloading 2 file(s) to" in capsys.readouterr().out
    assert left(root) == ["downloads", "mrpc"]
    assert all((folder / name).read_bytes() == (web / name).read_bytes() for name in NAMES.values())
    assert load_pairs("mrpc", root=root).provenance["data_official"] is True
    with pytest.raises(InputError, match=r"was made from a download, not from"):
        prepare_mrpc(web, root)


def test_download_of_another_file_is_refused(web, tmp_path):
    (web / NAMES["test"]).write_text(mrpc_text(8, seed=5))
    with pytest.raises(InputError, match=r"msr_paraphrase_test.txt.*wanted md5 .*, got .*It was removed"):
        prepare_mrpc(root=tmp_path / "cache", progress=False)
    assert left(tmp_path / "cache") == ["downloads"]


def test_no_network(source, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(InputError, match=r"could not download http://127.*refused.*data prepare mrpc --source DIR"):
        prepare_mrpc(root=tmp_path / "cache", progress=False)
    with pytest.raises(InputError, match=r"mrpc is not prepared: there is no .*data prepare mrpc.*--source DIR"):
        load_pairs("mrpc", root=tmp_path / "cache")


def test_official_table():
    assert {split: official.digest for split, official in MRPC.items()} == {
        "train": "793daf7b6224281e75fe61c1f80afe35", "test": "e437fdddb92535b820fe8852e2df8a49",
    }  # fmt: skip
    assert MRPC_SIZES == {"train": 4_076, "test": 1_725}


@pytest.mark.parametrize("use", [load_pairs, is_ready])
def test_unknown_name(use):
    with pytest.raises(InputError, match=r"wanted pairs of mrpc or docstrings; got 'qqp'"):
        use("qqp")


def test_command_line(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    assert main(["data", "list"]) == 0
    assert "not prepared train 40, test 8" in capsys.readouterr().out.splitlines()[-1]
    assert main(["data", "prepare", "mrpc", "--source", str(source)]) == 0
    assert f"mrpc is ready in {tmp_path / 'data' / 'cache' / 'mrpc'}" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == ["mrpc", "pairs", "2", "classes", "ready", "train", "40,", "test", "8"]
    assert main(["data", "prepare", "mrpc", "--source", str(tmp_path / "nowhere")]) == 2


# ---- halves of docstrings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "halves"),
    [
        ("one two\nthree four", ("one two", "three four")),
        ("a line and\nanother line and\n\n   a third", ("a line and\nanother line and", "a third")),
        ("x\none two three four", ("x\none two", "three four")),  # the end of a line is too far from the middle
        ("one two", ("one", "two")),
        ("x" * 50, None),
        ("x " + "y" * 50, None),
        ("", None),
        ("    ", None),
    ],
)
def test_cut_in_half(text, halves):
    assert cut_in_half(text) == halves


def splits_of(texts: dict[str, list[tuple[str, int]]]) -> datasets.Splits:
    """Splits of the docstrings task from (text, library) pairs."""
    made = {}
    for split, examples in texts.items():
        tokens = readers.text_tokens([text for text, _ in examples], 1024)
        made[split] = datasets.Split(tokens, np.arange(len(tokens)), np.array([library for _, library in examples]))
    return datasets.Splits(tasks.task("docstrings"), made["train"], made["dev"], made["test"], "dev")


@pytest.fixture
def invented(monkeypatch):
    """Docstrings whose halves tell library, split and number; some of train's occur in test or dev too."""
    say = lambda split, library, k: (f"{split} {library} é{k}\nhalf {split} {library} {k}", library)
    made = {split: [say(split, k % 3, k) for k in range(30)] for split in ("train", "dev", "test")}
    made["train"] += [made["test"][0], ("train first\nhalf test 1 1", 1), ("dev 2 é2\nnew", 2), ("oneword" * 9, 0)]
    made["train"] += [("twice twice", 0)]
    monkeypatch.setattr(cache, "load", lambda *_: splits_of(made))
    monkeypatch.setattr(cache, "provenance", lambda *_: {"data_digest": "0", "data_official": True})
    return load_pairs("docstrings")


def test_halves_are_paired_within_library_and_split(invented):
    for split, pairs in zip(("train", "dev", "test"), invented, strict=False):
        assert len(pairs) == 60 and pairs.labels.sum() == 30
        for first, second, label in zip(pairs.first, pairs.second, pairs.labels, strict=True):
            own_split, library, number = first.split()
            assert own_split == split
            assert second.split()[:3] == ["half", split, library]
            assert (second.split()[3] == number.removeprefix("é")) == label


def test_no_half_tells_the_label_or_comes_from_another_split(invented):
    for pairs in invented[:3]:
        for texts in (pairs.first, pairs.second):
            for label in (0, 1):
                once = Counter(text for text, own in zip(texts, pairs.labels, strict=True) if own == label)
                assert set(once.values()) == {1} and len(once) == 30
    halves = [set(pairs.first + pairs.second) for pairs in invented[:3]]
    assert not (halves[0] & halves[1] or halves[0] & halves[2] or halves[1] & halves[2])
    assert len(set(invented.train.labels[:20])) == 2  # in mixed order


def test_pairs_follow_from_the_seed(invented):
    again, other = (load_pairs("docstrings", seed) for seed in (0, 1))
    for mine, same, another in zip(invented[:3], again[:3], other[:3], strict=True):
        assert (mine.first, mine.second) == (same.first, same.second)
        assert np.array_equal(mine.labels, same.labels)
        assert (mine.first, mine.second) != (another.first, another.second)


def test_one_docstring_has_no_other(monkeypatch):
    texts = {split: [("one two", 0), (f"{split} four", 1), (f"{split}5 six", 1)] for split in ("train", "dev", "test")}
    monkeypatch.setattr(cache, "load", lambda *_: splits_of(texts))
    with pytest.raises(InputError, match=r"docstrings: wanted 2 or more of library 0 in every split, got 1"):
        load_pairs("docstrings")


def test_installed_docstrings(tmp_path):
    datasets.prepare("docstrings", tmp_path, progress=False, sizes={"train": 400, "test": 40})
    pairs = load_pairs("docstrings", root=tmp_path)
    assert pairs.provenance == datasets.provenance("docstrings", tmp_path) and pairs.provenance["data_official"]
    tokens = datasets.load("docstrings", tmp_path).test.tokens
    whole = [bytes((row[row > 0] - 1).tolist()).decode(errors="ignore") for row in tokens]
    assert 60 <= len(pairs.test) <= 80
    for first, second, label in zip(pairs.test.first, pairs.test.second, pairs.test.labels, strict=True):
        own = next(text for text in whole if text.startswith(first) or first in text)
        assert (own.rstrip().endswith(second)) == label
