import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import comparable, tiny_config, tiny_splits

from sat_lib.common import files
from sat_lib.common.errors import InputError
from sat_lib.datasets import batches
from sat_lib.training.checkpoint import load_checkpoint, load_model, save_checkpoint
from sat_lib.training.fit import NonFiniteLoss, _bar_text, fit, snapshot_path
from sat_lib.training.trainer import Trainer

CPU = torch.device("cpu")


def run(folder, config=None, data=None, **settings):
    return fit(config or tiny_config(), data or tiny_splits(), folder, CPU, progress=False, **settings)


def test_a_run_leaves_its_result_metrics_and_checkpoints(tmp_path):
    result = run(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "metrics.jsonl", "last.pt", "best-dense.pt", "best-sparse.pt", "result.json", "lock",
    }  # fmt: skip
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (result["transition_step"], result["phase"]) == (4, "sparse")
    metrics = files.read_rows(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in metrics if "loss" in m] == list(range(12))
    assert [m["step"] for m in metrics if "dev_accuracy" in m] == [4, 8, 12]
    assert [m["phase"] for m in metrics if "loss" in m] == ["dense"] * 5 + ["sparse"] * 7
    assert result["best"]["sparse"]["test_examples"] == 9
    assert result["parameters"] > 0
    assert result["stamp"]["device"]


