"""One model by several processes: how cases are measured, and what is made of their rows."""

import numpy as np
import pandas as pd
import pytest
import torch
from made_rows import STAMP, runs, verdict_of

from sat_lib import datasets, experiments
from sat_lib.common import distributed
from sat_lib.common.errors import InputError
from sat_lib.experiments import row_files
from sat_lib.experiments.training import accuracy_cases, data_parallel, data_parallel_cases, run_case, run_folder
from sat_lib.figures import training as training_figures
from sat_lib.figures.judge import IN_DIRECTION, NOT_REPRODUCED, NOT_RUN, REPRODUCED
from sat_lib.training import recipe

MS = {(1, 256): 6.0, (1, 512): 10.0, (2, 512): 6.25, (2, 1024): 10.5}  # of a dense step; a sparse one takes half
SEVERAL_GPUS = "one model on several GPUs"


def step_rows() -> list[dict]:
    rows = []
    for (processes, batch), ms in MS.items():
        row = {"sweep": "step", "processes": processes, "task": "cifar10", "batch": batch, "wall_seconds": 30.0} | STAMP
        for phase, time in (("dense", ms), ("sparse", ms / 2)):
            row |= {f"{phase}_median_ms": time, f"{phase}_low_ms": time, f"{phase}_high_ms": time}
            row[f"{phase}_examples_per_second"] = 1000 * batch / time
        rows.append(row)
    return rows


def training_rows(percents: list[float], processes: int = 2, differ: bool = False) -> list[dict]:
    outcome = {"transition_step": 200, "layouts": "aa", "weights": "bb"}
    by_process = [outcome] * (processes - 1) + [outcome | ({"weights": "cc"} if differ else {})]
    outcomes = {"by_process": by_process, "processes": processes, "wall_seconds": 50.0}
    return runs("cifar10", {"sat": percents}, **outcomes).to_dict("records")


def frames(several: list[dict], one: tuple[float, ...] = (42.0, 42.5, 41.5)) -> dict[str, pd.DataFrame]:
    together = [row | {"sweep": "training"} for row in several]
    return {
        "data_parallel": pd.DataFrame(step_rows() + together),
        "accuracy": pd.DataFrame(training_rows(list(one), processes=1)),
    }


def test_efficiency_is_against_so_many_times_one_and_the_share_alone_is_the_same_work():
    lines = training_figures.steps(pd.DataFrame(step_rows()))
    dense = lines[lines["phase"] == "dense"].set_index(["processes", "batch"])
    np.testing.assert_allclose(dense["efficiency"], [10 / 12, 1, 0.8, 10 / 10.5])
    assert dense["share_ms"].isna().tolist() == [True, True, False, False]
    assert (dense["share_ms"][2, 512], dense["share_ms"][2, 1024]) == (6.0, 10.0)


def test_the_panel_shows_both_ways_of_growing():
    rows = pd.DataFrame(step_rows())
    figure, drawn = training_figures.data_parallel(rows)
    (axis,) = figure.axes
    shown = {line.get_label(): line.get_ydata() for line in axis.get_lines() if not line.get_label().startswith("_")}
    assert shown.keys() == {f"{p} phase, 512 {how}" for p in ("dense", "sparse") for how in ("each", "in all")}
    np.testing.assert_allclose(shown["dense phase, 512 in all"], [51.2, 81.92])
    np.testing.assert_allclose(shown["sparse phase, 512 each"], [102.4, 2 * 1024 / 10.5])
    assert sorted(text.get_text() for text in axis.texts) == ["80%", "80%", "95%", "95%"]
    assert len(drawn) == len(training_figures.steps_table(rows)) == 8


def test_the_table_of_runs_says_where_processes_differ():
    rows = frames(training_rows([42.0]) + training_rows([41.0], differ=True))["data_parallel"]
    table = training_figures.runs_table(rows)
    assert table["test %"].tolist() == ["42.00", "41.00"]
    assert table["same step, layouts and weights in all"].tolist() == ["yes", "no"]


@pytest.mark.parametrize(
    ("several", "word", "why"),
    [
        (training_rows([42.0, 42.2, 41.8]), IN_DIRECTION, "within the spread"),  # on fewer GPUs than the paper's
        (training_rows([42.0, 42.2, 41.8], differ=True), NOT_REPRODUCED, "In 0 of 3 runs"),
        (training_rows([39.0, 39.1, 38.9]), NOT_REPRODUCED, "beyond the spread"),
        (training_rows([46.0, 46.1, 45.9]), IN_DIRECTION, "not run: 4 GPUs"),
        ([], NOT_RUN, "no rows"),
    ],
)  # fmt: skip
def test_several_gpus_have_to_agree_and_be_as_accurate_as_one(several, word, why):
    found = verdict_of(frames(several), SEVERAL_GPUS)
    assert found.verdict == word and why in found.why
    gains = "2 GPUs: 1.60 (batch 512), 1.90 (batch 1024) times the examples a second of one"
    assert word == NOT_RUN or gains in found.ours


