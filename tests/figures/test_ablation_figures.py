import numpy as np
import pandas as pd
import pytest

from sat_lib import experiments
from sat_lib.experiments.ablations import VARIATIONS
from sat_lib.figures import ablations, ablations_figure, changes, diagnosis
from sat_lib.figures.judge import gap
from sat_lib.training.recipe import case_config


def row(group, value, accuracy, seed=0, task="cifar10", at=1_000, steps=3_000, **more):
    sparse = at is not None
    line = {
        **{"task": task, "attention": "sat" if sparse else "dense", "seed": seed, "group": group, "value": value},
        **{"test_accuracy": accuracy, "transition_step": float("nan") if at is None else at, "step_kind": "fast"},
        "seconds": {"dense": 10.0 if sparse else 30.0, "sparse": 0.004 * (steps - at - 1) if sparse else 0.0},
        "history": [{"step": 0, "loss": 2.3}, {"step": steps, "dev_accuracy": 0.5, "dev_loss": 1.0}],
        **{"model": {}, "recipe": {}, "experiment": "ablations"},
        **{"mass_kept": 0.1, "density": 0.05, "distinct_columns": 1.0, "diagonal": 0.5, "empty_rows": 0.0},
    } | more
    return line | {"resolved": case_config(line).as_dict()}


@pytest.fixture
def rows():
    return pd.DataFrame(
        [
            row("dense", "dense", 0.40, at=None),
            row("layout", "correlation, learned", 0.45),
            row("layout", "correlation, learned", 0.47, seed=1),
            row("layout", "attention, by row", 0.41, distinct_columns=0.2),
            row("pruned", "zero", 0.44),
            row("switch_at", 2_000, 0.48, at=2_000),
            row("rule", "overfit", 0.43, at=1_500),
            row("preset", "best", 0.49),
            row("best, switch_at", 500, 0.46, at=500),
            row("best, switch_at", "gap", 0.47, at=750),
            row("layout", "correlation, learned", 0.60, task="agnews"),
        ]
    )


def test_every_layout_has_a_kind():
    layouts = [variation.value for variation in VARIATIONS if variation.group == "layout"]
    kinds = {label: ablations_figure.kind_of(label) for label in layouts}
    assert kinds["calibrated"] == kinds["correlation, largest"] == "learned by $W^P$"
    assert kinds["near, own heads"] == kinds["diagonal"] == kinds["nearest"] == "by hand"
    assert kinds["random, balanced"] == kinds["random, changing"] == "at random"
    assert kinds["gate, by row"] == kinds["correlation, refreshed"] == "measured on the dense model"


def test_summary_gives_mean_deviation_and_the_time_of_a_step_of_the_last_phase(rows):
    found = ablations.summary(rows).set_index(["task", "group", "value"])
    base = found.loc[("cifar10", "layout", "correlation, learned")]
    assert (base["runs"], base["percent"]) == (2, pytest.approx(46))
    assert base["deviation"] == pytest.approx(np.sqrt(2))
    assert base["step_ms"] == pytest.approx(4)
    dense = found.loc[("cifar10", "dense", "dense")]
    assert np.isnan(dense["deviation"]) and dense["step_ms"] == pytest.approx(10)


def test_every_layout_and_every_change_has_words_of_its_own():
    layouts = [variation.value for variation in VARIATIONS if variation.group == "layout"]
    words = [ablations_figure.layout_words(layout) for layout in layouts]
    assert len(set(words)) == len(layouts)
    assert not {"value, by row", "near, own heads", "calibrated"} & set(words)
    assert ablations_figure.layout_words("attention, by row") == "most attention, by row"
    groups = {*changes.FROM_BASE, "preset"}
    others = [each for each in VARIATIONS if each.group in groups]
    words = [changes.change_words(each.group, each.value) for each in others if each.group != "average"]
    assert len(set(words)) == len(words)
    assert {each.value for each in VARIATIONS if each.group == "rule"} == set(ablations_figure.RULES)
    assert changes.change_words("density", 0.0625) == "6.25 % of the blocks"


def test_the_figure_names_layouts_by_kind_and_accuracy_and_the_moments_of_the_transition(rows):
    figure, drawn = ablations_figure.ablations(rows)
    assert len(drawn) == 10
    upper, lower = figure.subfigs
    accurate, held = upper.axes[:2]
    rows_of = {
        label.get_text(): place for label, place in zip(accurate.get_yticklabels(), accurate.get_yticks(), strict=True)
    }
    named = sorted((label for label in rows_of if label), key=rows_of.get)
    assert named == [
        "learned by $W^P$",
        "learned from correlation (base)",
        "measured on the dense model",
        "most attention, by row",
    ]
    place = rows_of["most attention, by row"]
    (at,) = [line.get_xdata()[0] for line in held.lines if line.get_marker() == "o" and line.get_ydata()[0] == place]
    assert at == pytest.approx(0.1 / 0.05)
    forced, by_rule = lower.axes[:2]
    assert [text.get_text() for text in forced.texts] == ["base", "best"]
    assert {text.get_text(): text.xy[1] for text in by_rule.texts if text.get_text() != "dense"} == {
        "1500": pytest.approx(43),
        "750": pytest.approx(47),
    }


