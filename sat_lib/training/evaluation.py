"""What a run is judged by: the score of a model on a split, and the moving average of its weights."""

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
