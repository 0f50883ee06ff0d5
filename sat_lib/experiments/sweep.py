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
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import submitit
import torch
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment, clean_env, environment_variables

from .. import datasets, experiments
from ..common import distributed, files
from ..common.device import device_name, pick_device
from ..common.errors import InputError, require
from ..common.sources import source_digest
from ..datasets.pairs import load_pairs
from ..training.recipe import case_config
from . import training
from .row_files import Context, append_once, describe

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
        cluster, processes, parallel = self.cluster, self.processes, self.parallel
        require(cluster in CLUSTERS, f"cluster: wanted one of {CLUSTERS}; got {cluster!r}")
        require(_counts(processes), f"processes: wanted 1 or more that train a model; got {processes!r}")
        require(parallel is None or _counts(parallel), f"parallel: wanted 1 or more jobs at a time; got {parallel!r}")
        if cluster == "slurm":
            return
        require(not self.slurm, f"slurm: {self.slurm} is for --cluster slurm; got {cluster!r}")
        require(
            self.wait,
            f"no-wait: only SLURM keeps jobs that wait for their turn; with --cluster {cluster} this command does",
        )
        require(
            cluster == "local" or processes == 1,
            f"processes: --cluster debug runs jobs in this process alone; got {processes}. Use --cluster local",
        )


def _counts(value) -> bool:
    return isinstance(value, int) and value >= 1


@dataclass(frozen=True)
class Job:
    """What a job does: measure cases and append their rows. submitit calls it in each process of the job."""

    work: str  # what is measured; two jobs of the same work never run at once
    experiment: str
    cases: tuple[dict, ...]
    profile: str
    device: str
    launch: Launch
    root: Path
    code: str  # digest of the source text when the job was made
    gpus: tuple[int, ...] = ()  # of this machine, that a local job has for itself

    def __call__(self) -> None:
        cluster = self.launch.cluster
        if cluster == "local" and submitit.JobEnvironment().global_rank == 0:
            lock = _lock(submitit.JobEnvironment().paths)
            _held_to_the_end.enter_context(files.lock(lock, self.work, wait=True, quiet=True))
        if self.launch.processes > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        with distributed.joined(pick_device(self.device)) as device:
            context = Context(self.profile, device, self.root, source_digest("sat_lib.experiments"))
            require(
                self.profile == "paper" or context.code == self.code,
                "the source text changed since this job was submitted, and smoke rows count for one text alone. "
                "Run the same command again",
            )
            name, first = device_name(device), distributed.rank() == 0
            if first:
                known, row = _folder(self) / "devices.jsonl", {"cluster": cluster, "device": name}
                append_once(known, row, lambda: row in files.read_rows(known))
            # from this very device, which the command that submits may not have known
            todo = experiments.unmeasured(self.experiment, list(self.cases), context, {name})
            for case in distributed.from_first(todo):
                if first:
                    print(f"{self.experiment}: {describe(case)}", flush=True)
                experiments.measure_case(self.experiment, case, context)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit submits again when SLURM stops a job: the same; the checkpoint is in the run's folder."""
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
    processes, here = os.environ.get("WORLD_SIZE", "1"), launch.cluster != "slurm"
    require(
        processes == "1",
        f"environment: sweep starts the processes itself, and is one of {processes} (WORLD_SIZE). Call it without "
        "torchrun or srun, with --processes N",
    )
    require(device in ("auto", "cpu", "cuda"), f"device: wanted auto, cpu or cuda, jobs choose which; got {device!r}")
    if not here:
        missing = ", ".join(program for program in SLURM_PROGRAMS if shutil.which(program) is None)
        require(
            not missing,
            f"cluster: slurm wants SLURM's programs; {missing} not found on PATH. Call this on a machine that submits "
            "to SLURM, or use --cluster local",
        )
        device = "cuda" if device == "auto" else device  # of the nodes, which may have what this machine hasn't
    context, wanted = experiments.select(name, profile, device=device if here else "cpu", only=only, root=root)
    todo = experiments.unmeasured(name, wanted, context, _devices(context, launch.cluster))
    jobs = _jobs(name, todo, context, device, launch)
    if not jobs:
        print(f"{name}: each of {len(wanted)} cases has its row")
        return 0
    _prepare(todo)
    if launch.cluster != "debug":
        return _Sweep(jobs, context).run()
    for job in jobs:  # one that fails ends in the debugger, as is submitit's way
        submitit.DebugExecutor(_folder(job) / "logs" / "%j").submit(job).results()
    return 0


