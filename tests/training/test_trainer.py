import copy
import gc
import json
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_splits

from sat_lib.attention import ATTENTION
from sat_lib.attention.patterns import generate_layout
from sat_lib.attention.static_patterns import nearness
from sat_lib.attention.statistics import block_correlation
from sat_lib.common.errors import InputError
from sat_lib.datasets.batches import batch_indices
from sat_lib.model.encoder import Encoder
from sat_lib.model.sparsity import LOSS_WEIGHT, sparsity_loss
from sat_lib.training.checkpoint import config_from_dict
from sat_lib.training.recipe import PUBLISHED, run_config
from sat_lib.training.saliency import block_saliency
from sat_lib.training.trainer import Trainer


def trainer(device="cpu", **changes):
    return Trainer(tiny_config(**changes), tiny_splits(), torch.device(device))


def steps(made, count):
    return [made.train_step() for _ in range(count)]


def test_an_epoch_visits_every_example_at_most_once_and_the_next_in_another_order():
    epoch = [batch_indices(20, 6, step, seed=3) for step in range(3)]
    flat = np.concatenate(epoch)
    assert len(set(flat.tolist())) == 18
    assert not np.array_equal(batch_indices(20, 6, 3, seed=3), epoch[0])
    assert not np.array_equal(batch_indices(20, 6, 0, seed=4), epoch[0])
    assert np.array_equal(batch_indices(20, 6, 2, seed=3), epoch[2])
    with pytest.raises(InputError, match="at most the 20 training examples there are; got 21"):
        batch_indices(20, 21, 0, seed=0)


def test_published_recipes_are_the_papers():
    published = {
        "cifar10": (10_000, 175, 0.002, 500, 0.05, 1.7, 1.3),
        "inaturalist": (10_000, 800, 0.003, 500, 0.04, 1.7, 1.3),
        "agnews": (30_000, 80, 0.0009, 200, 0.08, 1.7, 1.3),
        "yelp": (30_000, 80, 0.0007, 200, 0.05, 1.3, 1.3),
    }
    for name, wanted in published.items():
        r = PUBLISHED[name]
        assert (r.steps, r.warm_up, r.rate, r.eval_every, r.density, r.theta, r.delta) == wanted
        assert (r.batch, r.schedule_after) == (512, "constant")


def test_optimiser_and_schedule_are_the_published_ones():
    made = trainer(steps=100, warm_up=10, rate=0.01)
    group = made.optimiser.param_groups[0]
    assert (group["eps"], group["weight_decay"]) == (1e-6, 0)
    rates = [record["rate"] for record in steps(made, 4)]
    rising = 0.0004 + (0.01 - 0.0004) * np.arange(4) / 9  # linear from a 25th of the peak, over the warm-up
    np.testing.assert_allclose(rates, rising)


