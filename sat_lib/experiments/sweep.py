"""Sweeps: the cases of an experiment that have no row yet, as jobs of submitit, under SLURM or on this machine.

A job measures a case, appends its row and ends; cases that are one and the same training run share a job. All that
lasts is on disk, so the command and every job may be stopped at any moment, and the same command goes on:

    rows, training runs                  where `experiments` keeps them; a run goes on from its last checkpoint
    runs/<profile>/sweep/jobs.jsonl      a line for every job that was started: what it measures, and its number
                         devices.jsonl   the devices that jobs ran on: a row from one of these is this sweep's
                         logs/<number>/  submitit's files of a job, and what it printed

Whether a case is done is told by its row, whether a job lives by SLURM's queue or this machine's processes: neither by
what an earlier command believed.
"""

import contextlib
import datetime
import os
import pickle
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import datasets, experiments
from ..common import distributed, files
from ..common.device import device_name, pick_device
from ..common.errors import InputError, require
from ..common.sources import source_digest
from ..datasets import pairs as sentence_pairs
from ..training.recipe import case_config
from . import training
from .row_files import Context, append_once, describe

CLUSTERS = ("slurm", "local", "debug")
POLL_SECONDS = {"slurm": 15.0, "local": 0.5}
DEFAULT_MINUTES = 120  # that a SLURM job runs before it is requeued
TIME_OUTS = 1000  # after which submitit requeues a job no more; each one is progress, so none is too many
A_YEAR = 365 * 24 * 60  # minutes: on this machine nothing ends a job but itself
TERMINAL_SECONDS = 3.0  # for the jobs here to end by themselves: a terminal sends Ctrl-C to them too
SLURM_PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
SLURM_TRIES = 5  # a busy controller doesn't answer at once


@dataclass(frozen=True)
class Launch:
    """How jobs are started.

    Args:
        cluster: "slurm", "local" (processes of this machine) or "debug" (in this process, one after another).
        processes: that train one model together, one GPU each, on one machine.
        parallel: jobs at a time. None: SLURM decides; on this machine as many as its GPUs allow, one on a CPU.
        slurm: submitit's arguments for SLURM without their prefix, and time in minutes, mem (a number: GB) and cpus.
        wait: False leaves the jobs to SLURM.
    """

    cluster: str = "slurm"
    processes: int = 1
    parallel: int | None = None
    slurm: dict = field(default_factory=dict)
    wait: bool = True

    def __post_init__(self):
        cluster = self.cluster
        require(cluster in CLUSTERS, f"cluster: wanted one of {CLUSTERS}; got {cluster!r}")
        require(_counts(self.processes), f"processes: wanted 1 or more that train a model; got {self.processes!r}")
        require(
            self.parallel is None or _counts(self.parallel),
            f"parallel: wanted 1 or more jobs at a time; got {self.parallel!r}",
        )
        require(cluster == "slurm" or not self.slurm, f"slurm: {self.slurm} is for --cluster slurm; got {cluster!r}")
        require(
            cluster == "slurm" or self.wait,
            f"no-wait: only SLURM keeps jobs that wait for their turn; with --cluster {cluster} this command does",
        )
        require(
            cluster != "debug" or self.processes == 1,
            f"processes: --cluster debug runs jobs in this process alone; got {self.processes}. Use --cluster local",
        )


def _counts(value) -> bool:
    return isinstance(value, int) and value >= 1


