"""How a model is trained: the published numbers of each task as presets, and what may be changed."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from ..attention.patterns import BUDGETS
from ..common.errors import require
from ..common.files import digest
from ..datasets.cache import PROTOCOLS
from ..datasets.tasks import task
from ..model.encoder import ModelConfig
from .saliency import CRITERIA

PATTERNS = ("learned", "near", "random", *CRITERIA)
PAPER_TASKS = ("agnews", "yelp", "cifar10", "inaturalist")


# ---- one recipe, one run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Everything beside the model that decides a run.

    The rules that end the dense phase: "stable" is the published test of the maps, see `TransitionRule`. "overfit" and
    "gap" look at the dev loss, see `EvaluationRule`, and switch in the step after the evaluation.

    Raises:
        InputError: an unknown task or choice, a number out of range, or a pattern that can't be refreshed.
    """

    task: str
    steps: int
    warm_up: int  # steps in which the rate rises to its peak
    rate: float  # AdamW's, at its peak
    eval_every: int  # steps between evaluations on the dev split
    density: float = 0.05  # kept blocks / all blocks
    theta: float = 1.7  # of the rule "stable": least skewness
    delta: float = 1.3  # of the rule "stable": greatest change of the distance, in percent
    batch: int = 512
    schedule_after: str = "constant"  # the rate after the transition: "constant", released; or the schedule "continued"
    rate_after: float = 0.5  # its value then, or the schedule's peak, as a share of `rate`; released: half
    average: int | None = None  # time constant, in steps, of the weights' moving average; None: the weights themselves
    precision: str = "bf16"
    protocol: str = "dev"  # which splits, see `datasets.load`; "published" also drops the last incomplete test batch
    switch_at: int | None = None  # the transition is forced at the end of this step; None: the rule decides
    switch_rule: str = "stable"  # or "overfit", "gap"
    pattern: str = "learned"  # what scores the blocks: R~; "near", nearness to the diagonal; "random"; or a criterion
    pattern_budget: str = "blocks"  # the generator's, see `patterns.generate_layout`
    pattern_heads: str = "shared"  # one pattern a layer, or each head its "own", of other blocks than heads before it
    pattern_refresh: int | None = None  # new layouts every so many steps of the sparse phase, of a pattern that changes
    seed: int = 0

    def __post_init__(self):
        task(self.task)
        for name in ("steps", "warm_up", "eval_every", "batch"):
            require(getattr(self, name) >= 1, f"{name}: wanted at least 1; got {getattr(self, name)}")
        fits = 1 < self.warm_up < self.steps  # PyTorch's schedule divides by one step less
        require(fits, f"warm_up: wanted 2 or more and less than {self.steps} steps; got {self.warm_up}")
        for name in ("rate", "rate_after"):
            require(getattr(self, name) > 0, f"{name}: wanted more than 0; got {getattr(self, name)}")
        averaged = self.average is None or (isinstance(self.average, int) and self.average >= 1)
        require(averaged, f"average: wanted None, or 1 or more steps; got {self.average!r}")
        require(0 < self.density <= 1, f"density: wanted more than 0 and at most 1; got {self.density}")
        for name, allowed in {
            "schedule_after": ("constant", "continued"),
            "precision": ("fp32", "bf16"),
            "protocol": PROTOCOLS,
            "switch_rule": ("stable", "overfit", "gap"),
            "pattern": PATTERNS,
            "pattern_budget": tuple(BUDGETS),
            "pattern_heads": ("shared", "own"),
        }.items():
            value = getattr(self, name)
            require(value in allowed, f"{name}: wanted one of {allowed}; got {value!r}")
        every, lasting = self.pattern_refresh, self.pattern in ("learned", "near")
        require(
            every is None or (every >= 1 and not lasting),
            f"pattern_refresh: wanted None, or 1 or more steps and a pattern that changes; got {every} for "
            f"{self.pattern!r}",
        )

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which the model computes."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")


