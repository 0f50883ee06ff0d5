"""Named experiments: a list of cases each, and a measurement that turns a case into a row (see `rows`)."""

import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from ..common import device as devices
from ..common import distributed, files
from ..common.device import device_name, pick_device
from ..common.errors import require
from ..common.sources import source_digest
from . import kernels, patterns, pretrained, step_time
from .ablations import ablate, ablation_cases, best_cases, diagnose_run, diagnosis_cases
from .pretrained import fine_tune, finetuning_cases, motivation, motivation_cases, pretrained_step_cases
from .row_files import (
    PROFILES,
    Context,
    _by_case,
    _flat,
    _main_device,
    _path,
    _plain,
    _stored,
    _that_fit,
    append_once,
    describe,
)
from .training import accuracy_cases, data_parallel, data_parallel_cases, short_cases, train, training_cases

# ---- cases to rows ---------------------------------------------------------------------------------------------------


def _on_device(measure: Callable[[dict, torch.device], dict]) -> Callable[[dict, Context], dict]:
    return lambda case, context: measure(case, context.device)


EXPERIMENTS: dict[str, tuple[Callable[[str], list[dict]], Callable[[dict, Context], dict]]] = {
    "training": (training_cases, train),
    "accuracy": (accuracy_cases, train),
    "accuracy_short": (short_cases, train),
    "ablations": (ablation_cases, ablate),
    "best": (best_cases, ablate),
    "diagnosis": (diagnosis_cases, diagnose_run),
    "step": (step_time.step_cases, step_time.step_time),
    "data_parallel": (data_parallel_cases, data_parallel),
    "patterns": (patterns.pattern_cases, patterns.patterns),
    "motivation": (motivation_cases, motivation),
    "finetuning": (finetuning_cases, fine_tune),
    "pretrained_step": (pretrained_step_cases, _on_device(pretrained.pretrained_step)),
    "kernels": (kernels.kernel_cases, _on_device(kernels.kernel_time)),
    "layer": (kernels.layer_cases, _on_device(kernels.layer_time)),
    "attention": (kernels.attention_cases, _on_device(kernels.attention_time)),
}


def select(
    name: str, profile: str, *, device: str = "auto", only: dict | None = None, root: Path = files.ROOT
) -> tuple[Context, list[dict]]:
    """Where an experiment is run, and the cases of it that are wanted; see `rows` for the arguments.

    Raises:
        InputError: an unknown experiment or profile, no such device, or no case has the values of `only`.
    """
    require(name in EXPERIMENTS, f"experiment: wanted one of {sorted(EXPERIMENTS)}; got {name!r}")
    require(profile in PROFILES, f"profile: wanted one of {PROFILES}; got {profile!r}")
    context = Context(profile, pick_device(device), Path(root), source_digest("experiments"))
    wanted = [case for case in EXPERIMENTS[name][0](profile) if (only or {}).items() <= _plain(case).items()]
    require(wanted, f"only: no case of {name} at the {profile} profile has {only}")
    return context, wanted


def unmeasured(name: str, cases: list[dict], context: Context, devices: set[str]) -> list[dict]:
    """Those of the cases that have no row from any of the devices."""
    stored = _stored(name, context)
    found = {digest for device in devices for digest in _by_case(stored, device)}
    return [case for case in cases if files.digest(case) not in found]


def measure_case(name: str, case: dict, context: Context) -> dict:
    """Measure one case and append its row. Of processes that measure it together the first one writes.

    Raises:
        InputError: several processes, and the case isn't a training run, which is all that they can do together.
    """
    together = distributed.size() == 1 or ("recipe" in case and "processes" not in case)
    require(together, f"processes: {name} is measured by one process; got {distributed.size()}. Start without torchrun")
    start = time.perf_counter()
    row = {"experiment": name, "case": case, "result": EXPERIMENTS[name][1](case, context)}
    taken = {"wall_seconds": round(time.perf_counter() - start, 1)}
    row |= {"stamp": devices.stamp(context.device) | taken, "code": context.code}
    if distributed.rank() == 0:
        device = row["stamp"]["device"]
        path = _path(name, context)
        append_once(path, row, lambda: files.digest(case) in _by_case(_stored(name, context), device))
    return row


def rows(
    name: str,
    profile: str = "smoke",
    *,
    device: str = "auto",
    measure: bool = True,
    only: dict | None = None,
    report: bool = False,
    root: Path = files.ROOT,
) -> pd.DataFrame:
    """An experiment's rows, one a case, measuring those that are missing.

    Args:
        name: key of `EXPERIMENTS`. device: "auto", "cpu" or "cuda". measure: False reads only what there is, from the
            device with the most rows. only: cases with these values alone. report: print a line before each
            measurement.

    Returns:
        The columns of case and result side by side, and experiment, commit, device, torch, date, wall_seconds of each
        row's stamp.
        Empty if nothing was measured and nothing may be. `frame.attrs["missing"]` counts the cases without a row.

    Raises:
        InputError: an unknown experiment or profile, or what the measurement says.
    """
    context, wanted = select(name, profile, device=device, only=only, root=root)
    stored = _stored(name, context)
    found = _by_case(stored, device_name(context.device) if measure else _main_device(stored))
    todo = distributed.from_first([case for case in wanted if measure and files.digest(case) not in found])
    fitting = _that_fit(todo, wanted, context)
    for number, case in enumerate(fitting, 1):
        if report:
            print(f"{name} {number}/{len(fitting)}: {describe(case)}", flush=True)
        found[files.digest(case)] = measure_case(name, case, context)
    kept = [found[files.digest(case)] for case in wanted if files.digest(case) in found]
    frame = pd.DataFrame([_flat(row) for row in kept])
    frame.attrs["missing"] = len(wanted) - len(kept)
    return frame
