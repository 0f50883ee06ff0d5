"""Where SAT's accuracy comes from: cases and rows of the experiments `ablations`, `best` and `diagnosis`."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from .. import datasets
from ..attention.baselines import BASELINES
from ..attention.layout import BlockLayout
from ..attention.patterns import generate_layout
from ..attention.statistics import mass_kept, overlap, pool_blocks
from ..common import distributed, files
from ..datasets.cache import Splits
from ..model.encoder import ModelConfig
from ..training.checkpoint import load_checkpoint, save_checkpoint
from ..training.fit import fit, own_folder
from ..training.recipe import BEST_MODEL, PUBLISHED, RunConfig, averaged_steps, best_recipe, case_config
from ..training.trainer import Trainer
from .row_files import Context
from .training import SHORT_RUN, SMOKE_RUN, load_data, run_case, run_folder, train

# The base, from which one thing is changed at a time; the preset "best" grew out of it.
BASE_MODEL = {"sparsity_init": "calibrated", "sparsity_target": "correlation", "pruned": "drop"}


def base_recipe(run: RunConfig) -> dict:
    """What the base changes of the recipe of a run: every head keeps one block of each row and column."""
    return {
        "density": 1 / run.model.blocks,
        "pattern_budget": "balanced",
        "pattern_heads": "own",
        "switch_rule": "overfit",
        "schedule_after": "continued",
    }


# ---- what is changed, and where --------------------------------------------------------------------------------------

# Runs are far shorter than published: accuracy peaks early, and what follows is overfitted.
PROFILES = {"paper": ("cifar10", "agnews"), "smoke": ("digits16",)}
RUNS = {
    "cifar10": {"steps": 3_000, "eval_every": 250, "switch_at": 1_000},
    "agnews": {"steps": 600, "eval_every": 50, "switch_at": 50},
    "digits16": {"switch_at": 100},
}
CIFAR, AGNEWS, DIGITS = ("cifar10",), ("agnews",), ("digits16",)
PAPER, SMOKE_TOO = CIFAR + AGNEWS, CIFAR + AGNEWS + DIGITS

# What is varied -> attention, model, and what is changed of the recipe of a run.
STARTS = {
    "base": ("sat", BASE_MODEL, base_recipe),
    "best": ("sat", BEST_MODEL, lambda run: best_recipe(run) | {"schedule_after": "constant"}),
    "dense": ("dense", {}, lambda run: {}),
}


@dataclass(frozen=True)
class Variation:
    """One thing changed. A value in `recipe` may be a function of the run before its recipe is changed."""

    group: str  # what is changed
    value: str | float  # to what
    on: tuple[str, ...] = CIFAR  # in which tasks
    model: dict = field(default_factory=dict)
    recipe: dict = field(default_factory=dict)
    start: str = "base"  # name in `STARTS`


def _each(group: str, *values: str | float, on: tuple[str, ...] = CIFAR, name: str = "", **more) -> list[Variation]:
    """One field of the recipe, which has the group's name if no other is given, set to each of these values."""
    return [Variation(group, value, on, recipe={name or group: value} | more) for value in values]


def _kept(block: int, each: int, **recipe) -> dict[str, dict]:
    """So many blocks a row, and what else is changed of the recipe."""
    return {"model": {"block": block}, "recipe": {"density": lambda run: each * block / run.model.length} | recipe}


_SHARED = {"pattern_heads": "shared"}
_PUBLISHED_NUMBER = {"density": lambda run: run.recipe.density} | _SHARED
_LARGEST = {"pattern_budget": "blocks"} | _PUBLISHED_NUMBER
_BY_ROW = {"pattern_budget": "rows"} | _PUBLISHED_NUMBER
_OF_ATTENTION = {"sparsity_target": "attention"}
_RELEASED = {"sparsity_init": "released"} | _OF_ATTENTION
_NEAR, _RANDOM = {"pattern": "near"}, {"pattern": "random"}
_REFRESHED = {"pattern_refresh": lambda run: round(0.1 * run.recipe.steps)}
_BY_THE_MAPS = {"switch_at": None, "switch_rule": "stable"}
_CRITERIA = ("gradient", "taylor", "gate", "fisher", "value", "excess", "content")

