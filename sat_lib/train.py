"""The steps of training: dense phase, transition, sparse phase; and evaluation. `fit` in runs.py drives them."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .datasets import Split, Splits
from .errors import InputError, require
from .layout import BlockLayout
from .model import Encoder
from .pattern import LOSS_WEIGHT, generate_layout, model_sparsity_loss
from .recipes import RunConfig, config_from_dict
from .reference import pool_blocks
from .transition import TransitionRule


def batch_indices(examples: int, batch: int, step: int, seed: int) -> np.ndarray:
    """(batch,) int64 indices of a step's training batch: epoch by epoch, each in its own order.

    A function of the step alone, so a resumed run needs no sampler state. An epoch's incomplete end is left out.
    """
    require(batch <= examples, f"batch: wanted at most the {examples} training examples there are; got {batch}")
    epoch, place = divmod(step, examples // batch)
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    return order[place * batch : (place + 1) * batch]


class Score(NamedTuple):
    """Share of examples classified right, mean cross-entropy, and how many examples were counted."""

    accuracy: float
    loss: float
    examples: int


class Trainer:
    """The state of one run, and what happens in a step. A notebook may step it by hand.

    Args:
        config: model and recipe. data: the task's splits. device: where the model and its batches live.
    """

    def __init__(self, config: RunConfig, data: Splits, device: torch.device):
        torch.manual_seed(config.recipe.seed)
        self.config, self.data, self.device = config, data, device
        self.model = Encoder(config.model).to(device)
        self.rule = TransitionRule(config.recipe.theta, config.recipe.delta)
        self.step = 0
        self.transition_step: int | None = None
        self.maps: dict[str, Tensor] = {}  # what the transition saw: see `enter_sparse_phase`
        self._new_optimiser(config.recipe.rate, scheduled=True)

    @property
    def phase(self) -> str:
        """ "dense" or "sparse"."""
        return "dense" if self.model.layouts is None else "sparse"

    def _new_optimiser(self, rate: float, scheduled: bool) -> None:
        """A fresh AdamW, with the published OneCycle schedule or at a constant rate."""
        recipe = self.config.recipe
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), eps=1e-6, weight_decay=0)
        self.schedule = None
        if scheduled:
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimiser, rate, recipe.steps, pct_start=recipe.warm_up / recipe.steps, anneal_strategy="linear"
            )

    def train_step(self, batch: tuple[Tensor, Tensor] | None = None) -> dict:
        """One optimiser step, and in SAT's dense phase the transition test after it.

        Args:
            batch: tokens (b, L) and labels (b,), int64, on the device; None takes the step's own from the training set.

        Returns:
            step, phase, rate, loss (task loss, a tensor without axes, so that nothing waits for the GPU), and in SAT's
            dense phase sparsity_loss, and per layer skewness, distance and change_percent.
        """
        self.model.train()
        learning = self.phase == "dense" and self.config.model.attention == "sat"
        record = {"step": self.step, "phase": self.phase, "rate": self.optimiser.param_groups[0]["lr"]}
        tokens, labels = batch or self._batch()
        with self._autocast():
            output = self.model(tokens, statistics=learning)
            loss = total = F.cross_entropy(output.logits.float(), labels)
        if learning:
            pooled = [seen.pooled for seen in output.statistics]
            pattern_loss = model_sparsity_loss(self.model.sparsity_parameters, pooled)
            total = loss + LOSS_WEIGHT * self.config.model.layers * pattern_loss
            record["sparsity_loss"] = pattern_loss.item()
        self._descend(total)
        record["loss"] = loss.detach()
        if learning:
            record |= self._test_transition([seen.mean_map for seen in output.statistics])
        self.step += 1
        return record

    def _batch(self) -> tuple[Tensor, Tensor]:
        recipe, train = self.config.recipe, self.data.train
        indices = batch_indices(len(train), recipe.batch, self.step, recipe.seed)
        return to_device(train, indices, self.device)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.recipe.precision == "bf16")

    def _descend(self, loss: Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_value_(self.model.parameters(), 1.0)
        self.optimiser.step()
        if self.schedule is not None and self.step + 1 < self.config.recipe.steps:
            self.schedule.step()

    def _test_transition(self, mean_maps: list[Tensor]) -> dict:
        if self.step == 0:
            self.maps["start"] = self._pool(mean_maps)
        switch, tests = self.rule.update(mean_maps)
        forced = self.config.recipe.switch_at
        if switch if forced is None else self.step >= forced:
            self.enter_sparse_phase(mean_maps)
        return {
            "skewness": [test.skewness for test in tests],
            "distance": [test.distance for test in tests],
            "change_percent": [test.change_percent for test in tests],
        }

    def _pool(self, mean_maps: list[Tensor]) -> Tensor:
        return torch.stack([pool_blocks(mean_map, self.config.model.block).float().cpu() for mean_map in mean_maps])

    @torch.no_grad()
    def enter_sparse_phase(self, mean_maps: list[Tensor]) -> None:
        """Generate the layouts from W^P, freeze it, and go on with a fresh AdamW at half the peak rate.

        Keeps in `maps`, all (layers, N, N) on the CPU: "transition" (the pooled maps now), "scores" (R~), "kept"
        (the block grids).
        """
        recipe, config = self.config.recipe, self.config.model
        scores = [parameter() for parameter in self.model.sparsity_parameters]
        layouts = [generate_layout(score, recipe.density, config.block) for score in scores]
        self.maps["transition"] = self._pool(mean_maps)
        self.maps["scores"] = torch.stack(scores).float().cpu()
        self.maps["kept"] = torch.stack([layout.grid for layout in layouts]).cpu()
        self.transition_step = self.step
        self.rule = TransitionRule(recipe.theta, recipe.delta)  # done; its maps needn't go into every checkpoint
        before = self.schedule.state_dict()
        self._start_sparse_phase(layouts)
        if self.schedule is not None and self.step + 1 < recipe.steps:
            self.schedule.load_state_dict(before | {"last_epoch": self.step})
            self.schedule.step()

    def _start_sparse_phase(self, layouts: list[BlockLayout]) -> None:
        recipe = self.config.recipe
        self.model.enter_sparse_phase(layouts)
        self._new_optimiser(recipe.rate / 2, scheduled=recipe.schedule_after == "continued")

    @torch.no_grad()
    def evaluate(self, split: Split) -> Score:
        """Score of the model as it is on a split; every example counts.

        Under the "published" protocol an incomplete last batch is dropped, as the released code does.
        """
        recipe = self.config.recipe
        self.model.eval()
        right = loss = examples = 0
        stop = len(split) - len(split) % recipe.batch if recipe.protocol == "published" else len(split)
        require(stop > 0, f"batch: the published protocol wants {recipe.batch} examples or more; got {len(split)}")
        for start in range(0, stop, recipe.batch):
            tokens, labels = to_device(split, np.arange(start, min(start + recipe.batch, stop)), self.device)
            with self._autocast():
                logits = self.model(tokens).logits.float()
            right += (logits.argmax(-1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum").double()
            examples += len(labels)
        return Score(float(right) / examples, float(loss) / examples, examples)

    def state_dict(self) -> dict:
        """All that a run needs to go on as if it had never stopped; loads with torch.load(weights_only=True)."""
        layouts = self.model.layouts
        return {
            "config": self.config.as_dict(),
            "step": self.step,
            "transition_step": self.transition_step,
            "model": self.model.state_dict(),
            "grids": None if layouts is None else [layout.grid for layout in layouts],
            "optimiser": self.optimiser.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "rule": self.rule.state_dict(),
            "maps": self.maps,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict` of a run of the same configuration.

        Raises:
            InputError: it belongs to another configuration; the message names what differs.
        """
        check_same_config(state["config"], self.config)
        self.step, self.transition_step, self.maps = state["step"], state["transition_step"], dict(state["maps"])
        if state["grids"] is not None:
            self._start_sparse_phase([BlockLayout(grid, self.config.model.block) for grid in state["grids"]])
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.rule.load_state_dict(state["rule"])
        torch.set_rng_state(state["rng"].cpu())
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)


def to_device(split: Split, indices: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (b, L) and labels (b,) of some examples, int64, on the device."""
    tokens, labels = split.batch(indices)
    return torch.as_tensor(tokens).to(device, torch.int64), torch.as_tensor(labels).to(device, torch.int64)


def check_same_config(saved: dict, config: RunConfig) -> None:
    """Raise InputError, naming every field that differs, unless `saved` is `config` as a dictionary."""
    wanted, saved = config.as_dict(), config_from_dict(saved).as_dict()  # fields that are newer than it: their defaults
    differing = [
        f"{part}.{name}: saved {saved[part].get(name)!r}, wanted {value!r}"
        for part in wanted
        for name, value in wanted[part].items()
        if saved[part].get(name) != value
    ]
    if differing:
        raise InputError(
            "checkpoint: it belongs to another configuration (" + "; ".join(differing) + "). "
            "Use the same settings, or another folder for this run"
        )
