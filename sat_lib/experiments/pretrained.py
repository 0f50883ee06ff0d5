"""Pretrained models: their maps, their fine-tuning, and the time of a step; notebooks 01 and 09."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.static_patterns import random_layout
from ..common import timing
from ..common.errors import require
from ..datasets import pairs
from ..maps import describe, offset_profile, patch_maps, stride_mass, stride_peak
from ..pretrained import finetune
from ..pretrained.encoders import attention_maps
from ..pretrained.finetune import FineTuner, FineTuning
from ..pretrained.sparse_attention import PATTERNS, SparseAttention
from .row_files import Context

CHUNK = 8  # examples whose maps are held together


def look_at_maps(settings: FineTuning, examples: int, device: torch.device) -> dict:
    """`A^s` of randomly chosen training examples before, half way through and after fine-tuning, and of the untrained
    model as a control.

    Returns:
        metrics: per moment, layer and head the means over examples of `maps.describe`, and for images
            stride_mass and stride_share.
        profiles: for images, per moment and layer the offset profile of the patches and its period.
        shown: the first example's map half way through, (L, L) in hundred-thousandths, whole numbers: of the head with
            most mass on the diagonal (images: at the stride of the grid), shown_head of shown_layer.
        length, grid (patches in a row of an image), tokens (of the first example), and what `fine_tune` says of data.
    """
    require(examples >= 1, f"examples: wanted at least 1; got {examples}")
    metrics, profiles = [], []
    for moment, tuner in _moments(settings, device):
        require(examples <= len(tuner.train), f"examples: wanted at most {len(tuner.train)}; got {examples}")
        indices = np.random.default_rng([settings.seed, 1]).choice(len(tuner.train), examples, replace=False)
        grid, when = _grid(tuner.model), {"moment": moment, "step": tuner.step}
        found, mean_maps, first, tokens = _look(tuner, indices)
        metrics += [when | line for line in found.round(5).reset_index().to_dict("records")]
        profiles += [] if grid is None else [when | line for line in _profiles(mean_maps, grid)]
        if moment == "half way":
            shown, shown_tokens = first, tokens
            layer, head = map(int, found["diagonal_mass" if grid is None else "stride_mass"].idxmax())
    return {
        "metrics": metrics,
        "profiles": profiles,
        "shown": (shown[layer, head] * 1e5).round().int().tolist(),
        "shown_layer": layer,
        "shown_head": head,
        "length": shown.shape[-1],
        "tokens": shown_tokens,
        "examples": examples,
        "grid": grid,
        "train_examples": tuner.examples,
        **tuner.provenance,
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


def _look(tuner: FineTuner, indices: np.ndarray) -> tuple[pd.DataFrame, Tensor, Tensor, int]:
    """The attention maps of some examples.

    Returns:
        Metrics by layer and head, means over the examples; mean maps (layers, H, L, L) float64; those of the first
        example; how many tokens it has without padding.
    """
    grid, sums, total = _grid(tuner.model), 0.0, 0.0
    for start in range(0, len(indices), CHUNK):
        inputs, _ = tuner.train.batch(indices[start : start + CHUNK], tuner.device)
        maps = attention_maps(tuner.model, inputs)
        real = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        numbers = [_layer_metrics(layer, real, grid) for layer in maps]
        sums = sums + pd.concat(numbers, keys=range(len(maps)), names=["layer", "head"])
        total = total + torch.stack([layer.sum(0, dtype=torch.float64) for layer in maps])
        if start == 0:
            first = torch.stack([layer[0] for layer in maps]).cpu()
            tokens = first.shape[-1] if real is None else int(real[0].sum())
    return sums / len(indices), (total / len(indices)).cpu(), first, tokens


def _layer_metrics(maps: Tensor, real: Tensor | None, grid: int | None) -> pd.DataFrame:
    """A line a head, summed over the batch."""
    found = describe(maps, real)
    if grid is not None:
        found["stride_mass"], share = stride_mass(patch_maps(maps, grid), grid)
        found["stride_share"] = torch.full_like(found["stride_mass"], share)
    return pd.DataFrame({name: value.sum(0).cpu().numpy() for name, value in found.items()})


def _profiles(mean_maps: Tensor, grid: int) -> Iterator[dict]:
    """Per layer of an image model: mean entry by distance, relative to the mean, up to 4 rows of the grid."""
    for layer, maps in enumerate(mean_maps):
        profile = offset_profile(patch_maps(maps[None], grid))
        period, height = stride_peak(profile, most=2 * grid)
        values = [round(value, 4) for value in profile[: 4 * grid + 1].tolist()]
        yield {"layer": layer, "period": period, "height": round(height, 4), "profile": values}


# ---- pretrained models: notebooks 01 and 09 --------------------------------------------------------------------------

SMOKE_FINE_TUNING = {
    ("cifar-vit", "image"): {"epochs": 1, "batch": 16, "rate": 1e-3, "train_examples": 240, "test_examples": 180},
    ("minilm", "text"): {"epochs": 1, "batch": 8, "rate": 1e-4, "train_examples": 96, "test_examples": 100},
}
PAPER_FINE_TUNING = {
    ("google/vit-base-patch16-224-in21k", "image", "cifar10"): {"epochs": 3, "batch": 64, "rate": 1e-4},
    ("bert-base-uncased", "text", "mrpc"): {"epochs": 3, "batch": 32, "rate": 3e-5},
    ("cifar-vit", "image", "digits"): {"epochs": 5, "batch": 32, "rate": 5e-4},
    ("minilm", "text", "mrpc"): {"epochs": 4, "batch": 32, "rate": 1e-4},
}


def _fine_tuning_cases(profile: str, **more) -> list[dict]:
    """Each model: at the smoke profile the stand-ins, on MRPC if it is there; at the paper profile all."""
    if profile == "paper":
        settings = {key: value | {"precision": "bf16"} for key, value in PAPER_FINE_TUNING.items()}
    else:
        data = {"image": "digits", "text": pairs.default_pairs()}
        settings = {(model, kind, data[kind]): value for (model, kind), value in SMOKE_FINE_TUNING.items()}
    return [
        {"model": model, "kind": kind, "data": data} | settings[model, kind, data] | more
        for model, kind, data in settings
    ]


def motivation_cases(profile: str) -> list[dict]:
    """Part of an epoch of dense fine-tuning of each model, at the paper profile a whole one, in float32."""
    smoke = profile == "smoke"
    more = {"train_examples": 96} if smoke else {"epochs": 1, "precision": "fp32"}
    return _fine_tuning_cases(profile, **more, examples=16 if smoke else 64)


def motivation(case: dict, context: Context) -> dict:
    """See `look_at_maps`."""
    settings = {name: value for name, value in case.items() if name != "examples"}
    return look_at_maps(FineTuning(**settings), case["examples"], context.device)


def finetuning_cases(profile: str) -> list[dict]:
    """Every model dense, and with SAT by pattern and density; at the paper profile three seeds and both rules."""
    smoke = profile == "smoke"
    densities = (0.25,) if smoke else (0.5, 0.25, 0.125)
    variants = [(pattern, "zero", density) for pattern in PATTERNS for density in densities]
    variants += [] if smoke else [(pattern, "drop", 0.25) for pattern in PATTERNS]
    cases = []
    for seed in range(1 if smoke else 3):
        for base in _fine_tuning_cases(profile, seed=seed):
            cases.append(base | {"attention": "dense"})
            for pattern, pruned, density in variants:
                sat = {"attention": "sat", "pattern": pattern, "pruned": pruned, "density": density}
                cases.append(base | sat | {"switch_share": 0.25})
    return cases


def fine_tune(case: dict, context: Context) -> dict:
    """See `finetune.fine_tune`."""
    return finetune.fine_tune(FineTuning(**case), context.device)


def pretrained_step_cases(profile: str) -> list[dict]:
    """A step of BERT base and ViT base at their usual lengths, by attention; two layers at the smoke profile."""
    smoke = profile == "smoke"
    shapes = [("bert-base", 128, 16)] + ([] if smoke else [("bert-base", 512, 32), ("vit-base", 197, 16)])
    kinds = [("eager", "dense", None), ("sdpa", "dense", None), ("sat", "dense", None)]
    kinds += [("sat", "sparse", density) for density in ((0.25,) if smoke else (0.5, 0.25, 0.125))]
    sizes = {"batch": 4, "layers": 2} if smoke else {"batch": 64, "layers": 12}
    sizes["precision"] = "fp32" if smoke else "bf16"
    return [
        {"architecture": architecture, "length": length, "block": block}
        | {"attention": attention, "phase": phase, "density": density, **sizes}
        for architecture, length, block in shapes
        for attention, phase, density in kinds
    ]


# ---- the time of a step at the published sizes -----------------------------------------------------------------------


def pretrained_step(case: dict, device: torch.device) -> dict:
    """Time and peak memory of a training step of BERT base or ViT base, with random weights, inputs and layouts.

    Args:
        case: architecture ("bert-base" or "vit-base"), layers, length, batch, precision, attention ("eager", "sdpa" or
            "sat"), phase, and for the sparse one density and block.

    The last tenth of the texts is padding. A step is forward, backward and AdamW; in SAT's dense phase the statistics
    and the transition test too.
    """
    torch.manual_seed(0)
    model = _architecture(case).to(device).train()
    inputs = _random_inputs(case, model, device)
    sat = None
    if case["attention"] == "sat":
        sat = SparseAttention(model, inputs, block=case["block"], density=case["density"] or 1.0, theta=math.inf)
        if case["phase"] == "sparse":
            blocks, layers = -(-sat.length // sat.block), range(len(sat.sparsity))
            sat.enter_sparse_phase([random_layout(blocks, blocks, case["density"], sat.block, seed) for seed in layers])
    else:
        model.set_attn_implementation(case["attention"])
    optimiser = torch.optim.AdamW([*model.parameters(), *(sat.parameters() if sat else ())], lr=1e-5)
    labels = torch.zeros(case["batch"], dtype=torch.int64, device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=case["precision"] == "bf16"):
            loss = F.cross_entropy(model(**inputs).logits.float(), labels)
        optimiser.zero_grad(set_to_none=True)
        (loss + sat.loss() if sat else loss).backward()
        optimiser.step()
        if sat:
            sat.step()

    on_cpu = device.type == "cpu"
    timed = timing.time_calls(step, device, warm_up=1 if on_cpu else 5, calls=3 if on_cpu else 30)
    return vars(timed) | {"peak_bytes": timing.peak_bytes(step, device), "parameters": model.num_parameters()}


def _architecture(case: dict) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

    settings = {"num_hidden_layers": case["layers"], "attention_probs_dropout_prob": 0.0}
    if case["architecture"] == "bert-base":
        return BertForSequenceClassification(BertConfig(**settings))
    return ViTForImageClassification(ViTConfig(**settings))


def _random_inputs(case: dict, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    batch, length = case["batch"], case["length"]
    if case["architecture"] == "vit-base":
        return {"pixel_values": torch.randn(batch, 3, model.config.image_size, model.config.image_size, device=device)}
    tokens = torch.randint(1, model.config.vocab_size, (batch, length), device=device)
    mask = torch.ones_like(tokens)
    mask[:, length - length // 10 :] = 0
    return {"input_ids": tokens, "attention_mask": mask}
