"""The steps of training: dense phase, transition, sparse phase; and evaluation. `fit` in runs.py drives them."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..attention.layout import BlockLayout
from ..attention.patterns import generate_layout, nearness
from ..attention.statistics import pool_blocks
from ..common import distributed
from ..common.errors import InputError, require
from ..datasets.batches import Examples, batch_indices
from ..datasets.cache import Split, Splits
from ..model.encoder import Encoder
from ..model.fused import fuse
from ..model.sparsity import LOSS_WEIGHT, model_sparsity_loss
from .cuda_graph import Captured, Reading
from .recipe import PROBE_EXAMPLES, RunConfig, check_same_config
from .saliency import block_signal
from .transition import EvaluationRule, TransitionRule

STEPS = ("auto", "fast", "plain")


class Score(NamedTuple):
    """Share of examples classified right, mean cross-entropy, and how many examples were counted."""

    accuracy: float
    loss: float
    examples: int


class Gradients(NamedTuple):
    """What a step's forward and backward pass leave beside the gradients. In SAT's dense phase the last two too."""

    loss: Tensor
    sparsity_loss: Tensor | None = None
    mean_maps: Sequence[Tensor] = ()


class Trainer:
    """The state of one run, and what happens in a step. A notebook may step it by hand.

    Processes that were joined (see `distributed`) train one model together: each takes its share of the batch, and
    all make the same update, by the mean of their gradients.

    Args:
        config: model and recipe. data: the task's splits. device: where the model and its batches live.
        step: "plain", PyTorch's modules one by one; "fast", the operators of `fused`, torch.compile and, on a GPU,
            a CUDA graph; "auto", fast on a GPU wherever the model is one that it is made for: `fast` tells,
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
        self.config, self.data, self.device = config, data, device
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
        self._new_optimiser(recipe.rate, scheduled=True)
        self._new_average()
        self._new_phase()

    def _fuse(self, step: str) -> str | None:
        """Make the model a fast one where that was asked for; the reason where it stays plain."""
        if step == "plain":
            return "as asked for"
        if step == "auto" and self.device.type != "cuda":
            return f"on a {self.device.type.upper()}"
        try:
            require(self.config.recipe.precision == "bf16", "precision: the fast step is for bf16. Take the plain step")
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

    def _new_phase(self) -> None:
        """What one graph can repeat is a phase's own."""
        self._captured = Captured(self.device) if self.fast and self.device.type == "cuda" else None
        if self._captured:
            distributed.release_at_the_end(self._captured)

    def _new_average(self) -> None:
        """Begin the average anew with the weights as they are. SAT's dense phase, whose evaluations the rules look at,
        has none."""
        steps, self.average = self.config.recipe.average, None
        if steps is not None and not self.learning:
            self.average = copy.deepcopy(self.model)
            blend = get_ema_multi_avg_fn(1 - 1 / steps)  # AveragedModel would wait for the GPU in every step
            parameters = [list(model.parameters()) for model in (self.average, self.model)]
            self._update_average = lambda: blend(*parameters, None)

    @property
    def evaluated(self) -> Encoder:
        """The model that evaluations are of: as trained, or its moving average."""
        return self.model if self.average is None else self.average

    @property
    def phase(self) -> str:
        """ "dense" or "sparse"."""
        return "dense" if self.model.layouts is None else "sparse"

    def _new_optimiser(self, rate: float, scheduled: bool) -> None:
        """A fresh AdamW, with the published OneCycle schedule or at a constant rate."""
        recipe = self.config.recipe
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(
            trained, lr=rate, betas=(0.9, 0.999), eps=1e-6, weight_decay=0, fused=self.device.type == "cuda"
        )
        self.schedule = None
        if scheduled:
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimiser, rate, recipe.steps, pct_start=recipe.warm_up / recipe.steps, anneal_strategy="linear"
            )

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
        record["loss"] = seen.loss
        if learning:
            measured = self.rule.measure(seen.mean_maps)
            distributed.copy_first([measured])  # all judge the same numbers
            measured = Reading(measured)  # read once the rest of the step is queued
        self._update()
        if learning:
            self.evaluation_rule.note_step(seen.loss)
            record["sparsity_loss"] = seen.sparsity_loss
            record |= self._test_transition(measured.values(), seen.mean_maps)
        elif self._refresh_is_due():
            layouts = self._generate_layouts()[1]
            for model in {self.model, self.evaluated}:
                model.enter_sparse_phase(layouts)
            self._new_phase()
        self.step += 1
        return record

    def _batch(self) -> tuple[Tensor, Tensor]:
        recipe = self.config.recipe
        indices = batch_indices(len(self.examples), recipe.batch, self.step, recipe.seed)
        return self.examples.batch(distributed.share(indices))

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.recipe.precision == "bf16")

    def _backward(self, tokens: Tensor, labels: Tensor) -> Gradients:
        """Leave the clipped gradients of the loss in the parameters: means over the processes, as what is returned."""
        self.optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            output = self.model(tokens, statistics=self.learning)
            loss = F.cross_entropy(output.logits.float(), labels)
        if not self.learning:
            loss.backward()
            return Gradients(self._share_gradients(loss))
        wanted = "pooled" if self.config.model.sparsity_target == "attention" else "correlation"
        maps, pooled = ([getattr(seen, name) for seen in output.statistics] for name in ("mean_map", wanted))
        means = distributed.mean([*maps, *pooled])
        sparsity_loss = model_sparsity_loss(self.model.sparsity_parameters, means[len(maps) :])
        (loss + LOSS_WEIGHT * self.config.model.layers * sparsity_loss).backward()
        return Gradients(self._share_gradients(loss), sparsity_loss.detach(), means[: len(maps)])

    def _share_gradients(self, loss: Tensor) -> Tensor:
        """Put the mean over the processes in place of each gradient, clip it, and return that of the loss.

        All in one tensor at the end of the backward pass, 0.6 MB for CIFAR-10, instead of DistributedDataParallel's
        buckets during it: there is little to hide, and it goes into the graph. (The dense phase's maps are 8.4 MB.)
        """
        trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        mean_loss, *means = distributed.mean([loss.detach(), *(parameter.grad for parameter in trained)])
        for parameter, mean in zip(trained, means, strict=True):
            parameter.grad = mean
        nn.utils.clip_grad_value_(trained, 1.0)
        return mean_loss

    def _update(self) -> None:
        self.optimiser.step()
        if self.schedule is not None and self.step + 1 < self.config.recipe.steps:
            self.schedule.step()
        if self.average is not None:
            self._update_average()

    def _test_transition(self, measured: list, mean_maps: Sequence[Tensor]) -> dict:
        if self.step == 0:
            self.maps["start"] = self._pool(mean_maps)
        stable, tests = self.rule.judge(measured)
        recipe = self.config.recipe
        switch = stable if recipe.switch_rule == "stable" else self.evaluation_rule.fired
        if switch if recipe.switch_at is None else self.step >= recipe.switch_at:
            self.enter_sparse_phase(mean_maps)
        return {
            "skewness": [test.skewness for test in tests],
            "distance": [test.distance for test in tests],
            "change_percent": [test.change_percent for test in tests],
        }

    def _pool(self, mean_maps: Sequence[Tensor]) -> Tensor:
        return torch.stack([pool_blocks(mean_map, self.config.model.block).float().cpu() for mean_map in mean_maps])

    def note_dev_loss(self, loss: float) -> None:
        """Take an evaluation on the dev split, for the rules that look at it."""
        if self.learning:
            self.evaluation_rule.note_evaluation(loss)

    def _refresh_is_due(self) -> bool:
        every = self.config.recipe.pattern_refresh
        sparse = self.phase == "sparse" and every is not None
        return sparse and (self.step - self.transition_step) % every == 0 and self.step + 1 < self.config.recipe.steps

    def block_scores(self) -> Tensor:
        """What the recipe's pattern gives to the generator: (layers, N, N), or (layers, H, N, N) of a signal."""
        recipe, config = self.config.recipe, self.config.model
        if recipe.pattern == "learned":
            return torch.stack([parameter().detach() for parameter in self.model.sparsity_parameters])
        if recipe.pattern == "near":
            return nearness(config.blocks).float().expand(config.layers, -1, -1)
        generator = np.random.default_rng([recipe.seed, self.step])
        if recipe.pattern == "random":
            return torch.from_numpy(generator.random((config.layers, config.blocks, config.blocks), np.float32))
        chosen = generator.choice(len(self.examples), min(PROBE_EXAMPLES, len(self.examples)), replace=False)
        return block_signal(self.model, recipe.pattern, *self.examples.batch(chosen), seed=recipe.seed)

    def _generate_layouts(self) -> tuple[Tensor, list[BlockLayout]]:
        """Scores, and a layout for each layer, the same in all processes."""
        recipe, config = self.config.recipe, self.config.model
        scores = self.block_scores().to(self.device).contiguous()
        distributed.copy_first([scores])
        used, by_head = scores, scores.dim() == 4
        if recipe.pattern_heads == "own" and not by_head:
            used = scores[:, None].expand(-1, config.heads, -1, -1)
        elif recipe.pattern_heads == "shared" and by_head:
            used = scores.mean(1)
        make = lambda score: generate_layout(score, recipe.density, config.block, recipe.pattern_budget)
        return scores, [make(score) for score in used]

    @torch.no_grad()
    def enter_sparse_phase(self, mean_maps: Sequence[Tensor]) -> None:
        """Generate the layouts, freeze W^P, and go on with a fresh AdamW.

        Keeps in `maps` on the CPU: "transition" (the pooled maps now, (layers, N, N)), "scores" (R~, or those of
        another pattern), "kept" (the block grids, by head where heads have their own).
        """
        recipe = self.config.recipe
        scores, layouts = self._generate_layouts()
        self.maps["transition"] = self._pool(mean_maps)
        self.maps["scores"] = scores.float().cpu()
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
        self._new_optimiser(recipe.rate * recipe.rate_after, scheduled=recipe.schedule_after == "continued")
        self._new_average()
        self._new_phase()

    @torch.no_grad()
    def evaluate(self, split: Split) -> Score:
        """Score of the model as it is, or of its moving average, on a split; every example counts.

        Under the "published" protocol an incomplete last batch is dropped, as the released code does.
        """
        recipe, examples, model = self.config.recipe, self._on_device(split), self.evaluated.eval()
        stop = len(split) - len(split) % recipe.batch if recipe.protocol == "published" else len(split)
        require(stop > 0, f"batch: the published protocol wants {recipe.batch} examples or more; got {len(split)}")
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # right, loss, examples
        for start in range(recipe.batch * distributed.rank(), stop, recipe.batch * distributed.size()):
            tokens, labels = examples.batch(np.arange(start, min(start + recipe.batch, stop)))
            with self._autocast():
                logits = model(tokens).logits.float()
            right, loss = (logits.argmax(-1) == labels).sum(), F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([right, loss, torch.full_like(right, len(labels))]).double()
        right, loss, examples = distributed.total(sums).tolist()
        return Score(right / examples, loss / examples, round(examples))

    def state_dict(self) -> dict:
        """All that a run needs to go on as if it had never stopped; loads with torch.load(weights_only=True).

        All processes have to call it.
        """
        layouts = self.model.layouts
        return {
            "config": self.config.as_dict(),
            "step": self.step,
            "transition_step": self.transition_step,
            "evaluation_rule": self.evaluation_rule.state_dict(),
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "grids": None if layouts is None else [layout.grid for layout in layouts],
            "optimiser": self.optimiser.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "rule": self.rule.state_dict(),
            "maps": self.maps,
            "rng": distributed.gathered(self._rng()),
        }

    def _rng(self) -> list[Tensor]:
        """States of this process's generators."""
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict` of a run of the same configuration.

        Raises:
            InputError: it belongs to another configuration (the message names what differs), to an earlier version of
                this package, or to the dense phase while this trainer is past it. Nothing is changed then.
        """
        check_same_config(state["config"], self.config)
        require(
            isinstance(state["rng"], list),
            "checkpoint: an earlier version of sat_lib wrote it. Finish that run with that version, or delete it",
        )
        require(
            state["grids"] is not None or self.phase == "dense",
            "checkpoint: it is of the dense phase, and this trainer is in the sparse one. Make a new trainer",
        )
        self.step, self.transition_step, self.maps = state["step"], state["transition_step"], dict(state["maps"])
        older = {"fired": state.get("overfitting", False), "dev_loss": state.get("dev_loss"), "losses": None}
        self.evaluation_rule.load_state_dict(state.get("evaluation_rule", older))
        if state["grids"] is not None:
            self._start_sparse_phase([BlockLayout(grid, self.config.model.block) for grid in state["grids"]])
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.rule.load_state_dict(state["rule"])
        if len(state["rng"]) != distributed.size():  # another number of processes goes on, with draws of its own
            torch.manual_seed(self.config.recipe.seed + 1_000_003 * (distributed.rank() + 1) + self.step)
            return
        cpu, *cuda = state["rng"][distributed.rank()]
        torch.set_rng_state(cpu.cpu())
        if self.device.type == "cuda" and cuda:
            torch.cuda.set_rng_state(cuda[0].cpu(), self.device)
