"""Named experiments: a list of cases each, and a measurement that turns a case into a row.

A row is {"experiment", "case", "result", "stamp"}, one JSON line, written as soon as it is measured. Rows of the
`paper` profile lie in data/results and are committed; a case that has a row from the same device is not measured
again. Rows of the `smoke` profile lie in runs/smoke and count only for the source text they were measured with.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from . import (
    benchmarks,
    comparison,
    datasets,
    distributed,
    files,
    finetuning,
    motivation,
    peers,
    runs,
    sentence_pairs,
    timing,
)
from .ablations import ablate, ablation_cases, best_cases, diagnose_run, diagnosis_cases
from .attention import ATTENTION
from .baselines import IMPLEMENTATIONS
from .errors import require
from .pretrained import PATTERNS
from .recipes import BEST_MODEL, PAPER_TASKS, run_config
from .tasks import task
from .train import Trainer, to_device
from .training_cases import SHORT_RUN, Context, case_config, load_data, run_case, run_folder, train

PROFILES = ("smoke", "paper")
# ---- training: notebooks 02 and 03 -----------------------------------------------------------------------------------


def training_cases(profile: str) -> list[dict]:
    """One SAT run."""
    return [run_case("digits16" if profile == "smoke" else "cifar10", "sat", 0, profile)]


def accuracy_cases(profile: str) -> list[dict]:
    """Every task with every attention and seed, seed by seed."""
    seeds = {"digits16": 2, "docstrings": 1} if profile == "smoke" else dict.fromkeys(PAPER_TASKS, 5)
    return _every_attention(seeds, profile)


def _every_attention(seeds: dict[str, int], profile: str, **changes) -> list[dict]:
    """So many seeds of each task with every attention, seed by seed."""
    return [
        run_case(name, attention, seed, profile, **changes)
        for seed in range(max(seeds.values()))
        for name in seeds
        if seed < seeds[name]
        for attention in ATTENTION
    ]


def short_cases(profile: str) -> list[dict]:
    """IMDB, and the text sets of the paper, in 1,000 steps instead of 30,000; three seeds.

    For what a user has of these sets: a part of AG News or Yelp is learnt by heart in fewer steps still.
    """
    if profile == "smoke":
        return _every_attention({"docstrings": 1}, profile)
    return _every_attention(dict.fromkeys(("imdb", "agnews", "yelp"), 3), profile, **SHORT_RUN)


# ---- whole training steps: notebook 04 -------------------------------------------------------------------------------

# What is timed -> attention, its implementation, changes of the model. "sat" is timed in either phase, "sat, best" is
# the sparse one of that preset. "plain" kinds take PyTorch's modules one by one, as the layers of transformers do,
# which the fast step isn't made for.
STEP_KINDS = {
    "sat, sparse phase": ("sat", "kernel", {}),
    "sat, dense phase": ("sat", "kernel", {}),
    "sat, best": ("sat", "kernel", BEST_MODEL),  # a changed model, which no published time is of
    "dense": ("dense", "sdpa", {}),
    "longformer, kernel": ("longformer", "kernel", {}),
    "longformer, library": ("longformer", "library", {}),
    "longformer D = 2, kernel": ("longformer", "kernel", {"dilation": 2}),
    "longformer D = 2, library": ("longformer", "library", {"dilation": 2}),
    "bigbird, kernel": ("bigbird", "kernel", {}),
    "bigbird, library": ("bigbird", "library", {}),
    "lsg, kernel": ("lsg", "kernel", {}),
    "lsg, library": ("lsg", "library", {}),
    "sat, sparse phase, plain": ("sat", "kernel", {}),
    "sat, dense phase, plain": ("sat", "kernel", {}),
    "dense, plain": ("dense", "sdpa", {}),
    "longformer, transformers": ("longformer", "transformers", {}),
    "bigbird, transformers": ("bigbird", "transformers", {}),
}


def step_cases(profile: str) -> list[dict]:
    """A step of every model and implementation, per task shape; one image and one text shape at the smoke profile."""
    smoke = profile == "smoke"
    return [
        {
            "task": name,
            "kind": kind,
            "attention": attention,
            "implementation": implementation,
            "model": model,
            "batch": 4 if smoke else 512,
            "precision": "fp32" if smoke else "bf16",
            "step": "plain" if smoke or kind.endswith(("plain", "transformers")) else "fast",
        }
        | ({"preset": "best"} if kind == "sat, best" else {})
        for name in (("cifar10", "agnews") if smoke else PAPER_TASKS)
        for kind, (attention, implementation, model) in STEP_KINDS.items()
        if not (smoke and kind.endswith("plain"))  # all are, there
    ]


def step_time(case: dict, context: Context) -> dict:
    """Time and peak memory of whole training steps on random tokens of a task's shape, which lie on the device.

    A step is forward, backward, clipping and optimiser, and in SAT's dense phase the statistics and the transition
    test. "error" in place of numbers where the memory isn't enough for a layer of transformers. The memory is that of
    the second step, before a fast step is captured: a graph keeps what it needs, and allocates nothing any more.
    """
    device, on_cpu = context.device, context.device.type == "cpu"
    trainer, batch = _step_trainer(case, device)
    result = {"density": trainer.config.recipe.density, "parameters": trainer.model.parameter_count()}
    if case["implementation"] == "transformers":
        result["transformers"] = peers.transformers_version()
    step = partial(trainer.train_step, batch)
    try:
        step()
        memory = {"peak_bytes": timing.peak_bytes(step, device)}
        timed = timing.time_calls(step, device, warm_up=1 if on_cpu else 4, calls=5 if on_cpu else 30)
        return result | vars(timed) | memory
    except torch.OutOfMemoryError as error:
        if case["implementation"] != "transformers":
            raise
        none = dict.fromkeys(("median_ms", "low_ms", "high_ms", "calls", "peak_bytes"))
        return result | none | {"error": f"OutOfMemoryError: {error}".splitlines()[0]}
    finally:
        del trainer, batch, step
        if not on_cpu:
            torch.cuda.empty_cache()


def _step_trainer(case: dict, device: torch.device) -> tuple[Trainer, tuple[torch.Tensor, torch.Tensor]]:
    """A trainer in the phase to be timed, and its batch on the device: this process's share of the case's."""
    ours = {"implementation": case["implementation"]} if case["implementation"] in IMPLEMENTATIONS else {}
    config = run_config(
        case["task"],
        case["attention"],
        case.get("preset", "released"),
        model=case["model"] | ours,
        batch=case["batch"],
        precision=case["precision"],
        theta=float("inf"),
        switch_at=10**9,
    )
    data = _random_splits(case["task"], case["batch"])
    trainer = Trainer(config, data, device, case["step"])
    if case["implementation"] == "transformers":
        peers.use_transformers(trainer.model)
    batch = to_device(data.train, distributed.share(np.arange(case["batch"])), device)
    if case["kind"].startswith("sat, sparse phase") or "preset" in case:
        trainer.train_step(batch)
        trainer.enter_sparse_phase(list(trainer.rule.maps))
    return trainer, batch


def _random_splits(name: str, examples: int) -> datasets.Splits:
    """Random tokens of a task's shape; in text tasks the last tenth of each example is padding."""
    chosen, random = task(name), np.random.default_rng(0)
    tokens = random.integers(1, min(256, chosen.vocab), (examples, chosen.length)).astype(chosen.dtype)
    if chosen.masked_attention:
        tokens[:, -chosen.length // 10 :] = 0
    labels = random.integers(0, len(chosen.classes), examples)
    split = datasets.Split(tokens, np.arange(examples), labels)
    return datasets.Splits(chosen, split, split, split, "dev")


# ---- one model on several GPUs: notebook 07 --------------------------------------------------------------------------


def data_parallel_cases(profile: str) -> list[dict]:
    """SAT by 1, 2 and 4 processes: its steps, the published batch shared or one for each; and whole runs by several.

    One process also takes each share alone; its runs are those of `accuracy`.
    """
    smoke = profile == "smoke"
    name, batch, seeds, numbers = ("digits16", 16, 1, (1, 2)) if smoke else ("cifar10", 512, 3, (1, 2, 4))
    changes = {"steps": 60, "warm_up": 6, "eval_every": 20, "switch_at": 20} if smoke else {}
    step = {"precision": "fp32", "step": "plain"} if smoke else {"precision": "bf16", "step": "fast"}
    same = {"task": name, "attention": "sat", **step}
    cases = []
    for processes in numbers:
        batches = {batch // number for number in numbers} if processes == 1 else {batch, batch * processes}
        cases += [{"sweep": "step", "processes": processes, "batch": size, **same} for size in sorted(batches)]
        cases += [
            {"sweep": "training", "processes": processes} | run_case(name, "sat", seed, profile, **changes)
            for seed in range(seeds)
            if processes > 1
        ]
    return cases


def data_parallel(case: dict, context: Context) -> dict:
    """Measure a case in as many new processes as it says, one too."""
    if case["sweep"] == "training":
        load_data(case_config(case))  # what is wrong with them is told here, not in each process
    return distributed.launch(case["processes"], context.device, _as_one_of_several, case, context)


def _as_one_of_several(device: torch.device, case: dict, context: Context) -> dict:
    context = replace(context, device=device)
    return train(case, context) if case["sweep"] == "training" else _throughput(case, context)


def _throughput(case: dict, context: Context) -> dict:
    """Time of whole steps one after another in either phase, by the wall clock, on random tokens."""
    lengths = {"rounds": 3, "calls": 5} if context.device.type == "cpu" else {}
    result = {}
    for phase in ("dense", "sparse"):
        kind = {"kind": f"sat, {phase} phase", "implementation": "kernel", "model": {}}
        trainer, batch = _step_trainer(case | kind, context.device)
        timed = timing.time_rounds(partial(trainer.train_step, batch), context.device, **lengths)
        result |= {f"{phase}_{name}": value for name, value in vars(timed).items()}
        result[f"{phase}_examples_per_second"] = 1000 * case["batch"] / timed.median_ms
    return result


# ---- pretrained models: notebooks 01 and 09 --------------------------------------------------------------------------

PUBLISHED_MODELS = (("google/vit-base-patch16-224-in21k", "image", "cifar10"), ("bert-base-uncased", "text", "mrpc"))
STAND_INS = (("cifar-vit", "image", "digits"), ("minilm", "text", "mrpc"))
SMOKE_FINE_TUNING = {
    "image": {"epochs": 1, "batch": 16, "rate": 1e-3, "train_examples": 320},
    "text": {"epochs": 1, "batch": 8, "rate": 1e-4, "train_examples": 120, "test_examples": 100},
}
PAPER_FINE_TUNING = {
    "cifar-vit": {"epochs": 5, "batch": 32, "rate": 5e-4},
    "minilm": {"epochs": 4, "batch": 32, "rate": 1e-4},
    "google/vit-base-patch16-224-in21k": {"epochs": 3, "batch": 64, "rate": 1e-4},
    "bert-base-uncased": {"epochs": 3, "batch": 32, "rate": 3e-5},
}


def _models(profile: str) -> list[tuple[str, str, str]]:
    """Model, kind, data: at the smoke profile the stand-ins, on MRPC if it is there; at the paper profile all."""
    if profile == "paper":
        return [*PUBLISHED_MODELS, *STAND_INS]
    return [
        (model, kind, sentence_pairs.default_pairs() if kind == "text" else data) for model, kind, data in STAND_INS
    ]


def _fine_tuning_case(model: str, kind: str, data: str, profile: str, **more) -> dict:
    settings = SMOKE_FINE_TUNING[kind] if profile == "smoke" else PAPER_FINE_TUNING[model] | {"precision": "bf16"}
    return {"model": model, "kind": kind, "data": data, **settings, **more}


def motivation_cases(profile: str) -> list[dict]:
    """Part of an epoch of dense fine-tuning of each model, at the paper profile a whole one, in float32."""
    smoke = profile == "smoke"
    more = {"train_examples": 160} if smoke else {"epochs": 1, "precision": "fp32"}
    examples = {"examples": 16 if smoke else 64}
    return [_fine_tuning_case(*model, profile, **more, **examples) for model in _models(profile)]


def look_at_maps(case: dict, context: Context) -> dict:
    """See `motivation.look_at_maps`."""
    settings = {name: value for name, value in case.items() if name != "examples"}
    return motivation.look_at_maps(finetuning.FineTuning(**settings), case["examples"], context.device)


def finetuning_cases(profile: str) -> list[dict]:
    """Every model dense, and with SAT by pattern and density; at the paper profile three seeds and both rules."""
    smoke = profile == "smoke"
    densities = (0.25,) if smoke else (0.5, 0.25, 0.125)
    variants = [(pattern, "zero", density) for pattern in PATTERNS for density in densities]
    variants += [] if smoke else [(pattern, "drop", 0.25) for pattern in PATTERNS]
    cases = []
    for seed in range(1 if smoke else 3):
        for model in _models(profile):
            base = _fine_tuning_case(*model, profile, seed=seed)
            cases.append(base | {"attention": "dense"})
            for pattern, pruned, density in variants:
                sat = {"attention": "sat", "pattern": pattern, "pruned": pruned, "density": density}
                cases.append(base | sat | {"switch_share": 0.25})
    return cases


def fine_tune(case: dict, context: Context) -> dict:
    """See `finetuning.fine_tune`."""
    return finetuning.fine_tune(finetuning.FineTuning(**case), context.device)


def pretrained_step_cases(profile: str) -> list[dict]:
    """A step of BERT base and ViT base at their usual lengths, by attention; two layers at the smoke profile."""
    smoke = profile == "smoke"
    shapes = [("bert-base", 128, 16)] + ([] if smoke else [("bert-base", 512, 32), ("vit-base", 197, 16)])
    kinds = [(name, None) for name in finetuning.STEP_ATTENTIONS[:-1]]
    kinds += [(finetuning.STEP_ATTENTIONS[-1], density) for density in ((0.25,) if smoke else (0.5, 0.25, 0.125))]
    sizes = {"batch": 4, "layers": 2} if smoke else {"batch": 64, "layers": 12}
    sizes["precision"] = "fp32" if smoke else "bf16"
    return [
        {"architecture": architecture, "length": length, "block": block, "attention": name, "density": density, **sizes}
        for architecture, length, block in shapes
        for name, density in kinds
    ]


# ---- what patterns keep of a map: notebook 08 ------------------------------------------------------------------------


def pattern_cases(profile: str) -> list[dict]:
    """One SAT run with snapshots over its phases, and how its maps are compared.

    At the smoke profile it is made to switch after a quarter; at the paper profile it is the published recipe in 2,000
    steps instead of 10,000: the maps settle early.
    """
    smoke = profile == "smoke"
    steps = [0, 50, 100, 200, 400] if smoke else [0, 50, 100, 200, 500, 1_000, 2_000]
    compared = {"snapshots": steps, "examples": 8 if smoke else 16, "densities": [0.02, 0.05, 0.1, 0.25, 1.0]}
    changes = {} if smoke else {"steps": steps[-1]}
    return [run_case("digits" if smoke else "cifar10", "sat", 0, profile, **changes) | compared]


def patterns(case: dict, context: Context) -> dict:
    """Train the run, or read it, and compare what patterns keep of its maps; see `comparison.compare_snapshots`."""
    config, steps = case_config(case), tuple(case["snapshots"])
    data, folder = load_data(config), run_folder(case, context)
    result = runs.fit(config, data, folder, context.device, snapshots=steps)
    tokens, _ = to_device(data.test, np.arange(case["examples"]), context.device)
    return {
        **{name: result[name] for name in ("test_accuracy", "transition_step", "seconds")},
        **datasets.provenance(config.recipe.task),
        "test_examples": result["best"][result["phase"]]["test_examples"],
        "folder": str(folder.relative_to(context.root)),
        "density": config.recipe.density,
        **comparison.compare_snapshots(folder, steps, tokens, tuple(case["densities"])),
    }


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
    "step": (step_cases, step_time),
    "data_parallel": (data_parallel_cases, data_parallel),
    "patterns": (pattern_cases, patterns),
    "motivation": (motivation_cases, look_at_maps),
    "finetuning": (finetuning_cases, fine_tune),
    "pretrained_step": (pretrained_step_cases, _on_device(finetuning.pretrained_step)),
    "kernels": (benchmarks.kernel_cases, _on_device(benchmarks.kernel_time)),
    "layer": (benchmarks.layer_cases, _on_device(benchmarks.layer_time)),
    "attention": (benchmarks.attention_cases, _on_device(benchmarks.attention_time)),
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
    context = Context(profile, timing.pick_device(device), Path(root), files.source_digest("experiments"))
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
    row |= {"stamp": timing.stamp(context.device) | taken, "code": context.code}
    if distributed.rank() == 0:
        device = row["stamp"]["device"]
        path = _path(name, context)
        append_once(path, row, lambda: files.digest(case) in _by_case(_stored(name, context), device))
    return row


def append_once(path: Path, row: dict, there: Callable[[], bool]) -> None:
    """Append a row unless `there()`; processes that end at the same time do so one after another."""
    with files.lock(path, f"writing {path}", wait=True, quiet=True):
        if not there():
            files.append_row(path, row)


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
    found = _by_case(stored, timing.device_name(context.device) if measure else _main_device(stored))
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


def _that_fit(todo: list[dict], wanted: list[dict], context: Context) -> list[dict]:
    """Those to do that this machine has the GPUs for; all, where none of the wanted is one: an error then says why."""
    most = distributed.most_processes(context.device)
    if all(case.get("processes", 1) > most for case in wanted):
        return todo
    fitting = [case for case in todo if case.get("processes", 1) <= most]
    if len(fitting) < len(todo):
        print(f"{len(todo) - len(fitting)} cases are left out: they want more than the {most} GPUs here", flush=True)
    return fitting


def describe(case: dict) -> str:
    """A case in words, for a line on the terminal."""
    return ", ".join(f"{key} {value}" for key, value in _plain(case).items())


def _plain(case: dict) -> dict:
    return {name: value for name, value in case.items() if not isinstance(value, dict)}


def _path(name: str, context: Context) -> Path:
    return context.rows_folder / f"{name}.jsonl"


def _stored(name: str, context: Context) -> list[dict]:
    """The rows that count at a profile."""
    stored = files.read_rows(_path(name, context))
    return [row for row in stored if context.profile == "paper" or row["code"] == context.code]


def _by_case(stored: list[dict], device: str | None) -> dict[str, dict]:
    """Case digest -> newest row of that device."""
    return {files.digest(row["case"]): row for row in stored if row["stamp"]["device"] == device}


def _main_device(stored: list[dict]) -> str | None:
    devices = [row["stamp"]["device"] for row in stored]
    return max(devices, key=devices.count) if devices else None


def _flat(row: dict) -> dict:
    stamp = {name: row["stamp"][name] for name in ("commit", "device", "python", "torch", "numpy", "date")}
    taken = {"wall_seconds": row["stamp"].get("wall_seconds")}  # None in rows older than it
    return row["case"] | row["result"] | stamp | taken | {"experiment": row["experiment"]}


def table(frame: pd.DataFrame) -> str:
    """The rows as text, for the terminal: what is a number, a word or a short list."""
    plain = [name for name in frame.columns if not frame[name].map(lambda cell: isinstance(cell, list | dict)).any()]
    hidden = {"experiment", "commit", "python", "torch", "numpy", "date", "wall_seconds"}
    return frame[[name for name in plain if name not in hidden]].to_string(index=False, float_format="%.4g")
