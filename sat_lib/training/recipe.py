"""How a model is trained: the published numbers of each task as presets, and what may be changed."""

import json
from dataclasses import asdict, dataclass, replace

from ..attention.patterns import BUDGETS
from ..common.errors import InputError, require
from ..common.files import digest
from ..datasets.cache import PROTOCOLS
from ..datasets.tasks import task
from ..model.encoder import ModelConfig
from .saliency import SIGNALS

PRESETS = ("released", "continued", "best")
PATTERNS = ("learned", "near", "random", *SIGNALS)
PRECISIONS = ("fp32", "bf16")
PROBE_EXAMPLES = 256
PAPER_TASKS = ("agnews", "yelp", "cifar10", "inaturalist")


@dataclass(frozen=True)
class Recipe:
    """Everything beside the model that decides a run.

    `schedule_after` says what the learning rate does after the transition, with a fresh AdamW: "constant" (released:
    the OneCycle schedule is left behind) or "continued" (it goes on). `rate_after` is the rate then, or the schedule's
    peak, as a share of `rate` (released: half). `average`: what is evaluated and kept is an exponential moving average
    of the weights over about so many steps. It begins with the sparse phase (SAT's dense phase has none), or with the
    run of any other attention. None evaluates the weights themselves.
    `switch_at` forces the transition at the end of that step, whatever the test says; None leaves it to `switch_rule`:
    "stable" is the published test with `theta` and `delta`; the others switch in the step after the first evaluation
    whose dev loss is above that of the evaluation before ("overfit"), or above the mean training loss, dropout
    included, since the evaluation before or the start ("gap").
    `pattern` says what the generator is given at the transition: "learned", R~; "near", nearness to the diagonal;
    "random" scores; or a name in `saliency.SIGNALS`, measured on `PROBE_EXAMPLES` training examples.
    `pattern_budget` is the generator's, see `patterns.generate_layout`; `pattern_heads` "shared" (one pattern a layer)
    or "own" (one a head, of other blocks than the heads before it as far as the budget allows).
    `pattern_refresh` makes new layouts every so many steps of the sparse phase; for patterns that can differ by then,
    all but "learned" and "near".
    `protocol` names the splits, see `datasets.load`; "published" also drops the last incomplete test batch.
    """

    task: str
    steps: int
    warm_up: int
    rate: float
    eval_every: int
    density: float = 0.05
    theta: float = 1.7
    delta: float = 1.3
    batch: int = 512
    schedule_after: str = "constant"
    rate_after: float = 0.5
    average: int | None = None
    precision: str = "bf16"
    protocol: str = "dev"
    switch_at: int | None = None
    switch_rule: str = "stable"
    pattern: str = "learned"
    pattern_budget: str = "blocks"
    pattern_heads: str = "shared"
    pattern_refresh: int | None = None
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
            "precision": PRECISIONS,
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


def run_config(
    task_name: str, attention: str = "sat", preset: str = "released", model: dict | None = None, **changes
) -> RunConfig:
    """A run of a task's published recipe.

    Args:
        attention: name in `attention.ATTENTION`.
        preset: "released"; "continued", in which the schedule goes on after the transition; or "best", see
            `BEST_MODEL` and `best_recipe`; a `switch_rule` among the changes takes the place of its forced transition.
        model: changes to the model's fields; `changes`: to the recipe's fields (seed, steps, ...).

    Raises:
        InputError: an unknown task, attention, preset or field, or a value out of range.
    """
    require(preset in PRESETS, f"preset: wanted one of {PRESETS}; got {preset!r}")
    base = PUBLISHED[task(task_name).name]
    for given, known in ((changes, Recipe), (model or {}, ModelConfig)):
        unknown = sorted(set(given) - set(known.__dataclass_fields__))
        require(not unknown, f"unknown setting {unknown}; known: {sorted(known.__dataclass_fields__)}")
    if preset == "continued":
        changes = {"schedule_after": "continued"} | changes
    if preset == "best":
        require(attention == "sat", f"preset: 'best' is for the attention 'sat'; got {attention!r}")
        model = BEST_MODEL | (model or {})
    run = RunConfig(model_config(task_name, attention=attention, **(model or {})), replace(base, **changes))
    if preset != "best":
        return run
    best = best_recipe(run)
    if "switch_rule" in changes:
        best.pop("switch_at", None)  # the rule that is asked for decides
    return replace(run, recipe=replace(run.recipe, **best | changes))


# The preset "best", which the ablations led to: blocks are smaller, W^P learns which of them go together by their
# contents, and pruned entries drop out of the softmax.
BEST_MODEL = {"block": 16, "sparsity_init": "calibrated", "sparsity_target": "correlation", "pruned": "drop"}


def best_recipe(run: RunConfig) -> dict:
    """What the preset "best" changes of the recipe of a run, by its task's kind, its block rows and its steps.

    Every head keeps one block of each row and column. On images the switch comes when the dense phase begins to learn
    by heart, by the rule "gap"; on others, of which text was measured, as soon as the warm-up is over, and by that rule
    only where `switch_at` is taken back. From then on the rate is constant, as published: at the peak for images, at
    half of it for others; and the weights are averaged.
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
    """Over how many steps the preset "best" averages the weights of a run: a 25th."""
    return max(1, steps // 25)


def dense_phase(config: RunConfig) -> RunConfig:
    """The run that never leaves the dense phase, and until `config`, of SAT, does takes the very same steps.

    Two configurations with the same one differ in nothing before their transition.
    """
    published = PUBLISHED[config.recipe.task]
    late = ("density", "theta", "delta", "schedule_after", "rate_after", "average", "switch_rule")
    late += ("pattern", "pattern_budget", "pattern_heads", "pattern_refresh")
    recipe = replace(config.recipe, switch_at=config.recipe.steps, **{name: getattr(published, name) for name in late})
    return RunConfig(replace(config.model, pruned=ModelConfig.__dataclass_fields__["pruned"].default), recipe)


def config_from_dict(values: dict) -> RunConfig:
    """Rebuild a configuration from `dataclasses.asdict` of one."""
    return RunConfig(ModelConfig(**values["model"]), Recipe(**values["recipe"]))


def case_config(case: dict) -> RunConfig:
    """The run that a training case stands for."""
    return run_config(case["task"], case["attention"], model=case["model"], seed=case["seed"], **case["recipe"])

LAYERS = {"image": 2, "text": 4, "symbols": 4}


def model_config(task_name: str, **changes) -> ModelConfig:
    """The published model for a task (2 layers for images, 4 for text), with `changes` by field name."""
    data = task(task_name)
    sizes = {
        "vocab": data.vocab,
        "classes": len(data.classes),
        "layers": LAYERS[data.kind],
        "length": data.length,
        "masked_attention": data.masked_attention,
    }
    return ModelConfig(**(sizes | changes))


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
