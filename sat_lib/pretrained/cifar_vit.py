"""The small ViT that stands in for a downloaded one: trained on gray CIFAR-10, and shipped in data/pretrained.

    python -m sat_lib pretrain          # on a GPU, about 7 minutes on an H100; goes on where it was cut off

It is transformers' own ViTForImageClassification on 32 x 32 pixels in patches of 2: 257 tokens, the class token first,
in a patch grid 16 wide.
"""

import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import datasets
from ..common import files
from ..common.device import stamp
from ..common.errors import require
from ..datasets.batches import batch_indices, to_device
from ..datasets.tasks import task
from ..training.checkpoint import load_checkpoint, save_checkpoint
from .encoders import pixels
from .finetune import Images, accuracy, rate_schedule

SIDE, PATCH = 32, 2  # pixels
CHECKPOINT_SECONDS = 60


@dataclass(frozen=True)
class Pretraining:
    """Sizes and recipe. Learning rate: linear warm-up, cosine to 0. Images: shifted by up to 4 pixels, mirrored,
    one square of `erased` pixels' side blanked, mixed in pairs (mixup, Beta(`mixup`, `mixup`))."""

    layers: int = 6
    width: int = 192
    heads: int = 6
    hidden: int = 576
    epochs: int = 100
    batch: int = 512
    rate: float = 0.001
    warm_up: int = 500
    weight_decay: float = 0.05
    smoothing: float = 0.1
    mixup: float = 0.2
    erased: int = 8
    seed: int = 0

    def __post_init__(self):
        for name in ("layers", "width", "heads", "hidden", "epochs", "batch", "warm_up"):
            require(getattr(self, name) >= 1, f"{name}: wanted at least 1; got {getattr(self, name)}")
        require(self.width % self.heads == 0, f"heads: {self.heads} don't divide a width of {self.width}")
        for name in ("rate", "mixup"):
            require(getattr(self, name) > 0, f"{name}: wanted more than 0; got {getattr(self, name)}")
        require(0 <= self.erased <= SIDE, f"erased: wanted 0 to {SIDE} pixels; got {self.erased}")


def vit(settings: Pretraining) -> nn.Module:
    """The untrained model, without dropout in its attention."""
    from transformers import ViTConfig, ViTForImageClassification

    classes = task("cifar10").classes
    config = ViTConfig(
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.hidden,
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(classes)),
        label2id={name: label for label, name in enumerate(classes)},
    )
    return ViTForImageClassification(config)


def pretrain(settings: Pretraining, folder: Path, work: Path, device: torch.device, *, progress: bool = True) -> dict:
    """Train on CIFAR-10's training split, or go on; write config.json, model.safetensors and README.md to `folder`.

    Args:
        work: folder for the checkpoint that an interrupted run goes on from.

    Returns:
        What the model card says: settings, accuracies, parameters, seconds, stamp.

    Raises:
        InputError: `folder` holds a model already, `work` a run of other settings, or CIFAR-10 isn't prepared.
    """
    there = folder / "model.safetensors"
    require(not there.exists(), f"folder: {there} exists. Name another with --folder, or move it away")
    data = datasets.load("cifar10")
    provenance = datasets.provenance("cifar10")
    with files.lock(work / "lock", f"pretraining in {work}"):
        model, seconds = _trained(asdict(settings) | provenance, settings, data, work, device, progress)
        model.half().float()  # accuracies are those of the weights as they are shipped
        result = {
            "settings": asdict(settings),
            "dev_accuracy": accuracy(model, Images(data.dev, SIDE, 1), 500, device),
            "dev_examples": len(data.dev),
            "test_accuracy": accuracy(model, Images(data.test, SIDE, 1), 500, device),
            "test_examples": len(data.test),
            "parameters": model.num_parameters(),
            "seconds": round(seconds),
            "train_examples": len(data.train),
            **provenance,
            "stamp": stamp(device),
        }
        _write(model, result, folder)
    return result


