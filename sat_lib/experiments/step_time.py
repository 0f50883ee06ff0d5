"""Time and memory of whole training steps, by attention and what computes it: notebook 04; and of several processes."""

from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
import torch

from .. import datasets
from ..attention.baselines import IMPLEMENTATIONS
from ..common import distributed, timing
from ..datasets.batches import to_device
from ..datasets.tasks import task
from ..training.recipe import BEST_MODEL, PAPER_TASKS, run_config
from ..training.trainer import Trainer
from . import transformers_layers
from .row_files import Context

# ---- whole training steps: notebook 04 -------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepKind:
    """What is timed.

    Args:
        compute: "kernel", SAT's; "library", gathers and products of our own; "transformers", the published layer; or
            "sdpa", dense attention as it is.
        phase: "sparse" is SAT's alone; all else is "dense".
        step_kind: "plain" takes PyTorch's modules one by one, as the layers of transformers do, which the "fast" step
            isn't made for.
        preset, model: of the run, and what is changed of its model; no published time is of a changed one.
    """

    attention: str
    compute: str
    phase: str = "dense"
    step_kind: str = "fast"
    preset: str = "released"
    model: dict = field(default_factory=dict)


STEP_KINDS = (
    StepKind("sat", "kernel", "sparse"),
    StepKind("sat", "kernel"),
    StepKind("sat", "kernel", "sparse", preset="best", model=BEST_MODEL),
    StepKind("dense", "sdpa"),
    *(
        StepKind(attention, compute, model=model)
        for attention, model in (("longformer", {}), ("longformer", {"dilation": 2}), ("bigbird", {}), ("lsg", {}))
        for compute in ("kernel", "library")
    ),
    StepKind("sat", "kernel", "sparse", step_kind="plain"),
    StepKind("sat", "kernel", step_kind="plain"),
    StepKind("dense", "sdpa", step_kind="plain"),
    StepKind("longformer", "transformers", step_kind="plain"),
    StepKind("bigbird", "transformers", step_kind="plain"),
)


def step_cases(profile: str) -> list[dict]:
    """A step of every kind, per task shape; at the smoke profile one image and one text shape, plain steps alone."""
    kinds, tasks, sizes = STEP_KINDS, PAPER_TASKS, {"batch": 512, "precision": "bf16"}
    if profile == "smoke":
        fast = [kind for kind in STEP_KINDS if kind.step_kind == "fast" or kind.compute == "transformers"]
        kinds = [replace(kind, step_kind="plain") for kind in fast]
        tasks, sizes = ("cifar10", "agnews"), {"batch": 4, "precision": "fp32"}
    return [{"task": name} | asdict(kind) | sizes for name in tasks for kind in kinds]


def step_time(case: dict, context: Context) -> dict:
    """Time and peak memory of whole training steps on random tokens of a task's shape, which lie on the device.

    A step is forward, backward, clipping and optimiser, and in SAT's dense phase the statistics and the transition
    test. "error" in place of numbers where the memory isn't enough for a layer of transformers. The memory is that of
    the second step, before a fast step is captured: a graph keeps what it needs, and allocates nothing any more.
    """
    device, on_cpu = context.device, context.device.type == "cpu"
    trainer, batch = step_trainer(case, device)
    published = case["compute"] == "transformers"
    result = {"density": trainer.config.recipe.density, "parameters": trainer.model.parameter_count()}
    result["transformers"] = transformers_layers.transformers_version() if published else None
    step = partial(trainer.train_step, batch)
    try:
        step()
        memory = {"peak_bytes": timing.peak_bytes(step, device)}
        timed = timing.time_calls(step, device, warm_up=1 if on_cpu else 4, calls=5 if on_cpu else 30)
        return result | vars(timed) | memory | {"error": None}
    except torch.OutOfMemoryError as error:
        if not published:
            raise
        none = dict.fromkeys(("median_ms", "low_ms", "high_ms", "calls", "peak_bytes"))
        return result | none | {"error": f"OutOfMemoryError: {error}".splitlines()[0]}
    finally:
        del trainer, batch, step
        if not on_cpu:
            torch.cuda.empty_cache()


def step_trainer(case: dict, device: torch.device) -> tuple[Trainer, tuple[torch.Tensor, torch.Tensor]]:
    """A trainer in the phase to be timed, and its batch on the device: this process's share of the case's."""
    ours = {"implementation": case["compute"]} if case["compute"] in IMPLEMENTATIONS else {}
    config = run_config(
        case["task"],
        case["attention"],
        case["preset"],
        model=case["model"] | ours,
        batch=case["batch"],
        precision=case["precision"],
        theta=float("inf"),
        switch_at=10**9,
    )
    data = _random_splits(case["task"], case["batch"])
    trainer = Trainer(config, data, device, case["step_kind"])
    if case["compute"] == "transformers":
        transformers_layers.use_transformers(trainer.model)
    batch = to_device(data.train, distributed.share(np.arange(case["batch"])), device)
    if case["phase"] == "sparse":
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


def throughput(case: dict, context: Context) -> dict:
    """Time of whole steps one after another in either phase, by the wall clock, on random tokens."""
    lengths = {"rounds": 3, "calls": 5} if context.device.type == "cpu" else {}
    result = {}
    for phase in ("dense", "sparse"):
        kind = StepKind(case["attention"], "kernel", phase, case["step_kind"])
        trainer, batch = step_trainer(case | asdict(kind), context.device)
        timed = timing.time_rounds(partial(trainer.train_step, batch), context.device, **lengths)
        result |= {f"{phase}_{name}": value for name, value in vars(timed).items()}
        result[f"{phase}_examples_per_second"] = 1000 * case["batch"] / timed.median_ms
    return result