def test_where_no_rule_came_there_is_no_panel_for_rules_and_a_lone_seed_has_no_interval(rows):
    without = rows[~rows["value"].isin(["overfit", "gap"]) & (rows["seed"] == 0)]
    figure, _ = ablations_figure.ablations(without)
    forced, by_rule = figure.subfigs[1].axes[:2]
    assert not by_rule.get_visible() and "dense" in {text.get_text() for text in forced.texts}
    assert not any(len(interval) for each in forced.collections for interval in each.get_segments())


def test_the_changes_are_differences_with_their_errors_the_largest_gain_first(rows):
    more = pd.DataFrame([row("pruned", "zero", 0.42, seed=1), row("preset", "best, random", 0.46)])
    figure, drawn = changes.changes(pd.concat([rows, more], ignore_index=True))
    found = drawn.set_index(["of", "group", "value"])
    assert found.loc[("base", "pruned", "zero"), "difference"] == pytest.approx(-3)
    assert found.loc[("base", "pruned", "zero"), "error"] == pytest.approx(np.sqrt(2))
    assert found.loc[("best", "preset", "best, random"), "difference"] == pytest.approx(-3)
    assert np.isnan(found.loc[("best", "preset", "best, random"), "error"])
    assert set(found.index.get_level_values("group")) == {"dense", "pruned", "preset"}
    axis = figure.axes[0]
    places = {label.get_text(): place for label, place in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True)}
    assert sorted(places, key=places.get) == [
        "changed from the base",
        'preset "best"',
        "pruned entries count in the softmax",
        "dense attention",
        'changed from "best"',
        "random blocks",
    ]


def test_the_first_task_gives_a_change_its_place_whichever_run_was_measured_first(rows):
    late = [
        row("pruned", "zero", 0.50, task="agnews"),
        row("dropout", 0.2, 0.43),
        row("dropout", 0.2, 0.5, task="agnews"),
    ]
    late += [row("pruned", "zero", 0.42, seed=1)]
    lines = changes.change_lines(pd.concat([rows[rows["group"] != "pruned"], pd.DataFrame(late)], ignore_index=True))
    assert list(lines["task"].unique()) == ["cifar10", "agnews"] and lines["task"].is_monotonic_decreasing


def test_the_changes_of_one_run_without_its_base_are_drawn_empty(rows):
    figure, drawn = changes.changes(rows[rows["group"] == "pruned"])
    assert drawn.empty and len(figure.axes) == 1


def test_the_table_has_the_best_of_a_group_first(rows):
    table = ablations.ablation_table(rows)
    layouts = table[(table["task"] == "CIFAR-10") & (table["changed"] == "layout")]
    assert list(layouts["test %"]) == ["46.00", "41.00"]
    assert list(layouts["key blocks used %"]) == ["100", "20"]
    assert table.loc[table["changed"] == "switch_at", "to"].item() == "2000"
    assert table.loc[table["changed"] == "dense", "switched at step"].item() == "-"


def test_the_switch_table_sets_forced_steps_and_rules_against_the_best_step_and_looks_ahead():
    evaluations = lambda *losses: [
        {"step": 500 * place, "dev_loss": loss, "dev_accuracy": 0.5} for place, loss in enumerate(losses, 1)
    ]
    rows = pd.DataFrame(
        [
            row("layout", "correlation, learned", 0.45, at=1_000, history=evaluations(2.0, 1.75, 1.5)),
            row("layout", "correlation, learned", 0.47, at=1_000, seed=1, history=evaluations(9.0, 9.0, 9.0)),
            row("switch_at", 190, 0.40, at=190, history=evaluations(2.0, 1.5, 1.9)),
            row("switch_at", 500, 0.42, at=500, history=evaluations(2.0, 1.5, 1.9)),
            row("rule", "gap", 0.43, at=500, seed=1, history=evaluations(9.0, 10.0, 9.0)),
            row("rule", "overfit", 0.44, at=None, history=evaluations(9.0, 9.0, 9.0)),
            row("dense", "dense", 0.41, at=None, history=evaluations(2.0, 1.75, 1.25)),
            row("preset", "best", 0.50),
        ]
    )
    table = ablations.switch_table(rows).set_index("step or rule")
    assert list(table.index) == ["190", "500", "1000", "gap", "overfit"]
    assert list(table["test %"]) == ["40.00", "42.00", "46.00", "43.00", "44.00"]
    assert list(table["less the best step"]) == ["-6.00", "-4.00", "-", "-3.00", "-2.00"]
    assert list(table["switched at step"]) == ["190", "500", "1000", "500", "-"]
    # 190 and 500 are compared at step 1,000, with two that are still dense there; 1,000 at 1,500, with one (seed 0);
    # the rule "gap" at 1,000, with the base of its seed. "overfit" never switched.
    assert list(table["dev loss less dense"]) == ["-0.250", "-0.250", "+0.250", "+1.000", "-"]


