"""Sweeps: the cases of an experiment that have no row yet, as jobs of submitit, under SLURM or on this machine.

A job measures a case, appends its row and ends; cases that are one and the same training run share a job. All that
lasts is on disk, so the command and every job may be stopped at any moment, and the same command goes on:

    rows, training runs                  where `experiments` keeps them; a run goes on from its last checkpoint
    runs/<profile>/sweep/logs/<number>/  submitit's files of a job, what it printed, and a lock that it holds while it
                                         lives, if that is on this machine
                         devices.jsonl   the devices that jobs ran on: a row from one of these is this sweep's

Whether a case is done is told by its row, whether a job lives by SLURM or by its lock: neither by what an earlier
command believed.
"""

import contextlib
import os
import pickle
import shutil
import signal
import socket
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import submitit
import torch
from submitit import helpers
from submitit.core.utils import FailedJobError, FailedSubmissionError

from .. import datasets, experiments
from ..common import distributed, files
from ..common.device import device_name, pick_device
from ..common.errors import InputError, require
from ..common.sources import source_digest
from ..datasets.pairs import load_pairs
from ..training.recipe import case_config
from . import training
from .row_files import Context, RowFile, append_once, describe

CLUSTERS = ("slurm", "local", "debug")
POLL_SECONDS = {"slurm": 15.0, "local": 0.5}
DEFAULT_MINUTES = 120  # that a SLURM job runs before it is requeued
TIME_OUTS = 1000  # after which submitit requeues a job no more; each one is progress, so none is too many
A_YEAR = 365 * 24 * 60  # minutes: on this machine nothing ends a job but itself
TERMINAL_SECONDS = 3.0  # for the jobs here to end by themselves: a terminal sends Ctrl-C to them too
SLURM_PROGRAMS = ("sbatch", "srun", "sacct", "scontrol")

_held_to_the_end = contextlib.ExitStack()  # locks that the end of the process drops


@dataclass(frozen=True)
class Launch:
    """How jobs are started."""

    cluster: str = "slurm"  # or "local", processes of this machine, or "debug", in this process one after another
    processes: int = 1  # that train one model together, one GPU each, on one machine
    parallel: int | None = None  # jobs at a time. None: SLURM decides; here what the GPUs allow, one on a CPU
    slurm: dict = field(default_factory=dict)  # submitit's arguments unprefixed, time in minutes, mem (GB), cpus
    wait: bool = True  # False leaves the jobs to SLURM

    def __post_init__(self):
        cluster, processes, parallel, here = self.cluster, self.processes, self.parallel, self.cluster != "slurm"
        require(cluster in CLUSTERS, f"cluster: wanted one of {CLUSTERS}; got {cluster!r}")
        require(_counts(processes), f"processes: wanted 1 or more that train a model; got {processes!r}")
        require(parallel is None or _counts(parallel), f"parallel: wanted 1 or more jobs at a time; got {parallel!r}")
        require(not (here and self.slurm), f"slurm: {self.slurm} is for --cluster slurm; got {cluster!r}")
        who = f"only SLURM keeps jobs that wait for their turn; with --cluster {cluster} this command does"
        require(self.wait or not here, f"no-wait: {who}")
        alone = f"--cluster debug runs jobs in this process alone; got {processes}. Use --cluster local"
        require(cluster != "debug" or processes == 1, f"processes: {alone}")


def _counts(value) -> bool:
    return isinstance(value, int) and value >= 1


