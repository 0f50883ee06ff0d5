"""Sweeps through submitit: on this machine, and under a stand-in for SLURM's programs."""

import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("submitit", reason="needs submitit: pip install submitit")

import cloudpickle
import submitit

from sat_lib import datasets, experiments
from sat_lib.__main__ import main
from sat_lib.common import files
from sat_lib.common.errors import InputError
from sat_lib.experiments import row_files, sweep, training
from sat_lib.experiments.sweep import Launch

LONG = 36  # steps of a run that is stopped on its way, twice before its end


def tiny_case(attention="sat", **changes) -> dict:
    """A training run of a second."""
    recipe = {"steps": 12, "warm_up": 3, "eval_every": 6, "batch": 6, "density": 0.2, "rate": 0.01}
    recipe["switch_at"] = 4 if attention == "sat" else None
    model = {"width": 32, "hidden": 16, "block": 32}
    return {"task": "digits16", "attention": attention, "seed": 0, "model": model, "recipe": recipe | changes}


@pytest.fixture
def cases(monkeypatch):
    """Say what the cases of "accuracy" are; the jobs get them with their pickle."""
    monkeypatch.setitem(sweep.POLL_SECONDS, "local", 0.1)
    monkeypatch.setitem(sweep.POLL_SECONDS, "slurm", 0.1)
    monkeypatch.setattr(sweep, "TERMINAL_SECONDS", 0.1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # jobs run side by side

    def choose(*some):
        made = row_files.Experiment(lambda _profile: list(some), training.train)
        monkeypatch.setitem(experiments.EXPERIMENTS, "accuracy", made)

    def too_long(*_):
        raise TimeoutError("jobs that seconds are enough for took ten minutes")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(600)
    yield choose
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run(root, launch=None, profile="paper", **settings) -> int:
    return sweep.sweep("accuracy", profile, launch or Launch("local"), device="cpu", root=root, **settings)


def stored(root, profile="paper") -> list[dict]:
    folder = "data/results" if profile == "paper" else "runs/smoke/rows"
    return files.read_rows(root / folder / "accuracy.jsonl")


def jobs(root, profile="paper") -> list[str]:
    """Numbers of the jobs that were started, in the order of time."""
    pickles = (root / "runs" / profile / "sweep/logs").glob("*/*_submitted.pkl")
    return [path.parent.name for path in sorted(pickles, key=lambda path: path.stat().st_mtime_ns)]


def only_run(root) -> Path:
    (folder,) = (root / "runs/paper/training").iterdir()
    return folder


def started_at(root, steps=LONG) -> list[int]:
    """The steps that the progress bars of the jobs' logs begin with, in the order of time."""
    logs = sorted((root / "runs/paper/sweep/logs").glob("*/*_0_log.err"), key=lambda path: path.stat().st_mtime_ns)
    return [int(step) for log in logs for step in re.findall(rf"(\d+)/{steps} \[00:00<\?", log.read_text())]


# ---- on this machine -------------------------------------------------------------------------------------------------


def test_a_sweep_measures_what_it_can_names_what_failed_and_repeats_nothing(tmp_path, cases, capsys):
    """Three cases, two at a time; the first one's loss isn't finite."""
    bad, *good = tiny_case("dense", rate=1e30), tiny_case("sat"), tiny_case("dense")
    cases(bad, *good)
    assert run(tmp_path, Launch("local", parallel=2), "smoke") == 1
    rows = stored(tmp_path, "smoke")
    assert sorted(row["case"]["attention"] for row in rows) == ["dense", "sat"]
    assert all(row["case"] in good and row["result"]["test_examples"] > 0 for row in rows)
    said = capsys.readouterr().out
    assert said.startswith("accuracy: 1 pending, 2 running, 0 done, 0 failed\n")
    assert "accuracy: 0 pending, 0 running, 2 done, 1 failed\nfailed: task digits16, attention dense, seed 0\n" in said
    error, log = re.search(r"    (.*)\n    log: (.*)\n$", said).groups()
    assert error.startswith("sat_lib.training.fit.NonFiniteLoss: the loss became nan at step")
    assert error in Path(log).read_text()

    assert run(tmp_path, profile="smoke", only={"attention": "sat"}) == 0
    assert "accuracy: each of 1 cases has its row" in capsys.readouterr().out
    assert (stored(tmp_path, "smoke"), len(jobs(tmp_path, "smoke"))) == (rows, 3)
    frame = experiments.rows("accuracy", device="cpu", measure=False, root=tmp_path)
    assert (len(frame), frame.attrs["missing"]) == (2, 1)


def processes_of(controller: int) -> list[int]:
    """A local job's own processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found += [int(path.parent.name)] if parent == controller else []
    return found


class HeldJob(sweep.Job):
    """A job that waits behind its first checkpoint until the test lets it go on."""

    def __call__(self):
        from sat_lib.training import fit

        save = fit._Run.save

        def save_and_wait(run, bar):
            save(run, bar)
            while not (self.context.root / "go on").exists():
                time.sleep(0.02)

        fit._Run.save = save_and_wait
        sweep.Job.__call__(self)


@pytest.fixture
def held(tmp_path, monkeypatch):
    """Have jobs wait behind their first checkpoints; calling this lets all go on."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    monkeypatch.setattr(sweep, "Job", HeldJob)
    yield (tmp_path / "go on").touch
    cloudpickle.unregister_pickle_by_value(module)


def step_reached(root) -> int:
    """The steps behind the newest checkpoint of the only run; 0 without one."""
    paths = list((root / "runs/paper/training").glob("*/last.pt"))
    return torch.load(paths[0])["trainer"]["step"] if paths else 0


class Gone(Exception):
    """The command ended where nothing could clean up."""


def test_the_same_command_goes_on_whatever_ended_the_last_one(tmp_path, cases, capsys, held, monkeypatch):
    cases(tiny_case("dense", steps=LONG))
    look = sweep._Sweep._look

    def when_at(step, event):
        """Run the command, with an event once its job waits behind the checkpoint of a step."""
        at = lambda self: event() if step_reached(tmp_path) == step else look(self)
        monkeypatch.setattr(sweep._Sweep, "_look", at)
        return run(tmp_path)

    def die():
        raise Gone

    def interrupt():
        raise KeyboardInterrupt

    def kill():
        controller = int(jobs(tmp_path)[-1])
        for process in [controller, *processes_of(controller)]:
            os.kill(process, signal.SIGKILL)
        monkeypatch.setattr(sweep._Sweep, "_look", look)

    with pytest.raises(Gone):
        when_at(6, die)
    first = jobs(tmp_path)
    (process,) = processes_of(int(first[0]))
    capsys.readouterr()

    assert when_at(6, interrupt) == 130
    assert jobs(tmp_path) == first, "a job that lives was started again"
    assert "stopped, with the jobs on this machine; the same command goes on" in capsys.readouterr().out
    while Path(f"/proc/{process}").exists():  # on a busy machine it takes its time to end
        time.sleep(0.05)

    assert when_at(12, kill) == 1
    assert re.search(r"killed, or ended without a result: .*\n    log: .*_0_log.err", capsys.readouterr().out)
    assert stored(tmp_path) == []

    held()
    assert run(tmp_path) == 0
    assert [row["result"]["phase"] for row in stored(tmp_path)] == ["dense"]
    assert started_at(tmp_path) == [0, 6, 12]
    assert len(jobs(tmp_path)) == 3


def test_two_processes_train_one_model_and_write_one_row(tmp_path, cases, capsys):
    cases(tiny_case("sat"))
    assert run(tmp_path, Launch("local", processes=2)) == 0, capsys.readouterr().out
    assert [row["result"]["transition_step"] for row in stored(tmp_path)] == [4]
    assert files.json.loads((only_run(tmp_path) / "result.json").read_text())["processes"] == 2
    logs = (tmp_path / "runs/paper/sweep/logs").glob("*/*_log.out")
    printed = {path.name.split("_")[1]: path.read_text() for path in logs}
    assert ["accuracy: task digits16" in printed[rank] for rank in ("0", "1")] == [True, False]


def test_the_command_line_measures_the_chosen_cases_in_its_own_process(tmp_path, cases, capsys, monkeypatch):
    cases(tiny_case("sat"), tiny_case("dense"))
    monkeypatch.setattr(sweep.sweep, "__kwdefaults__", sweep.sweep.__kwdefaults__ | {"root": tmp_path})
    command = ["sweep", "accuracy", "--profile", "paper", "--cluster", "debug", "--device", "cpu"]
    assert main([*command, "--only", "task=digits16", "attention=dense"]) == 0
    assert [row["case"] for row in stored(tmp_path)] == [tiny_case("dense")]
    assert main([*command, "--only", "attention=dense"]) == 0
    assert capsys.readouterr().out.endswith("accuracy: each of 1 cases has its row\n")


def test_what_another_process_trains_is_left_to_it(tmp_path, cases, capsys):
    cases(tiny_case("sat"))
    context, (case,) = experiments.select("accuracy", "paper", device="cpu", root=tmp_path)
    folder = training.run_folder(case, context)
    with files.lock(folder / "lock", "training"):
        assert run(tmp_path) == 1
    assert f"left to another process that trains in {folder}" in capsys.readouterr().out
    assert jobs(tmp_path) == []


def test_cases_of_one_run_share_a_job(tmp_path, cases):
    same = [{"setting": name, **tiny_case("sat")} for name in ("theta", "delta")]
    cases(*same, tiny_case("dense"))
    context, some = experiments.select("accuracy", "paper", device="cpu", root=tmp_path)
    made = sweep._jobs("accuracy", some, context, Launch("local"))
    assert [job.cases for job in made] == [tuple(same), (tiny_case("dense"),)]
    assert len({job.work for job in made}) == 2


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine with four GPUs, and what its local jobs are started with."""
    seen = []

    class Recorded:
        def __init__(self, *_):
            pass

        def update_parameters(self, **parameters):
            seen.append(parameters)

        def submit(self, job):
            seen[-1]["threads"] = os.environ.get("OMP_NUM_THREADS")
            return SimpleNamespace(submission=lambda: SimpleNamespace(function=job))

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda _pid: range(24), raising=False)
    monkeypatch.setattr(submitit, "LocalExecutor", Recorded)
    return seen


def test_local_jobs_have_gpus_of_their_own(four_gpus, tmp_path):
    launch, cuda = Launch("local", processes=2), torch.device("cuda")
    context = row_files.Context("paper", cuda, tmp_path, "")
    waiting = [sweep.Job(work, "accuracy", (), context, launch) for work in "abc"]
    living = sweep._start_here(waiting, [])
    assert [(job.work, job.gpus) for job in jobs_of(living)] == [("a", (4, 5)), ("b", (6, 7))]
    assert [parameters["visible_gpus"] for parameters in four_gpus] == [(4, 5), (6, 7)]
    assert {(p["gpus_per_node"], p["tasks_per_node"], p["threads"]) for p in four_gpus} == {(2, 2, "6")}
    assert sweep._start_here(waiting[2:], living) == []
    assert [job.gpus for job in jobs_of(sweep._start_here(waiting[2:], living[1:]))] == [(4, 5)]
    with pytest.raises(InputError, match="no more than this machine's 4 GPUs; got 3 jobs of 2"):
        sweep._slots(cuda, Launch("local", processes=2, parallel=3))


def jobs_of(handles) -> list[sweep.Job]:
    return [handle.submission().function for handle in handles]


def test_gpus_are_given_by_number(four_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES: wanted numbers"):
        sweep._slots(torch.device("cuda"), Launch("local"))


# ---- under SLURM -----------------------------------------------------------------------------------------------------

# One file under the names of SLURM's programs. Jobs are processes; with FAKE_SLURM_HOLD set they wait for ever.
FAKE_SLURM = """#!{python}
import json, os, re, subprocess, sys, time
from pathlib import Path

name, arguments, state = Path(sys.argv[0]).name, sys.argv[1:], Path({state!r})

def start(job, script):
    if "FAKE_SLURM_HOLD" in os.environ:
        return (state / job).write_text("pending")
    variables = dict(SLURM_JOB_ID=job, SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_PROCID="0", SLURM_LOCALID="0")
    if "_" in job:
        variables |= dict(zip(("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"), job.split("_")))
    process = subprocess.Popen(
        ["bash", script], env=os.environ | variables, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (state / job).write_text(str(process.pid))

def alive(text):
    if text == "pending":
        return True
    path = Path("/proc") / text / "stat"
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"

if name == "sbatch":
    script = Path(arguments[0])
    text = script.read_text()
    number = str(7 + len(list(state.glob("*.sh"))))
    (state / (number + ".sh")).write_text(text)
    array = re.search(r"--array='?0-(\\d+)", text)
    for job in [number + "_" + str(k) for k in range(int(array[1]) + 1)] if array else [number]:
        start(job, state / (number + ".sh"))
    print("Submitted batch job", number)
elif name == "srun":  # --unbuffered --output PATH --error PATH [--option=value] command
    out, error = arguments[2], arguments[4]
    command = [word for word in arguments[5:] if not word.startswith("--kill")]
    job = os.environ["SLURM_JOB_ID"]
    files = [path.replace("%A_%a", job).replace("%j", job).replace("%t", "0") for path in (out, error)]
    while not Path(files[0]).parent.exists():
        time.sleep(0.05)
    os.dup2(os.open(files[0], os.O_CREAT | os.O_APPEND | os.O_WRONLY), 1)
    os.dup2(os.open(files[1], os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
    os.execvp(command[0], command)
elif name == "sacct":
    print("JobID|State|NodeList")
    for path in state.iterdir():
        if not path.suffix:
            living = "PENDING" if path.read_text() == "pending" else "RUNNING"
            print(path.name, living if alive(path.read_text()) else "FAILED", "", sep="|")
elif name == "scontrol" and arguments[0] == "requeue":
    job = arguments[1]
    start(job, state / (job.split("_")[0] + ".sh"))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's programs on PATH; the folder with the scripts and jobs that they were given."""
    programs, state = tmp_path / "programs", tmp_path / "slurm"
    programs.mkdir()
    state.mkdir()
    for name in sweep.SLURM_PROGRAMS:
        (programs / name).write_text(FAKE_SLURM.format(python=sys.executable, state=str(state)))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    submitit.SlurmJob.watcher.clear()  # it knows the jobs of the tests before
    return state


def test_slurm_runs_an_array_and_a_preempted_job_is_requeued_and_goes_on(tmp_path, cases, slurm, held, monkeypatch):
    cases(tiny_case("dense", steps=LONG), tiny_case("sat"))
    look, preempted = sweep._Sweep._look, []

    def preempt(self):
        if not preempted and list(tmp_path.glob("runs/paper/training/*dense*/last.pt")):
            (process,) = processes_of(int((slurm / "7_0").read_text())) or [int((slurm / "7_0").read_text())]
            os.kill(process, signal.SIGUSR2)  # as SLURM does before it takes the machine away
            preempted.append(process)
            held()
        look(self)

    monkeypatch.setattr(sweep._Sweep, "_look", preempt)
    launch = Launch(parallel=2, slurm={"partition": "gpu", "time": 30, "mem": 8, "cpus": 3, "mail-type": "END"})
    assert run(tmp_path, launch) == 0
    assert preempted
    script = set((slurm / "7.sh").read_text().splitlines())
    assert {f"#SBATCH --{line}" for line in ("array=0-1%2", "partition=gpu", "time=30", "mem=8GB", "nodes=1")} <= script
    assert {f"#SBATCH --{line}" for line in ("cpus-per-task=3", "mail-type=END", "ntasks-per-node=1")} <= script
    assert not [line for line in script if "gpus" in line], "--device cpu"
    assert len(stored(tmp_path)) == 2
    assert started_at(tmp_path) == [0, 6]
    assert {row["cluster"] for row in files.read_rows(tmp_path / "runs/paper/sweep/devices.jsonl")} == {"slurm"}
    assert run(tmp_path, launch) == 0
    assert not (slurm / "8.sh").exists(), "there was nothing to submit"


def test_what_waits_in_slurms_queue_is_not_submitted_again(tmp_path, cases, slurm, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_SLURM_HOLD", "1")
    loaded = []
    monkeypatch.setattr(datasets, "load", lambda task, **_: loaded.append(task))
    cases(tiny_case("sat"), tiny_case("dense"))
    assert run(tmp_path, Launch(wait=False), only={"attention": "sat"}) == 0
    assert run(tmp_path, Launch(wait=False)) == 0
    assert run(tmp_path, Launch(wait=False)) == 0
    assert jobs(tmp_path) == ["7", "8"]
    assert loaded == ["digits16"] * 3
    said = capsys.readouterr().out
    assert "accuracy: 1 pending, 0 running" in said and "accuracy: 2 pending, 0 running" in said

    def interrupt(_self):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep._Sweep, "_look", interrupt)
    assert run(tmp_path, Launch()) == 130
    assert "to end them: scancel 7 8" in capsys.readouterr().out


def test_a_job_is_submitted_again_as_it_was(cases, tmp_path):
    cases(tiny_case("sat"))
    context, some = experiments.select("accuracy", "paper", device="cpu", root=tmp_path)
    (job,) = sweep._jobs("accuracy", some, context, Launch())
    again = pickle.loads(pickle.dumps(job)).checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert (again.function, again.args, again.kwargs) == (job, (), {})


def test_arguments_of_slurm():
    parameters = sweep.slurm_parameters("accuracy", Launch(processes=4, slurm={"partition": "gpu"}), "cuda")
    assert {name: value for name, value in parameters.items() if value is not None} == {
        "name": "sat_lib-accuracy", "timeout_min": 120, "nodes": 1, "tasks_per_node": 4, "gpus_per_node": 4,
        "slurm_srun_args": ["--kill-on-bad-exit=1"], "slurm_partition": "gpu",
    }  # fmt: skip
    given = {"gres": "gpu:a100:1", "time": 30, "mem": "900M", "setup": "module load cuda"}
    parameters = sweep.slurm_parameters("accuracy", Launch(parallel=3, slurm=given), "cuda")
    assert parameters["gpus_per_node"] is None and parameters["slurm_setup"] == ["module load cuda"]
    assert (parameters["slurm_mem"], parameters["slurm_array_parallelism"]) == ("900M", 3)


@pytest.mark.parametrize(("inside", "partition"), [(False, "gpu"), (True, None)])
def test_variables_of_slurm_are_settings_outside_of_a_job_and_a_jobs_own_inside(
    inside, partition, cases, tmp_path, slurm, monkeypatch
):
    for name, value in (("SLURM_CONF", "/etc/slurm.conf"), ("SBATCH_PARTITION", "gpu"), ("SLURM_NTASKS", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_ID", "5") if inside else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before, seen = dict(os.environ), {}
    monkeypatch.setattr(submitit.AutoExecutor, "submit_array", lambda *_: seen.update(os.environ) or [])
    cases(tiny_case("sat"))
    assert run(tmp_path, Launch(wait=False)) == 0
    assert (seen["SLURM_CONF"], seen.get("SBATCH_PARTITION")) == ("/etc/slurm.conf", partition)
    assert ("SLURM_NTASKS" in seen) == (not inside)
    assert dict(os.environ) == before


def test_slurm_that_does_not_tell_of_a_job_is_said(tmp_path, cases, slurm, monkeypatch):
    monkeypatch.setenv("FAKE_SLURM_HOLD", "1")
    cases(tiny_case("sat"))
    assert run(tmp_path, Launch(wait=False)) == 0
    submitit.SlurmJob.watcher.clear()
    (slurm.parent / "programs/sacct").write_text("#!/bin/sh\necho no controller >&2; exit 1\n")
    with pytest.raises(InputError, match=r"sacct: SLURM doesn't say whether job 7 lives. .* delete .*logs/7$"):
        run(tmp_path, Launch(wait=False))
    assert jobs(tmp_path) == ["7"]


# ---- what is refused, and rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["speed", "--cluster", "local"], "experiment: wanted one of"),
        (["accuracy", "--cluster", "cloud"], "cluster: wanted one of ('slurm', 'local', 'debug'); got 'cloud'"),
        (["accuracy"], "sbatch, srun, sacct, scontrol not found on PATH"),
        (["accuracy", "--processes", "0"], "processes: wanted 1 or more that train a model; got 0"),
        (["accuracy", "--parallel", "0"], "parallel: wanted 1 or more jobs at a time; got 0"),
        (["accuracy", "--cluster", "local", "--only", "task=mnist"], "only: no case of accuracy"),
        (["accuracy", "--cluster", "local", "--device", "cuda:1"], "device: wanted auto, cpu or cuda"),
        (["accuracy", "--cluster", "local", "--no-wait"], "no-wait: only SLURM keeps jobs"),
        (["accuracy", "--cluster", "local", "--slurm", "time=3"], "slurm: {'time': 3} is for --cluster slurm"),
        (["accuracy", "--cluster", "debug", "--processes", "2"], "Use --cluster local"),
        (["kernels", "--cluster", "local", "--processes", "2"], "kernels has cases that train none; got 2"),
    ],
)
def test_bad_input_ends_with_status_2_and_a_message(command, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sweep.sweep, "__kwdefaults__", sweep.sweep.__kwdefaults__ | {"root": tmp_path})
    assert main(["sweep", *command]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"partiton": "gpu"}, "slurm: Unknown argument 'partiton'"),
        ({"time": "2:00:00"}, "slurm: wanted time as whole minutes, such as time=120; got '2:00:00'"),
        ({"cpus": "many"}, 'slurm: Parameter "cpus_per_task" expected type'),
    ],
)
def test_wrong_arguments_of_slurm_are_named(given, message, tmp_path, cases, slurm):
    cases(tiny_case("sat"))
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        run(tmp_path, Launch(slurm=given))
    assert jobs(tmp_path) == []


def test_what_sbatch_refuses_is_said(tmp_path, cases, slurm):
    (slurm.parent / "programs/sbatch").write_text("#!/bin/sh\necho invalid partition >&2; exit 1\n")
    cases(tiny_case("sat"))
    with pytest.raises(InputError, match=r"sbatch refused the jobs(?s:.*)invalid partition"):
        run(tmp_path, Launch())


def test_one_launcher_is_not_started_inside_another(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="sweep starts the processes itself, and is one of 2"):
        run(tmp_path)


def append_at_once(path, number, barrier):
    def there():
        found = {"case": number // 2} in files.read_rows(path)
        time.sleep(0.05)
        return found

    barrier.wait()
    row_files.append_once(path, {"case": number // 2}, there)


def test_rows_that_come_at_the_same_time_are_appended_once_each(tmp_path, capfd):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(4)
    some = [fork.Process(target=append_at_once, args=(tmp_path / "x.jsonl", n, barrier)) for n in range(4)]
    for process in some:
        process.start()
    for process in some:
        process.join()
    assert sorted(row["case"] for row in files.read_rows(tmp_path / "x.jsonl")) == [0, 1]
    assert capfd.readouterr() == ("", "")
