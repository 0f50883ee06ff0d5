"""Fine-tuning of pretrained encoders, dense or with SAT, and the time of its steps.

Images are those of a `datasets` task, brought to the model's size; texts are `datasets.pairs`, cut and padded to one
length.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .. import datasets
from ..attention.statistics import mass_kept
from ..common import timing
from ..common.errors import require
from ..datasets.batches import batch_indices, to_device
from ..datasets.pairs import Pairs, load_pairs
from ..datasets.tasks import task
from .encoders import attention_maps, load_model, load_tokenizer, pixels
from .sparse_attention import SparseAttention


@dataclass(frozen=True)
class FineTuning:
    """One run. `kind` is "image" or "text", `data` a task of `datasets` or a name of `datasets.pairs`.

    The rate rises over the first tenth of the steps and falls to 0, both linearly; a switch to the sparse phase halves
    it and makes a fresh AdamW, as in training from scratch. `switch_share` forces the switch at that share of the
    steps, None leaves it to the test. `theta`, `delta`, `block`, `density`, `pattern`, `pruned` are those of
    `SparseAttention`. `train_examples` and `test_examples` take so many, None all.
    """

    model: str
    kind: str
    data: str
    attention: str = "dense"
    epochs: int = 3
    batch: int = 32
    rate: float = 5e-5
    length: int = 128
    train_examples: int | None = None
    test_examples: int | None = None
    block: int = 16
    density: float = 0.25
    pattern: str = "learned"
    pruned: str = "zero"
    theta: float = 1.7
    delta: float = 1.3
    switch_share: float | None = None
    precision: str = "fp32"
    pretrained: bool = True
    seed: int = 0

    def __post_init__(self):
        require(self.attention in ("dense", "sat"), f"attention: wanted 'dense' or 'sat'; got {self.attention!r}")
        for name in ("epochs", "batch", "length", "train_examples", "test_examples"):
            value = getattr(self, name)
            all_of_them = name.endswith("examples") and value is None
            require(all_of_them or value >= 1, f"{name}: wanted at least 1; got {value}")
        share = self.switch_share
        require(share is None or 0 <= share < 1, f"switch_share: wanted 0 to below 1, or None; got {share}")
        require(self.rate > 0, f"rate: wanted more than 0; got {self.rate}")
        require(self.precision in ("fp32", "bf16"), f"precision: wanted 'fp32' or 'bf16'; got {self.precision!r}")


# ---- data ------------------------------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """Tokenised sentence pairs: what the model takes, each (n, length) int64, and labels (n,)."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def batch(self, indices: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        chosen = torch.as_tensor(indices)
        return {name: x[chosen].to(device) for name, x in self.inputs.items()}, self.labels[chosen].to(device)

    def __len__(self):
        return len(self.labels)


class Images(NamedTuple):
    """Gray image tokens of a task, which become (b, channels, side, side) pixels batch by batch."""

    split: datasets.Split
    side: int
    channels: int

    def batch(self, indices: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        tokens, labels = to_device(self.split, indices, device)
        return {"pixel_values": pixels(tokens, self.side, self.channels)}, labels

    def __len__(self):
        return len(self.split)


Examples = Texts | Images


def encode_pairs(tokenizer, pairs: Pairs, length: int) -> Texts:
    """Pairs of texts as "[CLS] first [SEP] second [SEP]", cut off and padded to `length` tokens."""
    encoded = tokenizer(
        pairs.first, pairs.second, truncation=True, padding="max_length", max_length=length, return_tensors="pt"
    )
    return Texts(dict(encoded), torch.as_tensor(pairs.labels))


def load_data(settings: FineTuning, model: nn.Module) -> tuple[Examples, Examples, Examples, dict]:
    """Train, dev and test examples as the model takes them, and what a result says of its data."""
    if settings.kind == "image":
        splits = datasets.load(settings.data)
        sizes = model.config.image_size, model.config.num_channels
        parts = [Images(split, *sizes) for split in (splits.train, splits.dev, splits.test)]
        return *parts, datasets.provenance(settings.data)
    splits, tokenizer = load_pairs(settings.data), load_tokenizer(settings.model)
    parts = [encode_pairs(tokenizer, part, settings.length) for part in (splits.train, splits.dev, splits.test)]
    return *parts, splits.provenance


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples, batch: int, device: torch.device, count: int | None = None) -> float:
    """Share of the first `count` examples (None: all) that the model, put into evaluation mode, classifies right."""
    model.eval()
    right, count = 0, len(examples) if count is None else count
    for start in range(0, count, batch):
        inputs, labels = examples.batch(np.arange(start, min(start + batch, count)), device)
        right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return right / count


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def rate_schedule(
    optimiser: torch.optim.Optimizer, warm_up: int, fall: Callable[[int], float], step: int = 0
) -> LambdaLR:
    """The optimiser's rate rises over `warm_up` steps, and is `fall(step)` of its highest once that is less.

    Step 0 has a rate, and the fall counts from there: neither transformers nor torch has such a schedule by name.
    `step` is the one to come, of an optimiser that is new or whose state is that of this step.
    """
    for group in optimiser.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimiser, lambda step: min((step + 1) / warm_up, fall(step)), last_epoch=step - 1)


