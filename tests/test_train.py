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
from sat_lib.errors import InputError
from sat_lib.pattern import sparsity_loss
from sat_lib.recipes import PUBLISHED, config_from_dict, run_config
from sat_lib.train import Trainer, batch_indices


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


def test_the_transition_waits_for_the_rule_where_it_is_not_forced():
    never = trainer(switch_at=None, theta=1e9)
    steps(never, 8)
    assert never.phase == "dense"
    soon = trainer(switch_at=None, theta=-1e9, delta=1e9)
    steps(soon, 4)
    assert soon.transition_step == 2


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


def test_a_checkpoint_from_before_a_field_was_new_has_its_default():
    state = trainer().state_dict()
    del state["config"]["model"]["window"]
    trainer().load_state_dict(state)
    with pytest.raises(InputError, match=r"model\.window: saved 64, wanted 32"):
        trainer(model={"window": 32}).load_state_dict(state)


def test_a_checkpoint_that_cannot_be_gone_on_with_is_refused_and_changes_nothing():
    made = trainer()
    dense = copy.deepcopy(made.state_dict())
    steps(made, 6)
    before = copy.deepcopy(made.model.state_dict())
    with pytest.raises(InputError, match="of the dense phase, and this trainer is in the sparse one"):
        made.load_state_dict(dense)
    with pytest.raises(InputError, match="an earlier version of sat_lib wrote it"):
        made.load_state_dict(made.state_dict() | {"rng": torch.get_rng_state()})
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
    ]:
        with pytest.raises(InputError, match=message):
            run_config("digits16", **settings)
    with pytest.raises(InputError, match="no task 'digit'"):
        run_config("digit")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_mixed_precision_trains_the_same_model_to_a_similar_loss(dtype):
    losses = [float(r["loss"]) for r in steps(trainer(precision=dtype), 12)]
    assert np.isfinite(losses).all()
    full = [float(r["loss"]) for r in steps(trainer(), 12)]
    assert abs(losses[0] - full[0]) < 0.02
