"""Named experiments: a list of cases each, and a measurement that turns a case into a row.

A row is {"experiment", "case", "result", "stamp"}, one JSON line, written as soon as it is measured. Rows of the
`paper` profile lie in data/results and are committed; a case that has a row from the same device is not measured
again. Rows of the `smoke` profile lie in runs/smoke and count only for the source text they were measured with.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from .attention import ATTENTION
from .baselines import BASELINES, IMPLEMENTATIONS
from .errors import require
from .pretrained import PATTERNS
from .pattern import diagnose
from .recipes import PAPER_TASKS, RunConfig, best_settings, run_config
from .reference import pool_blocks
from .tasks import task
from .train import Trainer, to_device

PROFILES = ("smoke", "paper")
HISTORY_POINTS = 400  # of a training curve that go into its row


@dataclass(frozen=True)
class Context:
    """Where and on what an experiment is run."""

    profile: str
    device: torch.device
    root: Path
    code: str  # digest of the source text behind this module

    @property
    def rows_folder(self) -> Path:
        return self.root / ("data/results" if self.profile == "paper" else "runs/smoke/rows")

    @property
    def training_folder(self) -> Path:
        """Of training runs; smoke runs are kept apart by the code they ran."""
        return self.root / "runs" / self.profile / ("training" if self.profile == "paper" else f"training-{self.code}")


# ---- training: notebooks 02, 03 and 06 -------------------------------------------------------------------------------

SMOKE_RUN = {
    "digits": {"steps": 400, "warm_up": 40, "eval_every": 100, "batch": 4, "rate": 0.006, "switch_at": 100},
    "digits16": {"model": {"block": 16}, "steps": 300, "warm_up": 30, "eval_every": 50, "batch": 16, "rate": 0.006},
    "docstrings": {"model": {"layers": 1}, "steps": 300, "warm_up": 30, "eval_every": 100, "batch": 8, "rate": 0.004},
}


def _run_case(task_name: str, attention: str, seed: int, profile: str, **changes) -> dict:
    settings = (SMOKE_RUN[task_name] if profile == "smoke" else {}) | changes
    model = settings.pop("model", {})
    if profile == "smoke" and attention in BASELINES:
        model = model | {"implementation": "library"}  # the faster one on a CPU
    return {"task": task_name, "attention": attention, "seed": seed, "model": model, "recipe": settings}


def case_config(case: dict) -> RunConfig:
    """The run that a training case stands for."""
    return run_config(case["task"], case["attention"], model=case["model"], seed=case["seed"], **case["recipe"])


def training_cases(profile: str) -> list[dict]:
    """One SAT run."""
    return [_run_case("digits16" if profile == "smoke" else "cifar10", "sat", 0, profile)]


def accuracy_cases(profile: str) -> list[dict]:
    """Every task with every attention and seed, seed by seed."""
    seeds = {"digits16": 2, "docstrings": 1} if profile == "smoke" else dict.fromkeys(PAPER_TASKS, 5)
    return _every_attention(seeds, profile)


def _every_attention(seeds: dict[str, int], profile: str, **changes) -> list[dict]:
    """So many seeds of each task with every attention, seed by seed."""
    return [
        _run_case(name, attention, seed, profile, **changes)
        for seed in range(max(seeds.values()))
        for name in seeds
        if seed < seeds[name]
        for attention in ATTENTION
    ]


SHORT_RUN = {"steps": 1_000, "eval_every": 50}


def short_cases(profile: str) -> list[dict]:
    """IMDB, and the text sets of the paper, in 1,000 steps instead of 30,000; three seeds.

    For what a user has of these sets: a part of AG News or Yelp is learnt by heart in fewer steps still.
    """
    if profile == "smoke":
        return _every_attention({"docstrings": 1}, profile)
    return _every_attention(dict.fromkeys(("imdb", "agnews", "yelp"), 3), profile, **SHORT_RUN)


# What SAT's layout can come from in the ablations, beside the settings of the preset "best": recipe, model.
SHARED = {"pattern_heads": "shared"}
RELEASED_SCORES = {"sparsity_init": "released", "sparsity_target": "attention"}
CALIBRATED_SCORES = {"sparsity_init": "calibrated", "sparsity_target": "attention"}
LAYOUTS = {
    "correlation, learned": ({}, {}),
    "near, own heads": ({"pattern": "near"}, {}),
    "diagonal": ({"pattern": "near"} | SHARED, {}),
    "nearest": ({"pattern": "near", "pattern_budget": "blocks", "density": None} | SHARED, {}),
    "released": ({"pattern_budget": "blocks", "density": None} | SHARED, RELEASED_SCORES),
    "calibrated": ({"pattern_budget": "blocks", "density": None} | SHARED, CALIBRATED_SCORES),
    "correlation, largest": ({"pattern_budget": "blocks", "density": None} | SHARED, {}),
    "random, balanced": ({"pattern": "random"}, {}),
    "random": ({"pattern": "random", "pattern_budget": "blocks", "density": None} | SHARED, {}),
    "attention, balanced": ({"pattern": "attention"}, {}),
    **{
        f"{name}, by row": ({"pattern": name, "pattern_budget": "rows", "density": None} | SHARED, {})
        for name in ("attention", "gradient", "taylor", "gate", "fisher", "value", "excess", "content")
    },
    "gradient, balanced": ({"pattern": "gradient"}, {}),
    "gate, balanced": ({"pattern": "gate"}, {}),
    "random, changing": ({"pattern": "random", "pattern_refresh": 0.1}, {}),
    "correlation, refreshed": ({"pattern": "correlation", "pattern_refresh": 0.1}, {}),
}
# Per profile and task: the length of a run, the forced transition, and other values of what is changed one at a time.
# Steps are far fewer than published: accuracy peaks early, and what follows is learnt by heart.
ABLATIONS = {
    ("paper", "cifar10"): {
        "run": {"steps": 3_000, "eval_every": 250, "switch_at": 1_000},
        "layouts": tuple(LAYOUTS),
        "switch_at": (190, 500, 1_500, 2_000),
        "blocks_kept": (0.02, 0.0625, 0.125, 0.25, 0.4),
        "block": (16, 64),
        "test": {"theta": (1.7, 0.0, 3.4), "delta": (0.65, 5.2)},
    },
    ("paper", "agnews"): {
        "run": {"steps": 600, "eval_every": 50, "switch_at": 50},
        "layouts": (
            *("correlation, learned", "near, own heads", "diagonal", "nearest", "released", "calibrated"),
            *("random, balanced", "attention, balanced", "attention, by row"),
        ),
        "switch_at": (0, 100, 200),
        "blocks_kept": (0.08, 0.25),
        "block": (),
        "test": {},
    },
    ("smoke", "digits16"): {
        "run": {"switch_at": 100},
        "layouts": ("correlation, learned", "near, own heads", "released", "calibrated", "random", "attention, by row"),
        "switch_at": (25, 200),
        "blocks_kept": (0.25,),
        "block": (32,),
        "test": {"theta": (0.5, 0.0)},
    },
}


def ablation_cases(profile: str) -> list[dict]:
    """One thing changed at a time, seed by seed; what isn't is as in the preset "best", with a forced transition.

    `group` says what is changed (layout, pruned, schedule, switch_at, density, block, theta, delta), `value` to what.
    Layouts by "balanced" budgets keep one block of a row, the others as many as the task's published density says.
    theta and delta decide about the transition, so that it isn't forced there.
    """
    seeds, pairs = (range(1) if profile == "smoke" else range(3)), []
    for (wanted, name), plan in ABLATIONS.items():
        if wanted == profile:
            pairs += [(name, *one) for one in _ablations(name, plan)]
    return [
        {"group": group, "value": value} | _run_case(name, "sat", seed, profile, model=model, **recipe)
        if group != "dense"
        else {"group": group, "value": value} | _run_case(name, "dense", seed, profile, model=model, **recipe)
        for seed in seeds
        for name, group, value, model, recipe in pairs
    ]


def _ablations(name: str, plan: dict) -> list[tuple[str, object, dict, dict]]:
    """(group, value, model, recipe) of each case of a task."""
    small = SMOKE_RUN[name]["model"] if plan["layouts"][0] and name in SMOKE_RUN else {}
    base = run_config(name, "sat", model=small)
    best, run = best_settings(base.model.blocks), plan["run"]
    without_switch = {key: value for key, value in run.items() if key != "switch_at"}
    cases = []

    def add(group: str, value, recipe: dict, model: dict | None = None, **more) -> None:
        changed = best["recipe"] | run | recipe | more
        if changed["density"] is None:
            changed["density"] = base.recipe.density
        cases.append((group, value, small | best["model"] | (model or {}), changed))

    for label in plan["layouts"]:
        recipe, model = LAYOUTS[label]
        if "pattern_refresh" in recipe:
            recipe = recipe | {"pattern_refresh": round(recipe["pattern_refresh"] * run["steps"])}
        add("layout", label, recipe, model)
    cases.append(("dense", "dense", small, without_switch))
    released = LAYOUTS["released"]
    add("pruned", "zero", {}, {"pruned": "zero"})
    add("pruned", "released, zero", released[0], released[1] | {"pruned": "zero"})
    add("schedule", "constant", {}, schedule_after="constant")
    for at in plan["switch_at"]:
        add("switch_at", at, {"switch_at": at})
    for density in plan["blocks_kept"]:
        add("density", density, {"density": density})
    for block in plan["block"]:
        blocks = -(-base.model.length // block)
        add("block", block, {"density": 1 / blocks}, {"block": block})
    for setting, values in plan["test"].items():
        for value in values:
            add(setting, value, {"switch_at": None, setting: value} | {"switch_rule": "stable"})
    add("rule", "overfit", {"switch_at": None})
    return cases


def ablate(case: dict, context: Context) -> dict:
    """`train`, the dense phase shared with the other cases, without the whole history: its evaluations alone.

    Beside it, of the layouts at the transition and of the attention then: `mass_kept`, `density`, `distinct_columns`
    (share of the block columns that some row keeps) and `empty_rows`, means over the layers (and heads).
    """
    result = train(case, context, context.training_folder / "dense-phases")
    result["history"] = [line for line in result["history"] if "dev_accuracy" in line]
    maps = {name: torch.tensor(value) for name, value in result.pop("maps").items()}
    if "kept" in maps:
        pooled, kept = maps["transition"].double(), maps["kept"].bool()
        heads = kept if kept.dim() == 4 else kept[:, None]
        held = (pooled[:, None] * heads).sum((-1, -2)) / pooled.sum((-1, -2))[:, None]
        result |= {
            "mass_kept": float(held.mean()),
            "density": float(heads.double().mean()),
            "distinct_columns": float(heads.any(-2).double().mean()),
            "empty_rows": float((~heads.any(-1)).double().sum(-1).mean()),
            "diagonal": float(heads.diagonal(dim1=-2, dim2=-1).sum() / heads.sum()),
        }
    return result


def best_cases(profile: str) -> list[dict]:
    """The preset "best": CIFAR-10 in the published number of steps, five seeds; the text sets in short runs, three,
    and on the part of AG News the baselines beside it."""
    if profile == "smoke":
        return [_best_case("digits16", 0, profile)]
    cases = [_best_case("cifar10", seed, profile) for seed in range(5)]
    for seed in range(3):
        cases += [_best_case(name, seed, profile, **SHORT_RUN) for name in ("agnews", "imdb", "yelp")]
        cases += [
            _run_case(name, attention, seed, profile, **SHORT_RUN)
            for name in ("agnews",)
            for attention in BASELINES
            if attention != "dense"
        ]
    return cases


def _best_case(name: str, seed: int, profile: str, **changes) -> dict:
    small = SMOKE_RUN[name]["model"] if profile == "smoke" else {}
    best = best_settings(run_config(name, "sat", model=small).model.blocks)
    return _run_case(name, "sat", seed, profile, model=small | best["model"], **(best["recipe"] | changes))


def diagnosis_cases(profile: str) -> list[dict]:
    """The dense phase's first steps with each initialisation of W^P, looked at every `every` steps."""
    smoke = profile == "smoke"
    tasks = {"digits16": 100} if smoke else {"cifar10": 600, "agnews": 300}
    return [
        {"steps": steps, "every": 10}
        | _run_case(name, "sat", seed, profile, model=_small(name, profile) | {"sparsity_init": init}, switch_at=10**9)
        for seed in range(1 if smoke else 3)
        for name, steps in tasks.items()
        for init in ("released", "calibrated")
    ]