def test_a_finished_run_is_read_and_not_repeated(tmp_path):
    first = run(tmp_path)
    before = (tmp_path / "last.pt").stat().st_mtime_ns
    assert run(tmp_path) == first
    assert (tmp_path / "last.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_two_halves_equal_the_whole_metrics_included(stop, tmp_path):
    whole = run(tmp_path / "whole")
    assert run(tmp_path / "halves", stop_at=stop) is None
    halves = run(tmp_path / "halves")
    assert comparable(halves) == comparable(whole)
    assert (tmp_path / "halves/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    for name in ("best-dense.pt", "best-sparse.pt"):
        a, b = (load_checkpoint(tmp_path / f / name, CPU)["model"] for f in ("whole", "halves"))
        assert all(torch.equal(a[key], b[key]) for key in a)


KILLED = """
    import sys; sys.path[:0] = {paths!r}
    import os, signal
    from pathlib import Path
    from conftest import tiny_config, tiny_splits
    from sat_lib.training import fit
    import torch
    fit.CHECKPOINT_SECONDS = 0
    step = fit.Trainer.train_step
    def step_or_die(self):
        if self.step == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)
    fit.Trainer.train_step = step_or_die
    torch.set_num_threads({threads})
    fit.fit(tiny_config(), tiny_splits(), Path({folder!r}), torch.device("cpu"), progress=False)
"""


def test_kill_9_in_the_middle_and_started_again_gives_the_same_run(tmp_path):
    whole = run(tmp_path / "whole")
    settings = {
        "paths": [str(files.ROOT / "tests"), str(files.ROOT)], "at": 7, "folder": str(tmp_path / "killed"),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    code = textwrap.dedent(KILLED.format(**settings))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (tmp_path / "killed/last.pt").exists()
    assert comparable(run(tmp_path / "killed")) == comparable(whole)


def test_best_checkpoints_are_loaded_in_the_phase_they_were_saved_in(tmp_path):
    run(tmp_path)
    dense, sparse = (load_model(tmp_path / f"best-{phase}.pt", CPU) for phase in ("dense", "sparse"))
    assert dense.layouts is None
    kept = load_checkpoint(tmp_path / "last.pt", CPU)["trainer"]["maps"]["kept"]
    assert [torch.equal(layout.grid, grid) for layout, grid in zip(sparse.layouts, kept, strict=True)] == [True, True]


def test_each_phases_best_is_tested_in_its_own_phase(tmp_path, monkeypatch):
    tested = []
    evaluate = Trainer.evaluate

    def recorded(self, split):
        if split is self.data.test:
            tested.append((self.phase, self.model.layouts is None))
        return evaluate(self, split)

    monkeypatch.setattr(Trainer, "evaluate", recorded)
    run(tmp_path)
    assert tested == [("dense", True), ("sparse", False)]


def test_the_best_checkpoint_of_a_recipe_with_an_average_holds_it_and_is_what_is_tested(tmp_path, monkeypatch):
    averages, evaluate, accuracies = {}, Trainer.evaluate, {4: 0.3, 8: 0.9, 12: 0.5}

    def told(self, split):
        score = evaluate(self, split)
        if split is not self.data.dev:
            return score
        averages[self.step] = copy.deepcopy(self.evaluated)
        return score._replace(accuracy=accuracies[self.step])

    monkeypatch.setattr(Trainer, "evaluate", told)
    result = run(tmp_path, tiny_config(average=4), snapshots=(8, 12))
    assert {phase: best["step"] for phase, best in result["best"].items()} == {"dense": 4, "sparse": 8}
    held, kept = (model.state_dict() for model in (load_model(tmp_path / "best-sparse.pt", CPU), averages[8]))
    raw = load_checkpoint(snapshot_path(tmp_path, 8), CPU)["model"]
    assert all(torch.equal(value, kept[name]) for name, value in held.items())
    assert not all(torch.equal(value, raw[name]) for name, value in held.items())
    trainer = Trainer(tiny_config(), tiny_splits(), CPU)
    for phase, best in result["best"].items():
        trainer.model = load_model(tmp_path / f"best-{phase}.pt", CPU)
        assert best["test_loss"] == evaluate(trainer, trainer.data.test).loss


@pytest.mark.parametrize("step", [2, 8])
def test_a_non_finite_loss_stops_with_step_and_indices(step, tmp_path, monkeypatch):
    monkeypatch.setattr("sat_lib.training.fit.CHECKPOINT_SECONDS", 0)
    train_step = Trainer.train_step

    def poisoned(self):
        if self.step == step:
            with torch.no_grad():
                self.model.head[2].bias.fill_(float("nan"))
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with pytest.raises(NonFiniteLoss, match=f"at step {step} "):
        run(tmp_path)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == step
    assert report["batch_indices"] == batches.batch_indices(24, 6, step, seed=0).tolist()
    monkeypatch.setattr(Trainer, "train_step", train_step)
    saved = load_checkpoint(tmp_path / "last.pt", CPU)["trainer"]
    assert saved["step"] <= step
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_folder_of_another_configuration_is_refused_and_left_alone(tmp_path):
    run(tmp_path, stop_at=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"another configuration \(recipe.seed: saved 0, wanted 1\)"):
        run(tmp_path, tiny_config(seed=1))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"not a checkpoint"])
def test_a_damaged_checkpoint_is_named(damage, tmp_path):
    run(tmp_path, stop_at=6)
    (tmp_path / "last.pt").write_bytes(damage((tmp_path / "last.pt").read_bytes()))
    with pytest.raises(InputError, match=r"last.pt can't be read .* Delete it"):
        run(tmp_path)
    with pytest.raises(InputError, match="doesn't exist"):
        load_model(tmp_path / "none.pt", CPU)


def test_a_file_of_another_kind_or_version_is_named(tmp_path):
    run(tmp_path, stop_at=6)
    with pytest.raises(InputError, match=r"with \['config', .*'step'\]; got \['best', 'seconds', 'trainer'\]"):
        load_model(tmp_path / "last.pt", CPU)
    save_checkpoint(tmp_path / "last.pt", load_checkpoint(tmp_path / "best-dense.pt", CPU))
    with pytest.raises(InputError, match=r"with \['best', 'seconds', 'trainer'\]; got .* delete it to train"):
        run(tmp_path)
    save_checkpoint(tmp_path / "last.pt", torch.zeros(3))
    with pytest.raises(InputError, match="got Tensor"):
        run(tmp_path)


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    run(tmp_path, stop_at=3)
    before = (tmp_path / "last.pt").read_bytes()
    write_bytes = Path.write_bytes

    def full(path, data):
        if path.suffix == ".pt":
            write_bytes(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"could not write .*No space left on device; .*Free some space"):
        run(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    assert comparable(run(tmp_path)) == comparable(run(tmp_path.with_name("copy")))


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with files.lock(tmp_path / "lock", "x"), pytest.raises(InputError, match="is already running"):
        run(tmp_path)


def test_progress_shows_phase_loss_skewness_and_distance(tmp_path, capfd):
    fit(tiny_config(), tiny_splits(), tmp_path, CPU, progress=True)
    shown = capfd.readouterr().err
    assert "12/12" in shown
    for word in ("phase=", "loss="):
        assert word in shown
    text = _bar_text({"phase": "dense", "loss": 1.0, "skewness": [2.0, 3.0], "distance": [0.1, None]})
    assert text == {"phase": "dense", "loss": "1.000", "skewness": "2.00", "distance": "0.100"}


def test_snapshots_hold_the_model_of_their_step_and_phase(tmp_path):
    run(tmp_path, snapshots=(0, 4, 5, 12))
    kept = {step: load_checkpoint(snapshot_path(tmp_path, step), CPU) for step in (0, 4, 5, 12)}
    assert {path.name for path in tmp_path.glob("step-*.pt")} == {f"step-{step:06}.pt" for step in kept}
    assert [state["step"] for state in kept.values()] == [0, 4, 5, 12]
    assert [state["grids"] is None for state in kept.values()] == [True, True, False, False]
    fresh = Trainer(tiny_config(), tiny_splits(), CPU).model.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in kept[0]["model"].items())
    last = load_checkpoint(tmp_path / "last.pt", CPU)["trainer"]["model"]
    assert all(torch.equal(value, last[name]) for name, value in kept[12]["model"].items())
    assert load_model(snapshot_path(tmp_path, 12), CPU).layouts is not None


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_snapshots_of_an_interrupted_run_equal_those_of_a_whole_one(stop, tmp_path):
    steps = (0, 3, 4, 5, 6, 12)
    whole = run(tmp_path / "whole", snapshots=steps)
    run(tmp_path / "halves", snapshots=steps, stop_at=stop)
    assert comparable(run(tmp_path / "halves", snapshots=steps)) == comparable(whole)
    for step in steps:
        a, b = (load_checkpoint(snapshot_path(tmp_path / f, step), CPU) for f in ("whole", "halves"))
        assert a["step"] == b["step"]
        assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_snapshots_that_a_run_cannot_have_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"snapshots: wanted steps from 0 to 12; got \[13\]"):
        run(tmp_path, snapshots=(0, 13))
    run(tmp_path, stop_at=5)
    with pytest.raises(InputError, match=r"went past the steps \[2\] without"):
        run(tmp_path, snapshots=(2, 7))
    run(tmp_path, snapshots=(7,))
    assert run(tmp_path, snapshots=(7,)) == run(tmp_path)
    with pytest.raises(InputError, match=r"went past the steps \[2\] without"):
        run(tmp_path, snapshots=(2, 7))


@pytest.mark.parametrize("stop", [None, 4, 7, 8])
@pytest.mark.parametrize("rule", ["overfit", "gap"])
def test_a_rule_on_evaluations_judges_those_of_a_run(rule, stop, tmp_path, monkeypatch):
    """Both fire at step 8: the dev loss rises there, and is above the training loss for the first time."""
    evaluate = Trainer.evaluate
    losses = {2: -4.0, 4: -5.0, 6: -6.0, 8: 1e3, 10: 0.8, 12: 0.9}

    def told(self, split):
        score = evaluate(self, split)
        return score._replace(loss=losses[self.step]) if split is self.data.dev else score

    monkeypatch.setattr(Trainer, "evaluate", told)
    config = tiny_config(switch_at=None, switch_rule=rule, eval_every=2, theta=-1e9, delta=1e9)
    if stop is not None:
        run(tmp_path, config, stop_at=stop)
    result = run(tmp_path, config)
    assert (result["transition_step"], result["phase"]) == (8, "sparse")
    phases = [row["phase"] for row in files.read_rows(tmp_path / "metrics.jsonl") if "loss" in row]
    assert phases == ["dense"] * 9 + ["sparse"] * 3
