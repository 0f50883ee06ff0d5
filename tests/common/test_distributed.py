"""Two processes train what one trains, on a CPU and on two GPUs: the same losses, transition, layouts and weights."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import two_processes
from conftest import tiny_config, tiny_splits
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from sat_lib.common import distributed, files
from sat_lib.common.errors import InputError
from sat_lib.training import fit
from sat_lib.training.checkpoint import load_checkpoint, save_checkpoint
from sat_lib.training.recipe import run_config

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of runs by two processes, and what each of the two saw."""
    folder = tmp_path_factory.mktemp("two")
    return folder, distributed.launch(2, torch.device("cpu"), two_processes.see, folder)


def losses(folder):
    return [row["loss"] for row in files.read_rows(folder / "metrics.jsonl") if "loss" in row]


def test_what_processes_say_to_one_another(two):
    for seen in two[1]:
        assert seen["mean"] == [[1.5], [[1.0, 1.0], [1.0, 1.0]]]
        assert (seen["total"], seen["copied"], seen["gathered"], seen["from_first"]) == ([3], [1], [0, 1], 0)
        assert "batch: wanted a multiple of 2 processes; got 5" in seen["refused"]
        assert seen["share"] == [3, 3]
        assert seen["slowest"] >= 20


def test_processes_that_differ_take_the_weights_the_test_and_the_pattern_of_the_first(two):
    first, second = (seen["unlike"] for seen in two[1])
    assert first == second


def test_both_processes_have_one_transition_the_same_layouts_and_the_same_weights(two):
    first, second = two[1]
    for run in ("exact", "whole", "cut"):
        assert first[run]["result"] == second[run]["result"]
        for own in (first[run], second[run]):
            assert own["own_grids"] == own["grids"] != []
            assert own["own_weights"] == own["weights"]
        assert first[run]["own_weights"] == second[run]["own_weights"]
        mine, theirs = first[run]["result"]["by_process"]
        assert mine == theirs
        assert mine["transition_step"] == first[run]["result"]["transition_step"]


@pytest.mark.gpu
@TWO_GPUS
@pytest.mark.parametrize(("step", "precision", "within"), [("plain", "fp32", 0.01), ("fast", "bf16", 0.1)])
def test_two_gpus_train_what_one_trains(step, precision, within, tmp_path):
    """The published sizes, without dropout; a fast step is a graph with NCCL's kernels in it. Rounding differs, and
    what it does to a loss grows with the steps."""
    sizes = {"steps": 40, "warm_up": 4, "eval_every": 10, "batch": 16, "switch_at": 15, "precision": precision}
    config = run_config("digits16", "sat", model={"dropout": 0.0}, **sizes)
    cuda, train = torch.device("cuda"), two_processes.train
    results = [distributed.launch(n, cuda, train, config, step, tmp_path / str(n)) for n in (1, 2)]
    for processes, result in enumerate(results, 1):
        assert (result["step"], result["processes"], result["transition_step"]) == (step, processes, 15)
        assert result["by_process"] == processes * result["by_process"][:1]
    one, two = (np.array(losses(tmp_path / name)) for name in "12")
    np.testing.assert_allclose(two, one, rtol=within)
    np.testing.assert_allclose(two[:5], one[:5], rtol=within / 10)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5)


def test_two_processes_train_what_one_trains(two, tmp_path):
    """Without dropout, the transition left to the rule."""
    folder, (seen, _) = two
    result = fit.fit(tiny_config(**two_processes.EXACT), tiny_splits(), tmp_path, torch.device("cpu"), progress=False)
    assert seen["exact"]["result"]["processes"] == 2
    assert result["processes"] == 1
    assert seen["exact"]["result"]["transition_step"] == result["transition_step"] is not None
    assert result["transition_step"] > 2
    np.testing.assert_allclose(losses(folder / "exact"), losses(tmp_path), rtol=1e-4)
    last = load_checkpoint(tmp_path / "last.pt", torch.device("cpu"))["trainer"]
    assert seen["exact"]["grids"] == [grid.int().tolist() for grid in last["grids"]]
    for name, value in last["model"].items():
        torch.testing.assert_close(torch.tensor(seen["exact"]["weights"][name]), value, rtol=1e-3, atol=1e-4)
    for phase, best in result["best"].items():
        assert best["test_examples"] == seen["exact"]["result"]["best"][phase]["test_examples"] == 9