def _folder(of: Context | Job) -> Path:
    return of.root.absolute() / "runs" / of.profile / "sweep"


def _devices(context: Context, cluster: str) -> set[str]:
    """Whose rows count: the devices that jobs ran on before, and this machine's where jobs run here."""
    stored = files.read_rows(_folder(context) / "devices.jsonl")
    here = set() if cluster == "slurm" else {device_name(context.device)}
    return here | {row["device"] for row in stored if row["cluster"] == cluster}


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
    more = (context.profile, device, launch, context.root.absolute(), context.code)
    return [Job(work, name, tuple(some), *more) for work, some in works.items()]


def _prepare(cases: list[dict]) -> None:
    """Load every task's data once, which prepares what isn't: jobs that start together must not all do that."""
    recipes = [case_config(case).recipe for case in cases if "recipe" in case]
    for task, protocol in sorted({(recipe.task, recipe.protocol) for recipe in recipes}):
        datasets.load(task, protocol=protocol)
    for kind, data in sorted({(case["kind"], case["data"]) for case in cases if "data" in case}):
        load_pairs(data) if kind == "text" else datasets.load(data)


# ---- starting jobs, and whether they live ----------------------------------------------------------------------------


def _lock(paths: submitit.core.utils.JobPaths) -> Path:
    """What the first process of a local job holds until it ends."""
    return paths.folder / f"lock-{socket.gethostname()}"


def _lives(job: submitit.Job) -> bool:
    """As SLURM tells, or the process that this command started, or the lock of a job that another command did."""
    return not job.done() or files.locked(_lock(job.paths))


def _living(folder: Path, cluster: str, wanted: Container[str]) -> dict[str, tuple[Job, submitit.Job]]:
    """Work -> its job that lives, and as submitit knows it, whichever command started it.

    Raises:
        InputError: SLURM doesn't say of a wanted work's job; submitit takes that for a yes.
    """
    kind, newest = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob, {}
    for logs in sorted(folder.glob("logs/*/"), key=lambda path: path.stat().st_mtime_ns):
        with contextlib.suppress(OSError, ImportError, AttributeError):  # no job, or of an earlier text of this package
            job = DelayedSubmission.load(logs / f"{logs.name}_submitted.pkl").function
            if job.launch.cluster == cluster:
                newest[job.work] = job, kind(folder / "logs" / "%j", logs.name, range(job.launch.processes))
    living = {work: (job, handle) for work, (job, handle) in newest.items() if _lives(handle)}
    for work, (_, handle) in living.items():
        require(
            handle.get_info("standard") or work not in wanted,
            f"sacct: SLURM doesn't say whether job {handle.job_id} lives. Jobs go on; call the same command later, or, "
            f"if it is known to be no more, delete {handle.paths.folder}",
        )
    return living