VARIATIONS = [
    Variation("dense", "dense", SMOKE_TOO, start="dense"),
    # what the layout comes from
    Variation("layout", "correlation, learned", SMOKE_TOO),
    Variation("layout", "near, own heads", SMOKE_TOO, recipe=_NEAR),
    Variation("layout", "diagonal", PAPER, recipe=_NEAR | _SHARED),
    Variation("layout", "nearest", PAPER, recipe=_NEAR | _LARGEST),
    Variation("layout", "released", SMOKE_TOO, _RELEASED, _LARGEST),
    Variation("layout", "calibrated", SMOKE_TOO, _OF_ATTENTION, _LARGEST),
    Variation("layout", "correlation, largest", recipe=_LARGEST),
    Variation("layout", "random, balanced", PAPER, recipe=_RANDOM),
    Variation("layout", "random", CIFAR + DIGITS, recipe=_RANDOM | _LARGEST),
    Variation("layout", "attention, balanced", PAPER, recipe={"pattern": "attention"}),
    *(Variation("layout", f"{name}, balanced", recipe={"pattern": name}) for name in ("gradient", "gate")),
    Variation("layout", "attention, by row", SMOKE_TOO, recipe={"pattern": "attention"} | _BY_ROW),
    *(Variation("layout", f"{name}, by row", recipe={"pattern": name} | _BY_ROW) for name in _CRITERIA),
    Variation("layout", "random, changing", recipe=_RANDOM | _REFRESHED),
    Variation("layout", "correlation, refreshed", recipe={"pattern": "correlation"} | _REFRESHED),
    # what else the model and the recipe are set to
    Variation("pruned", "zero", SMOKE_TOO, {"pruned": "zero"}),
    Variation("pruned", "released, zero", PAPER, _RELEASED | {"pruned": "zero"}, _LARGEST),
    *_each("schedule", "constant", on=PAPER, name="schedule_after"),
    *_each("rate_after", 1.0, on=PAPER),
    *_each("average", averaged_steps(3_000)),
    *_each("average", averaged_steps(600), on=AGNEWS),
    Variation("dropout", 0.2, model={"dropout": 0.2}),
    *_each("switch_at", 190, 500, 750, 1_500, 2_000),
    *_each("switch_at", 0, 100, on=AGNEWS),
    *_each("switch_at", 150, on=AGNEWS + DIGITS),
    *_each("switch_at", 200, on=AGNEWS),
    *_each("density", 0.02, 0.0625, 0.125),
    *_each("density", 0.08, on=AGNEWS),
    *_each("density", 0.25, on=SMOKE_TOO),
    *_each("density", 0.4),
    *(Variation("block", block, **_kept(block, 1)) for block in (16, 64)),
    Variation("block", "16, three a row", PAPER, **_kept(16, 3)),
    Variation("block", "16, three a row, near", PAPER, **_kept(16, 3, pattern="near")),
    *_each("theta", 1.7, 0.0, 3.4, **_BY_THE_MAPS),
    *_each("delta", 0.65, 5.2, **_BY_THE_MAPS),
    *_each("rule", "overfit", "gap", on=PAPER, name="switch_rule", switch_at=None),
    Variation("mean_over", "real", AGNEWS, {"mean_over": "real"}),
    Variation("mean_over", "real, dense", AGNEWS, {"mean_over": "real"}, start="dense"),
    # what is taken back of the preset "best"; with all blocks it is dense attention trained as "best" is
    Variation("preset", "best", SMOKE_TOO, start="best"),
    Variation("preset", "best, two a row", **_kept(16, 2), start="best"),
    Variation("preset", "best, three a row", PAPER, **_kept(16, 3), start="best"),
    Variation("preset", "best, one of 32 a row", **_kept(32, 1), start="best"),
    Variation("preset", "best, all blocks", PAPER, recipe={"density": 1.0}, start="best"),
    Variation("preset", "best, half the rate", recipe={"rate_after": 0.5}, start="best"),
    Variation("preset", "best, schedule goes on", recipe={"schedule_after": "continued"}, start="best"),
    Variation("preset", "best, no average", PAPER, recipe={"average": None}, start="best"),
    Variation("preset", "best, near", recipe=_NEAR, start="best"),
    Variation("preset", "best, random", recipe=_RANDOM, start="best"),
    *(Variation("best, switch_at", at, recipe={"switch_at": at}, start="best") for at in (500, 750, 1_500, 2_000)),
    *(Variation("best, switch_at", at, AGNEWS, recipe={"switch_at": at}, start="best") for at in (0, 100, 150, 200)),
    Variation("best, switch_at", "gap", PAPER, recipe={"switch_at": None}, start="best"),
]