@dataclass(frozen=True)
class Job(helpers.Checkpointable):
    """What a job does: measure cases and append their rows. submitit calls it in each process of the job.

    When SLURM stops it, submitit submits the same again: the checkpoint is in the run's folder.
    """

    work: str  # what is measured; two jobs of the same work never run at once
    experiment: str
    cases: tuple[dict, ...]
    context: Context  # its device is of the kind that is wanted, its code of when the job was made
    launch: Launch
    gpus: tuple[int, ...] = ()  # of this machine, that a local job has for itself

    def __call__(self) -> None:
        cluster = self.launch.cluster
        if cluster == "local" and submitit.JobEnvironment().global_rank == 0:
            lock = _lock(submitit.JobEnvironment().paths.folder)
            _held_to_the_end.enter_context(files.lock(lock, self.work, wait=True, quiet=True))
        if self.launch.processes > 1:
            helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        with distributed.joined(pick_device(self.context.device.type)) as device:
            context = replace(self.context, device=device, code=source_digest("sat_lib.experiments"))
            require(
                context.profile == "paper" or context.code == self.context.code,
                "the source text changed since this job was submitted, and smoke rows count for one text alone. "
                "Run the same command again",
            )
            name, first = device_name(device), distributed.rank() == 0
            if first:
                known, row = _folder(context) / "devices.jsonl", {"cluster": cluster, "device": name}
                append_once(known, row, lambda: row in files.read_rows(known))
            # from this very device, which the command that submits may not have known
            todo = RowFile.of(self.experiment, context).missing(self.cases, {name})
            for case in distributed.from_first(todo):
                if first:
                    print(f"{self.experiment}: {describe(case)}", flush=True)
                experiments.measure_case(self.experiment, case, context)


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
    processes, here = os.environ.get("WORLD_SIZE", "1"), launch.cluster != "slurm"
    require(
        processes == "1",
        f"environment: sweep starts the processes itself, and is one of {processes} (WORLD_SIZE). Call it without "
        "torchrun or srun, with --processes N",
    )
    require(device in ("auto", "cpu", "cuda"), f"device: wanted auto, cpu or cuda, jobs choose which; got {device!r}")
    absent = ", ".join(program for program in SLURM_PROGRAMS if shutil.which(program) is None)
    require(
        here or not absent,
        f"cluster: slurm wants SLURM's programs; {absent} not found on PATH. Call this on a machine that submits to "
        "SLURM, or use --cluster local",
    )
    there = device if here else "cpu"  # the nodes may have what this machine hasn't
    context, wanted = experiments.select(name, profile, device=there, only=only, root=Path(root).absolute())
    if not here:
        context = replace(context, device=torch.device("cuda" if device == "auto" else device))
    todo = _unmeasured(name, wanted, context, launch)
    if not todo:
        print(f"{name}: each of {len(wanted)} cases has its row")
        return 0
    jobs = _jobs(name, todo, context, launch)
    _prepare(todo)
    if launch.cluster != "debug":
        return _Sweep(jobs).run()
    for job in jobs:  # one that fails ends in the debugger, as is submitit's way
        submitit.DebugExecutor(_folder(context) / "logs" / "%j").submit(job).results()
    return 0


def _folder(context: Context) -> Path:
    return context.root / "runs" / context.profile / "sweep"


def _unmeasured(name: str, cases: Iterable[dict], context: Context, launch: Launch) -> list[dict]:
    """Cases without a row from a device that jobs ran on before, or from this machine's where jobs run here."""
    stored = files.read_rows(_folder(context) / "devices.jsonl")
    here = set() if launch.cluster == "slurm" else {device_name(context.device)}
    devices = here | {row["device"] for row in stored if row["cluster"] == launch.cluster}
    return RowFile.of(name, context).missing(cases, devices)


def _jobs(name: str, cases: list[dict], context: Context, launch: Launch) -> list[Job]:
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
    return [Job(work, name, tuple(some), context, launch) for work, some in works.items()]


def _prepare(cases: list[dict]) -> None:
    """Load every task's data once, which prepares what isn't: jobs that start together must not all do that."""
    recipes = [case_config(case).recipe for case in cases if "recipe" in case]
    for task, protocol in sorted({(recipe.task, recipe.protocol) for recipe in recipes}):
        datasets.load(task, protocol=protocol)
    for kind, data in sorted({(case["kind"], case["data"]) for case in cases if "data" in case}):
        load_pairs(data) if kind == "text" else datasets.load(data)


# ---- starting jobs, and whether they live ----------------------------------------------------------------------------


def _lock(folder: Path) -> Path:
    """What the first process of a local job holds until it ends, in the job's folder."""
    return folder / f"lock-{socket.gethostname()}"


def _lives(handle: submitit.Job) -> bool:
    """As SLURM tells, or the process that this command started, or the lock of a job that another command did."""
    return not handle.done() or files.locked(_lock(handle.paths.folder))


def _living(folder: Path, cluster: str) -> dict[str, submitit.Job]:
    """Work -> its job that lives, whichever command started it."""
    kind, newest = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob, {}
    for logs in sorted(folder.glob("logs/*/"), key=lambda path: path.stat().st_mtime_ns):
        with contextlib.suppress(OSError, ImportError, AttributeError):  # no job, or of an earlier text of this package
            job = helpers.DelayedSubmission.load(logs / f"{logs.name}_submitted.pkl").function
            if job.launch.cluster == cluster:
                newest[job.work] = kind(logs, logs.name, range(job.launch.processes))
    return {work: handle for work, handle in newest.items() if _lives(handle)}


