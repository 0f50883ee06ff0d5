"""Where SAT's accuracy comes from: cases and rows of the experiments `ablations`, `best` and `diagnosis`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from .. import datasets
from ..attention.baselines import BASELINES
from ..attention.layout import BlockLayout
from ..attention.patterns import generate_layout
from ..attention.statistics import mass_kept, overlap, pool_blocks
from ..common import distributed
from ..datasets.tasks import task
from ..training.recipe import BEST_MODEL, RunConfig, averaged_steps, best_recipe, case_config
from ..training.trainer import Trainer
from .row_files import Context
from .training import SHORT_RUN, SMOKE_RUN, load_data, run_case, train

# ---- ablations -------------------------------------------------------------------------------------------------------

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


# What a layout can come from: changes of the base in the recipe, and in the model. A density of None is the task's
# published one.
_SHARED = {"pattern_heads": "shared"}
_LARGEST = {"pattern_budget": "blocks", "density": None} | _SHARED
_BY_ROW = {"pattern_budget": "rows", "density": None} | _SHARED
_OF_ATTENTION = {"sparsity_target": "attention"}
_RELEASED = {"sparsity_init": "released"} | _OF_ATTENTION
_ROW_SIGNALS = ("attention", "gradient", "taylor", "gate", "fisher", "value", "excess", "content")
LAYOUTS = {
    "correlation, learned": ({}, {}),
    "near, own heads": ({"pattern": "near"}, {}),
    "diagonal": ({"pattern": "near"} | _SHARED, {}),
    "nearest": ({"pattern": "near"} | _LARGEST, {}),
    "released": (_LARGEST, _RELEASED),
    "calibrated": (_LARGEST, {"sparsity_init": "calibrated"} | _OF_ATTENTION),
    "correlation, largest": (_LARGEST, {}),
    "random, balanced": ({"pattern": "random"}, {}),
    "random": ({"pattern": "random"} | _LARGEST, {}),
    "attention, balanced": ({"pattern": "attention"}, {}),
    "gradient, balanced": ({"pattern": "gradient"}, {}),
    "gate, balanced": ({"pattern": "gate"}, {}),
    **{f"{name}, by row": ({"pattern": name} | _BY_ROW, {}) for name in _ROW_SIGNALS},
    "random, changing": ({"pattern": "random", "pattern_refresh": 0.1}, {}),  # a share of the run's steps
    "correlation, refreshed": ({"pattern": "correlation", "pattern_refresh": 0.1}, {}),
}
# What the group "block" is set to: the block, how many of them a row keeps, and what else is changed of the recipe.
BLOCKS = {
    16: (16, 1, {}),
    64: (64, 1, {}),
    "16, three a row": (16, 3, {}),
    "16, three a row, near": (16, 3, {"pattern": "near"}),
}
# What the group "preset" takes back of the preset "best": the block and how many of them a row keeps (None: as in
# "best"), or something else of the recipe. With all blocks it is dense attention trained as "best" is.
PRESETS = {
    "best": (None, {}),
    "best, two a row": ((16, 2), {}),
    "best, three a row": ((16, 3), {}),
    "best, one of 32 a row": ((32, 1), {}),
    "best, all blocks": (None, {"density": 1.0}),
    "best, half the rate": (None, {"rate_after": 0.5}),
    "best, schedule goes on": (None, {"schedule_after": "continued"}),
    "best, no average": (None, {"average": None}),
    "best, near": (None, {"pattern": "near"}),
    "best, random": (None, {"pattern": "random"}),
}
# Profile -> task -> the run with its forced transition, and group by group the values of what is changed. Runs are far
# shorter than published: accuracy peaks early, and what follows is learnt by heart.
PLANS = {
    "paper": {
        "cifar10": {
            "run": {"steps": 3_000, "eval_every": 250, "switch_at": 1_000},
            "layout": tuple(LAYOUTS),
            "pruned": ("zero", "released, zero"),
            "schedule": ("constant",),
            "rate_after": (1.0,),
            "average": (averaged_steps(3_000),),
            "dropout": (0.2,),
            "switch_at": (190, 500, 750, 1_500, 2_000),
            "density": (0.02, 0.0625, 0.125, 0.25, 0.4),
            "block": tuple(BLOCKS),
            "theta": (1.7, 0.0, 3.4),
            "delta": (0.65, 5.2),
            "rule": ("overfit", "gap"),
            "preset": tuple(PRESETS),
            "best, switch_at": (500, 750, 1_500, 2_000, "gap"),
        },
        "agnews": {
            "run": {"steps": 600, "eval_every": 50, "switch_at": 50},
            "layout": (
                *("correlation, learned", "near, own heads", "diagonal", "nearest", "released", "calibrated"),
                *("random, balanced", "attention, balanced", "attention, by row"),
            ),
            "pruned": ("zero", "released, zero"),
            "schedule": ("constant",),
            "rate_after": (1.0,),
            "average": (averaged_steps(600),),
            "switch_at": (0, 100, 150, 200),
            "density": (0.08, 0.25),
            "block": ("16, three a row", "16, three a row, near"),
            "rule": ("overfit", "gap"),
            "mean_over": ("real", "real, dense"),
            "preset": ("best", "best, three a row", "best, all blocks", "best, no average"),
            "best, switch_at": (0, 100, 150, 200, "gap"),
        },
    },
    "smoke": {
        "digits16": {
            "run": {"switch_at": 100},
            "layout": (
                *("correlation, learned", "near, own heads", "released", "calibrated", "random"),
                "attention, by row",
            ),
            "pruned": ("zero",),
            "switch_at": (200,),
            "density": (0.25,),
            "preset": ("best",),
        },
    },
}


def ablation_cases(profile: str) -> list[dict]:
    """One thing changed at a time, seed by seed; what isn't is as in the base, with a forced transition.

    `group` says what is changed (layout, dense, or a name in `PLANS`), `value` to what. theta, delta and the rules
    decide about the transition: it isn't forced there. The preset "best" changes several things at once, and its values
    take one of them back; it is forced to switch as the base is, in the group "best, switch_at" at other steps or, by
    the name of its own rule, not at all.
    """
    seeds = range(1 if profile == "smoke" else 3)
    return [
        {"group": group, "value": value} | run_case(name, attention, seed, profile, model=model, **recipe)
        for seed in seeds
        for name, plan in PLANS[profile].items()
        for group, value, attention, model, recipe in _ablations(name, plan, profile)
    ]


def _ablations(name: str, plan: dict, profile: str) -> list[tuple[str, object, str, dict, dict]]:
    """(group, value, attention, model, recipe) of each case of a task."""
    small, run = _small(name, profile), plan["run"]
    base = case_config(run_case(name, "sat", 0, profile, model=small, **run))
    without_switch = {key: value for key, value in run.items() if key != "switch_at"}
    cases = [("dense", "dense", "dense", small, without_switch)]
    for group, values in plan.items():
        for value in values if group != "run" else ():
            if value == "real, dense":
                cases.append((group, value, "dense", small | {"mean_over": "real"}, without_switch))
                continue
            recipe, model = _changes(group, value, base)
            settings = base_recipe(base) | run | recipe
            if settings["density"] is None:
                settings["density"] = base.recipe.density
            cases.append((group, value, "sat", small | BASE_MODEL | model, settings))
    return cases


def _changes(group: str, value, base: RunConfig) -> tuple[dict, dict]:
    """What a value of a group changes in the recipe, and in the model."""
    if group == "layout":
        recipe, model = LAYOUTS[value]
        if "pattern_refresh" in recipe:
            recipe = recipe | {"pattern_refresh": round(recipe["pattern_refresh"] * base.recipe.steps)}
        return recipe, model
    if group == "pruned":
        recipe, model = LAYOUTS["released"] if value == "released, zero" else ({}, {})
        return recipe, model | {"pruned": "zero"}
    if group == "schedule":
        return {"schedule_after": value}, {}
    if group == "block":
        block, each, recipe = BLOCKS[value]
        kept, model = _kept(block, each, base)
        return recipe | kept, model
    if group == "best, switch_at":
        recipe, model = _changes("preset", "best", base)
        return recipe | {"switch_at": None if value == "gap" else value}, model
    if group == "preset":
        blocks, recipe = PRESETS[value]
        best = best_recipe(replace(base, model=replace(base.model, **BEST_MODEL))) | {"schedule_after": "constant"}
        best.pop("switch_at", None)  # forced where the base is
        kept, model = _kept(*blocks, base) if blocks else ({}, {})
        return best | kept | recipe, BEST_MODEL | model
    if group in ("theta", "delta"):
        return {"switch_at": None, "switch_rule": "stable", group: value}, {}
    if group == "rule":
        return {"switch_at": None, "switch_rule": value}, {}
    return ({}, {group: value}) if group in ("mean_over", "dropout") else ({group: value}, {})


def _kept(block: int, each: int, base: RunConfig) -> tuple[dict, dict]:
    """The recipe's and the model's share of so many blocks a row."""
    return {"density": each * block / base.model.length}, {"block": block}


def ablate(case: dict, context: Context) -> dict:
    """`train`, with `layout_figures` in place of the maps and the evaluations alone of the history. A process that
    trains by itself shares the dense phase with the other cases."""
    shared = context.training_folder / "dense-phases" if distributed.size() == 1 else None
    result = train(case, context, shared)
    maps = result.pop("maps")
    result["history"] = [line for line in result["history"] if "dev_accuracy" in line]
    return result | layout_figures(maps)


def layout_figures(maps: dict) -> dict[str, float]:
    """Of the layouts at the transition, means over layers and heads; nothing where there was none.

    `mass_kept` of the map then, the mean over batch and heads, whatever head the layout is for; `density`; `diagonal`:
    share of the kept blocks; `distinct_columns`: share of the block columns that some row keeps; `empty_rows`.
    """
    if "kept" not in maps:
        return {}
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
    case = partial(_case_with, profile=profile)
    if profile == "smoke":
        return [case(best_recipe, "digits16", "sat", 0, model=_small("digits16", profile) | BEST_MODEL)]
    best = lambda name, seed, **changes: case(partial(_best_but, **changes), name, "sat", seed, model=BEST_MODEL)
    base = lambda name, seed: case(base_recipe, name, "sat", seed, model=BASE_MODEL)
    cases = [best("cifar10", seed, each=each) for each in (1, 2, 3) for seed in range(5)]
    cases += [base("cifar10", seed) for seed in range(5)]
    for seed in range(3):
        cases += [best("cifar10", seed, switch_at=at) for at in (2_000, 4_000)]
        for name in ("agnews", "imdb", "yelp"):
            cases += [best(name, seed), best(name, seed, switch_at=None)]
        cases += [best(name, seed, each=3, switch_at=None) for name in ("agnews", "yelp")]
        cases += [base("agnews", seed)]
        cases += [run_case("agnews", attention, seed, profile, **SHORT_RUN) for attention in BASELINES]
        for name in ("cifar10", "agnews"):
            cases += [case(_average, name, attention, seed) for attention in ("dense", *BASELINES)]
    return cases


def _case_with(
    recipe: Callable[[RunConfig], dict], name: str, attention: str, seed: int, profile: str, model: dict | None = None
) -> dict:
    """A case with what `recipe` says of its run, a short one of a text set."""
    changes = {"model": model or {}} | (SHORT_RUN if task(name).kind == "text" else {})
    run = case_config(run_case(name, attention, seed, profile, **changes))
    return run_case(name, attention, seed, profile, **recipe(run), **changes)


def _best_but(run: RunConfig, each: int = 1, **changes) -> dict:
    """The preset "best" with so many blocks of each row and column, and with changes; None takes one back."""
    recipe = best_recipe(run) | {"density": each / run.model.blocks} | changes
    return {name: value for name, value in recipe.items() if value is not None}


def _average(run: RunConfig) -> dict:
    return {"average": averaged_steps(run.recipe.steps)}


def _small(name: str, profile: str) -> dict:
    """What the smoke profile changes of a task's model."""
    return SMOKE_RUN[name].get("model", {}) if profile == "smoke" else {}


# ---- diagnosis -------------------------------------------------------------------------------------------------------


def diagnosis_cases(profile: str) -> list[dict]:
    """The dense phase's first steps with each initialisation of W^P, looked at every `every` steps."""
    smoke = profile == "smoke"
    tasks = {"digits16": 100} if smoke else {"cifar10": 600, "agnews": 300}
    return [
        {"steps": steps, "every": 10}
        | run_case(name, "sat", seed, profile, model=_small(name, profile) | {"sparsity_init": init}, switch_at=10**9)
        for seed in range(1 if smoke else 3)
        for name, steps in tasks.items()
        for init in ("released", "calibrated")
    ]


def diagnose_run(case: dict, context: Context) -> dict:
    """What R~ has learnt after so many steps, beside the map of the last of them: `columns`, with step, layer and the
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
    """What R~ has learnt of a pooled map, both (N, N), and what its largest entries would keep; W^P is (N, width).

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