def ablation_cases(profile: str) -> list[dict]:
    """One thing changed at a time, seed by seed; what isn't is as in the base, with a forced transition.

    `group` and `value` are those of `VARIATIONS`. theta, delta and the rules decide about the transition: it isn't
    forced there. The preset "best" changes several things at once, and its values take one of them back; in the group
    "best, switch_at" it is forced to switch at other steps or, by the name of its own rule, not at all.
    """
    return [
        _varied(variation, name, seed, profile)
        for seed in range(1 if profile == "smoke" else 3)
        for name in PROFILES[profile]
        for variation in VARIATIONS
        if name in variation.on
    ]


def _varied(variation: Variation, name: str, seed: int, profile: str) -> dict:
    attention, model, start = STARTS[variation.start]
    run = {field: value for field, value in RUNS[name].items() if attention == "sat" or field != "switch_at"}

    def recipe(before: RunConfig) -> dict:
        changed = {field: value(before) if callable(value) else value for field, value in variation.recipe.items()}
        return start(before) | run | changed

    case = _case_with(recipe, name, attention, seed, profile, model | variation.model, run)
    return {"group": variation.group, "value": variation.value} | case


def _case_with(
    recipe: Callable[[RunConfig], dict], name: str, attention: str, seed: int, profile: str, model: dict, run: dict
) -> dict:
    """A case with `model` and `run` changed, and then what `recipe` says of that run; small at the smoke profile."""
    if profile == "smoke":
        model = SMOKE_RUN[name]["model"] | model
    before = case_config(run_case(name, attention, seed, profile, model=model, **run))
    return run_case(name, attention, seed, profile, model=model, **(run | recipe(before)))


def ablate(case: dict, context: Context) -> dict:
    """`train`, with `layout_figures` in place of the maps and the evaluations alone of the history. A process that
    trains by itself shares the dense phase with the other cases."""
    if distributed.size() == 1:
        config, folder = case_config(case), run_folder(case, context)
        share_dense_phase(config, load_data(config), folder, context.device, context.training_folder / "dense-phases")
    result = train(case, context)
    maps = result.pop("maps")
    result["history"] = [line for line in result["history"] if "dev_accuracy" in line]
    return result | layout_figures(maps)


# ---- runs that are alike until their transition ----------------------------------------------------------------------


def dense_phase(config: RunConfig) -> RunConfig:
    """The run that never leaves the dense phase, and until `config`, of SAT, does takes the very same steps.

    Two configurations with the same one differ in nothing before their transition.
    """
    published = PUBLISHED[config.recipe.task]
    late = ("density", "theta", "delta", "schedule_after", "rate_after", "average", "switch_rule")
    late += ("pattern", "pattern_budget", "pattern_heads", "pattern_refresh")
    recipe = replace(config.recipe, switch_at=config.recipe.steps, **{name: getattr(published, name) for name in late})
    return RunConfig(replace(config.model, pruned=ModelConfig.pruned), recipe)


def share_dense_phase(config: RunConfig, data: Splits, folder: Path, device: torch.device, phases: Path) -> None:
    """Let a run that is forced to switch begin where another with the same dense phase was before that step.

    The first such run leaves that in `phases`, by kind of device. `fit` then ends the run as it would by itself, random
    numbers included; its seconds count the shared steps too. A run that isn't forced, or has begun, is left alone. For
    one process.

    Raises:
        InputError: see `fit`.
    """
    at = config.recipe.switch_at
    forced = config.model.attention == "sat" and at is not None and at < config.recipe.steps
    with own_folder(folder, config):
        if not forced or (folder / "last.pt").exists() or (folder / "result.json").exists():
            return
        source = _before_transition(config, data, device, phases)
        if (source / "best-dense.pt").exists():
            best = load_checkpoint(source / "best-dense.pt", torch.device("cpu"))
            save_checkpoint(folder / "best-dense.pt", best | {"config": config.as_dict()})
        shutil.copyfile(source / "metrics.jsonl", folder / "metrics.jsonl")
        state = load_checkpoint(source / "last.pt", torch.device("cpu"))
        state["trainer"]["config"] = config.as_dict()
        save_checkpoint(folder / "last.pt", state)  # last: it says that the others are there


