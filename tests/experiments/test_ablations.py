"""The cases of the ablations, what is told of layouts, and the finding: W^P as released learns nothing of the map."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import comparable, tiny_config, tiny_splits
from torch import nn

from sat_lib.attention.statistics import pool_blocks
from sat_lib.common.errors import InputError
from sat_lib.experiments import ablations, training
from sat_lib.experiments.ablations import (
    VARIATIONS,
    ablation_cases,
    best_cases,
    dense_phase,
    diagnose,
    diagnosis_cases,
    layout_figures,
    share_dense_phase,
)
from sat_lib.experiments.row_files import Context
from sat_lib.experiments.training import run_case
from sat_lib.model.encoder import Encoder
from sat_lib.training import fit
from sat_lib.training.checkpoint import load_checkpoint
from sat_lib.training.recipe import RunConfig, case_config, run_config
from sat_lib.training.trainer import Trainer

CPU = torch.device("cpu")


# ---- the finding -----------------------------------------------------------------------------------------------------


def learned(init: str, seed: int, steps: int = 80) -> dict[str, float]:
    """What R~ has learned of the uneven map of one layer, in steps of the published kind."""
    settings = {"steps": 400, "warm_up": 20, "switch_at": 10**9, "density": 0.1, "seed": seed}
    config = tiny_config(model={"sparsity_init": init, "block": 16, "layers": 1}, **settings)
    trainer = Trainer(config, tiny_splits(), CPU)
    (layer,), (parameter,) = trainer.model.layers, trainer.model.sparsity_parameters
    for weight in (layer.attention.query.weight, layer.attention.key.weight, trainer.model.position.weight):
        nn.init.normal_(weight, std=0.5)
    for _ in range(steps):
        trainer.train_step()
    scores, width = parameter().detach() / parameter.scale, parameter.weight.shape[1]
    return diagnose(scores, pool_blocks(trainer.rule.maps[0], 16), 0.1, width)


@pytest.mark.parametrize("seed", range(3))
def test_the_parameter_as_released_learns_nothing_of_the_map(seed):
    seen = learned("released", seed)
    assert seen["best_mass"] > 0.25 and seen["form_mass"] > 0.2  # there is something to learn
    assert seen["mass_kept"] < 0.15  # chance: 0.1
    assert abs(seen["correlation"]) < 0.3
    assert seen["scale"] > 50


@pytest.mark.parametrize("seed", range(3))
def test_a_calibrated_parameter_learns_what_its_form_can_hold(seed):
    seen = learned("calibrated", seed)
    assert seen["scale"] == pytest.approx(1, abs=0.2)
    assert seen["mass_kept"] > 0.9 * seen["form_mass"] > 0.18
    assert seen["correlation"] > 0.5


def test_a_diagnosis_follows_the_dense_phase(tmp_path):
    (case, *_) = (case for case in diagnosis_cases("smoke") if case["model"]["sparsity_init"] == "calibrated")
    case = json.loads(json.dumps(case)) | {"steps": 5, "every": 2}
    found = ablations.diagnose_run(case, Context("smoke", CPU, tmp_path, "code"))
    columns, config = found["columns"], case_config(case)
    assert columns["step"] == [2, 2, 4, 4]
    assert columns["layer"] == [0, 1, 0, 1]
    assert {len(values) for values in columns.values()} == {4}
    assert found["density"] == config.recipe.density
    trainer = Trainer(config, training.load_data(config), CPU)
    for _ in range(4):
        trainer.train_step()
    parameter, mean_map = trainer.model.sparsity_parameters[1], trainer.rule.maps[1]
    scores, width = parameter().detach() / 256, parameter.weight.shape[1]
    seen = diagnose(scores, pool_blocks(mean_map, 16), config.recipe.density, width)
    assert {name: columns[name][3] for name in seen} == {name: round(value, 5) for name, value in seen.items()}
    assert json.loads(json.dumps(found)) == found


# ---- cases -----------------------------------------------------------------------------------------------------------

CASES = {"ablations": ablation_cases, "best": best_cases, "diagnosis": diagnosis_cases}


@pytest.mark.parametrize("profile", ["smoke", "paper"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_run_of_its_own(name, profile):
    cases = CASES[name](profile)
    configs = [case_config(json.loads(json.dumps(case))) for case in cases]
    assert len(configs) == len({config.digest for config in configs}) > 0
    assert [config.recipe.seed for config in configs] == [case["seed"] for case in cases]


def configs_of(profile: str, task: str, seed: int = 0) -> dict[tuple, RunConfig]:
    """The ablations of a task and seed by (group, value)."""
    return {
        (case["group"], case["value"]): case_config(case)
        for case in ablation_cases(profile)
        if (case["task"], case["seed"]) == (task, seed)
    }


def test_the_seeds_of_a_profile_run_the_same_ablations():
    for profile, seeds in (("smoke", 1), ("paper", 3)):
        cases = ablation_cases(profile)
        counted = Counter((case["task"], case["group"], case["value"]) for case in cases)
        assert set(counted.values()) == {seeds}
        assert {case["seed"] for case in cases} == set(range(seeds))


def values_of(group: str) -> list:
    return [variation.value for variation in VARIATIONS if variation.group == group]


LEARNED = {"pattern": "learned", "sparsity_init": "calibrated", "sparsity_target": "correlation"}
ONE_A_ROW = {"pattern_budget": "balanced", "pattern_heads": "own", "density": 1 / 32}
PUBLISHED_NUMBER = {"pattern_heads": "shared", "density": 0.05}
LARGEST = PUBLISHED_NUMBER | {"pattern_budget": "blocks"}
DOCUMENTED = {
    "correlation, learned": LEARNED | ONE_A_ROW,
    "near, own heads": {"pattern": "near"} | ONE_A_ROW,
    "diagonal": {"pattern": "near"} | ONE_A_ROW | {"pattern_heads": "shared"},
    "nearest": {"pattern": "near"} | LARGEST,
    "released": LARGEST | {"pattern": "learned", "sparsity_init": "released", "sparsity_target": "attention"},
    "calibrated": LARGEST | {"pattern": "learned", "sparsity_init": "calibrated", "sparsity_target": "attention"},
    "correlation, largest": LEARNED | LARGEST,
    "random, balanced": {"pattern": "random"} | ONE_A_ROW,
    "random": {"pattern": "random"} | LARGEST,
    "random, changing": {"pattern": "random", "pattern_refresh": 300} | ONE_A_ROW,
    "correlation, refreshed": {"pattern": "correlation", "pattern_refresh": 300} | ONE_A_ROW,
}


@pytest.mark.parametrize("name", values_of("layout"))
def test_a_layouts_name_says_what_it_comes_from(name):
    criterion, _, budget = name.partition(", ")
    by_name = {
        "by row": {"pattern": criterion, "pattern_budget": "rows"} | PUBLISHED_NUMBER,
        "balanced": {"pattern": criterion} | ONE_A_ROW,
    }
    wanted = {"pattern_refresh": None, "switch_at": 1_000, "schedule_after": "continued", "pruned": "drop", "block": 32}
    wanted |= DOCUMENTED[name] if name in DOCUMENTED else by_name[budget]
    config = configs_of("paper", "cifar10")["layout", name].as_dict()
    got = config["model"] | config["recipe"]
    assert {field: got[field] for field in wanted} == wanted


@pytest.mark.parametrize(("profile", "task"), [("smoke", "digits16"), ("paper", "cifar10"), ("paper", "agnews")])
def test_an_ablation_changes_one_thing_of_the_base(profile, task):
    cases = configs_of(profile, task)
    base = cases["layout", "correlation, learned"].as_dict()
    flat = lambda config: {**config["model"], **config["recipe"]}
    may = {
        "layout": {"pattern", "pattern_budget", "pattern_heads", "pattern_refresh", "density", "sparsity_init",
                   "sparsity_target"},
        "schedule": {"schedule_after"}, "switch_at": {"switch_at"}, "density": {"density"},
        "block": {"block", "density", "pattern"}, "theta": {"theta", "switch_at", "switch_rule"},
        "delta": {"delta", "switch_at", "switch_rule"}, "rule": {"switch_at", "switch_rule"},
        "mean_over": {"mean_over"}, "rate_after": {"rate_after"}, "average": {"average"}, "dropout": {"dropout"},
        "preset": {"block", "density", "schedule_after", "rate_after", "average", "switch_rule", "pattern"},
    }  # fmt: skip
    may["pruned"] = may["layout"] | {"pruned"}
    may["best, switch_at"] = may["preset"] | {"switch_at"}
    for (group, value), config in cases.items():
        if config.model.attention == "dense":
            common = ("steps", "warm_up", "eval_every", "rate", "batch", "seed", "precision", "protocol")
            assert all(flat(config.as_dict())[name] == flat(base)[name] for name in common)
            wanted = ("length", None) if group == "dense" else ("real", None)
            assert (config.model.mean_over, config.recipe.switch_at) == wanted
            continue
        changed = {name for name, field in flat(config.as_dict()).items() if field != flat(base)[name]}
        assert changed <= may[group], (group, value)
        assert changed or value == "correlation, learned"
        if group not in ("layout", "preset", "best, switch_at", "block"):
            field = {"schedule": "schedule_after", "rule": "switch_rule"}.get(group, group)
            assert flat(config.as_dict())[field] == (str(value).split(", ")[-1] if group == "pruned" else value)
    for group, value in cases:
        config = cases[group, value]
        if group in ("theta", "delta", "rule"):
            rule = value if group == "rule" else "stable"
            assert (config.recipe.switch_at, config.recipe.switch_rule) == (None, rule)
        if group == "block":
            block, each = (16, 3) if "three a row" in str(value) else (value, 1)
            assert (config.model.block, config.recipe.density) == (block, each / config.model.blocks)
            assert config.recipe.pattern == ("near" if "near" in str(value) else "learned")
    of_the_run = {"steps", "eval_every", "warm_up", "batch", "rate", "switch_at"}
    forced = flat(cases["preset", "best"].as_dict())
    best = flat(run_config(task, "sat", "best", steps=forced["steps"]).as_dict())
    assert {name for name in best if best[name] != forced[name]} <= of_the_run


TAKEN_BACK = {
    "best": {},
    "best, two a row": {"density": 2 / 64},
    "best, three a row": {"density": 3 / 64},
    "best, one of 32 a row": {"density": 1 / 32, "block": 32},
    "best, all blocks": {"density": 1},
    "best, half the rate": {"rate_after": 0.5},
    "best, schedule goes on": {"schedule_after": "continued"},
    "best, no average": {"average": None},
    "best, near": {"pattern": "near"},
    "best, random": {"pattern": "random"},
}


@pytest.mark.parametrize("name", values_of("preset"))
def test_a_value_of_the_preset_takes_back_what_it_names(name):
    cases = configs_of("paper", "cifar10")
    whole, taken = (cases["preset", value].as_dict() for value in ("best", name))
    whole, taken = ({**config["model"], **config["recipe"]} for config in (whole, taken))
    assert {field: value for field, value in taken.items() if value != whole[field]} == TAKEN_BACK[name]


def test_with_all_blocks_the_preset_is_dense_attention():
    made = Trainer(tiny_config(preset="best", density=1.0, switch_at=1), tiny_splits(), CPU)
    for _ in range(2):
        made.train_step()
    assert made.phase == "sparse" and made.maps["kept"].all()
    dense = Encoder(made.config.model)
    dense.load_state_dict(made.model.state_dict())
    tokens = torch.as_tensor(tiny_splits().dev.batch(np.arange(4))[0]).long()
    torch.testing.assert_close(made.model.eval()(tokens).logits, dense.eval()(tokens).logits)


@pytest.mark.parametrize("task", ["cifar10", "agnews"])
def test_the_preset_is_also_forced_to_switch_at_other_steps_and_left_to_its_rule(task):
    cases = configs_of("paper", task)
    best = cases["preset", "best"]
    moved = {value: config for (group, value), config in cases.items() if group == "best, switch_at"}
    assert moved.pop("gap") == replace(best, recipe=replace(best.recipe, switch_at=None, switch_rule="gap"))
    for step, config in moved.items():
        assert config == replace(best, recipe=replace(best.recipe, switch_at=step)) != best
    assert len(moved) == 4


def test_the_preset_best_is_run_beside_other_transitions_the_base_the_baselines_and_all_of_them_averaged():
    cases, configs = best_cases("paper"), list(map(case_config, best_cases("paper")))
    assert {case["recipe"].get("steps") for case in cases if case["task"] == "cifar10"} == {None}
    assert {case["recipe"]["steps"] for case in cases if case["task"] != "cifar10"} == {1_000}
    short = lambda task: {} if task == "cifar10" else {"steps": 1_000, "eval_every": 50}

    def seeds(task, attention="sat", preset="released", **changes):
        runs = [run_config(task, attention, preset, seed=seed, **short(task), **changes) for seed in range(5)]
        return sum(run in configs for run in runs)

    for task, wanted in {"cifar10": 5, "agnews": 3, "imdb": 3, "yelp": 3}.items():
        assert seeds(task, preset="best") == wanted
        assert task == "cifar10" or seeds(task, preset="best", switch_at=None) == wanted
    for task, kept, wanted in (("cifar10", 2, 5), ("cifar10", 3, 5), ("agnews", 3, 3), ("yelp", 3, 3)):
        assert seeds(task, preset="best", density=kept / 64, switch_at=None) == wanted
    for step in (2_000, 4_000):
        assert seeds("cifar10", preset="best", switch_at=step) == 3
    base = {"sparsity_init": "calibrated", "sparsity_target": "correlation", "pruned": "drop"}
    recipe = {"density": 1 / 32, "pattern_budget": "balanced", "pattern_heads": "own", "switch_rule": "overfit"}
    for task, wanted in {"cifar10": 5, "agnews": 3}.items():
        assert seeds(task, preset="continued", model=base, **recipe) == wanted
    baselines = ("longformer", "bigbird", "lsg")
    for attention in baselines:
        assert seeds("agnews", attention) == 3
    for attention in ("dense", *baselines):
        assert seeds("cifar10", attention, average=400) == seeds("agnews", attention, average=40) == 3
    assert len(cases) == 3 * 5 + 2 * 3 + 8 * 3 + 5 + 3 + 3 * 3 + 3 * 4 * 2
    (smoke,) = best_cases("smoke")
    assert case_config(smoke).recipe.density == 1 / case_config(smoke).model.blocks


def test_diagnoses_are_of_the_published_recipe_with_either_start_of_the_parameter():
    for case in diagnosis_cases("paper"):
        config, init = case_config(case), case["model"]["sparsity_init"]
        changes = {"seed": case["seed"], "switch_at": config.recipe.switch_at}
        assert config == run_config(case["task"], "sat", model={"sparsity_init": init}, **changes)
        assert case["steps"] < config.recipe.switch_at
    counted = Counter((case["task"], case["model"]["sparsity_init"]) for case in diagnosis_cases("paper"))
    assert counted == {(task, init): 3 for task in ("cifar10", "agnews") for init in ("released", "calibrated")}


# ---- what is told of layouts -----------------------------------------------------------------------------------------


def test_figures_of_layouts_that_heads_share():
    first, second = [[4, 1], [2, 3]], [[1, 1], [1, 1]]
    kept = [[[1, 0], [1, 0]], [[0, 1], [0, 0]]]
    assert layout_figures({"transition": [first, second], "kept": kept}) == {
        "mass_kept": pytest.approx((6 / 10 + 1 / 4) / 2),
        "density": pytest.approx(3 / 8),
        "diagonal": pytest.approx(1 / 3),
        "distinct_columns": 0.5,
        "empty_rows": 0.5,
    }


def test_figures_of_layouts_by_head():
    pooled = [[4, 1, 0], [2, 3, 0], [0, 0, 10]]
    heads = [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 0, 1], [0, 0, 1], [0, 0, 0]]]
    assert layout_figures({"transition": [pooled], "kept": [heads]}) == {
        "mass_kept": pytest.approx((17 / 20 + 0) / 2),
        "density": pytest.approx(5 / 18),
        "diagonal": pytest.approx(3 / 5),
        "distinct_columns": pytest.approx((1 + 1 / 3) / 2),
        "empty_rows": 0.5,
    }
    assert set(layout_figures({"transition": [pooled]}).values()) == {None}


def test_ablated_runs_share_a_dense_phase_and_tell_of_their_layouts(tmp_path):
    context, rows = Context("smoke", CPU, tmp_path, "code"), {}
    for pattern in ("near", "random"):
        small = {"steps": 6, "warm_up": 2, "eval_every": 2, "switch_at": 3, "pattern": pattern, "density": 1 / 16}
        model = {"block": 16, "layers": 1, "width": 32, "hidden": 16}
        case = run_case("digits16", "sat", 0, "smoke", model=model, pattern_budget="rows", **small)
        rows[pattern] = ablations.ablate(case, context)
    folder = context.training_folder / "dense-phases"
    assert len(list(folder.iterdir())) == 1
    assert rows["near"]["history"][0] == rows["random"]["history"][0]
    for row in rows.values():
        assert [line["step"] for line in row["history"]] == [2, 4, 6]
        assert all("dev_accuracy" in line for line in row["history"])
        assert "maps" not in row
        assert (row["density"], row["empty_rows"], row["transition_step"]) == (1 / 16, 0, 3)
    assert (rows["near"]["diagonal"], rows["near"]["distinct_columns"]) == (1, 1)
    assert rows["random"]["diagonal"] < 0.5


# ---- runs that are alike until their transition ----------------------------------------------------------------------


def run(folder, config, phases=None):
    """A whole run, with its dense phase from a folder of them if one is given."""
    if phases is not None:
        share_dense_phase(config, tiny_splits(), folder, CPU, phases)
    return fit.fit(config, tiny_splits(), folder, CPU, progress=False)


# What may differ between two runs that have their dense phase in common.
LATE = (
    {"rate_after": 1.0}, {"average": 3},
    {"density": 0.5}, {"theta": 3.0}, {"delta": 7.0}, {"preset": "continued"}, {"switch_at": 7}, {"switch_at": None},
    {"switch_rule": "overfit"}, {"pattern": "near"}, {"pattern_budget": "rows"}, {"pattern_heads": "own"},
    {"pattern": "random", "pattern_refresh": 2}, {"model": {"pruned": "drop"}},
)  # fmt: skip


@pytest.mark.parametrize("changes", LATE, ids=str)
def test_configurations_that_differ_after_the_transition_share_their_dense_phase(changes):
    config, other = tiny_config(), tiny_config(**changes)
    assert config != other
    assert dense_phase(other) == dense_phase(config)
    assert dense_phase(dense_phase(config)) == dense_phase(config)
    runs = [[], []]
    for some, run in zip((other, dense_phase(config)), runs, strict=True):
        made = Trainer(some, tiny_splits(), CPU)
        run += [float(made.train_step()["loss"]) for _ in range(5)]
    assert runs[0] == runs[1]
    for _ in range(7):
        made.train_step()
    assert made.phase == "dense"


@pytest.mark.parametrize("changes", [
    {"seed": 1}, {"rate": 0.02}, {"batch": 4}, {"steps": 13}, {"warm_up": 4}, {"eval_every": 3}, {"precision": "bf16"},
    {"protocol": "published"}, {"model": {"block": 16}}, {"model": {"dropout": 0.0}}, {"attention": "dense"},
    {"model": {"sparsity_target": "correlation"}}, {"model": {"sparsity_init": "calibrated"}},
], ids=str)  # fmt: skip
def test_configurations_that_differ_before_the_transition_do_not_share_their_dense_phase(changes):
    assert dense_phase(tiny_config(**changes)) != dense_phase(tiny_config())


@pytest.fixture
def trained(monkeypatch):
    """The steps that are trained, one by one."""
    seen, train_step = [], fit.Trainer.train_step

    def noted(self):
        seen.append(self.step)
        return train_step(self)

    monkeypatch.setattr(fit.Trainer, "train_step", noted)
    return seen


def shared_folder(phases, config):
    return phases / f"{dense_phase(config).name}-cpu-auto"


def best_models(folder):
    return {path.name: load_checkpoint(path, CPU)["model"] for path in folder.glob("best-*.pt")}


@pytest.mark.parametrize("switch", [0, 3, 4, 10])
def test_a_run_that_begins_with_a_shared_dense_phase_ends_as_it_would_alone(switch, tmp_path):
    config = tiny_config(switch_at=switch, eval_every=2)
    alone = run(tmp_path / "alone", config)
    for name in ("first", "second"):  # one trains the dense phase, the other takes it
        assert comparable(run(tmp_path / name, config, tmp_path / "phases")) == comparable(alone)
        assert (tmp_path / name / "metrics.jsonl").read_text() == (tmp_path / "alone/metrics.jsonl").read_text()
        mine, theirs = (best_models(tmp_path / folder) for folder in (name, "alone"))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[phase][key], theirs[phase][key]) for phase in mine for key in mine[phase])
        assert json.loads((tmp_path / name / "config.json").read_text()) == config.as_dict()
        for path in (tmp_path / name).glob("best-*.pt"):
            assert load_checkpoint(path, CPU)["config"] == config.as_dict()


def test_configurations_that_part_at_the_transition_train_its_dense_phase_once(tmp_path, trained):
    phases = tmp_path / "phases"
    run(tmp_path / "a", tiny_config(), phases)
    assert trained == list(range(12))
    source = shared_folder(phases, tiny_config()) / "before-000004"
    before = {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
    assert before.keys() >= {"last.pt", "metrics.jsonl", "best-dense.pt"}
    changes = ({"density": 0.5}, {"pattern": "near"}, {"pattern": "random", "pattern_heads": "own"})
    changes += ({"average": 3, "rate_after": 1.0},)
    for name, changed in zip("bcde", changes, strict=True):
        trained.clear()
        config = tiny_config(**changed)
        result = run(tmp_path / name, config, phases)
        assert trained == list(range(4, 12))
        assert comparable(result) == comparable(run(tmp_path / f"{name}-alone", config))
        seconds = json.loads((tmp_path / name / "result.json").read_text())["seconds"]
        assert seconds["dense"] > load_checkpoint(source / "last.pt", CPU)["seconds"]["dense"] - 0.01
    assert {path.name: path.stat().st_mtime_ns for path in source.iterdir()} == before
    assert [path.name for path in phases.iterdir()] == [source.parent.name]


def test_an_earlier_transition_is_where_a_later_ones_dense_phase_begins(tmp_path, trained):
    phases, steps = tmp_path / "phases", {}
    for switch in (2, 6, 9, 4):
        trained.clear()
        result = run(tmp_path / str(switch), tiny_config(switch_at=switch), phases)
        steps[switch] = trained.copy()
        alone = run(tmp_path / f"{switch}-alone", tiny_config(switch_at=switch))
        assert comparable(result) == comparable(alone)
    assert [some[0] for some in steps.values()] == [0, 2, 6, 2]  # the last is before the one of 6
    assert all(some == list(range(some[0], 12)) for some in steps.values())
    (folder,) = phases.iterdir()
    assert {path.name for path in folder.iterdir()} == {"lock", *(f"before-{switch:06}" for switch in steps)}


def test_what_an_interrupted_dense_phase_left_is_harmless(tmp_path, trained):
    config = tiny_config()
    for name in ("half", "broken"):
        work = shared_folder(tmp_path / name, config) / "work"
        fit.fit(dense_phase(config), tiny_splits(), work, CPU, progress=False, stop_at=2)
    (work / "last.pt").write_bytes(b"cut off")
    (work / "config.json").write_text(json.dumps(tiny_config(seed=9).as_dict()))
    alone = run(tmp_path / "alone", tiny_config())
    for name in ("half", "broken"):
        own = tmp_path / f"{name}-run"
        own.mkdir()
        (own / "metrics.jsonl").write_text('{"step": 0, "loss": 7.0}\n')  # copied before it was interrupted
        assert comparable(run(own, tiny_config(), tmp_path / name)) == comparable(alone)
        assert (own / "metrics.jsonl").read_text() == (tmp_path / "alone/metrics.jsonl").read_text()
        assert {path.name for path in shared_folder(tmp_path / name, config).iterdir()} == {"lock", "before-000004"}


def test_a_run_with_a_shared_dense_phase_goes_on_from_its_own_checkpoint(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(fit, "CHECKPOINT_SECONDS", 0)
    train_step, broken = fit.Trainer.train_step, []

    def step_or_break(self):
        if self.step == 7 and not broken:
            broken.append(True)
            raise KeyboardInterrupt
        return train_step(self)

    monkeypatch.setattr(fit.Trainer, "train_step", step_or_break)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", tiny_config(), tmp_path / "phases")
    trained.clear()
    result = run(tmp_path / "run", tiny_config(), tmp_path / "phases")
    assert trained == list(range(7, 12))
    assert comparable(result) == comparable(run(tmp_path / "alone", tiny_config()))


def test_several_processes_share_nothing(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ablations.distributed, "size", lambda: 2)
    monkeypatch.setattr(ablations, "train", lambda case, context: asked.append(case) or {"maps": {}, "history": []})
    case = ablation_cases("smoke")[1]
    assert ablations.ablate(case, Context("smoke", CPU, tmp_path, "code"))["history"] == []
    assert asked == [case]
    assert not any(tmp_path.iterdir())


def test_a_run_whose_folder_holds_another_configuration_is_left_alone(tmp_path):
    run(tmp_path / "run", tiny_config())
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match=r"another configuration \(recipe.seed: saved 0, wanted 1\)"):
        run(tmp_path / "run", tiny_config(seed=1), tmp_path / "phases")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert not (tmp_path / "phases").exists()


@pytest.mark.parametrize("changes", [{"seed": 1}, {"rate": 0.02}, {"model": {"sparsity_init": "calibrated"}}], ids=str)
def test_configurations_that_part_earlier_do_not_share(changes, tmp_path, trained):
    phases = tmp_path / "phases"
    run(tmp_path / "first", tiny_config(), phases)
    trained.clear()
    config = tiny_config(**changes)
    assert comparable(run(tmp_path / "other", config, phases)) == comparable(run(tmp_path / "alone", config))
    assert trained == 2 * list(range(12))
    assert set(phases.iterdir()) == {shared_folder(phases, some) for some in (tiny_config(), config)}


@pytest.mark.parametrize("changes", [
    {"switch_at": None}, {"switch_at": 12}, {"attention": "dense", "switch_at": 4, "average": 3},
], ids=str)  # fmt: skip
def test_a_run_that_is_not_forced_to_switch_shares_nothing(changes, tmp_path):
    run(tmp_path / "run", tiny_config(**changes), tmp_path / "phases")
    assert not (tmp_path / "phases").exists()