def _start_here(jobs: list[Job], others: Collection[submitit.Job]) -> list[submitit.Job]:
    """Start the first jobs as processes of this machine, as many as there is room for beside the others."""
    context, launch = jobs[0].context, jobs[0].launch
    slots, used = _slots(context.device, launch), {gpu for other in others for gpu in other.submission().function.gpus}
    free = [slot for slot in slots if used.isdisjoint(slot)][: max(0, len(slots) - len(others))]
    together = len(slots) * launch.processes  # with more threads than cores all spend their time waiting
    given = together == 1 or "OMP_NUM_THREADS" in os.environ
    threads = {} if given else {"OMP_NUM_THREADS": max(1, len(os.sched_getaffinity(0)) // together)}
    handles, executor = [], submitit.LocalExecutor(_folder(context) / "logs" / "%j")
    for job, gpus in zip(jobs, free, strict=False):
        executor.update_parameters(
            timeout_min=A_YEAR, tasks_per_node=launch.processes, gpus_per_node=len(gpus), visible_gpus=gpus
        )
        with helpers.environment_variables(**threads):
            handles.append(executor.submit(replace(job, gpus=gpus)))
    return handles


def _slots(device: torch.device, launch: Launch) -> list[tuple[int, ...]]:
    """The GPUs of each job that may run on this machine at a time; none each on a CPU."""
    if device.type != "cuda":
        return [()] * (launch.parallel or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    numbers, each = visible.replace(" ", "").split(","), launch.processes
    wanted = f"wanted numbers, such as 0,1; got {visible!r}. Give the GPUs by number"
    require(all(map(str.isdecimal, numbers)), f"CUDA_VISIBLE_DEVICES: {wanted}")
    jobs = launch.parallel or max(1, len(numbers) // each)
    require(
        jobs * each <= len(numbers),
        f"parallel, processes: wanted no more than this machine's {len(numbers)} GPUs; got {jobs} jobs of {each}",
    )
    return [tuple(map(int, numbers[at : at + each])) for at in range(0, jobs * each, each)]


def _submit(jobs: list[Job]) -> list[submitit.Job]:
    """Submit all jobs to SLURM, as one array."""
    context, launch = jobs[0].context, jobs[0].launch
    parameters = slurm_parameters(jobs[0].experiment, launch, context.device.type)
    executor = submitit.AutoExecutor(_folder(context) / "logs" / "%j", "slurm", slurm_max_num_timeout=TIME_OUTS)
    where = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    inside = "SLURM_JOB_ID" in os.environ  # of a job, whose variables its own jobs would take for theirs
    try:
        executor.update_parameters(**parameters)
        with helpers.clean_env() if inside else contextlib.nullcontext(), helpers.environment_variables(**where):
            return executor.submit_array(jobs)
    except (NameError, AssertionError, ValueError) as error:
        raise InputError(f"slurm: {str(error).partition(chr(10))[0]}; got {launch.slurm}") from error
    except (FailedJobError, FailedSubmissionError) as error:
        raise InputError(f"slurm: sbatch refused the jobs: {str(error).strip()}") from error


def slurm_parameters(name: str, launch: Launch, device: str) -> dict:
    """The arguments of submitit's AutoExecutor for a job of `launch.processes` processes on one machine."""
    given = {key.replace("-", "_"): value for key, value in launch.slurm.items()}
    minutes = given.pop("time", DEFAULT_MINUTES)
    require(_counts(minutes), f"slurm: wanted time as whole minutes, such as time=120; got {minutes!r}")
    counted = given.keys() & {"gres", "gpus_per_node", "gpus_per_task", "num_gpus"}
    parameters = {  # submitit takes None for what isn't set
        "name": f"sat_lib-{name}",
        "timeout_min": minutes,
        "nodes": 1,
        "tasks_per_node": launch.processes,
        "cpus_per_task": given.pop("cpus", None),
        "mem_gb": given.pop("mem") if isinstance(given.get("mem"), int | float) else None,
        "gpus_per_node": None if device == "cpu" or counted else launch.processes,
        "slurm_array_parallelism": launch.parallel,
        # the other processes would wait for one that failed
        "slurm_srun_args": ["--kill-on-bad-exit=1"] if launch.processes > 1 else None,
    }
    for key, value in given.items():
        lines = key in ("setup", "teardown", "srun_args") and isinstance(value, str)  # submitit takes lists of them
        parameters[f"slurm_{key}"] = [value] if lines else value
    return parameters


# ---- watching them ---------------------------------------------------------------------------------------------------


class _Sweep:
    """The jobs of one command: waiting for their turn, alive, or ended, which their rows tell."""

    def __init__(self, jobs: list[Job]):
        self.context, self.launch, self.experiment = jobs[0].context, jobs[0].launch, jobs[0].experiment
        self.cases = {job.work: job.cases for job in jobs}
        self.waiting, self.alive, self.left = jobs, {}, False
        self.done = self.failed = 0  # cases
        self.failures: list[str] = []
        self.said = ""

    def run(self) -> int:
        """Start and watch to the end; the exit status."""
        try:
            self._start()
            self._report()
            while self.launch.wait and (self.alive or self.waiting):
                time.sleep(POLL_SECONDS[self.launch.cluster])
                self._look()
                self._start()
                self._report()
        except KeyboardInterrupt:
            print(f"\n{self._stop()}", flush=True)
            return 130
        if not self.launch.wait:
            logs = _folder(self.context) / "logs"
            print(f"left to SLURM, logs in {logs}; the same command without --no-wait watches them")
            return 0
        for line in self.failures:
            print(line, flush=True)
        return 1 if self.failures or self.left else 0

    def _start(self) -> None:
        """Start waiting jobs that there is room for. Other commands wait meanwhile, so none starts the same work."""
        if not self.waiting:
            return
        here, new, handles = self.launch.cluster == "local", [], []
        with files.lock(_folder(self.context) / "lock", "starting jobs", wait=True, quiet=True):
            living = _living(_folder(self.context), self.launch.cluster)
            for job in self.waiting:
                handle, folder = living.get(job.work), self.context.root / job.work
                if handle:
                    require(  # submitit takes its silence for a yes
                        handle.get_info("standard"),
                        f"sacct: SLURM doesn't say whether job {handle.job_id} lives. Jobs go on; call the same "
                        f"command later, or, if it is known to be no more, delete {handle.paths.folder}",
                    )
                    self.alive[job.work] = handle
                elif files.locked(folder / "lock"):
                    print(f"left to another process that trains in {folder}", flush=True)
                    self.left = True
                else:
                    new.append(job)
            if new:
                handles = _start_here(new, living.values()) if here else _submit(new)
            self.alive |= {job.work: handle for job, handle in zip(new, handles, strict=False)}
            self.waiting = new[len(handles) :]
            while here and not all(handle.done() or files.locked(_lock(handle.paths.folder)) for handle in handles):
                time.sleep(0.1)  # until other commands see that they live

    def _look(self) -> None:
        """See which jobs live, and judge those that ended by their rows."""
        submitit.SlurmJob.watcher.update()
        for work in [work for work, handle in self.alive.items() if not _lives(handle)]:
            handle, cases = self.alive.pop(work), self.cases[work]
            missing = _unmeasured(self.experiment, cases, self.context, self.launch)
            self.done += len(cases) - len(missing)
            self.failed += len(missing)
            self.failures += [f"failed: {describe(case)}" for case in missing]
            self.failures += [_why(handle)] if missing else []

    def _report(self) -> None:
        """One line, when it says something new."""
        # unknown: SLURM took it just now
        queued = [work for work, job in self.alive.items() if job.state.startswith(("PENDING", "REQUEUE", "UNKNOWN"))]
        pending = sum(len(self.cases[work]) for work in [*queued, *(job.work for job in self.waiting)])
        running = sum(len(self.cases[work]) for work in self.alive.keys() - queued)
        line = f"{self.experiment}: {pending} pending, {running} running, {self.done} done, {self.failed} failed"
        if line != self.said:
            print(line, flush=True)
        self.said = line

    def _stop(self) -> str:
        """End the jobs on this machine; what to tell the user."""
        handles = self.alive.values()
        if self.launch.cluster == "slurm":
            numbers = " ".join(sorted({handle.job_id.partition("_")[0] for handle in handles}))
            return f"the jobs go on under SLURM and the same command watches them again; to end them: scancel {numbers}"
        _wait_for(handles, TERMINAL_SECONDS)
        for handle in filter(_lives, handles):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(handle.job_id), signal.SIGINT)  # to the process that started those of the job
        _wait_for(handles, 10.0)
        return "stopped, with the jobs on this machine; the same command goes on from their last checkpoints"


def _wait_for(handles: Iterable[submitit.Job], seconds: float) -> None:
    """Until no job lives, at most so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(_lives, handles)):
        time.sleep(0.1)


def _why(handle: submitit.Job) -> str:
    """The last line of a failed job's error and the path of its log: of the process that failed first."""
    results = sorted(handle.paths.folder.glob("*_result.pkl"), key=lambda path: path.stat().st_mtime_ns)
    outcomes = {path: pickle.loads(path.read_bytes()) for path in results}
    failed = [path for path, (outcome, _) in outcomes.items() if outcome == "error"]
    if failed:
        log, how = failed[0].with_name(failed[0].name.replace("result.pkl", "log.err")), ""
        text = outcomes[failed[0]][1]
    else:
        log, how = handle.paths.stderr, "killed, or ended without a result: "
        text = log.read_text(errors="replace") if log.exists() else ""
    last = text.strip().rpartition("\n")[2].strip()
    return f"    {how}{last or 'it printed nothing'}\n    log: {log}"