def _before_transition(config: RunConfig, data: Splits, device: torch.device, phases: Path) -> Path:
    """The folder of the dense phase, stopped before the step of the transition; trained from the latest earlier one."""
    dense, at = dense_phase(config), config.recipe.switch_at
    phases = Path(phases) / f"{dense.name}-{device.type}-auto"
    source, work = phases / f"before-{at:06}", phases / "work"
    with files.lock(phases / "lock", f"training in {phases}", wait=True, quiet=True):
        if not source.exists():
            earlier = [path for path in phases.glob("before-*") if path.name < source.name]
            shutil.rmtree(work, ignore_errors=True)
            if earlier:
                shutil.copytree(max(earlier), work)
            fit(dense, data, work, device, progress=False, stop_at=at)
            work.rename(source)
    return source


# ---- what is told of layouts -----------------------------------------------------------------------------------------


def layout_figures(maps: dict) -> dict[str, float | None]:
    """Of the layouts at the transition, means over layers and heads; None each where there was none.

    `mass_kept` of the map then, the mean over batch and heads, whatever head the layout is for; `density`; `diagonal`:
    share of the kept blocks; `distinct_columns`: share of the block columns that some row keeps; `empty_rows`.
    """
    if "kept" not in maps:
        return dict.fromkeys(("mass_kept", "density", "diagonal", "distinct_columns", "empty_rows"))
    pooled, kept = torch.tensor(maps["transition"]), torch.tensor(maps["kept"]).bool()
    heads = kept if kept.dim() == 4 else kept[:, None]
    layouts = [(layer, BlockLayout(grid, 1)) for layer, grids in enumerate(heads) for grid in grids]
    return {
        "mass_kept": fmean(mass_kept(pooled[layer], layout) for layer, layout in layouts),
        "density": fmean(layout.density for _, layout in layouts),
        "diagonal": float(heads.diagonal(dim1=-2, dim2=-1).sum() / heads.sum()),
        "distinct_columns": float(heads.any(-2).double().mean()),
        "empty_rows": fmean(layout.empty_rows for _, layout in layouts),
    }


# ---- the preset "best" -----------------------------------------------------------------------------------------------


def best_cases(profile: str) -> list[dict]:
    """The preset "best": CIFAR-10 in the published number of steps, five seeds; text sets in short runs, three seeds.

    Beside it the same with more blocks a row and with other transitions, on text with that by its rule; the base; the
    baselines on AG News, which `accuracy_short` has too: two runs of a seed tell how far apart they come; and what the
    average of the weights does for all the others.
    """
    if profile == "smoke":
        return [_case_with(best_recipe, "digits16", "sat", 0, profile, BEST_MODEL, {})]

    def case(recipe, name, attention, seed, model):
        return _case_with(recipe, name, attention, seed, profile, model, {} if name == "cifar10" else SHORT_RUN)

    best = lambda name, seed, **changes: case(partial(_best_but, **changes), name, "sat", seed, BEST_MODEL)
    average = lambda run: {"average": averaged_steps(run.recipe.steps)}
    cases = [best("cifar10", seed, each=each) for each in (1, 2, 3) for seed in range(5)]
    cases += [case(base_recipe, "cifar10", "sat", seed, BASE_MODEL) for seed in range(5)]
    for seed in range(3):
        cases += [best("cifar10", seed, switch_at=at) for at in (2_000, 4_000)]
        for name in ("agnews", "imdb", "yelp"):
            cases += [best(name, seed), best(name, seed, switch_at=None)]
        cases += [best(name, seed, each=3, switch_at=None) for name in ("agnews", "yelp")]
        cases += [case(base_recipe, "agnews", "sat", seed, BASE_MODEL)]
        cases += [run_case("agnews", attention, seed, profile, **SHORT_RUN) for attention in BASELINES]
        for name in ("cifar10", "agnews"):
            cases += [case(average, name, attention, seed, {}) for attention in ("dense", *BASELINES)]
    return cases


