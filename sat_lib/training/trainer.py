"""The steps of training: dense phase, transition, sparse phase. `fit.fit` drives them, or a notebook."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.layout import BlockLayout
from ..attention.statistics import pool_blocks
from ..common import distributed
from ..common.errors import InputError, require
from ..datasets.batches import Examples, batch_indices
from ..datasets.cache import Split, Splits
from ..model.encoder import Encoder
from ..model.fused import fuse
from ..model.sparsity import LOSS_WEIGHT, model_sparsity_loss
from .checkpoint import check_parts, check_same_config, generator_states, restore_generators
from .cuda_graph import Captured, Reading
from .evaluation import EvaluationRule, MovingAverage, Score, evaluate
from .pattern import generate_layouts
from .recipe import RunConfig
from .transition import TransitionRule

STEPS = ("auto", "fast", "plain")


class Trainer:
    """The state of one run, and what happens in a step. A notebook may step it by hand.

    Processes that were joined (see `distributed`) train one model together: each takes its share of the batch, and
    all make the same update, by the mean of their gradients.

    Args:
        config: model and recipe. data: the task's splits. device: where the model and its batches live.
        step: "plain", PyTorch's modules one by one; "fast", the operators of `model.fused`, torch.compile and, on a
            GPU, a CUDA graph; "auto", fast on a GPU wherever the model is one that it is made for: `fast` tells,
            `why_plain` why not. Both give the same results but for rounding and dropout's draws.

    Raises:
        InputError: "fast" was asked for and isn't made for this model, precision or device; or the processes don't
            divide the batch.
    """

    def __init__(self, config: RunConfig, data: Splits, device: torch.device, step: str = "auto"):
        recipe, processes = config.recipe, distributed.size()
        require(step in STEPS, f"step: wanted one of {STEPS}; got {step!r}")
        require(recipe.batch % processes == 0, f"batch: wanted a multiple of {processes} processes; got {recipe.batch}")
        torch.manual_seed(recipe.seed)
        self.config, self.recipe, self.data, self.device = config, recipe, data, device
        self.model = Encoder(config.model).to(device)
        distributed.copy_first(self.model.state_dict().values())
        self.why_plain = self._fuse(step)  # None for a fast step
        self.fast = self.why_plain is None
        if processes > 1:
            torch.manual_seed(recipe.seed + 1_000_003 * distributed.rank())  # dropout differs, the model doesn't
        self._examples: dict[int, Examples] = {}  # by identity of a split
        self.examples = self._on_device(data.train)
        self.rule = TransitionRule(recipe.theta, recipe.delta)
        self.step = 0
        self.transition_step: int | None = None
        self.evaluation_rule = EvaluationRule(recipe.switch_rule)
        self.maps: dict[str, Tensor] = {}  # what the transition saw: see `enter_sparse_phase`
        self._new_phase(recipe.rate, scheduled=True)

    def _fuse(self, step: str) -> str | None:
        """Make the model a fast one where that was asked for; the reason where it stays plain."""
        if step == "plain":
            return "as asked for"
        if step == "auto" and self.device.type != "cuda":
            return f"on a {self.device.type.upper()}"
        try:
            require(self.recipe.precision == "bf16", "precision: the fast step is for bf16. Take the plain step")
            fuse(self.model, compiled=self.device.type == "cuda")
        except InputError as error:
            if step == "fast":
                raise
            return str(error)
        return None

    def _on_device(self, split: Split) -> Examples:
        if id(split) not in self._examples:
            self._examples[id(split)] = Examples(split, self.device)
        return self._examples[id(split)]

    def _new_graph(self) -> None:
        """What one graph can repeat is a phase's own."""
        self._captured = Captured(self.device) if self.fast and self.device.type == "cuda" else None
        if self._captured:
            distributed.release_at_the_end(self._captured)

    @property
    def evaluated(self) -> Encoder:
        """The model that evaluations are of: as trained, or its moving average."""
        return self.model if self.average is None else self.average.model

    @property
    def phase(self) -> str:
        """ "dense" or "sparse"."""
        return "dense" if self.model.layouts is None else "sparse"

    def _new_phase(self, rate: float, scheduled: bool) -> None:
        """A fresh AdamW, with the published OneCycle schedule or at a constant rate; average and graph begin anew."""
        steps, trained = self.recipe.steps, [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimiser = torch.optim.AdamW(
            trained, lr=rate, betas=(0.9, 0.999), eps=1e-6, weight_decay=0, fused=self.device.type == "cuda"
        )
        self.schedule = None
        if scheduled:
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimiser, rate, steps, pct_start=self.recipe.warm_up / steps, anneal_strategy="linear"
            )
        # SAT's dense phase has no average: the switch rules look at evaluations of the model itself
        averaged = self.recipe.average is not None and not self.learning
        self.average = MovingAverage(self.model, self.recipe.average) if averaged else None
        self._new_graph()

    @property
    def learning(self) -> bool:
        """Whether steps learn W^P and test for the transition."""
        return self.phase == "dense" and self.config.model.attention == "sat"

    def train_step(self, batch: tuple[Tensor, Tensor] | None = None) -> dict:
        """One optimiser step, and in SAT's dense phase the transition test.

        Args:
            batch: tokens (b, L) and labels (b,), int64, on the device; None takes the step's own from the training set.

        Returns:
            step, phase, rate, loss (task loss, a tensor without axes, so that nothing waits for the GPU), and in SAT's
            dense phase sparsity_loss (likewise), and per layer skewness, distance and change_percent.
        """
        self.model.train()
        learning = self.learning
        record = {"step": self.step, "phase": self.phase, "rate": self.optimiser.param_groups[0]["lr"]}
        batch = batch or self._batch()
        seen = self._captured(self._backward, *batch) if self._captured else self._backward(*batch)
        record["loss"], sparsity_loss, mean_maps = seen
        if learning:
            measured = self.rule.measure(mean_maps)
            distributed.copy_first([measured])  # all judge the same numbers
            measured = Reading(measured)  # read once the rest of the step is queued
        self._update()
        if learning:
            self.evaluation_rule.note_step(record["loss"])
            record["sparsity_loss"] = sparsity_loss
            record |= self._test_transition(measured.values(), mean_maps)
        elif self._refresh_is_due():
            self._refresh_layouts()
        self.step += 1
        return record

    def _batch(self) -> tuple[Tensor, Tensor]:
        indices = batch_indices(len(self.examples), self.recipe.batch, self.step, self.recipe.seed)
        return self.examples.batch(distributed.share(indices))

    def _backward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
        """Leave the clipped gradients of the loss in the parameters, means over the processes.

        Returns:
            The loss; in SAT's dense phase the sparsity loss and the mean maps too, elsewhere None and (): all means.
        """
        self.optimiser.zero_grad(set_to_none=True)
        with self.recipe.autocast(self.device):
            output = self.model(tokens, statistics=self.learning)
            loss = F.cross_entropy(output.logits.float(), labels)
        if not self.learning:
            loss.backward()
            return self._share_gradients(loss), None, ()
        wanted = "pooled" if self.config.model.sparsity_target == "attention" else "correlation"
        maps, pooled = ([getattr(seen, name) for seen in output.statistics] for name in ("mean_map", wanted))
        means = distributed.mean([*maps, *pooled])
        sparsity_loss = model_sparsity_loss(self.model.sparsity_parameters, means[len(maps) :])
        (loss + LOSS_WEIGHT * self.config.model.layers * sparsity_loss).backward()
        return self._share_gradients(loss), sparsity_loss.detach(), means[: len(maps)]

    def _share_gradients(self, loss: Tensor) -> Tensor:
        """Put the mean over the processes in place of each gradient, clip it, and return that of the loss."""
        trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        mean_loss = distributed.mean_gradients(trained, loss)
        nn.utils.clip_grad_value_(trained, 1.0)
        return mean_loss

    def _update(self) -> None:
        self.optimiser.step()
        if self.schedule is not None and self.step + 1 < self.recipe.steps:
            self.schedule.step()
        if self.average is not None:
            self.average.update()

    def _test_transition(self, measured: list, mean_maps: Sequence[Tensor]) -> dict:
        if self.step == 0:
            self.maps["start"] = self._pool(mean_maps)
        stable, tests = self.rule.judge(measured)
        switch = stable if self.recipe.switch_rule == "stable" else self.evaluation_rule.fired
        if self.recipe.switch_at is not None:  # forced
            switch = self.step >= self.recipe.switch_at
        if switch:
            self.enter_sparse_phase(mean_maps)
        told = ("skewness", "distance", "change_percent")
        return {name: [getattr(test, name) for test in tests] for name in told}

    def _pool(self, mean_maps: Sequence[Tensor]) -> Tensor:
        return torch.stack([pool_blocks(mean_map, self.config.model.block).float().cpu() for mean_map in mean_maps])

    def note_dev_loss(self, loss: float) -> None:
        """Take an evaluation on the dev split, for the rules that look at it."""
        if self.learning:
            self.evaluation_rule.note_evaluation(loss)

    def _refresh_is_due(self) -> bool:
        every = self.recipe.pattern_refresh
        sparse = self.phase == "sparse" and every is not None
        return sparse and (self.step - self.transition_step) % every == 0 and self.step + 1 < self.recipe.steps

    def _refresh_layouts(self) -> None:
        _, layouts = generate_layouts(self.model, self.recipe, self.examples, self.step)
        for model in {self.model, self.evaluated}:
            model.enter_sparse_phase(layouts)
        self._new_graph()

    @torch.no_grad()
    def enter_sparse_phase(self, mean_maps: Sequence[Tensor]) -> None:
        """Generate the layouts, freeze W^P, and go on with a fresh AdamW.

        Keeps in `maps` on the CPU: "transition" (the pooled maps now, (layers, N, N)), "scores" (R~, or those of
        another pattern), "kept" (the block grids, by head where heads have their own).
        """
        scores, layouts = generate_layouts(self.model, self.recipe, self.examples, self.step)
        self.maps["transition"] = self._pool(mean_maps)
        self.maps["scores"] = scores.float().cpu()
        self.maps["kept"] = torch.stack([layout.grid for layout in layouts]).cpu()
        self.transition_step = self.step
        self.rule = TransitionRule(self.rule.theta, self.rule.delta)  # its maps needn't go into every checkpoint
        before = self.schedule.state_dict()
        self._start_sparse_phase(layouts)
        if self.schedule is not None and self.step + 1 < self.recipe.steps:
            self.schedule.load_state_dict(before | {"last_epoch": self.step})
            self.schedule.step()

    def _start_sparse_phase(self, layouts: list[BlockLayout]) -> None:
        self.model.enter_sparse_phase(layouts)
        rate, continued = self.recipe.rate * self.recipe.rate_after, self.recipe.schedule_after == "continued"
        self._new_phase(rate, scheduled=continued)

    def evaluate(self, split: Split) -> Score:
        """Score of the model as it is, or of its moving average, on a split: see `evaluation.evaluate`."""
        return evaluate(self.evaluated, self._on_device(split), self.recipe)

    def state_dict(self) -> dict:
        """All that a run needs to go on as if it had never stopped; for torch.load(weights_only=True). All processes
        have to call it."""
        layouts = self.model.layouts
        return {
            "config": self.config.as_dict(),
            "step": self.step,
            "transition_step": self.transition_step,
            "grids": None if layouts is None else [layout.grid for layout in layouts],
            "maps": self.maps,
            "rng": generator_states(self.device),
            **{name: None if part is None else part.state_dict() for name, part in self._parts().items()},
        }

    def _parts(self) -> dict:
        """What keeps a state of its own; None where the phase or the recipe has none."""
        names = ("model", "average", "optimiser", "schedule", "rule", "evaluation_rule")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict` of a run of the same configuration.

        Raises:
            InputError: it isn't a state of this version of sat_lib, belongs to another configuration (the message names
                what differs), or to the dense phase while this trainer is past it. Nothing is changed then.
        """
        check_parts(state, ("config", "step", "transition_step", "grids", "maps", "rng", *self._parts()))
        check_same_config(state["config"], self.config)
        require(
            state["grids"] is not None or self.phase == "dense",
            "checkpoint: it is of the dense phase, and this trainer is in the sparse one. Make a new trainer",
        )
        self.step, self.transition_step, self.maps = state["step"], state["transition_step"], dict(state["maps"])
        if state["grids"] is not None:
            self._start_sparse_phase([BlockLayout(grid, self.config.model.block) for grid in state["grids"]])
        for name, part in self._parts().items():
            if part is not None:
                part.load_state_dict(state[name])
        restore_generators(state["rng"], self.device, self.recipe.seed + self.step)