def test_conclusions_part_what_gained_from_what_did_not(rows):
    base, better, worse, *best = ablations.conclusions(rows)[:6]
    assert base == 'CIFAR-10: 46.00 % with "base" (2 runs).'
    assert better == "Above it: switch_at 2000 +2.00."
    assert worse == "Below it: pruned zero -2.00; rule overfit -3.00; attention, by row -5.00; dense -6.00."
    assert best == [
        'CIFAR-10: 49.00 % with "best" (1 run).',
        "Above it: nothing.",
        "Below it: best, switch_at gap -2.00; best, switch_at 500 -3.00.",
    ]


def test_a_difference_has_the_standard_error_of_two_means():
    ours, others = pd.Series([1.0, 3.0]), pd.Series([0.0, 4.0, 2.0])
    assert gap(ours, others).numbers == f"+0.00 ± {np.hypot(1, 2 / np.sqrt(3)):.2f}"
    assert gap(ours, others[:1]).numbers == "+2.00"


def test_the_best_table_sets_beside_it_runs_of_as_many_steps():
    averaged = {"recipe": {"average": 120, "density": 1 / 64}, "model": {"block": 16}, "experiment": "best"}
    best = [row("", "", accuracy, seed=seed, **averaged) for seed, accuracy in enumerate((0.45, 0.47))]
    best += [row("", "", 0.43, experiment="best"), row("", "", 0.41, at=None, **averaged)]
    two = {"average": 120, "density": 2 / 64}
    best += [row("", "", 0.44, **averaged | {"recipe": two})]
    best += [row("", "", 0.415, **averaged | {"recipe": two | {"switch_at": 80}})]
    text = averaged["recipe"] | {"steps": 3_000}
    for accuracy, changed in ((0.6, {"switch_at": 80}), (0.5, {}), (0.4, {"density": 3 / 64})):
        best.append(row("", "", accuracy, task="agnews", **averaged | {"recipe": text | changed}))
    others = [row("", "", 0.42), row("", "", 0.40, at=None), row("", "", 0.9, at=None, steps=9_999)]
    others = [line | {"experiment": "accuracy"} for line in others]
    frames = {"best": pd.DataFrame(best), "accuracy": pd.DataFrame(others), "accuracy_short": pd.DataFrame()}
    table = ablations.best_table(frames).set_index("attention")
    of_text, table = (table[(table["task"] == "AG News") == wanted] for wanted in (True, False))
    by_rule = "switched by its rule"
    assert list(of_text.index) == ["sat, best", f"sat, best, {by_rule}", f"sat, best, 3 a row, {by_rule}"]
    found = {"sat, best": "46.00", "sat, best, 2 a row": "44.00", "sat, best, 2 a row, switched at 80": "41.50"}
    found |= {"sat, base": "43.00", "sat, released": "42.00", "dense, averaged": "41.00", "dense": "40.00"}
    assert dict(table["test %"]) == found
    assert list(table["test %"]) == sorted(table["test %"], reverse=True)
    assert table.loc["sat, released", "best gains"] == "+4.00"
    assert table.loc["sat, best", "best gains"] == "-"
    assert ablations.best_table(frames | {"best": pd.DataFrame()}).empty
    without = ablations.best_table(frames | {"best": pd.DataFrame(best[2:-3])}).set_index("attention")
    assert set(without["best gains"]) == {"-"} and len(without) == len(table) - 1


def test_the_diagnosis_is_drawn_by_task_and_initialisation():
    names = ("correlation", "scale", "mass_kept", "best_mass", "form_mass", "overlap", "diagonal", "empty_rows")
    rows = pd.DataFrame(
        [
            {"task": "cifar10", "model": {"sparsity_init": init}, "seed": seed}
            | {"columns": {"step": [10, 20], "layer": [0, 0]} | {name: [0.5, value] for name in names}}
            for seed in (0, 1)
            for init, value in (("released", 0.25), ("calibrated", 1.0))
        ]
    )
    figure, drawn = diagnosis.diagnosis(rows)
    assert len(drawn) == 8 and len(figure.axes) == 4
    released, _, of_form = figure.axes[0].lines
    assert list(released.get_ydata()) == [1, 1] and list(of_form.get_ydata()) == [1, 1]
    assert {text.get_text() for text in figure.axes[0].texts} == {"released", "calibrated", "best of its form"}
    assert [len(axis.collections) for axis in figure.axes] == [2] * 4
    table = diagnosis.diagnosis_table(rows).set_index("W^P starts")
    assert list(table["mass kept %"]) == ["25.0", "100.0"]
    assert list(table["step"]) == [20, 20] and list(table["runs"]) == [2, 2]


def test_the_committed_rows_are_of_cases_that_there_are():
    for name in ("ablations", "best", "diagnosis"):
        rows = experiments.rows(name, "paper", measure=False)
        stored = experiments.files.read_rows(experiments.files.ROOT / "data/results" / f"{name}.jsonl")
        assert len(rows) == len(stored) > 0
        assert not {"maps"} & set(rows.columns)