def _trained(
    what: dict, settings: Pretraining, data, work: Path, device: torch.device, progress: bool
) -> tuple[nn.Module, float]:
    """The model and its seconds. `what` tells runs apart: a checkpoint of another one isn't gone on with."""
    torch.manual_seed(settings.seed)
    model = vit(settings).to(device)
    optimiser = torch.optim.AdamW(_decayed(model, settings.weight_decay), lr=settings.rate)
    steps = settings.epochs * (len(data.train) // settings.batch)
    first, seconds = 0, 0.0
    if (work / "last.pt").exists():
        state = load_checkpoint(work / "last.pt", device)
        require(
            state["what"] == what,
            f"settings: {work} holds a run with {state['what']}; wanted {what}. Delete it to start anew",
        )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, seconds = state["step"], state["seconds"]
    fall = lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    schedule = rate_schedule(optimiser, settings.warm_up, fall, first)
    started = saved = time.monotonic()
    model.train()
    for step in tqdm(range(first, steps), initial=first, total=steps, disable=not progress, mininterval=2.0):
        loss = _train_step(model, optimiser, data.train, settings, step, device)
        schedule.step()
        now = time.monotonic()
        if now - saved > CHECKPOINT_SECONDS or step == steps - 1:
            require(bool(loss.isfinite()), f"rate: the loss is {float(loss)} at step {step}. Lower the rate")
            state = {"what": what, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
            state |= {"step": step + 1, "seconds": seconds + now - started}
            save_checkpoint(work / "last.pt", state)
            saved = now
    return model.eval(), seconds + time.monotonic() - started


def _decayed(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: matrices decay, vectors and positions don't."""
    parameters = dict(model.named_parameters())
    free = [name for name, value in parameters.items() if value.dim() < 2 or "embeddings" in name]
    return [
        {"params": [value for name, value in parameters.items() if name not in free], "weight_decay": weight_decay},
        {"params": [parameters[name] for name in free], "weight_decay": 0.0},
    ]


def _train_step(model, optimiser, split, settings: Pretraining, step: int, device) -> Tensor:
    random = np.random.default_rng([settings.seed, step])
    tokens, labels = to_device(split, batch_indices(len(split), settings.batch, step, settings.seed), device)
    images = augment(pixels(tokens), settings.erased, random)
    share = float(random.beta(settings.mixup, settings.mixup))
    other = torch.as_tensor(random.permutation(len(labels)), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(pixel_values=images.lerp(images[other], 1 - share)).logits.float()
    losses = [F.cross_entropy(logits, some, label_smoothing=settings.smoothing) for some in (labels, labels[other])]
    loss = share * losses[0] + (1 - share) * losses[1]
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.detach()


def augment(images: Tensor, erased: int, random: np.random.Generator) -> Tensor:
    """Shift (b, 1, S, S) images by up to 4 pixels, mirror half of them, and blank one square of side `erased` in each.

    What moves in from outside is black (-1), what is blanked is gray (0).
    """
    count, _, side, _ = images.shape
    draw = lambda high: torch.as_tensor(random.integers(0, high, (count, 1)), device=images.device)
    place = torch.arange(side, device=images.device)
    rows = place + draw(9)  # of the image padded by 4
    columns = place + draw(9)
    columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    padded = F.pad(images, (4, 4, 4, 4), value=-1.0)[:, 0]
    example = torch.arange(count, device=images.device)[:, None, None]
    moved = padded[example, rows[:, :, None], columns[:, None, :]]
    top, left = draw(side - erased + 1), draw(side - erased + 1)
    inside = [(place >= edge) & (place < edge + erased) for edge in (top, left)]
    return moved.masked_fill(inside[0][:, :, None] & inside[1][:, None, :], 0.0)[:, None]


def _write(model: nn.Module, result: dict, folder: Path) -> None:
    """The model in float16 with its card; each file whole or not at all, model.safetensors last.

    transformers writes the weights under the names of the hub, which differ from the modules' and between versions.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model.to("cpu", torch.float16).save_pretrained(temporary)
        config, weights = (Path(temporary, name).read_bytes() for name in ("config.json", "model.safetensors"))
    files.write(folder / "config.json", config)
    files.write(folder / "README.md", model_card(result))
    files.write_json(folder / "training.json", result)
    files.write(folder / "model.safetensors", weights)


def model_card(result: dict) -> str:
    """README.md of the shipped model: what it is, from what, how good."""
    settings, made = result["settings"], result["stamp"]
    official = "the official archive" if result["data_official"] else "files without the official archive's checksum"
    lines = {
        "data": f"CIFAR-10 in gray as sat_lib tokenises it, {result['train_examples']:,} training images ({official})",
        "length": f"{settings['epochs']} epochs of batches of {settings['batch']}, {result['seconds']} s",
        "optimiser": f"AdamW, rate {settings['rate']}, weight decay {settings['weight_decay']}, bfloat16 autocast",
        "rate": f"{settings['warm_up']} steps of warm-up, then cosine to 0",
        "augmentation": f"shifts by up to 4 pixels, mirroring, {settings['erased']} x {settings['erased']} pixels "
        f"blanked, mixup {settings['mixup']}, label smoothing {settings['smoothing']}",
        "test accuracy": f"{result['test_accuracy']:.2%} of {result['test_examples']:,} images, as shipped",
        "dev accuracy": f"{result['dev_accuracy']:.2%} of {result['dev_examples']:,} images; the last step is kept",
        "made by": f"`python -m sat_lib pretrain` at commit {made['commit']}, seed {settings['seed']}",
        "on": f"{made['device']}, PyTorch {made['torch']}, {made['date']}",
    }
    table = "".join(f"| {name} | {text} |\n" for name, text in lines.items())
    return f"""# cifar-vit: a small ViT on gray CIFAR-10

The stand-in for a downloaded ViT: transformers' `ViTForImageClassification`, {result["parameters"]:,} parameters,
{settings["layers"]} layers of width {settings["width"]} with {settings["heads"]} heads. It takes 32 x 32 gray pixels
from -1 to 1 in patches of {PATCH} (257 tokens, the class token first). Weights are float16.

| | |
| --- | --- |
{table}
Use: to look at attention maps, and to fine-tune from. It has seen nothing but CIFAR-10, without colours. training.json
has all numbers. MIT licence.
"""
