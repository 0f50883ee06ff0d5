import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import tiny_splits

from sat_lib import datasets, experiments, figures, reproduce
from sat_lib.__main__ import main
from sat_lib.common import files
from sat_lib.figures import speed
from sat_lib.reproduce import documents


@pytest.mark.parametrize("command", [[], ["data"], ["train"], ["bench"], ["reproduce"], ["demo"]])
def test_help_of_every_command(command):
    ended = subprocess.run([sys.executable, "-m", "sat_lib", *command, "--help"], capture_output=True, text=True)
    assert ended.returncode == 0
    assert "usage: python -m sat_lib" in ended.stdout


def test_train_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "load", lambda *_, **__: tiny_splits())
    command = ["train", "digits16", "--folder", str(tmp_path), "--device", "cpu", "--model", "width=16", "block=32"]
    command += ["--set", "steps=6", "warm_up=2", "eval_every=3", "batch=6", "switch_at=3", "density=0.2"]
    assert main(command) == 0
    assert "transition: step 3; judged in the sparse phase" in capsys.readouterr().out
    assert main(command) == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "mnist"], "no task 'mnist'"),
        (["train", "digits16", "--attention", "linear"], "attention: wanted one of"),
        (["train", "digits16", "--set", "density=0.0001", "steps"], "wanted NAME=VALUE; got 'steps'"),
        (["train", "digits16", "--model", "heads=3"], "3 heads don't divide"),
        (["data", "prepare", "imdb"], "--source"),
        (["bench", "speed"], "experiment: wanted one of"),
        (["bench", "attention", "--profile", "huge"], "profile: wanted one of"),
        (["reproduce", "99_nothing"], "99_nothing"),
        (["reproduce", "--record", "--dry-run"], "record: wanted a run that measures"),
        (["reproduce", "--record", "--figures-only"], "record: wanted a run that measures"),
    ],
)
def test_bad_input_ends_with_status_2_and_a_message(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_times_are_recorded_of_all_stages_or_not_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "run", lambda *_, **__: 0)
    rows, recorded = tmp_path / "data/results/smoke.jsonl", lambda: files.read_rows(rows)
    stages = [{"stage": "01_one", "written": "one.pdf"}, {"stage": "02_two", "written": "nothing (never run)"}]
    files.write_json(tmp_path / "figures/smoke/summary.json", {"stages": stages})
    assert main(["reproduce", "01", "--record"]) == 2
    assert "record: wanted the times of all stages; got none of 02_two. Run" in capsys.readouterr().err
    assert recorded() == []
    files.write_json(tmp_path / "figures/smoke/summary.json", {"stages": stages[:1]})
    assert main(["reproduce", "--record"]) == 0 and recorded() == [{"stages": stages[:1]}]


def test_an_installed_package_works_in_the_present_folder_and_says_what_wants_the_checkout(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(files.PACKAGE, tmp_path / "site-packages" / "sat_lib", ignore=ignored)
    (tmp_path / "work").mkdir()

    def python(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site-packages")}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "work", env=environment)

    said = python("-c", "from sat_lib.common import files; print(files.PACKAGE, files.ROOT, files.commit(), sep='\\n')")
    assert said.stdout.split() == [f"{tmp_path}/site-packages/sat_lib", f"{tmp_path}/work", "unknown"]
    listed = python("-m", "sat_lib", "data", "list")
    assert listed.returncode == 0 and "digits16" in listed.stdout
    for command in (["reproduce"], ["reproduce", "--figures-only", "--dry-run"]):
        refused = python("-m", "sat_lib", *command)
        assert refused.returncode == 2 and "has no notebooks" in refused.stderr and "in a checkout" in refused.stderr
    assert list(tmp_path.rglob("work/*")) == []


def small_shape(_profile):
    shape = {"batch": 1, "heads": 1, "head_size": 8, "block": 16, "density": 0.3, "dtype": "float32"}
    lengths = [{"sweep": "length", "length": n, **shape} for n in (32, 64)]
    return [{**case, "method": name} for case in lengths for name in ("sdpa", "fused")]


def test_rows_are_measured_once_stored_and_drawn(tmp_path, monkeypatch):
    made = replace(experiments.EXPERIMENTS["kernels"], cases=small_shape)
    monkeypatch.setitem(experiments.EXPERIMENTS, "kernels", made)
    empty = experiments.rows("kernels", device="cpu", measure=False, root=tmp_path)
    assert (len(empty), empty.attrs["missing"]) == (0, 4)
    some = experiments.rows("kernels", device="cpu", only={"length": 32}, root=tmp_path)
    first = experiments.rows("kernels", device="cpu", root=tmp_path)
    again = experiments.rows("kernels", device="cpu", root=tmp_path)
    assert (len(some), len(first)) == (2, 4)
    assert first["forward_backward_ms"].tolist() == again["forward_backward_ms"].tolist()
    assert first["operations"].tolist() == [32**2 * 33, 16 * 16 * 33, 64**2 * 33, 4 * 256 * 33]
    figure, drawn = speed.scaling(first)
    written = figures.save("07_scaling", "smoke", figure, drawn, first, root=tmp_path)
    assert all(path.stat().st_size > 0 for path in written)
    assert "smoke profile, not the paper's set-up" in figure._supxlabel.get_text().replace("\n", " ")


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_the_documents_quote_the_present_tables(name, tmp_path):
    text = (files.ROOT / name).read_text()
    (tmp_path / name).write_text(text)
    (tmp_path / "figures").symlink_to(files.ROOT / "figures")
    documents.quote(tmp_path / name, tmp_path)
    assert (tmp_path / name).read_text() == text, "run `make figures`"
    assert len(documents.QUOTED.findall(text)) >= 1


def test_a_copy_may_be_told_its_commit(monkeypatch):
    monkeypatch.setenv("SAT_LIB_COMMIT", "0123456789ab")
    assert files.commit() == "0123456789ab"
    monkeypatch.delenv("SAT_LIB_COMMIT")
    assert files.commit() != "0123456789ab"


def test_committed_rows_have_their_provenance():
    for path in sorted((files.ROOT / "data/results").glob("*.jsonl")):
        for row in files.read_rows(path):
            stamp = row.get("stamp", row)
            assert stamp["commit"] not in (None, "unknown") and not stamp["commit"].endswith("-dirty"), path.name
            assert stamp["device"], path.name