@dataclass(frozen=True)
class Job:
    """What a job does: measure cases and append their rows. submitit pickles it and calls it in each of its processes.

    Args:
        work: name of what is measured; two jobs of the same work never run at once.
        code: digest of the source text when the job was made.
    """

    work: str
    experiment: str
    cases: tuple[dict, ...]
    profile: str
    device: str
    launch: Launch
    root: Path
    code: str

    def __call__(self) -> None:
        if self.launch.processes > 1:
            from submitit.helpers import TorchDistributedEnvironment

            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        with distributed.joined(pick_device(self.device)) as device:
            context = Context(self.profile, device, self.root, source_digest("experiments"))
            require(
                self.profile == "paper" or context.code == self.code,
                "the source text changed since this job was submitted, and smoke rows count for one text alone. "
                "Run the same command again",
            )
            for case in distributed.from_first(self._todo(context)):
                if distributed.rank() == 0:
                    print(f"{self.experiment}: {describe(case)}", flush=True)
                experiments.measure_case(self.experiment, case, context)

    def _todo(self, context: Context) -> list[dict]:
        """The cases without a row from this very device, which the command that submits may not have known."""
        name = device_name(context.device)
        if distributed.rank() == 0:
            known = _folder(context) / "devices.jsonl"
            row = {"cluster": self.launch.cluster, "device": name}
            append_once(known, row, lambda: row in files.read_rows(known))
        return experiments.unmeasured(self.experiment, list(self.cases), context, {name})

    def checkpoint(self):
        """What submitit submits again when SLURM preempts a job or its time is up: the same; the run's folder has the
        checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def sweep(
    name: str,
    profile: str = "smoke",
    launch: Launch | None = None,
    *,
    device: str = "auto",
    only: dict | None = None,
    root: Path = files.ROOT,
) -> int:
    """Measure an experiment's cases that have no row, in jobs; those that an earlier command left running are watched.

    Args:
        name, profile, only, root: see `experiments.rows`. launch: how; SLURM unless given. device: "auto", "cpu" or
            "cuda"; "auto" is CUDA under SLURM.

    Returns:
        The exit status: 0, 1 (a case failed, whose log is named, or was left to a process that trains it already), 130
        (interrupted by Ctrl-C).

    Raises:
        InputError: unknown experiment, profile or argument; no SLURM here; data that aren't prepared; called by one of
            several processes that a launcher started.
    """
    launch = launch or Launch()
    processes = os.environ.get("WORLD_SIZE", "1")
    require(
        processes == "1",
        f"environment: sweep starts the processes itself, and is one of {processes} (WORLD_SIZE). Call it without "
        "torchrun or srun, with --processes N",
    )
    require(device in ("auto", "cpu", "cuda"), f"device: wanted auto, cpu or cuda, jobs choose which; got {device!r}")
    here = launch.cluster != "slurm"
    if not here:
        _require_slurm()
        device = "cuda" if device == "auto" else device  # of the nodes, which may have what this machine hasn't
    context, wanted = experiments.select(name, profile, device=device if here else "cpu", only=only, root=root)
    todo = experiments.unmeasured(name, wanted, context, _devices(context, launch.cluster))
    jobs = _jobs(name, todo, context, device, launch)
    if not jobs:
        print(f"{name}: each of {len(wanted)} cases has its row")
        return 0
    _prepare(todo)
    if launch.cluster == "debug":
        return _debug(jobs, context)
    launcher = (_Local if here else _Slurm)(name, launch, device, _folder(context))
    return _Sweep(jobs, launcher, context).run()


def _require_slurm() -> None:
    missing = [program for program in SLURM_PROGRAMS if shutil.which(program) is None]
    require(
        not missing,
        f"cluster: slurm wants SLURM's programs; {', '.join(missing)} not found on PATH. Call this on a machine that "
        "submits to SLURM, or use --cluster local",
    )


def _folder(context: Context) -> Path:
    return context.root.absolute() / "runs" / context.profile / "sweep"


def _devices(context: Context, cluster: str) -> set[str]:
    """Whose rows count: the devices that jobs ran on before, and this machine's where jobs run here."""
    stored = files.read_rows(_folder(context) / "devices.jsonl")
    known = {row["device"] for row in stored if row["cluster"] == cluster}
    return known if cluster == "slurm" else known | {device_name(context.device)}


def _jobs(name: str, cases: list[dict], context: Context, device: str, launch: Launch) -> list[Job]:
    """A job for each case, or for all cases of one training run: two jobs can't train in one folder at a time."""
    works: dict[str, list[dict]] = {}
    for case in cases:
        require("processes" not in case, f"experiment: {name} starts processes of its own. Use python -m sat_lib bench")
        folder = training.run_folder(case, context)
        require(
            folder is not None or launch.processes == 1,
            f"processes: several train one model, and {name} has cases that train none; got {launch.processes}",
        )
        work = f"{name}/{files.digest(case)}" if folder is None else str(folder.relative_to(context.root))
        works.setdefault(work, []).append(case)
    root = context.root.absolute()
    return [
        Job(work, name, tuple(some), context.profile, device, launch, root, context.code)
        for work, some in works.items()
    ]


