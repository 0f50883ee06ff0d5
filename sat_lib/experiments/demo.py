"""SAT in a minute: a tiny model goes through its phases on the CPU, and the terminal shows what happens."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import datasets
from ..attention.layout import BlockLayout
from ..attention.ops import block_sparse_attention
from ..attention.patterns import generate_layout
from ..attention.static_patterns import random_layout
from ..attention.statistics import mass_kept
from ..common import files, timing
from ..figures import training as training_figures
from ..training.recipe import RunConfig, run_config
from ..training.trainer import Trainer

CPU = torch.device("cpu")
UNICODE, ASCII = " ░▒▓█", " .:+#"  # shades, from light to dark
LONGER = (2048, 32, 0.05)  # length, block and density at which attention is timed too
LEVELS = (0.5, 1, 2, 4)  # times the mean of a map: where the next shade begins


def demo_config() -> RunConfig:
    """Two layers, 256 tokens in blocks of 16, a tenth of the blocks. theta is the published one."""
    recipe = {"steps": 240, "warm_up": 30, "eval_every": 20, "batch": 16, "rate": 0.006, "density": 0.1, "theta": 1.7}
    return run_config("digits16", "sat", model={"block": 16, "sparsity_init": "calibrated"}, **recipe)


def demo(config: RunConfig, data: datasets.Splits, folder: Path) -> Path:
    """Train a run of SAT on the CPU, show its map and layout, time attention; all is printed, one picture written.

    Returns:
        The path of the picture in `folder`. It is written whole or not at all, over that of an earlier demo.
    """
    _say_what_comes(config, data)
    trainer = Trainer(config, data, CPU)
    history, picture = _train(trainer), Path(folder) / "demo.png"
    maps = {name: value.tolist() for name, value in trainer.maps.items()}
    run = {"history": history, "maps": maps, "transition_step": trainer.transition_step}
    figure, _ = training_figures.training(pd.DataFrame([run]))
    with files.atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png")
    if trainer.transition_step is not None:
        _show_maps(trainer.maps["transition"], trainer.maps["kept"])
    _say_times(config)
    print(
        f"\nPicture of the run: {picture}\nNext: `make reproduce` draws every figure from small runs like this one, in "
        "about 10 minutes.\nREADME.md says how to use the attention in a model of yours."
    )
    return picture


def _say_what_comes(config: RunConfig, data: datasets.Splits) -> None:
    model, recipe = config.model, config.recipe
    print(
        f"A Transformer of {model.layers} layers learns to tell {len(data.train):,} handwritten digits apart, in "
        f"{recipe.steps} steps.\nIts attention maps have {model.blocks} x {model.blocks} blocks, and it computes all "
        "of them at first.\nOnce the map of every layer is sparse (skewness of at least "
        f"{recipe.theta:g}) and stable (the distance\nfrom the step before changes by less than {recipe.delta:g} %), "
        f"training goes on with {recipe.density:.0%} of them.\n\nDense phase",
        flush=True,
    )


def _train(trainer: Trainer) -> list[dict]:
    """A record of every step. Says how far the run has come, and at the end what each phase has reached."""
    recipe, data, history, dev = trainer.config.recipe, trainer.data, [], {}
    while trainer.step < recipe.steps:
        record = trainer.train_step()
        history.append(record | {"loss": float(record["loss"])})
        if trainer.transition_step == record["step"]:
            _say_transition(trainer)
        elif trainer.step % recipe.eval_every == 0:
            dev[trainer.phase] = trainer.evaluate(data.dev).accuracy
            _say_progress(history[-1], dev[trainer.phase])
    if trainer.transition_step is None:
        print(f"The test didn't pass in {trainer.step} steps: the model stayed dense.")
    reached = ", ".join(f"{accuracy:.0%} at the end of the {phase} phase" for phase, accuracy in dev.items())
    print(f"\nDev accuracy on {len(data.dev)} digits: {reached} (chance: {1 / len(data.task.classes):.0%}).")
    print("This is one run of a tiny model. It shows how SAT works, and proves nothing about how well.", flush=True)
    return history


def _say_progress(record: dict, accuracy: float) -> None:
    line = f"  step {record['step'] + 1:3}  loss {record['loss']:.2f}  dev accuracy {accuracy:4.0%}"
    if "skewness" in record:
        skewness, change = (", ".join(f"{value:.1f}" for value in record[k]) for k in ("skewness", "change_percent"))
        line += f"  by layer: skewness {skewness}, change {change} %"
    print(line, flush=True)


def _say_transition(trainer: Trainer) -> None:
    why = "as it was told to" if trainer.config.recipe.switch_at is not None else "the test passed in every layer"
    kept = trainer.maps["kept"][0]
    print(f"Transition at step {trainer.step}: {why}\n\nSparse phase: {kept.sum()} of {kept.numel()} blocks a layer")


def _show_maps(pooled: Tensor, kept: Tensor) -> None:
    """The first layer's map, pooled over blocks, beside its layout; then what every layout holds. (layers, N, N)."""
    shades, width = _shades(), 2 * kept.shape[-1]
    print(f"\nLayer 1 at the transition, block by block\n{'attention map':{width}}    blocks that are kept")
    for values, marks in zip(pooled[0] / pooled[0].mean(), kept[0].tolist(), strict=True):
        levels = torch.bucketize(values, torch.tensor(LEVELS), right=True).tolist()
        layout = "".join(2 * (shades[-1] if mark else shades[1]) for mark in marks)
        print(f"{''.join(2 * shades[level] for level in levels)}    {layout}")
    steps = ", ".join(f"{shade} from {level:g}" for shade, level in zip(shades[1:], LEVELS, strict=True))
    print(f"shades of the map, over its mean: {steps}\n")
    for layer, (values, grid) in enumerate(zip(pooled, kept, strict=True), 1):
        layout = BlockLayout(grid, 1)
        best = generate_layout(values, layout.density, 1)
        print(
            f"Layer {layer}: the kept blocks hold {mass_kept(values, layout):.1%} of the attention; as many at random "
            f"would hold {layout.density:.1%}, the best {mass_kept(values, best):.1%}."
        )


def _shades() -> str:
    """Unicode where the terminal takes it."""
    encoding = sys.stdout.encoding or "ascii"
    return UNICODE if UNICODE.encode(encoding, "ignore").decode(encoding) == UNICODE else ASCII


def _say_times(config: RunConfig) -> None:
    print("\nA call of attention with its gradients, in plain PyTorch on this CPU")
    for length, block, density in ((config.model.length, config.model.block, config.recipe.density), LONGER):
        blocks = length // block
        sparse = partial(block_sparse_attention, layout=random_layout(blocks, blocks, density, block, seed=0))
        dense_ms, sparse_ms = (_milliseconds(call, length) for call in (F.scaled_dot_product_attention, sparse))
        times = f"dense {dense_ms:.1f} ms, block-sparse {sparse_ms:.1f} ms"
        print(f"  {length:4} tokens, {density:.0%} of the blocks: {times} ({dense_ms / sparse_ms:.2f} times as fast)")
    print("SAT's CUDA kernels want a GPU: python -m sat_lib bench attention", flush=True)


def _milliseconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], length: int) -> float:
    inputs = [torch.randn(2, 2, length, 32, requires_grad=True) for _ in range(3)]
    call = lambda: torch.autograd.grad(attend(*inputs).sum(), inputs)
    return timing.time_calls(call, CPU, warm_up=2, calls=9, seconds=2).median_ms
