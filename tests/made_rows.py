"""Rows as experiments write them, for tests of what is drawn and said of rows."""

import pandas as pd

STAMP = {"device": "NVIDIA H100", "commit": "0123456789ab", "torch": "2.13.0", "date": "2026-01-01T00:00:00+00:00"}
WHOLE = {"cifar10": 45_000, "agnews": 114_000, "yelp": 550_000, "inaturalist": 427_513, "imdb": 23_750}


def runs(task: str, means: dict[str, list[float]], switched=(200,), **more) -> pd.DataFrame:
    """Rows of training runs: percent by attention and seed; SAT's runs switched at these steps, in turn."""
    lines = []
    for attention, percents in means.items():
        for seed, percent in enumerate(percents):
            step = switched[seed % len(switched)] if attention == "sat" else None
            case = {"task": task, "attention": attention, "seed": seed, "model": {}, "recipe": {}}
            result = {
                "test_accuracy": percent / 100,
                "transition_step": step,
                "seconds": {"dense": 60.0, "sparse": 60.0},
            }
            extent = {"train_examples": WHOLE[task], "data_official": True, "experiment": "accuracy"}
            lines.append(case | result | extent | STAMP | more)
    return pd.DataFrame(lines)