def test_dense_phase_loss_and_its_weight():
    """One step from the same start: the gradients are those of task loss + 0.01 x layers x sum of pattern losses."""
    made, other = trainer(), trainer()
    tokens, labels = other._batch()
    other.model.train()
    output = other.model(tokens, statistics=True)
    loss = F.cross_entropy(output.logits, labels)
    pattern = sum(map(sparsity_loss, other.model.sparsity_parameters, (s.pooled for s in output.statistics)))
    (loss + 0.02 * pattern).backward()
    torch.nn.utils.clip_grad_value_(other.model.parameters(), 1.0)
    torch.manual_seed(made.config.recipe.seed)
    made = trainer()
    record = made.train_step()
    assert float(record["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert record["sparsity_loss"] == pytest.approx(pattern.item(), rel=1e-5)
    for (name, mine), theirs in zip(made.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
        assert mine.grad.abs().max() <= 1.0


@pytest.mark.parametrize("init", ["released", "calibrated"])
def test_the_sparsity_parameter_may_predict_the_correlation_of_the_blocks_values(init):
    made = trainer(model={"sparsity_target": "correlation", "sparsity_init": init, "dropout": 0.0})
    values = []
    for layer in made.model.layers:
        see = lambda attention, inputs: values.append(attention.heads(inputs[0])[2].detach())
        layer.attention.register_forward_pre_hook(see)
    initial = [copy.deepcopy(parameter) for parameter in made.model.sparsity_parameters]
    record = made.train_step()
    targets = [block_correlation(v, 32) for v in values]
    loss = sum(F.mse_loss(parameter(), target) for parameter, target in zip(initial, targets, strict=True))
    assert record["sparsity_loss"] == pytest.approx(loss.item(), rel=1e-5)
    (2 * LOSS_WEIGHT * loss).backward()
    for parameter, mine in zip(made.model.sparsity_parameters, initial, strict=True):
        torch.testing.assert_close(parameter.weight.grad, mine.weight.grad.clamp(-1, 1))


@pytest.mark.parametrize(("init", "target", "scale"), [
    ("released", "attention", 1), ("calibrated", "attention", 256), ("calibrated", "correlation", 1),
])  # fmt: skip
def test_the_target_is_multiplied_by_the_length_where_a_calibrated_parameter_predicts_attention(init, target, scale):
    made = trainer(model={"sparsity_init": init, "sparsity_target": target})
    assert [parameter.scale for parameter in made.model.sparsity_parameters] == [scale] * 2


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_transition_freezes_the_pattern_and_starts_a_fresh_optimiser(name):
    made = trainer(name)
    records = steps(made, 5)
    assert [r["phase"] for r in records] == ["dense"] * 5
    assert made.phase == "sparse"
    assert made.transition_step == 4
    assert not made.optimiser.state
    frozen = [p.weight.clone() for p in made.model.sparsity_parameters]
    records = steps(made, 5)
    assert {r["phase"] for r in records} == {"sparse"}
    assert "skewness" not in records[0]
    assert all(torch.equal(a, p.weight) for a, p in zip(frozen, made.model.sparsity_parameters, strict=True))
    assert [int(k.sum()) for k in made.maps["kept"]] == [int(64 * 0.2)] * 2
    for score, kept in zip(made.maps["scores"], made.maps["kept"], strict=True):
        assert score[kept].min() >= score[~kept].max()


def test_released_rate_is_constant_at_half_the_peak_and_continued_goes_on_with_the_schedule():
    released = [r["rate"] for r in steps(trainer(), 12)]
    dense = [r["rate"] for r in steps(trainer(attention="dense"), 12)]
    continued = [r["rate"] for r in steps(trainer(preset="continued"), 12)]
    np.testing.assert_allclose(released[:5], dense[:5])
    np.testing.assert_allclose(released[5:], 0.005)
    np.testing.assert_allclose(continued[:5], dense[:5])
    np.testing.assert_allclose(continued[5:], np.array(dense[5:]) / 2)


@pytest.mark.parametrize("share", [0.25, 1.0, 1.5])
def test_the_rate_after_the_transition_is_a_share_of_the_peak(share):
    made = trainer(rate_after=share)
    np.testing.assert_allclose([r["rate"] for r in steps(made, 8)][5:], 0.01 * share)
    continued, half = (
        [r["rate"] for r in steps(trainer(preset="continued", rate_after=rate), 12)] for rate in (share, 0.5)
    )
    np.testing.assert_allclose(continued[:5], half[:5])
    np.testing.assert_allclose(continued[5:], 2 * share * np.array(half[5:]))


def weights(model) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("attention", "begins"), [("sat", 5), ("dense", 0)])
def test_the_average_of_the_weights_is_evaluated_and_forgets_exponentially(attention, begins, name):
    settings = {"attention": attention, "model": {"dropout": 0.0}}
    made, plain = trainer(name, average=4, **settings), trainer(name, **settings)
    wanted = None
    for step in range(10):
        assert (made.evaluated is made.model) == (step < begins)
        before = weights(made.model)
        steps(made, 1), steps(plain, 1)
        now = weights(made.model)
        if step >= begins:
            wanted = 0.75 * (before if wanted is None else wanted) + 0.25 * now
            torch.testing.assert_close(weights(made.evaluated), wanted, rtol=1e-5, atol=1e-6)
    test = made.data.test
    seen, raw = made.evaluate(test), plain.evaluate(test)
    torch.testing.assert_close(weights(made.model), weights(plain.model), rtol=0, atol=0)  # it changes no training
    assert seen.loss != raw.loss
    plain.model.load_state_dict(made.evaluated.state_dict())
    assert plain.evaluate(test).loss == pytest.approx(seen.loss, rel=1e-6)


def test_the_average_over_one_step_is_the_model_itself():
    made, plain = (trainer(average=average, model={"dropout": 0.0}) for average in (1, None))
    steps(made, 8), steps(plain, 8)
    assert made.evaluate(made.data.dev) == plain.evaluate(plain.data.dev)


def test_the_averaged_model_has_the_refreshed_layouts():
    made = trainer(average=4, pattern="random", pattern_refresh=3)
    for _ in range(12):
        steps(made, 1)
        assert made.evaluated.layouts == made.model.layouts
    assert made.phase == "sparse"


@pytest.mark.parametrize("attention", ["sat", "dense"])
@pytest.mark.parametrize("stop", [3, 5, 8])
def test_an_average_goes_on_from_a_checkpoint(attention, stop):
    settings = {"attention": attention, "average": 3, "model": {"dropout": 0.0}}
    whole, first, second = (trainer(**settings) for _ in range(3))
    steps(whole, 12), steps(first, stop)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, 12 - stop)
    assert torch.equal(weights(second.evaluated), weights(whole.evaluated))
    assert second.evaluate(second.data.test) == whole.evaluate(whole.data.test)


def test_the_transition_waits_for_the_rule_where_it_is_not_forced():
    never = trainer(switch_at=None, theta=1e9)
    steps(never, 8)
    assert never.phase == "dense"
    soon = trainer(switch_at=None, theta=-1e9, delta=1e9)
    steps(soon, 4)
    assert soon.transition_step == 2


def test_the_rule_overfit_switches_at_the_end_of_the_step_after_the_dev_loss_rose():
    made = trainer(switch_at=None, switch_rule="overfit", theta=-1e9, delta=1e9)  # "stable" would switch in step 2
    for loss in (1.0, 0.9, 0.9, 0.8):
        steps(made, 1)
        made.note_dev_loss(loss)
    steps(made, 1)
    assert (made.phase, made.evaluation_rule.fired) == ("dense", False)
    made.note_dev_loss(0.81)
    made.note_dev_loss(0.5)  # what has begun isn't undone
    assert made.phase == "dense"
    steps(made, 1)
    assert (made.phase, made.transition_step) == ("sparse", 5)
    made.note_dev_loss(0.7)
    assert made.evaluation_rule.dev_loss == 0.5


def test_the_rule_gap_switches_at_the_end_of_the_step_after_the_dev_loss_was_above_the_training_loss():
    made = trainer(switch_at=None, switch_rule="gap", theta=-1e9, delta=1e9)
    for above in (-0.01, -0.01, 0.01):
        mean = np.mean([float(record["loss"]) for record in steps(made, 2)])
        assert made.phase == "dense"
        made.note_dev_loss(mean + above)
    made.note_dev_loss(-1.0)  # no step since; what has fired isn't undone
    steps(made, 1)
    assert (made.phase, made.transition_step) == ("sparse", 6)


@pytest.mark.parametrize("rule", ["overfit", "gap"])
@pytest.mark.parametrize("last", [0.9, 1.1])
def test_a_rule_that_looks_at_evaluations_goes_on_from_a_checkpoint(rule, last):
    settings = {"switch_at": None, "switch_rule": rule}
    made, other, third = (trainer(**settings) for _ in range(3))
    losses = [float(record["loss"]) for record in steps(made, 2)]
    if rule == "overfit":
        made.note_dev_loss(np.mean(losses))
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    other.note_dev_loss(np.mean(losses) * last)
    third.load_state_dict(copy.deepcopy(other.state_dict()))
    for each in (other, third):
        steps(each, 1)
        assert each.transition_step == (2 if last > 1 else None)


@pytest.mark.parametrize("rule", ["overfit", "gap"])
def test_a_forced_switch_waits_for_its_step_whatever_the_evaluations_say(rule):
    made = trainer(switch_rule=rule)
    steps(made, 1)
    for loss in (1e9, 2e9):
        made.note_dev_loss(loss)
    steps(made, 4)
    assert made.evaluation_rule.fired and made.transition_step == 4


def test_a_dense_model_never_looks_at_its_maps():
    made = trainer(attention="dense")
    assert set(made.train_step()) == {"step", "phase", "rate", "loss"}


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_attention_trains_and_goes_on_from_its_state(attention):
    settings = {"attention": attention, "model": {"block": 16, "dropout": 0.0}}
    settings["switch_at"] = 1 if attention == "sat" else None
    made = trainer(**settings)
    first = steps(made, 3)
    assert made.phase == ("sparse" if attention == "sat" else "dense")
    other = trainer(**settings)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    assert float(other.train_step()["loss"]) == float(made.train_step()["loss"]) != float(first[0]["loss"])
    assert other.evaluate(tiny_splits().test) == made.evaluate(tiny_splits().test)


def test_a_batch_that_is_given_takes_the_place_of_the_steps_own():
    made, other = (trainer(model={"dropout": 0.0}) for _ in range(2))
    tokens, labels = other._batch()
    assert float(made.train_step()["loss"]) == float(other.train_step((tokens, labels))["loss"])
    made, other = (trainer(model={"dropout": 0.0}) for _ in range(2))
    assert float(made.train_step()["loss"]) != float(other.train_step((tokens, (labels + 1) % 10))["loss"])


def test_a_checkpoint_that_cannot_be_gone_on_with_is_refused_and_changes_nothing():
    made = trainer()
    dense = copy.deepcopy(made.state_dict())
    steps(made, 6)
    before = copy.deepcopy(made.model.state_dict())
    with pytest.raises(InputError, match="of the dense phase, and this trainer is in the sparse one"):
        made.load_state_dict(dense)
    incomplete = made.state_dict()
    del incomplete["evaluation_rule"]
    with pytest.raises(InputError, match=r"wanted one of this version .*, with \['average', .*Take another file"):
        made.load_state_dict(incomplete)
    older = copy.deepcopy(made.state_dict())
    del older["config"]["model"]["window"]
    with pytest.raises(InputError, match=r"a model with the fields of this version .* it differs in \['window'\]"):
        made.load_state_dict(older)
    assert made.step == 6
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def test_a_trainer_is_gone_when_nobody_holds_it():
    """A cycle would keep its tokens and its graph's memory on the GPU until Python looks for cycles."""
    made = trainer()
    steps(made, 6)
    model = weakref.ref(made.model)
    gc.disable()
    try:
        del made
        assert model() is None
    finally:
        gc.enable()


def test_a_configuration_survives_json():
    config = tiny_config(attention="longformer", model={"dilation": (1, 2)})
    assert config_from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_evaluation_counts_every_example_and_the_published_protocol_drops_the_incomplete_batch():
    split = tiny_splits().test
    made, published = trainer(), trainer(protocol="published")
    assert (made.evaluate(split).examples, published.evaluate(split).examples) == (9, 6)
    logits = made.model(torch.as_tensor(split.tokens).long()).logits
    labels = torch.as_tensor(split.labels)
    score = made.evaluate(split)
    assert score.accuracy == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert score.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("stop", [0, 3, 4, 5, 9])
@pytest.mark.parametrize("preset", ["released", "continued"])
def test_resuming_at_any_step_gives_the_same_run_bit_for_bit(stop, preset, tmp_path):
    whole = trainer(preset=preset)
    wanted = [float(r["loss"]) for r in steps(whole, 12)]
    first = trainer(preset=preset)
    got = [float(r["loss"]) for r in steps(first, stop)]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(12345)
    second = trainer(preset=preset)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    got += [float(r["loss"]) for r in steps(second, 12 - stop)]
    assert got == wanted
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert whole.model.layouts == second.model.layouts


def grids(made):
    return torch.stack([layout.grid for layout in made.model.layouts])


def layouts_of(made, scores):
    recipe = made.config.recipe
    return torch.stack([generate_layout(score, recipe.density, 32, recipe.pattern_budget).grid for score in scores])


@pytest.mark.parametrize("budget", ["blocks", "balanced"])
@pytest.mark.parametrize("heads", ["shared", "own"])
def test_the_pattern_near_is_nearness_to_the_diagonal(budget, heads):
    made = trainer(pattern="near", pattern_budget=budget, pattern_heads=heads)
    steps(made, 5)
    wanted = nearness(8).float().expand(*((2, 2) if heads == "own" else (2,)), 8, 8)
    assert torch.equal(grids(made), layouts_of(made, wanted))
    assert torch.equal(made.maps["kept"], grids(made))
    assert grids(made).shape == wanted.shape
    if heads == "own":
        assert not (grids(made)[:, 0] & grids(made)[:, 1]).any()


def test_a_random_pattern_is_drawn_anew_for_every_layer_and_seed():
    first, again, other = (trainer(pattern="random", seed=seed, pattern_budget="rows") for seed in (0, 0, 1))
    for made in (first, again, other):
        steps(made, 5)
        scores = made.maps["scores"]
        assert 0 <= scores.min() < 0.1 and 0.9 < scores.max() < 1 and scores.unique().numel() == scores.numel() == 128
        assert torch.equal(grids(made), layouts_of(made, scores))
    assert torch.equal(first.maps["scores"], again.maps["scores"])
    assert not torch.equal(first.maps["scores"], other.maps["scores"])


@pytest.mark.parametrize("heads", ["shared", "own"])
@pytest.mark.parametrize("name", ["attention", "gradient", "correlation"])
def test_a_criterions_pattern_is_measured_on_training_examples_at_the_transition(name, heads):
    made = trainer(pattern=name, pattern_heads=heads, pattern_budget="balanced")
    steps(made, 5)
    dense = Encoder(made.config.model)
    dense.load_state_dict(made.model.state_dict())
    draws = torch.get_rng_state()
    wanted = block_saliency(dense, name, *made.examples.batch(np.arange(24)))
    assert torch.equal(torch.get_rng_state(), draws)  # dropout goes on as without it
    scores = made.maps["scores"]
    torch.testing.assert_close(scores, wanted, rtol=1e-3, atol=1e-6)
    assert scores.shape == (2, 2, 8, 8)
    assert torch.equal(grids(made), layouts_of(made, scores if heads == "own" else scores.mean(1)))


def test_saliency_is_measured_on_so_many_examples_drawn_by_seed_and_step(monkeypatch):
    monkeypatch.setattr("sat_lib.training.pattern.PROBE_EXAMPLES", 10)
    seen = []
    measure = lambda model, criterion, tokens, labels, seed: seen.append(tokens) or torch.zeros(2, 2, 8, 8)
    monkeypatch.setattr("sat_lib.training.pattern.block_saliency", measure)
    for settings in ({}, {}, {"seed": 1}, {"switch_at": 3}):
        steps(trainer(pattern="taylor", **settings), 5)
    first, again, *others = seen
    training = {tuple(row) for row in tiny_splits().train.tokens.tolist()}
    assert all(len({tuple(row) for row in some.tolist()} & training) == len(some) == 10 for some in seen)
    assert torch.equal(first, again)
    assert not any(torch.equal(first, other) for other in others)


def test_the_learned_pattern_of_own_heads_deals_the_same_scores_to_all_of_them():
    made = trainer(pattern_heads="own", pattern_budget="balanced", density=1 / 8)
    steps(made, 5)
    scores = made.maps["scores"]
    torch.testing.assert_close(scores, torch.stack([parameter() for parameter in made.model.sparsity_parameters]))
    assert torch.equal(grids(made), layouts_of(made, scores[:, None].expand(-1, 2, -1, -1)))
    assert grids(made).sum((2, 3)).eq(8).all() and grids(made).sum(1).max() == 1


@pytest.mark.parametrize("pattern", ["random", "attention"])
def test_a_pattern_is_refreshed_every_so_many_steps_of_the_sparse_phase(pattern):
    made = trainer(pattern=pattern, pattern_refresh=3, pattern_heads="own", steps=14)
    seen, kept = {}, []
    for step in range(14):
        made.train_step()
        if made.phase == "sparse":
            seen[step] = grids(made)
            kept.append(made.maps["kept"])
    changed = [step for step in range(5, 14) if not torch.equal(seen[step], seen[step - 1])]
    assert changed == [7, 10]  # after steps 5 to 7, and 8 to 10; none for steps that don't come
    assert made.transition_step == 4
    assert all(torch.equal(some, seen[4]) for some in kept)
    assert all(grid.sum() == seen[4].sum() for grid in seen.values())


@pytest.mark.parametrize("stop", [7, 8])  # the layouts change at the end of step 7
@pytest.mark.parametrize("pattern", ["random", "gradient"])
def test_resuming_between_refreshes_gives_the_same_run_bit_for_bit(pattern, stop):
    settings = {"pattern": pattern, "pattern_refresh": 3, "pattern_heads": "own", "preset": "continued"}
    whole = trainer(**settings)
    wanted = [float(r["loss"]) for r in steps(whole, 12)]
    first = trainer(**settings)
    got = [float(r["loss"]) for r in steps(first, stop)]
    state = copy.deepcopy(first.state_dict())
    second = trainer(**settings)
    second.load_state_dict(state)
    got += [float(r["loss"]) for r in steps(second, 12 - stop)]
    assert got == wanted
    assert whole.model.layouts == second.model.layouts
    assert all(torch.equal(value, second.model.state_dict()[name]) for name, value in whole.model.state_dict().items())


def test_a_checkpoint_of_another_configuration_names_what_differs():
    state = trainer(seed=1).state_dict()
    with pytest.raises(InputError, match=r"recipe.seed: saved 1, wanted 0"):
        trainer().load_state_dict(state)


def test_configurations_are_checked_and_survive_json():
    config = tiny_config()
    assert config_from_dict(config.as_dict()) == config
    assert config.digest != tiny_config(seed=1).digest
    assert config.digest != tiny_config(model={"block": 16}).digest
    for settings, message in [
        ({"preset": "mine"}, "preset: wanted one of"),
        ({"stepz": 3}, "unknown setting"),
        ({"model": {"depth": 3}}, "unknown setting"),
        ({"steps": 10, "warm_up": 10}, "warm_up: wanted 2 or more and less than 10 steps; got 10"),
        ({"warm_up": 1}, "warm_up: wanted 2 or more"),
        ({"density": 0.0}, "density: wanted more than 0"),
        ({"precision": "fp8"}, "precision: wanted one of"),
        ({"batch": 0}, "batch: wanted at least 1"),
        ({"rate": -1.0}, "rate: wanted more than 0"),
        ({"rate_after": 0}, "rate_after: wanted more than 0; got 0"),
        ({"average": 0}, "average: wanted None, or 1 or more steps; got 0"),
        ({"average": 2.5}, "average: wanted None, or 1 or more steps; got 2.5"),
        ({"switch_rule": "early"}, r"switch_rule: wanted one of \('stable', 'overfit', 'gap'\); got 'early'"),
        ({"pattern": "learnt"}, r"pattern: wanted one of \('learned', 'near', 'random', 'attention', .*; got 'learnt'"),
        (
            {"pattern_budget": "columns"},
            r"pattern_budget: wanted one of \('blocks', 'rows', 'balanced'\); got 'columns'",
        ),
        ({"pattern_heads": "one"}, r"pattern_heads: wanted one of \('shared', 'own'\); got 'one'"),
        ({"pattern_refresh": 5}, "pattern_refresh: wanted None, .* a pattern that changes; got 5 for 'learned'"),
        ({"pattern_refresh": 5, "pattern": "near"}, "pattern_refresh: .* got 5 for 'near'"),
        ({"pattern_refresh": 0, "pattern": "random"}, "pattern_refresh: .* got 0 for 'random'"),
        (
            {"model": {"sparsity_target": "values"}},
            "sparsity_target: wanted 'attention' or 'correlation'; got 'values'",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            run_config("digits16", **settings)
    with pytest.raises(InputError, match="no task 'digit'"):
        run_config("digit")


def test_the_preset_best_is_what_the_ablations_led_to():
    model = {"block": 16, "sparsity_init": "calibrated", "sparsity_target": "correlation", "pruned": "drop"}
    cases = (
        ("cifar10", {}, 64, 400, 1.0, None),
        ("digits16", {"steps": 300}, 16, 12, 1.0, None),
        ("yelp", {}, 64, 1_200, 0.5, 80),
        ("agnews", {"warm_up": 60}, 64, 1_200, 0.5, 60),
        ("listops", {}, 125, 200, 0.5, 500),
    )
    for task, changes, blocks, average, rate, at in cases:
        recipe = {
            "density": 1 / blocks, "pattern": "learned", "pattern_budget": "balanced", "pattern_heads": "own",
            "switch_rule": "gap", "switch_at": at, "schedule_after": "constant", "rate_after": rate,
            "average": average, "pattern_refresh": None,
        }  # fmt: skip
        made = run_config(task, "sat", "best", **changes)
        assert made == run_config(task, "sat", model=model, **recipe, **changes)
        assert made.model.blocks == blocks
    for changes in ({"switch_at": None}, {"switch_rule": "gap"}, {"switch_rule": "overfit"}):
        made = run_config("agnews", "sat", "best", **changes).recipe
        assert (made.switch_at, made.switch_rule) == (None, changes.get("switch_rule", "gap"))
    assert run_config("agnews", "sat", "best", switch_rule="overfit", switch_at=9).recipe.switch_at == 9
    assert run_config("digits16", "sat", "best", model={"block": 256}).recipe.density == 1
    assert run_config("digits16", "sat", "best", steps=20, warm_up=2).recipe.average == 1
    changed = run_config("cifar10", "sat", "best", model={"pruned": "zero"}, density=0.25, schedule_after="continued")
    assert (changed.model.pruned, changed.recipe.density, changed.recipe.schedule_after) == ("zero", 0.25, "continued")
    assert (changed.model.sparsity_target, changed.recipe.pattern_heads) == ("correlation", "own")
    for attention in ("dense", "longformer"):
        with pytest.raises(InputError, match=f"preset: 'best' is for the attention 'sat'; got '{attention}'"):
            run_config("cifar10", attention, "best")


def test_the_preset_best_trains_with_blocks_of_every_row_and_column_for_every_head():
    made = Trainer(tiny_config(preset="best", density=2 / 8, switch_at=4), tiny_splits(), torch.device("cpu"))
    losses = [float(r["loss"]) for r in steps(made, 12)]
    assert made.phase == "sparse" and np.isfinite(losses).all()
    kept = grids(made)
    assert kept.shape == (2, 2, 8, 8) and kept.sum(2).eq(2).all() and kept.sum(3).eq(2).all()
    assert not (kept[:, 0] & kept[:, 1]).any()
    assert made.evaluated is not made.model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_mixed_precision_trains_the_same_model_to_a_similar_loss(dtype):
    losses = [float(r["loss"]) for r in steps(trainer(precision=dtype), 12)]
    assert np.isfinite(losses).all()
    full = [float(r["loss"]) for r in steps(trainer(), 12)]
    assert abs(losses[0] - full[0]) < 0.02
