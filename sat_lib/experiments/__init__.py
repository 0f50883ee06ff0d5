"""Named experiments: a list of cases each, and a measurement that turns a case into a row (see `rows`).

A file a subject, which has its cases and measures them. row_files: where rows lie, and as tables; sweep: cases as jobs;
kernel_summary: what the command line prints of kernels; demo: SAT in a minute.
"""

import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from ..common import distributed, files
from ..common.device import device_name, pick_device, stamp
from ..common.errors import require
from ..common.sources import DIGEST_RULE, source_digest
from ..training.recipe import case_config
from . import fast_layers, kernel_summary, kernels, patterns, pretrained, step_time
from .ablations import ablate, ablation_cases, best_cases, diagnose_run, diagnosis_cases
from .row_files import PROFILES, Context, Experiment, RowFile, describe, frame, plain
from .training import accuracy_cases, data_parallel, data_parallel_cases, short_cases, train, training_cases


def _on_device(measure: Callable[[dict, torch.device], dict]) -> Callable[[dict, Context], dict]:
    return lambda case, context: measure(case, context.device)


EXPERIMENTS = {
    "training": Experiment(training_cases, train),
    "accuracy": Experiment(accuracy_cases, train),
    "accuracy_short": Experiment(short_cases, train),
    "ablations": Experiment(ablation_cases, ablate),
    "best": Experiment(best_cases, ablate),
    "diagnosis": Experiment(diagnosis_cases, diagnose_run),
    "step": Experiment(step_time.step_cases, step_time.step_time),
    "data_parallel": Experiment(data_parallel_cases, data_parallel),
    "patterns": Experiment(patterns.pattern_cases, patterns.patterns),
    "motivation": Experiment(pretrained.motivation_cases, pretrained.motivation),
    "finetuning": Experiment(pretrained.finetuning_cases, pretrained.fine_tune),
    "pretrained_step": Experiment(pretrained.pretrained_step_cases, _on_device(pretrained.pretrained_step)),
    "kernels": Experiment(kernels.kernel_cases, _on_device(kernels.kernel_time), kernel_summary.show),
    "layer": Experiment(fast_layers.layer_cases, _on_device(fast_layers.layer_time)),
    "attention": Experiment(kernels.attention_cases, _on_device(kernels.attention_time), kernel_summary.show_attention),
}


def rows(
    name: str,
    profile: str = "smoke",
    *,
    device: str = "auto",
    measure: bool = True,
    only: dict | None = None,
    report: bool = False,
    again: bool = False,
    needed: bool | list[dict] = False,
    root: Path = files.ROOT,
) -> pd.DataFrame:
    """An experiment's rows, one a case, measuring those that are missing.

    Args:
        name: key of `EXPERIMENTS`. device: "auto", "cpu" or "cuda". measure: False reads only what there is, from the
            device with the most rows. only: cases with these values alone. report: print a line before each
            measurement. again: measure cases that have a row too; the new row takes its place.
        needed: what can't be done without: True, any row; or for each of several sets of values a row that has them.

    Returns:
        The columns of case and result side by side, `resolved` of training runs, and experiment, commit, device, torch,
        date, wall_seconds of each row's stamp. Without rows the columns of the cases alone.
        Empty if nothing was measured and nothing may be. `attrs` of the frame: "profile", and as "missing" how many
        cases have no row.

    Raises:
        InputError: an unknown experiment or profile, what the measurement says, or a row that is needed isn't there.
    """
    context, wanted = select(name, profile, device=device, only=only, root=root)
    file = RowFile.of(name, context)
    if measure:
        here = device_name(context.device)
        todo = wanted if again else file.missing(wanted, [here])
        todo = distributed.from_first(_that_fit(todo, wanted, context))
        for number, case in enumerate(todo, 1):
            if report:
                print(f"{name} {number}/{len(todo)}: {describe(case)}", flush=True)
            measure_case(name, case, context, again=again)
    found = file.read(here if measure else file.main_device())
    kept = [found[digest] for digest in map(files.digest, wanted) if digest in found]
    table = frame(kept, EXPERIMENTS[name].cases(profile))
    table.attrs |= {"profile": profile, "missing": len(wanted) - len(kept)}
    for values in [{}] if needed is True else needed or []:
        _require_row(table, name, profile, only or {}, values)
    return table


def select(
    name: str, profile: str, *, device: str = "auto", only: dict | None = None, root: Path = files.ROOT
) -> tuple[Context, list[dict]]:
    """Where an experiment is run, and the cases of it that are wanted; see `rows` for the arguments.

    Raises:
        InputError: an unknown experiment or profile, no such device, or no case has the values of `only`.
    """
    require(name in EXPERIMENTS, f"experiment: wanted one of {sorted(EXPERIMENTS)}; got {name!r}")
    require(profile in PROFILES, f"profile: wanted one of {PROFILES}; got {profile!r}")
    context = Context(profile, pick_device(device), Path(root), source_digest("sat_lib.experiments"))
    wanted = [case for case in EXPERIMENTS[name].cases(profile) if (only or {}).items() <= plain(case).items()]
    require(wanted, f"only: no case of {name} at the {profile} profile has {only}")
    return context, wanted


def measure_case(name: str, case: dict, context: Context, *, again: bool = False) -> None:
    """Measure one case and append its row. Of processes that measure it together the first one writes.

    Raises:
        InputError: several processes, and the case isn't a training run, which is all that they can do together.
    """
    trains = "recipe" in case
    together = distributed.size() == 1 or (trains and "processes" not in case)
    require(together, f"processes: {name} is measured by one process; got {distributed.size()}. Start without torchrun")
    start = time.perf_counter()
    result = EXPERIMENTS[name].measure(case, context)
    row = {"experiment": name, "case": case} | ({"resolved": case_config(case).as_dict()} if trains else {})
    row |= {"result": result, "stamp": stamp(context.device)}
    row["stamp"]["wall_seconds"] = round(time.perf_counter() - start, 1)
    row |= {"code": context.code, "digest_rule": DIGEST_RULE}
    if distributed.rank() == 0:
        RowFile.of(name, context).append(row, again)
    distributed.barrier()  # all of them read it then


def _that_fit(todo: list[dict], wanted: list[dict], context: Context) -> list[dict]:
    """Those to do that this machine has the GPUs for; all, where none of the wanted is one: an error then says why."""
    most = distributed.most_processes(context.device)
    if all(case.get("processes", 1) > most for case in wanted):
        return todo
    fitting = [case for case in todo if case.get("processes", 1) <= most]
    if len(fitting) < len(todo):
        print(f"{len(todo) - len(fitting)} cases are left out: they want more than the {most} GPUs here", flush=True)
    return fitting


def _require_row(table: pd.DataFrame, name: str, profile: str, only: dict, values: dict) -> None:
    """Raise InputError, with the command that measures it, unless some row has these values."""
    chosen = [shlex.quote(f"{column}={value}") for column, value in (only | values).items()]
    which = f" with {', '.join(f'{column} {value}' for column, value in values.items())}" if values else ""
    command = " ".join([f"bench {name} --profile {profile}", *(["--only"] if chosen else []), *chosen])
    require(
        (table[list(values)] == pd.Series(values)).all(axis=1).any(),
        f"rows: no rows of {name}{which} at the {profile} profile; measure them with: python -m sat_lib {command}",
    )
