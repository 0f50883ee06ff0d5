"""Time and memory of whole training steps, by attention and implementation: notebook 04; and of several processes."""

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
        result["transformers"] = transformers_layers.transformers_version()
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
        transformers_layers.use_transformers(trainer.model)
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