def _best_but(run: RunConfig, each: int = 1, **changes) -> dict:
    """The preset "best" with so many blocks of each row and column, and with changes; None takes one back."""
    recipe = best_recipe(run) | {"density": each / run.model.blocks} | changes
    return {name: value for name, value in recipe.items() if value is not None}


# ---- diagnosis -------------------------------------------------------------------------------------------------------


def diagnosis_cases(profile: str) -> list[dict]:
    """The dense phase's first steps with each initialisation of W^P, looked at every `every` steps."""
    smoke = profile == "smoke"
    tasks = {"digits16": 100} if smoke else {"cifar10": 600, "agnews": 300}
    return [
        {"steps": steps, "every": 10}
        | _case_with(lambda run: {}, name, "sat", seed, profile, {"sparsity_init": init}, {"switch_at": 10**9})
        for seed in range(1 if smoke else 3)
        for name, steps in tasks.items()
        for init in ("released", "calibrated")
    ]


def diagnose_run(case: dict, context: Context) -> dict:
    """What R~ has learned after so many steps, beside the map of the last of them: `columns`, with step, layer and the
    names of `ablations.diagnose`."""
    config = case_config(case)
    trainer, lines = Trainer(config, load_data(config), context.device), []
    for step in range(1, case["steps"] + 1):
        trainer.train_step()
        if step % case["every"] == 0:
            pooled = [pool_blocks(mean_map, config.model.block) for mean_map in trainer.rule.maps]
            for layer, (parameter, target) in enumerate(zip(trainer.model.sparsity_parameters, pooled, strict=True)):
                scores, width = parameter().detach() / parameter.scale, parameter.weight.shape[1]
                seen = diagnose(scores, target, config.recipe.density, width)
                lines.append({"step": step, "layer": layer} | {name: round(value, 5) for name, value in seen.items()})
    columns = {name: [line[name] for line in lines] for name in lines[0]}
    return {"density": config.recipe.density, "columns": columns, **datasets.provenance(config.recipe.task)}


def diagnose(scores: Tensor, pooled: Tensor, density: float, width: int) -> dict[str, float]:
    """What R~ has learned of a pooled map, both (N, N), and what its largest entries would keep; W^P is (N, width).

    Returns:
        correlation: of all entries of R~ with those of the map. scale: mean of R~ / mean of the map. mass_kept: share
        of the map in the blocks of the largest scores. best_mass: in as many blocks that hold most. form_mass: in
        those that `nearest_form` would choose, to which the loss would bring R~; others of its form may hold more.
        overlap: of the first blocks with the second. diagonal: share of the chosen blocks on the diagonal.
        empty_rows: block rows without a block.
    """
    scores, pooled = scores.double().cpu(), pooled.double().cpu()
    chosen, best, formed = (generate_layout(x, density, 1) for x in (scores, pooled, nearest_form(pooled, width)))
    pair = torch.stack([scores.flatten(), pooled.flatten()])
    return {
        "correlation": float(torch.corrcoef(pair)[0, 1]),
        "scale": float(scores.mean() / pooled.mean()),
        "mass_kept": mass_kept(pooled, chosen),
        "best_mass": mass_kept(pooled, best),
        "form_mass": mass_kept(pooled, formed),
        "overlap": overlap(chosen, best),
        "diagonal": float(chosen.grid.diagonal().sum() / chosen.kept_blocks),
        "empty_rows": chosen.empty_rows,
    }


def nearest_form(target: Tensor, width: int) -> Tensor:
    """What W^P (W^P)^T can be, W^P (N, width), that is nearest to `target` (N, N) by the sum of squares: symmetric,
    without negative eigenvalues, at most `width` above 0.

    Source: Higham 1988, "Computing a nearest symmetric positive semidefinite matrix", theorem 2.1; Eckart and Young
    1936 for the rank.
    """
    values, vectors = torch.linalg.eigh((target + target.T).double() / 2)  # ascending
    values[:-width] = 0
    return (vectors * values.clamp(min=0)) @ vectors.T