def _start_here(jobs: list[Job], others: list[Job]) -> Iterator[submitit.Job]:
    """Start the first jobs as processes of this machine, as many as there is room for beside the others."""
    launch, used = jobs[0].launch, {gpu for job in others for gpu in job.gpus}
    slots = _slots(launch, jobs[0].device)
    free = [slot for slot in slots if not used.intersection(slot)][: max(0, len(slots) - len(others))]
    together = len(slots) * launch.processes  # with more threads than cores all spend their time waiting
    given = together == 1 or "OMP_NUM_THREADS" in os.environ
    threads = {} if given else {"OMP_NUM_THREADS": max(1, len(os.sched_getaffinity(0)) // together)}
    for job, gpus in zip(jobs, free, strict=False):
        executor = submitit.LocalExecutor(_folder(job) / "logs" / "%j", max_num_timeout=TIME_OUTS)
        executor.update_parameters(
            timeout_min=A_YEAR, tasks_per_node=launch.processes, gpus_per_node=len(gpus), visible_gpus=gpus
        )
        with environment_variables(**threads):
            handle = executor.submit(replace(job, gpus=gpus))
        yield handle


def _slots(launch: Launch, device: str) -> list[tuple[int, ...]]:
    """The GPUs of each job that may run on this machine at a time; none each on a CPU."""
    if pick_device(device).type != "cuda":
        return [()] * (launch.parallel or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    try:
        gpus, each = [int(number) for number in visible.split(",")], launch.processes
    except ValueError as error:
        wanted = f"wanted numbers, such as 0,1; got {visible!r}. Give the GPUs by number"
        raise InputError(f"CUDA_VISIBLE_DEVICES: {wanted}") from error
    number = launch.parallel or max(1, len(gpus) // each)
    require(
        number * each <= len(gpus),
        f"parallel, processes: wanted no more than this machine's {len(gpus)} GPUs; got {number} jobs of {each}",
    )
    return [tuple(gpus[at * each : (at + 1) * each]) for at in range(number)]


def _submit(jobs: list[Job], _others: list[Job]) -> list[submitit.Job]:
    """Submit all jobs to SLURM, as one array."""
    launch, logs = jobs[0].launch, _folder(jobs[0]) / "logs" / "%j"
    executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=TIME_OUTS)
    where = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    inside = "SLURM_JOB_ID" in os.environ  # of a job, whose variables its own jobs would take for theirs
    try:
        executor.update_parameters(**slurm_parameters(jobs[0].experiment, launch, jobs[0].device))
        with clean_env() if inside else contextlib.nullcontext(), environment_variables(**where):
            return executor.submit_array(jobs)
    except (NameError, AssertionError, ValueError) as error:
        raise InputError(f"slurm: {str(error).partition(chr(10))[0]}; got {launch.slurm}") from error
    except (FailedJobError, FailedSubmissionError) as error:
        raise InputError(f"slurm: sbatch refused the jobs: {str(error).strip()}") from error


def slurm_parameters(name: str, launch: Launch, device: str) -> dict:
    """The arguments of submitit's AutoExecutor for a job of `launch.processes` processes on one machine."""
    given, several = {key.replace("-", "_"): value for key, value in launch.slurm.items()}, launch.processes > 1
    gpus = device != "cpu" and not given.keys() & {"gres", "gpus_per_node", "gpus_per_task", "num_gpus"}
    parameters = {
        "name": f"sat_lib-{name}",
        "timeout_min": given.pop("time", DEFAULT_MINUTES),
        "nodes": 1,
        "tasks_per_node": launch.processes,
        "cpus_per_task": given.pop("cpus", None),
        "mem_gb": given.pop("mem") if isinstance(given.get("mem"), int | float) else None,
        "gpus_per_node": launch.processes if gpus else None,
        "slurm_array_parallelism": launch.parallel,
        "slurm_srun_args": ["--kill-on-bad-exit=1"] if several else None,  # the others would wait for one that failed
    }
    minutes = parameters["timeout_min"]
    require(_counts(minutes), f"slurm: wanted time as whole minutes, such as time=120; got {minutes!r}")
    for key, value in given.items():
        lines = key in ("setup", "teardown", "srun_args") and isinstance(value, str)  # submitit takes lists of them
        parameters[f"slurm_{key}"] = [value] if lines else value
    return {key: value for key, value in parameters.items() if value is not None}


# ---- watching them ---------------------------------------------------------------------------------------------------


class _Sweep:
    """The jobs of one command: waiting for their turn, alive, or ended, which their rows tell."""

    def __init__(self, jobs: list[Job], context: Context):
        self.context, self.launch, self.experiment = context, jobs[0].launch, jobs[0].experiment
        self.waiting = {job.work: job for job in jobs}
        self.alive: dict[str, submitit.Job] = {}
        self.cases = {job.work: list(job.cases) for job in jobs}
        self.done = self.failed = self.left = 0  # cases
        self.failures: list[str] = []
        self.said = ""

    def run(self) -> int:
        """Start and watch to the end; the exit status."""
        try:
            self._start()
            self._report()
            if not self.launch.wait:
                logs = _folder(self.context) / "logs"
                print(f"left to SLURM, logs in {logs}; the same command without --no-wait watches them")
                return 0
            while self.alive or self.waiting:
                time.sleep(POLL_SECONDS[self.launch.cluster])
                self._look()
                self._start()
                self._report()
        except KeyboardInterrupt:
            print(f"\n{self._stop()}", flush=True)
            return 130
        print("\n".join(self.failures), end="\n" if self.failures else "", flush=True)
        return 1 if self.failures or self.left else 0

    def _start(self) -> None:
        """Start waiting jobs that there is room for. Other commands wait meanwhile, so none starts the same work."""
        if not self.waiting:
            return
        folder, here = _folder(self.context), self.launch.cluster == "local"
        with files.lock(folder / "lock", "starting jobs", wait=True, quiet=True):
            living = _living(folder, self.launch.cluster, self.waiting)
            for work in [work for work in self.waiting if work not in living]:
                if files.locked(self.context.root / work / "lock"):
                    print(f"left to another process that trains in {self.context.root / work}", flush=True)
                    self.left += len(self.waiting.pop(work).cases)
            self.alive |= {work: handle for work, (_, handle) in living.items() if work in self.waiting}
            jobs = [job for work, job in self.waiting.items() if work not in living]
            others = [job for job, _ in living.values()]
            handles = (_start_here if here else _submit)(jobs, others) if jobs else ()
            self.alive |= {job.work: handle for job, handle in zip(jobs, handles, strict=False)}
            self.waiting = {work: job for work, job in self.waiting.items() if work not in self.alive}
            while here and not all(job.done() or files.locked(_lock(job.paths)) for job in self.alive.values()):
                time.sleep(0.1)  # until other commands see that they live

    def _look(self) -> None:
        """See which jobs live, and judge those that ended by their rows."""
        submitit.SlurmJob.watcher.update()
        for work, job in list(self.alive.items()):
            if _lives(job):
                continue
            del self.alive[work]
            cases, devices = self.cases[work], _devices(self.context, self.launch.cluster)
            missing = experiments.unmeasured(self.experiment, cases, self.context, devices)
            self.done += len(cases) - len(missing)
            self.failed += len(missing)
            self.failures += [f"failed: {describe(case)}" for case in missing]
            self.failures += [_why(job)] if missing else []

    def _report(self) -> None:
        """One line, when it says something new."""
        counts = {"pending": sum(len(job.cases) for job in self.waiting.values()), "running": 0}
        for work, job in self.alive.items():
            waits = job.state.startswith(("PENDING", "REQUEUE", "UNKNOWN"))  # unknown: SLURM took it just now
            counts["pending" if waits else "running"] += len(self.cases[work])
        counts |= {"done": self.done, "failed": self.failed}
        line = f"{self.experiment}: " + ", ".join(f"{count} {state}" for state, count in counts.items())
        if line != self.said:
            print(line, flush=True)
        self.said = line

    def _stop(self) -> str:
        """End the jobs on this machine; what to tell the user."""
        if self.launch.cluster == "slurm":
            numbers = " ".join(sorted({job.job_id.partition("_")[0] for job in self.alive.values()}))
            return f"the jobs go on under SLURM and the same command watches them again; to end them: scancel {numbers}"
        self._wait_for_end(TERMINAL_SECONDS)
        for job in filter(_lives, self.alive.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGINT)  # its number is that of the process that started the others
        self._wait_for_end(10.0)
        return "stopped, with the jobs on this machine; the same command goes on from their last checkpoints"

    def _wait_for_end(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(map(_lives, self.alive.values())):
            time.sleep(0.1)


def _why(job: submitit.Job) -> str:
    """The last line of a failed job's error and the path of its log: of the process that failed first."""
    folder, errors = job.paths.folder, []
    for path in sorted(folder.glob("*_result.pkl"), key=lambda path: path.stat().st_mtime_ns):
        outcome, text = pickle.loads(path.read_bytes())
        errors += [(path.name.removesuffix("_result.pkl"), text)] if outcome == "error" else []
    process, text = errors[0] if errors else (f"{job.job_id}_0", "")
    log = folder / f"{process}_log.err"
    if not errors and log.exists():
        text = log.read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    return f"    {'' if errors else 'killed, or ended without a result: '}{lines[-1]}\n    log: {log}"
