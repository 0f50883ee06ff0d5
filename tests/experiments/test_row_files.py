"""The file that an experiment's rows lie in, and how cases become rows."""

import pytest

from sat_lib import experiments
from sat_lib.__main__ import main
from sat_lib.common import files, sources
from sat_lib.common.device import device_name, pick_device
from sat_lib.common.errors import InputError
from sat_lib.experiments.row_files import Experiment, RowFile, describe
from sat_lib.experiments.training import run_case
from sat_lib.training.checkpoint import config_from_dict
from sat_lib.training.recipe import case_config


def row(case: dict, result: int, device="GPU", code="new") -> dict:
    return {"case": case, "result": {"ms": result}, "stamp": {"device": device}, "code": code}


ONE, TWO = {"length": 1}, {"length": 2}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    for line in (row(ONE, 1), row(TWO, 2, code="old"), row(ONE, 3, "CPU"), row(ONE, 4), row(ONE, 5, "CPU")):
        files.append_row(path, line)
    return path


def results(rows: dict[str, dict]) -> list[int]:
    return [row["result"]["ms"] for row in rows.values()]


def test_the_newest_row_of_a_case_and_device_counts(path):
    assert results(RowFile(path).read("GPU")) == [4, 2]
    assert results(RowFile(path).read("CPU")) == [5]
    assert results(RowFile(path).read("other")) == []


def test_rows_of_another_source_text_do_not_count_where_one_is_asked_for(path):
    assert results(RowFile(path, "new").read("GPU")) == [4]
    assert RowFile(path, "new").missing([ONE, TWO], ["GPU"]) == [TWO]
    assert RowFile(path, "newest").main_device() is None


def test_missing_are_cases_without_a_row_from_any_of_the_devices(path):
    file = RowFile(path)
    assert file.missing([ONE, TWO], ["CPU"]) == [TWO]
    assert file.missing([ONE, TWO], ["CPU", "GPU"]) == []
    assert file.missing([ONE, TWO], []) == [ONE, TWO]


def test_the_main_device_has_rows_of_most_cases_however_often_they_were_measured(path):
    files.append_row(path, row(ONE, 6, "CPU"))  # three rows of one case, against three of two
    assert RowFile(path).main_device() == "GPU"


def test_a_row_is_appended_once_unless_its_case_is_measured_again(path):
    file = RowFile(path)
    for again, count in ((False, 5), (True, 6)):
        file.append(row(ONE, 7), again)
        assert len(files.read_rows(path)) == count
    assert results(file.read("GPU")) == [7, 2]
    file.append(row(ONE, 8, "another"))
    assert results(file.read("another")) == [8]


def test_a_case_in_words_leaves_out_what_it_has_not():
    assert describe({"task": "cifar10", "tf32": None, "model": {"block": 16}, "batch": 4}) == "task cifar10, batch 4"


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Put an experiment of two cases in the place of "attention"; a list of the cases that were measured."""
    seen = []

    def measure(case, context):
        seen.append(case)
        return {"ms": len(seen)}

    cases = lambda profile: [{"method": "dense", "length": 8}, {"method": "sat", "length": 8, "density": 0.5}]
    monkeypatch.setitem(experiments.EXPERIMENTS, "attention", Experiment(cases, measure))
    return seen


def test_bench_again_measures_what_has_a_row_and_the_new_row_counts(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments.rows, "__kwdefaults__", experiments.rows.__kwdefaults__ | {"root": tmp_path})
    command = ["bench", "attention", "--device", "cpu"]
    for more, count in ((["--again"], 2), ([], 2), (["--again", "--only", "method=sat"], 3)):
        assert main([*command, *more]) == 0
        assert len(measured) == count
    assert "attention 1/1: method sat, length 8, density 0.5" in capsys.readouterr().out
    rows = experiments.rows("attention", device="cpu", measure=False)
    assert rows["ms"].tolist() == [1, 3] and rows.attrs == {"profile": "smoke", "missing": 0}
    assert len(files.read_rows(tmp_path / "runs/smoke/rows/attention.jsonl")) == 3


def test_a_frame_has_the_columns_of_all_cases_whatever_rows_there_are(measured, tmp_path):
    settings = {"device": "cpu", "root": tmp_path}
    assert list(experiments.rows("attention", measure=False, **settings)) == ["method", "length", "density"]
    dense = experiments.rows("attention", only={"method": "dense"}, **settings)
    assert dense["density"].isna().all() and len(dense) == 1


def test_what_is_needed_and_not_there_is_told_with_the_command_that_measures_it(measured, tmp_path):
    settings = {"device": "cpu", "root": tmp_path}
    command = "python -m sat_lib bench attention --profile smoke"
    with pytest.raises(InputError, match=f"no rows of attention at the smoke profile; measure them with: {command}$"):
        experiments.rows("attention", measure=False, needed=True, **settings)
    experiments.rows("attention", only={"method": "dense"}, needed=[{"method": "dense"}], **settings)
    with pytest.raises(InputError, match=r"no rows of attention with method sat .* --only length=8 method=sat$"):
        experiments.rows("attention", measure=False, only={"length": 8}, needed=[{"method": "sat"}], **settings)
    assert len(experiments.rows("attention", needed=[{"method": "sat"}], **settings)) == 2


def test_a_row_says_by_which_rule_its_digest_was_made_and_a_training_run_what_it_was(measured, tmp_path, monkeypatch):
    experiments.rows("attention", device="cpu", root=tmp_path)
    case = run_case("digits16", "sat", 3, "smoke")
    monkeypatch.setitem(experiments.EXPERIMENTS, "best", Experiment(lambda profile: [case], lambda *_: {"seconds": 1}))
    (made,) = experiments.rows("best", device="cpu", root=tmp_path)["resolved"]
    assert made == case_config(case).as_dict() and made["recipe"]["seed"] == 3
    for name, resolved in (("attention", False), ("best", True)):
        for line in files.read_rows(tmp_path / f"runs/smoke/rows/{name}.jsonl"):
            assert line["digest_rule"] == sources.DIGEST_RULE and ("resolved" in line) == resolved
            assert line["stamp"]["device"] == device_name(pick_device("cpu")) and line["stamp"]["wall_seconds"] >= 0


@pytest.mark.parametrize("name", sorted(experiments.EXPERIMENTS))
def test_the_committed_rows_of_like_cases_have_the_same_columns_and_say_what_was_run(name):
    stored = files.read_rows(files.ROOT / f"data/results/{name}.jsonl")
    known = {files.digest(case) for case in experiments.EXPERIMENTS[name].cases("paper")}
    columns: dict[str | None, set] = {}
    for line in stored:
        case = line["case"]
        assert files.digest(case) in known
        assert ("resolved" in line) == ("recipe" in case)
        assert "recipe" not in case or config_from_dict(line["resolved"]) == case_config(case)
        assert line["digest_rule"] in (1, sources.DIGEST_RULE)
        like = str(("method" in case, case.get("sweep") if "method" not in case else None))
        columns.setdefault(like, set()).add(frozenset(line["result"]))
    assert all(len(some) == 1 for some in columns.values()), columns
