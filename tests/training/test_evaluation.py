"""The moving average of the weights, the score of a model, and the rules that look at dev losses."""

import pytest
import torch
from conftest import tiny_config, tiny_splits

from sat_lib.common.errors import InputError
from sat_lib.datasets.batches import Examples
from sat_lib.model.encoder import Encoder
from sat_lib.training.evaluation import EvaluationRule, MovingAverage, evaluate

CPU = torch.device("cpu")


def test_a_moving_average_begins_with_the_weights_and_forgets_with_its_time_constant():
    model = Encoder(tiny_config().model)
    average = MovingAverage(model, steps=4)
    start = model.head[0].weight.detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for updates in range(1, 4):
        average.update()
        torch.testing.assert_close(average.model.head[0].weight, start + 1 - 0.75**updates)
    assert torch.equal(model.head[0].weight, start + 1)
    other = MovingAverage(model, steps=4)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.model.head[0].weight, average.model.head[0].weight)


def test_the_published_protocol_wants_a_whole_batch():
    recipe, examples = tiny_config(protocol="published", batch=20).recipe, Examples(tiny_splits().test, CPU)
    with pytest.raises(InputError, match="the published protocol wants 20 examples or more; got 9"):
        evaluate(Encoder(tiny_config().model), examples, recipe)


@pytest.mark.parametrize(("name", "fires_at"), [("overfit", 2), ("gap", 1), ("stable", None)])
def test_rules_on_evaluations_compare_the_dev_loss_with_the_one_before_or_with_training(name, fires_at):
    """Training losses of three steps before each evaluation, and its dev loss."""
    rule, fired = EvaluationRule(name), []
    for losses, dev_loss in (((2.0, 1.8, 1.6), 1.7), ((1.6, 1.5, 1.4), 1.6), ((1.3, 1.2, 1.1), 1.65), ((0.9,), 0.1)):
        for loss in losses:
            rule.note_step(torch.tensor(loss))
        rule.note_evaluation(dev_loss)
        fired.append(rule.fired)
        again = EvaluationRule(name)
        again.load_state_dict(rule.state_dict())
        rule = again
    assert fired == [fires_at is not None and at >= fires_at for at in range(4)]


def test_the_rule_gap_needs_steps_to_compare_with():
    rule = EvaluationRule("gap")
    rule.note_evaluation(5.0)
    assert not rule.fired
    rule.note_step(torch.tensor(1.0, dtype=torch.float32))
    rule.note_evaluation(float("nan"))
    assert not rule.fired