def _prepare(cases: list[dict]) -> None:
    """Load every task's data once, which prepares what isn't: jobs that start together must not all do that."""
    tasks = {(config.recipe.task, config.recipe.protocol) for config in map(case_config, _runs(cases))}
    for task, protocol in sorted(tasks):
        datasets.load(task, protocol=protocol)
    for kind, data in sorted({(case["kind"], case["data"]) for case in cases if "data" in case}):
        sentence_pairs.load_pairs(data) if kind == "text" else datasets.load(data)


def _runs(cases: list[dict]) -> list[dict]:
    return [case for case in cases if "recipe" in case]


def _debug(jobs: list[Job], context: Context) -> int:
    """All jobs in this process; one that fails ends in the debugger, as is submitit's way."""
    import submitit

    executor = submitit.DebugExecutor(_folder(context) / "logs" / "%j")
    for job in jobs:
        executor.submit(job).results()
    return 0


# ---- starting jobs, and whether they live ----------------------------------------------------------------------------


class _Local:
    """Jobs as processes of this machine, so many at a time; each has its own GPUs and its share of the cores."""

    def __init__(self, name: str, launch: Launch, device: str, folder: Path):
        self.launch, self.folder, each = launch, folder, launch.processes
        gpus = _visible_gpus() if pick_device(device).type == "cuda" else None
        if gpus is None:
            self.slots: list[tuple[int, ...]] = [()] * (launch.parallel or 1)
            return
        most = len(gpus) // each
        wanted = launch.parallel or max(1, most)
        require(
            wanted <= most,
            f"parallel, processes: wanted no more than this machine's {len(gpus)} GPUs; got {wanted} jobs of {each}",
        )
        self.slots = [tuple(gpus[at * each : (at + 1) * each]) for at in range(wanted)]

    def start(self, jobs: list[Job]) -> list[dict]:
        """Start the first jobs, as many as there is room for beside those of any sweep that live; a record of each."""
        import submitit

        living = [record for record in files.read_rows(self.folder / "jobs.jsonl") if _lives_here(record)]
        used = {gpu for record in living for gpu in record["gpus"]}
        free = [slot for slot in self.slots if not used.intersection(slot)]
        free = free[: max(0, len(self.slots) - len(living))]
        records = []
        for job, gpus in zip(jobs, free, strict=False):
            executor = submitit.LocalExecutor(self.folder / "logs" / "%j", max_num_timeout=TIME_OUTS)
            executor.update_parameters(
                timeout_min=A_YEAR,
                tasks_per_node=self.launch.processes,
                gpus_per_node=len(gpus),
                visible_gpus=gpus,
            )
            with submitit.helpers.environment_variables(**self._threads()):
                started = executor.submit(job)
            records.append({"job": started.job_id, "host": socket.gethostname(), "gpus": list(gpus)})
        return records

    def _threads(self) -> dict[str, int]:
        """Threads that do PyTorch's work on a CPU: more of them than cores, and all spend their time waiting."""
        together = len(self.slots) * self.launch.processes
        if together == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": max(1, len(os.sched_getaffinity(0)) // together)}

    def stop(self, living: list[dict]) -> str:
        """End the jobs; what to tell the user."""
        _wait_for_end(living, TERMINAL_SECONDS)
        for record in living:
            if _lives_here(record):
                os.kill(int(record["job"]), signal.SIGINT)
        _wait_for_end(living, 10.0)
        return "stopped, with the jobs on this machine; the same command goes on from their last checkpoints"


def _visible_gpus() -> list[int]:
    """Numbers of the GPUs that this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(range(torch.cuda.device_count()))
    try:
        return [int(number) for number in chosen.split(",")]
    except ValueError as error:
        raise InputError(
            f"CUDA_VISIBLE_DEVICES: wanted numbers, such as 0,1; got {chosen!r}. Give the GPUs by number"
        ) from error


def _wait_for_end(records: list[dict], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(_lives_here, records)):
        time.sleep(0.1)


def _lives_here(record: dict) -> bool:
    """Whether a local job's process, which is its number, lives on this machine and isn't another by now."""
    if record["host"] != socket.gethostname():
        return False
    try:
        return b"submitit.local._local" in Path(f"/proc/{record['job']}/cmdline").read_bytes()
    except OSError:
        return False


class _Slurm:
    """Jobs of SLURM, one array."""

    def __init__(self, name: str, launch: Launch, device: str, folder: Path):
        import submitit

        self.executor = submitit.AutoExecutor(folder / "logs" / "%j", cluster="slurm", slurm_max_num_timeout=TIME_OUTS)
        try:
            self.executor.update_parameters(**slurm_parameters(name, launch, device))
        except (NameError, AssertionError, ValueError) as error:
            raise InputError(f"slurm: {str(error).partition(chr(10))[0]}; got {launch.slurm}") from error

    def start(self, jobs: list[Job]) -> list[dict]:
        """Submit all jobs; a record of each."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            with _outside_of_jobs():
                started = self.executor.submit_array(jobs)
        except (FailedJobError, FailedSubmissionError) as error:
            raise InputError(f"slurm: sbatch refused the jobs: {str(error).strip()}") from error
        return [{"job": job.job_id, "host": None, "gpus": []} for job in started]

    def stop(self, living: list[dict]) -> str:
        """Leave the jobs alone; what to tell the user."""
        numbers = " ".join(sorted({record["job"].partition("_")[0] for record in living}))
        return f"the jobs go on under SLURM and the same command watches them again; to end them: scancel {numbers}"