def test_rows_that_do_not_fit_together_are_no_verdict_and_no_error():
    made = frames(training_rows([42.0, 42.2], processes=4))  # no steps of four
    assert verdict_of(made, SEVERAL_GPUS).verdict == NOT_RUN
    made["data_parallel"] = made["data_parallel"].query("processes != 1")  # nothing to compare with
    assert verdict_of(made, SEVERAL_GPUS).verdict == NOT_RUN
    by_two = frames(training_rows([42.0, 42.2, 41.8]))
    by_two["accuracy"]["processes"] = 2
    assert "one GPU" not in verdict_of(by_two, SEVERAL_GPUS).ours


@pytest.mark.parametrize("kept", ["processes == 1", "processes == 2", "sweep == 'step'", "sweep == 'training'"])
def test_tables_and_panel_take_what_rows_there_are(kept):
    rows = frames(training_rows([42.0]))["data_parallel"].query(kept)
    step, training = ((rows["sweep"] == sweep).sum() for sweep in ("step", "training"))
    assert len(training_figures.steps_table(rows)) == 2 * step
    assert len(training_figures.runs_table(rows)) == training
    assert all(training_figures.agree(rows[rows["sweep"] == "training"]))
    if step:
        training_figures.data_parallel(rows)


def test_as_many_gpus_as_the_papers_reproduce_it():
    made = frames(training_rows([42.0, 42.2, 41.8], processes=4))
    four = [row | {"processes": 2 * row["processes"]} for row in step_rows() if row["processes"] == 2]
    made["data_parallel"] = pd.concat([made["data_parallel"], pd.DataFrame(four)], ignore_index=True)
    assert verdict_of(made, SEVERAL_GPUS).verdict == REPRODUCED


def test_cases_are_unique_and_the_runs_of_one_process_are_those_of_accuracy():
    cases = data_parallel_cases("paper")
    assert len({str(case) for case in cases}) == len(cases)
    numbers = {(case["sweep"], case["processes"]) for case in cases}
    assert numbers == {("step", 1), ("step", 2), ("step", 4), ("training", 2), ("training", 4)}
    single = {case["seed"]: case for case in accuracy_cases("paper")
              if (case["task"], case["attention"]) == ("cifar10", "sat")}  # fmt: skip
    for case in cases:
        if case["sweep"] == "training":
            assert recipe.case_config(case) == recipe.case_config(single[case["seed"]])


def test_runs_by_several_have_folders_of_their_own(tmp_path):
    context = row_files.Context("paper", torch.device("cpu"), tmp_path, "code")
    training = [case for case in data_parallel_cases("paper") if case["sweep"] == "training"]
    folders = {run_folder(case, context) for case in training}
    assert len(folders) == len(training)
    others = accuracy_cases("paper")
    assert folders.isdisjoint({run_folder(case, context) for case in others})


def test_what_wants_more_gpus_than_there_are_is_left_out_aloud(monkeypatch, tmp_path, capsys):
    measured = []
    cases = lambda profile: [{"processes": n} for n in (1, 2, 4)]
    measure = lambda case, context: measured.append(case) or {}
    monkeypatch.setitem(experiments.EXPERIMENTS, "data_parallel", row_files.Experiment(cases, measure))
    monkeypatch.setattr(distributed, "most_processes", lambda device: 2)
    frame = experiments.rows("data_parallel", device="cpu", root=tmp_path)
    assert [case["processes"] for case in measured] == [1, 2]
    assert "1 cases are left out: they want more than the 2 GPUs here" in capsys.readouterr().out
    assert (len(frame), frame.attrs["missing"]) == (2, 1)
    assert len(experiments.rows("data_parallel", device="cpu", root=tmp_path)) == 2 == len(measured)
    experiments.rows("data_parallel", device="cpu", root=tmp_path, only={"processes": 4})
    assert measured[-1] == {"processes": 4}  # it was asked for: `distributed.launch` says why not


def test_data_that_are_not_there_are_told_before_any_process_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "launch", lambda *_: pytest.fail("started"))

    def load(name, **_):
        raise InputError(f"task {name} is not prepared")

    monkeypatch.setattr(datasets, "load", load)
    context = row_files.Context("paper", torch.device("cpu"), tmp_path, "code")
    case = {"sweep": "training", "processes": 2} | run_case("cifar10", "sat", 0, "paper")
    with pytest.raises(InputError, match="task cifar10 is not prepared"):
        data_parallel(case, context)


def test_a_sweep_refuses_what_starts_its_own_processes(tmp_path):
    pytest.importorskip("submitit")
    from sat_lib.experiments.sweep import Launch, sweep

    with pytest.raises(InputError, match=r"data_parallel starts processes of its own\. Use python -m sat_lib bench"):
        sweep("data_parallel", "smoke", Launch("debug"), device="cpu", root=tmp_path)