def _small(name: str, profile: str) -> dict:
    return SMOKE_RUN[name].get("model", {}) if profile == "smoke" else {}


def diagnose_run(case: dict, context: Context) -> dict:
    """What R~ has learnt, step by step: a column per name of `pattern.diagnose`, with step and layer."""
    config = case_config(case)
    trainer, lines = Trainer(config, _data(config), context.device), []
    for step in range(1, case["steps"] + 1):
        trainer.train_step()
        if step % case["every"] == 0:
            block = config.model.block
            pooled = [pool_blocks(mean_map, block) for mean_map in trainer.rule.maps]
            for layer, (parameter, target) in enumerate(zip(trainer.model.sparsity_parameters, pooled, strict=True)):
                seen = diagnose(parameter().detach() / parameter.scale, target, config.recipe.density)
                lines.append({"step": step, "layer": layer} | {name: round(value, 5) for name, value in seen.items()})
    columns = {name: [line[name] for line in lines] for name in lines[0]}
    return {"density": config.recipe.density, "columns": columns, **datasets.provenance(config.recipe.task)}


def train(case: dict, context: Context, shared: Path | None = None) -> dict:
    """Train a case's run (or go on, or read it if it is finished); its result with a thinned history."""
    config = case_config(case)
    data, folder = _data(config), run_folder(case, context)
    result = runs.fit(config, data, folder, context.device, shared=shared)
    maps = {name: np.round(np.asarray(value, float), 7).tolist() for name, value in result["maps"].items()}
    return {
        **{name: result[name] for name in ("test_accuracy", "phase", "transition_step", "parameters")},
        "seconds": result["seconds"],
        **{name: result.get(name) for name in ("step", "processes", "by_process")},  # older runs don't tell
        "dense_best": result["best"].get("dense"),
        "sparse_best": result["best"].get("sparse"),
        "test_examples": result["best"][result["phase"]]["test_examples"],
        "train_examples": len(data.train),
        **datasets.provenance(config.recipe.task),
        "maps": maps,
        "history": _thinned(files.read_rows(folder / "metrics.jsonl")),
    }


