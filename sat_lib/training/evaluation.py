"""What a run is judged by: the score of a model on a split, the moving average of its weights, rules on dev losses."""

import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..common import distributed
from ..common.errors import require
from ..datasets.batches import Examples
from ..model.encoder import Encoder
from .recipe import Recipe


class Score(NamedTuple):
    """Share of examples classified right, mean cross-entropy, and how many examples were counted."""

    accuracy: float
    loss: float
    examples: int


@torch.no_grad()
def evaluate(model: Encoder, examples: Examples, recipe: Recipe) -> Score:
    """The model's score in evaluation mode; every example counts.

    Under the "published" protocol an incomplete last batch is dropped, as the released code does. Of several processes
    each takes a share of the batches.

    Raises:
        InputError: fewer examples than a batch under the published protocol.
    """
    model.eval()
    count, device = len(examples), examples.device
    stop = count - count % recipe.batch if recipe.protocol == "published" else count
    require(stop > 0, f"batch: the published protocol wants {recipe.batch} examples or more; got {count}")
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # right, loss, examples
    for start in range(recipe.batch * distributed.rank(), stop, recipe.batch * distributed.size()):
        tokens, labels = examples.batch(np.arange(start, min(start + recipe.batch, stop)))
        with recipe.autocast(device):
            logits = model(tokens).logits.float()
        right, loss = (logits.argmax(-1) == labels).sum(), F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([right, loss, torch.full_like(right, len(labels))]).double()
    right, loss, counted = distributed.total(sums).tolist()
    return Score(right / counted, loss / counted, round(counted))


class MovingAverage:
    """The exponential moving average of a model's weights, as a model of its own.

    It begins with the weights as they are. Nothing waits for the GPU, as torch's AveragedModel would in every step.

    Args:
        model: whose parameters are averaged; they stay the same tensors. steps: the time constant.
    """

    def __init__(self, model: Encoder, steps: int):
        self.model = copy.deepcopy(model)
        self._blend = get_ema_multi_avg_fn(1 - 1 / steps)
        self._parameters = [list(each.parameters()) for each in (self.model, model)]

    def update(self) -> None:
        """Take the weights after a step."""
        self._blend(*self._parameters, None)

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state)


@dataclass
class EvaluationRule:
    """A rule for the transition that looks at the losses instead of the maps, and has no threshold.

    "overfit": the dev loss is above that of the evaluation before. "gap": it is above the mean training loss of the
    steps since that evaluation, or since the start. `fired` stays true. With "stable", which is judged by the maps
    (`TransitionRule`), it never becomes so.
    """

    name: str
    fired: bool = False
    dev_loss: float | None = None  # of the last evaluation
    losses: Tensor | None = field(default=None, repr=False)  # sum of the training losses since then, and their number

    def note_step(self, loss: Tensor) -> None:
        """Take a step's training loss, a tensor without axes. Nothing waits for the GPU."""
        if self.name == "gap":
            step = torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)])
            self.losses = step if self.losses is None else self.losses + step

    def note_evaluation(self, dev_loss: float) -> None:
        """Take an evaluation on the dev split."""
        before = self.dev_loss
        if self.name == "gap":
            total, steps = (0.0, 0) if self.losses is None else self.losses.tolist()
            before, self.losses = total / steps if steps else None, None
        self.fired = self.fired or (self.name in ("overfit", "gap") and before is not None and dev_loss > before)
        self.dev_loss = dev_loss

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {"fired": self.fired, "dev_loss": self.dev_loss, "losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.fired, self.dev_loss, self.losses = state["fired"], state["dev_loss"], state["losses"]