class FineTuner:
    """The state of one run, stepped by `train_step`."""

    def __init__(self, settings: FineTuning, device: torch.device):
        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, device
        classes = len(task(settings.data).classes) if settings.kind == "image" else 2
        model = load_model(settings.model, settings.kind, classes, pretrained=settings.pretrained)
        self.train, self.dev, self.test, self.provenance = load_data(settings, model)
        self.chosen = np.random.default_rng(settings.seed).permutation(len(self.train))[: settings.train_examples]
        self.examples = len(self.chosen)
        self.steps = settings.epochs * (self.examples // settings.batch)
        require(self.steps > 0, f"batch: wanted at most the {self.examples} training examples; got {settings.batch}")
        self.model = model.to(device)
        self.step, self.sat = 0, None
        if settings.attention == "sat":
            names = ("block", "density", "theta", "delta", "pruned", "pattern")
            chosen = {name: getattr(settings, name) for name in names}
            share = settings.switch_share
            chosen["switch_at"] = None if share is None else int(share * self.steps)
            example, _ = self.train.batch(np.arange(2), device)
            self.sat = SparseAttention(self.model, example, **chosen)
        self._new_optimiser(settings.rate)

    @property
    def phase(self) -> str:
        """ "dense" or "sparse"."""
        return self.sat.phase if self.sat else "dense"

    def _new_optimiser(self, rate: float) -> None:
        """For the step that comes next."""
        parameters = [*self.model.parameters(), *(self.sat.parameters() if self.sat else ())]
        self.optimiser = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=rate, weight_decay=0.01)
        steps, warm_up = self.steps, max(1, self.steps // 10)
        fall = lambda step: max(0.0, steps - step) / max(1, steps - warm_up)
        self.schedule = rate_schedule(self.optimiser, warm_up, fall, self.step)

    def train_step(self, batch: tuple[dict[str, Tensor], Tensor] | None = None) -> dict:
        """One optimiser step; `batch` None takes the step's own. Returns step, phase, loss (a tensor), and in SAT's
        dense phase skewness and change_percent of every layer."""
        if batch is None:
            indices = batch_indices(self.examples, self.settings.batch, self.step, self.settings.seed)
            batch = self.train.batch(self.chosen[indices], self.device)
        inputs, labels = batch
        self.model.train()
        with self._autocast():
            logits = self.model(**inputs).logits.float()
        loss = F.cross_entropy(logits, labels)
        record = {"step": self.step, "phase": self.phase, "loss": loss.detach()}
        self.optimiser.zero_grad(set_to_none=True)
        (loss + self.sat.loss() if self.sat else loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.step += 1
        if self.sat and self.sat.phase == "dense":
            if self.sat.step():
                self._new_optimiser(self.settings.rate / 2)
            record["skewness"] = [test.skewness for test in self.sat.tests]
            record["change_percent"] = [test.change_percent for test in self.sat.tests]
        return record

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def evaluate(self, examples: Examples) -> tuple[float, int]:
        """Share of examples classified right by the model as it is, and their number."""
        count = min(len(examples), self.settings.test_examples or len(examples))
        with self._autocast():
            return accuracy(self.model, examples, 2 * self.settings.batch, self.device, count), count


def fine_tune(settings: FineTuning, device: torch.device) -> dict:
    """Train to the end; accuracies of the last step, and the time of a step like the last ones.

    Raises:
        InputError: what the model, the data or the settings say.
        RuntimeError: the loss became NaN or infinite.
    """
    tuner = FineTuner(settings, device)
    records = []
    while tuner.step < tuner.steps:
        records.append(tuner.train_step())
        if tuner.step == tuner.steps or tuner.step % 50 == 0:
            loss = float(records[-1]["loss"])
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss became {loss} by step {tuner.step}. Lower the rate")
    learning = [record for record in records if "skewness" in record]
    (dev_accuracy, _), (test_accuracy, test_examples) = tuner.evaluate(tuner.dev), tuner.evaluate(tuner.test)
    result = {
        "dev_accuracy": dev_accuracy,
        "test_accuracy": test_accuracy,
        "test_examples": test_examples,
        "train_examples": tuner.examples,
        "steps": tuner.steps,
        "transition_step": tuner.sat.transition_step if tuner.sat else None,
        "phase": tuner.phase,
        "losses": [round(float(record["loss"]), 4) for record in records[:: max(1, len(records) // 100)]],
        "skewness": [[round(value, 3) for value in record["skewness"]] for record in learning],
        "change_percent": [[_rounded(value) for value in record["change_percent"]] for record in learning],
        **tuner.provenance,
        **_what_is_kept(tuner),
    }
    on_cpu = device.type == "cpu"
    step = partial(tuner.train_step, tuner.train.batch(np.arange(settings.batch), device))
    timed = timing.time_calls(step, device, warm_up=1 if on_cpu else 5, calls=3 if on_cpu else 30)
    return result | {"step_ms": timed.median_ms, "step_low_ms": timed.low_ms, "step_high_ms": timed.high_ms}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 2)


def _what_is_kept(tuner: FineTuner) -> dict:
    """The layouts' blocks as 0 and 1, their density and the mass that they keep; None each without layouts.

    The mass is, by layer, the share of the attention of some test examples that dense attention would put in the kept
    blocks; queries that are padding don't count.
    """
    layouts = tuner.sat.layouts if tuner.sat else None
    if not layouts:
        return dict.fromkeys(("kept", "density_kept", "mass_kept"))
    inputs, _ = tuner.test.batch(np.arange(min(16, len(tuner.test))), tuner.device)
    maps = attention_maps(tuner.model, inputs)
    if "attention_mask" in inputs:
        maps = [layer * inputs["attention_mask"][:, None, :, None] for layer in maps]
    return {
        "kept": [layout.grid.int().tolist() for layout in layouts],
        "density_kept": layouts[0].density,
        "mass_kept": [mass_kept(layer.sum((0, 1)), layout) for layer, layout in zip(maps, layouts, strict=True)],
    }
