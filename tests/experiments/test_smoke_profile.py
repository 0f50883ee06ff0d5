"""`make reproduce` may become quicker by cheaper runs, not by fewer of them."""

from collections import Counter

import pytest

from sat_lib.attention import ATTENTION
from sat_lib.experiments import EXPERIMENTS
from sat_lib.training.recipe import case_config

# Experiment -> (task or model, attention, seed) of its cases, and how many there are of each.
CASES = {
    "training": {("digits16", "sat", 0): 1},
    "accuracy": {
        (task, name, seed): 1
        for task, seed in (("digits16", 0), ("digits16", 1), ("docstrings", 0))
        for name in ATTENTION
    },
    "accuracy_short": {("docstrings", name, 0): 1 for name in ATTENTION},
    "ablations": {("digits16", "dense", 0): 1, ("digits16", "sat", 0): 10},
    "best": {("digits16", "sat", 0): 1},
    "diagnosis": {("digits16", "sat", 0): 2},
    "step": {
        (task, name, None): count
        for task in ("cifar10", "agnews")
        for name, count in {"sat": 3, "dense": 1, "longformer": 5, "bigbird": 3, "lsg": 2}.items()
    },
    "data_parallel": {("digits16", "sat", None): 4, ("digits16", "sat", 0): 1},
    "patterns": {("digits", "sat", 0): 1},
    "motivation": {("cifar-vit", None, None): 1, ("minilm", None, None): 1},
    "finetuning": {
        (name, attention, 0): count
        for name in ("cifar-vit", "minilm")
        for attention, count in (("dense", 1), ("sat", 2))
    },
    "pretrained_step": {(None, name, None): count for name, count in {"eager": 1, "sdpa": 1, "sat": 2}.items()},
    "kernels": {(None, None, None): 18, ("cifar10", None, None): 1},
    "layer": {(None, None, None): 4},
    "attention": {(None, None, None): 2},
}


def key(case: dict) -> tuple:
    model = case["model"] if isinstance(case.get("model"), str) else None  # elsewhere what is changed of one
    return case.get("task", model), case.get("attention"), case.get("seed")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_smoke_case_is_lost(name):
    assert Counter(map(key, EXPERIMENTS[name].cases("smoke"))) == CASES[name]


def test_short_runs_of_the_smoke_profile_are_those_of_accuracy():
    names = lambda experiment: {case_config(case).name for case in EXPERIMENTS[experiment].cases("smoke")}
    assert names("accuracy_short") <= names("accuracy")