def test_a_run_of_two_that_was_cut_off_goes_on_bit_for_bit(two):
    """With dropout, whose draws are each process's own; the rule "gap" decides, and weights are averaged."""
    folder, (seen, _) = two
    assert seen["whole"]["result"]["transition_step"] < 7
    assert losses(folder / "cut") == losses(folder / "whole")
    assert seen["cut"]["weights"] == seen["whole"]["weights"]


def test_one_process_goes_on_where_two_stopped_and_a_finished_run_is_read(two):
    config = tiny_config(**two_processes.CUT)
    folder, (seen, _) = two
    again = fit.fit(config, tiny_splits(), folder / "whole", torch.device("cpu"), progress=False)
    assert again["test_accuracy"] == seen["whole"]["result"]["test_accuracy"]
    (folder / "cut" / "result.json").unlink()
    last = load_checkpoint(folder / "cut" / "last.pt", torch.device("cpu"))
    last["trainer"]["step"] = 11
    save_checkpoint(folder / "cut" / "last.pt", last)
    alone = fit.fit(config, tiny_splits(), folder / "cut", torch.device("cpu"), progress=False)
    assert alone["processes"] == 1


def test_the_command_line_trains_under_torchrun(tmp_path):
    sizes = ["--set", "steps=4", "warm_up=2", "eval_every=2", "batch=6", "switch_at=1", "--model", "layers=1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sat_lib"]
    command += ["train", "digits16", *sizes, "--device", "cpu", "--folder", str(tmp_path)]
    ran = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("transition: step 1; judged in the sparse phase") == 1
    assert " on 2 x " in ran.stdout
    assert json.loads((tmp_path / "result.json").read_text())["processes"] == 2


def test_a_half_set_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(InputError, match=r"WORLD_SIZE is set and .*'RANK'.* are not. Start with torchrun"),
        distributed.joined(torch.device("cpu")),
    ):
        pass


def test_more_processes_than_gpus_are_refused_before_any_is_started():
    there = torch.cuda.device_count()
    with pytest.raises(InputError, match=f"one at most for each of {there} GPUs here; got {there + 1}"):
        distributed.launch(there + 1, torch.device("cuda"), two_processes.fail)


def test_what_a_launched_process_raises_is_told():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(ChildFailedError, match="it failed on purpose"):
        distributed.launch(2, torch.device("cpu"), two_processes.fail)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])])
def test_one_that_fails_ends_those_that_wait_for_it_and_a_trainer_may_outlive_them(where):
    """On GPUs with graphs alive, which NCCL waits for."""
    device, config = torch.device(where), tiny_config()
    if where == "cuda":
        config = run_config("digits16", "sat", batch=4, steps=20, warm_up=2, switch_at=4, precision="bf16")
    with pytest.raises(ChildFailedError, match="one of them failed on purpose"):
        distributed.launch(2, device, two_processes.fail_alone, config)
    assert distributed.launch(2, device, two_processes.keep, config) == "sparse"


def test_what_holds_on_is_released_once_processes_part(monkeypatch):
    released = []

    class Holding:
        def release(self):
            released.append(1)

    holding = Holding()
    distributed.release_at_the_end(holding)
    assert not distributed._holding  # alone there is nobody to part from
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_: None)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: released.append(2))
    with distributed.joined(torch.device("cpu")):
        monkeypatch.setattr(distributed, "size", lambda: 2)
        distributed.release_at_the_end(holding)
    assert released == [1, 2]


def test_an_interrupt_ends_launched_processes():
    program = (
        "import torch, two_processes\n"
        "from sat_lib.common import distributed\n"
        "if __name__ == '__main__':\n"
        "    distributed.launch(2, torch.device('cpu'), two_processes.tell_and_sleep)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(files.ROOT / "tests"), str(files.ROOT)])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes)
    assert {started.stdout.readline(), started.stdout.readline()} == {"rank 0 sleeps\n", "rank 1 sleeps\n"}
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=600)  # ends once no child holds the pipes
    assert "KeyboardInterrupt" in said.splitlines()[-1]


def test_a_process_that_is_alone_talks_to_itself():
    x = torch.arange(3.0)
    assert distributed.size() == 1
    assert distributed.mean([x])[0] is x
    assert torch.equal(distributed.total(x), x)
    assert distributed.gathered("a") == ["a"]
    with distributed.joined(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