@contextlib.contextmanager
def _outside_of_jobs():
    """Hide the variables of a job of SLURM that the command may run in: its own jobs would take them for theirs."""
    from submitit.helpers import clean_env, environment_variables

    if "SLURM_JOB_ID" not in os.environ:  # then SLURM_* and SBATCH_* are the user's settings
        yield
        return
    where = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with clean_env(), environment_variables(**where):
        yield


def slurm_parameters(name: str, launch: Launch, device: str) -> dict:
    """The arguments of submitit's AutoExecutor for a job of `launch.processes` processes on one machine."""
    given = {key.replace("-", "_"): value for key, value in launch.slurm.items()}
    minutes = given.pop("time", DEFAULT_MINUTES)
    require(_counts(minutes), f"slurm: wanted time as whole minutes, such as time=120; got {minutes!r}")
    parameters = {
        "name": f"sat_lib-{name}",
        "timeout_min": minutes,
        "nodes": 1,
        "tasks_per_node": launch.processes,
        "cpus_per_task": given.pop("cpus", None),
        "slurm_array_parallelism": launch.parallel,
    }
    if isinstance(given.get("mem"), int | float):
        parameters["mem_gb"] = given.pop("mem")
    if device != "cpu" and not given.keys() & {"gres", "gpus_per_node", "gpus_per_task", "num_gpus"}:
        parameters["gpus_per_node"] = launch.processes
    if launch.processes > 1:
        parameters["slurm_srun_args"] = ["--kill-on-bad-exit=1"]  # the others would wait for the one that failed
    for key in ("setup", "teardown", "srun_args"):  # submitit takes lists of lines
        if isinstance(given.get(key), str):
            given[key] = [given[key]]
    return {key: value for key, value in parameters.items() if value is not None} | {
        f"slurm_{key}": value for key, value in given.items()
    }


def _states(records: Iterable[dict]) -> dict[str, str]:
    """Work -> "pending" or "running", of those recorded jobs that live."""
    records = list(records)
    queue = _slurm_queue() if any(record["cluster"] == "slurm" for record in records) else {}
    states = {record["work"]: queue.get(record["job"]) for record in records if record["cluster"] == "slurm"}
    states |= {record["work"]: "running" for record in records if record["cluster"] == "local" and _lives_here(record)}
    return {work: state for work, state in states.items() if state}