@dataclass(frozen=True)
class RunConfig:
    """One training run: a model and a recipe. Two equal configurations are the same run."""

    model: ModelConfig
    recipe: Recipe

    def as_dict(self) -> dict:
        """{"model": {...}, "recipe": {...}}, as JSON takes it."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def digest(self) -> str:
        """Of every field: what makes two runs the same."""
        return digest(self.as_dict())

    @property
    def name(self) -> str:
        """Folder name: task, attention, seed and a digest of all the rest."""
        return f"{self.recipe.task}-{self.model.attention}-seed{self.recipe.seed}-{self.digest[:8]}"


# ---- the published numbers -------------------------------------------------------------------------------------------

# The first four are the paper's. imdb takes Yelp's numbers, the other set of reviews. The embedded tasks are ours,
# sized for two CPU cores; the maps of the digits are means over few examples and jump about more from step to step
# than those of batches of 512, so their transition test has a wider delta.
PUBLISHED = {
    "cifar10": Recipe("cifar10", 10_000, 175, 0.002, 500, density=0.05, theta=1.7),
    "inaturalist": Recipe("inaturalist", 10_000, 800, 0.003, 500, density=0.04, theta=1.7),
    "agnews": Recipe("agnews", 30_000, 80, 0.0009, 200, density=0.08, theta=1.7),
    "yelp": Recipe("yelp", 30_000, 80, 0.0007, 200, density=0.05, theta=1.3),
    "imdb": Recipe("imdb", 30_000, 80, 0.0007, 200, density=0.05, theta=1.3),
    "digits": Recipe("digits", 600, 60, 0.002, 50, theta=0.5, delta=10, batch=32, precision="fp32"),
    "digits16": Recipe("digits16", 600, 60, 0.002, 50, theta=0.5, delta=10, batch=64, precision="fp32"),
    "docstrings": Recipe("docstrings", 400, 40, 0.002, 50, theta=1.3, delta=1.3, batch=32, precision="fp32"),
    "listops": Recipe("listops", 5_000, 500, 0.001, 500, density=0.05, theta=1.3, batch=32),
}


def model_config(task_name: str, **changes) -> ModelConfig:
    """The published model for a task (2 layers for images, 4 for others), with `changes` by field name."""
    data = task(task_name)
    sizes = {
        "vocab": data.vocab,
        "classes": len(data.classes),
        "layers": 2 if data.kind == "image" else 4,
        "length": data.length,
        "masked_attention": data.masked_attention,
    }
    return ModelConfig(**(sizes | changes))


# ---- presets ---------------------------------------------------------------------------------------------------------


# What the ablations led to: blocks are smaller, W^P learns which of them go together by their contents, and pruned
# entries drop out of the softmax.
BEST_MODEL = {"block": 16, "sparsity_init": "calibrated", "sparsity_target": "correlation", "pruned": "drop"}


def best_recipe(run: RunConfig) -> dict:
    """What the preset "best" changes of the recipe of a run, by its task's kind, its block rows and its steps.

    Every head keeps one block of each row and column. On images the switch comes when the dense phase begins to
    overfit, by the rule "gap". On others, of which text was measured, it comes as soon as the warm-up is over; by that
    rule only where `switch_at` is taken back. From then on the rate is constant, as published: at the peak for images,
    at half of it for others; and the weights are averaged.
    """
    image = task(run.recipe.task).kind == "image"
    return {
        "density": 1 / run.model.blocks,
        "pattern_budget": "balanced",
        "pattern_heads": "own",
        "switch_rule": "gap",
        "rate_after": 1.0 if image else 0.5,
        "average": averaged_steps(run.recipe.steps),
    } | ({} if image else {"switch_at": run.recipe.warm_up})


def averaged_steps(steps: int) -> int:
    """The time constant of the preset "best"'s average of the weights: a 25th of the run."""
    return max(1, steps // 25)


PRESETS: dict[str, Callable[[RunConfig], dict]] = {  # what each changes of the recipe of a run
    "released": lambda run: {},
    "continued": lambda run: {"schedule_after": "continued"},
    "best": best_recipe,
}


def run_config(
    task_name: str, attention: str = "sat", preset: str = "released", model: dict | None = None, **changes
) -> RunConfig:
    """A run of a task's published recipe.

    Args:
        attention: name in `attention.ATTENTION`.
        preset: "released"; "continued", in which the schedule goes on after the transition; or "best", see
            `BEST_MODEL` and `best_recipe`. A `switch_rule` among the changes takes the place of its forced transition.
        model: changes to the model's fields; `changes`: to the recipe's fields (seed, steps, ...).

    Raises:
        InputError: an unknown task, attention, preset or field, or a value out of range.
    """
    require(preset in PRESETS, f"preset: wanted one of {tuple(PRESETS)}; got {preset!r}")
    base, model = PUBLISHED[task(task_name).name], model or {}
    for given, known in ((changes, Recipe), (model, ModelConfig)):
        unknown = sorted(set(given) - set(known.__dataclass_fields__))
        require(not unknown, f"unknown setting {unknown}; known: {sorted(known.__dataclass_fields__)}")
    if preset == "best":
        require(attention == "sat", f"preset: 'best' is for the attention 'sat'; got {attention!r}")
        model = BEST_MODEL | model
    run = RunConfig(model_config(task_name, attention=attention, **model), replace(base, **changes))
    settings = PRESETS[preset](run)
    if "switch_rule" in changes:
        settings.pop("switch_at", None)  # the rule that is asked for decides
    return replace(run, recipe=replace(run.recipe, **settings | changes))


def case_config(case: dict) -> RunConfig:
    """The run that a training case stands for."""
    return run_config(case["task"], case["attention"], model=case["model"], seed=case["seed"], **case["recipe"])