def _data(config: RunConfig) -> datasets.Splits:
    return distributed.first_alone(lambda: datasets.load(config.recipe.task, protocol=config.recipe.protocol))


def _thinned(metrics: list[dict]) -> list[dict]:
    """All evaluations, the dense phase's steps and every n-th other step: about HISTORY_POINTS lines of each."""
    evaluations = [row for row in metrics if "dev_accuracy" in row]
    steps = [row for row in metrics if "loss" in row]
    learning = [row for row in steps if "skewness" in row]
    others = [row for row in steps if "skewness" not in row]
    return sorted(
        (row for part in (evaluations, learning, others) for row in part[:: max(1, len(part) // HISTORY_POINTS)]),
        key=lambda row: row["step"],
    )


# ---- whole training steps: notebook 04 -------------------------------------------------------------------------------

# What is timed -> attention, its implementation, changes of the model. "sat" is timed in either phase. "plain" kinds
# take PyTorch's modules one by one, as the layers of transformers do, which the fast step isn't made for.
STEP_KINDS = {
    "sat, sparse phase": ("sat", "kernel", {}),
    "sat, dense phase": ("sat", "kernel", {}),
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
    if case["kind"].startswith("sat, sparse phase"):
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
            {"sweep": "training", "processes": processes} | _run_case(name, "sat", seed, profile, **changes)
            for seed in range(seeds)
            if processes > 1
        ]
    return cases


def data_parallel(case: dict, context: Context) -> dict:
    """Measure a case in as many new processes as it says, one too."""
    if case["sweep"] == "training":
        _data(case_config(case))  # what is wrong with them is told here, not in each process
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
    return [_run_case("digits" if smoke else "cifar10", "sat", 0, profile, **changes) | compared]


def patterns(case: dict, context: Context) -> dict:
    """Train the run, or read it, and compare what patterns keep of its maps; see `comparison.compare_snapshots`."""
    config, steps = case_config(case), tuple(case["snapshots"])
    data, folder = _data(config), run_folder(case, context)
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
    "best": (best_cases, train),
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


def run_folder(case: dict, context: Context) -> Path | None:
    """The folder of the training run that a case stands for; None of a case that isn't one.

    Where the case says how many processes train it, the folder is its own: another number would go on with the run.
    """
    if "recipe" not in case:
        return None
    by = f"-by-{case['processes']}" if "processes" in case else ""
    return context.training_folder / f"{case_config(case).name}{by}"


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