def _slurm_queue() -> dict[str, str]:
    """Job number -> "pending" or "running", of the user's jobs; nothing where there is no SLURM."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
    for attempt in range(SLURM_TRIES):
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode == 0:
            break
        time.sleep(5 * attempt)
    require(
        answer.returncode == 0,
        f"squeue: SLURM doesn't say which jobs live ({answer.stderr.strip()}). Jobs go on; call the same command later",
    )
    pairs = [line.split() for line in answer.stdout.splitlines() if line.strip()]
    return {job: "pending" if state.startswith(("PENDING", "REQUEUE")) else "running" for job, state in pairs}


# ---- watching them ---------------------------------------------------------------------------------------------------


class _Sweep:
    """The jobs of one command: waiting for their turn, alive, or ended, which their rows tell."""

    def __init__(self, jobs: list[Job], launcher: _Local | _Slurm, context: Context):
        self.jobs = {job.work: job for job in jobs}
        self.launcher, self.context, self.folder = launcher, context, _folder(context)
        self.experiment, self.launch = jobs[0].experiment, jobs[0].launch
        self.waiting = list(jobs)
        self.alive: dict[str, dict] = {}  # work -> its record in jobs.jsonl
        self.states: dict[str, str] = {}  # work -> "pending" or "running", of those alive
        self.done = self.failed = self.left = 0  # cases
        self.failures: list[str] = []
        self.said = ""

    def run(self) -> int:
        """Start and watch to the end; the exit status."""
        try:
            self._start()
            self._report()
            if not self.launch.wait:
                print(f"left to SLURM, logs in {self.folder / 'logs'}; the same command without --no-wait watches them")
                return 0
            while self.alive or self.waiting:
                time.sleep(POLL_SECONDS[self.launch.cluster])
                self._look()
                self._start()
                self._report()
        except KeyboardInterrupt:
            print(f"\n{self.launcher.stop(list(self.alive.values()))}", flush=True)
            return 130
        print("\n".join(self.failures), end="\n" if self.failures else "", flush=True)
        return 1 if self.failures or self.left else 0

    def _start(self) -> None:
        """Start waiting jobs that there is room for. Other commands wait meanwhile, so none starts the same work."""
        if not self.waiting:
            return
        with files.lock(self.folder / "lock", "starting jobs", wait=True, quiet=True):
            self._leave_what_runs()
            records = self.launcher.start(self.waiting) if self.waiting else []
            for job, record in zip(self.waiting, records, strict=False):
                record |= {"work": job.work, "cluster": self.launch.cluster, "experiment": self.experiment}
                record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                files.append_row(self.folder / "jobs.jsonl", record)
                self.alive[job.work] = record
                self.states[job.work] = "pending" if self.launch.cluster == "slurm" else "running"
            self.waiting = self.waiting[len(records) :]

    def _leave_what_runs(self) -> None:
        """Watch those waiting jobs that another command has started, and leave out what other processes train."""
        newest = {record["work"]: record for record in files.read_rows(self.folder / "jobs.jsonl")}
        states = _states(newest[job.work] for job in self.waiting if job.work in newest)
        for job in [job for job in self.waiting if job.work in states]:
            self.alive[job.work], self.states[job.work] = newest[job.work], states[job.work]
            self.waiting.remove(job)
        for job in [job for job in self.waiting if _held(self.context.root / job.work / "lock")]:
            print(f"left to another process that trains in {self.context.root / job.work}", flush=True)
            self.waiting.remove(job)
            self.left += len(job.cases)

    def _look(self) -> None:
        """See which jobs live, and judge those that ended by their rows."""
        self.states = _states(self.alive.values())
        ended = [work for work in self.alive if work not in self.states]
        for work in ended:
            cases, record = list(self.jobs[work].cases), self.alive.pop(work)
            devices = _devices(self.context, record["cluster"])
            missing = experiments.unmeasured(self.experiment, cases, self.context, devices)
            self.done += len(cases) - len(missing)
            self.failed += len(missing)
            self.failures += [f"failed: {describe(case)}" for case in missing]
            self.failures += [_why(self.folder / "logs" / record["job"], record["job"])] if missing else []

    def _report(self) -> None:
        """One line, when it says something new."""
        counts = {"pending": sum(len(job.cases) for job in self.waiting), "running": 0}
        for work, state in self.states.items():
            counts[state] += len(self.jobs[work].cases)
        counts |= {"done": self.done, "failed": self.failed}
        line = f"{self.experiment}: " + ", ".join(f"{count} {state}" for state, count in counts.items())
        if line != self.said:
            print(line, flush=True)
        self.said = line


def _held(path: Path) -> bool:
    """Whether a living process holds a lock."""
    try:
        with files.lock(path, "") if path.exists() else contextlib.nullcontext():
            return False
    except InputError:
        return True


def _why(folder: Path, job: str) -> str:
    """The last line of a failed job's error and the path of its log: of the process that failed first."""
    failed = []
    for path in sorted(folder.glob("*_result.pkl"), key=lambda path: path.stat().st_mtime_ns):
        outcome, value = pickle.loads(path.read_bytes())
        if outcome == "error":
            failed.append((path.name.replace("_result.pkl", "_log.err"), value))
    name, text = failed[0] if failed else (f"{job}_0_log.err", "")
    log = folder / name
    if not failed and log.exists():
        text = log.read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    return f"    {'' if failed else 'killed, or ended without a result: '}{lines[-1]}\n    log: {log}"
