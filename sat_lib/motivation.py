"""What attention maps of pretrained models look like before, during and after fine-tuning: the paper's figure 1."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .errors import require
from .finetuning import FineTuner, FineTuning
from .map_metrics import describe, offset_profile, patch_maps, stride_mass, stride_peak
from .pretrained import attention_maps

CHUNK = 8  # examples whose maps are held together


class Look(NamedTuple):
    """The attention maps of some examples, summed up layer by layer."""

    metrics: list[dict[str, Tensor]]  # per layer, by name: (H,), mean over the examples
    mean_maps: Tensor  # (layers, H, L, L) float64
    first: Tensor  # (layers, H, L, L): those of the first example
    first_tokens: int  # of it, without padding


def look_at_maps(settings: FineTuning, examples: int, device: torch.device) -> dict:
    """`A^s` of randomly chosen training examples before, half way through and after fine-tuning, and of the untrained
    model as a control.

    Returns:
        metrics: per moment, layer and head the means over examples of `map_metrics.describe`, and for images
            stride_mass and stride_share.
        profiles: for images, per moment and layer the offset profile of the patches and its period.
        shown: the first example's map half way through, (L, L) in hundred-thousandths, whole numbers: of the head with
            most mass on the diagonal (images: at the stride of the grid), shown_head of shown_layer.
        length, grid (patches in a row of an image), tokens (of the first example), and what `fine_tune` says of data.
    """
    require(examples >= 1, f"examples: wanted at least 1; got {examples}")
    looks, result = {}, {}
    for moment, tuner in _moments(settings, device):
        require(examples <= len(tuner.train), f"examples: wanted at most {len(tuner.train)}; got {examples}")
        indices = np.random.default_rng([settings.seed, 1]).choice(len(tuner.train), examples, replace=False)
        looks[moment] = (tuner.step, _look(tuner, indices))
        result = {"grid": _grid(tuner.model), "train_examples": tuner.examples, **tuner.provenance}
    shown = looks["half way"][1]
    chosen = _striking(shown)
    return {
        "metrics": [line for moment, (step, look) in looks.items() for line in _lines(moment, step, look)],
        "profiles": [
            line for moment, (step, look) in looks.items() for line in _profiles(moment, step, look, result["grid"])
        ],
        "shown": (shown.first[chosen] * 1e5).round().int().tolist(),
        "shown_layer": chosen[0],
        "shown_head": chosen[1],
        "length": shown.first.shape[-1],
        "tokens": shown.first_tokens,
        "examples": examples,
        **result,
    }


def _moments(settings: FineTuning, device: torch.device) -> Iterator[tuple[str, FineTuner]]:
    """The untrained model, then one run: before, half way, at the end."""
    yield "untrained", FineTuner(replace(settings, pretrained=False), device)
    tuner = FineTuner(settings, device)
    yield "pretrained", tuner
    for moment, until in (("half way", tuner.steps // 2), ("fine-tuned", tuner.steps)):
        while tuner.step < until:
            tuner.train_step()
        yield moment, tuner


def _grid(model: nn.Module) -> int | None:
    """Patches in a row of an image; None for text."""
    patch = getattr(model.config, "patch_size", None)
    return None if patch is None else model.config.image_size // patch


def _look(tuner: FineTuner, indices: np.ndarray) -> Look:
    grid, sums, total, first, tokens = _grid(tuner.model), None, 0.0, None, 0
    for start in range(0, len(indices), CHUNK):
        inputs, _ = tuner.train.batch(indices[start : start + CHUNK], tuner.device)
        maps = attention_maps(tuner.model, inputs)
        real = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        found = [_layer_metrics(layer, real, grid) for layer in maps]
        sums = found if sums is None else [_added(*pair) for pair in zip(sums, found, strict=True)]
        total = total + torch.stack([layer.sum(0, dtype=torch.float64) for layer in maps])
        if first is None:
            first = torch.stack([layer[0] for layer in maps]).cpu()
            tokens = first.shape[-1] if real is None else int(real[0].sum())
    count = len(indices)
    metrics = [{name: value.cpu() / count for name, value in layer.items()} for layer in sums]
    return Look(metrics, (total / count).cpu(), first, tokens)


def _layer_metrics(maps: Tensor, real: Tensor | None, grid: int | None) -> dict[str, Tensor]:
    """By name (H,), summed over the batch."""
    found = describe(maps, real)
    if grid is not None:
        found["stride_mass"], share = stride_mass(patch_maps(maps, grid), grid)
        found["stride_share"] = torch.full_like(found["stride_mass"], share)
    return {name: value.sum(0) for name, value in found.items()}


def _added(some: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + more[name] for name, value in some.items()}


def _striking(look: Look) -> tuple[int, int]:
    """Layer and head with most mass on the diagonal, for images at the stride of the grid."""
    name = "stride_mass" if "stride_mass" in look.metrics[0] else "diagonal_mass"
    values = torch.stack([layer[name] for layer in look.metrics])
    layer, head = divmod(int(values.argmax()), values.shape[1])
    return layer, head


def _lines(moment: str, step: int, look: Look) -> list[dict]:
    return [
        {
            "moment": moment,
            "step": step,
            "layer": layer,
            "head": head,
            **{name: round(float(value[head]), 5) for name, value in metrics.items()},
        }
        for layer, metrics in enumerate(look.metrics)
        for head in range(look.first.shape[1])
    ]


def _profiles(moment: str, step: int, look: Look, grid: int | None) -> list[dict]:
    """Per layer of an image model: mean entry by distance, relative to the mean, up to 4 rows of the grid."""
    if grid is None:
        return []
    lines = []
    for layer, maps in enumerate(look.mean_maps):
        profile = offset_profile(patch_maps(maps[None], grid))
        period, height = stride_peak(profile, most=2 * grid)
        values = [round(value, 4) for value in profile[: 4 * grid + 1].tolist()]
        lines.append({"moment": moment, "step": step, "layer": layer, "period": period, "height": round(height, 4)})
        lines[-1]["profile"] = values
    return lines
