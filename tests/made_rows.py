"""Rows as experiments write them, for tests of what is drawn and said of rows."""

from pathlib import Path

import numpy as np
import pandas as pd

from sat_lib import experiments
from sat_lib.common import files
from sat_lib.figures import claims
from sat_lib.figures.evidence import SOURCES

STAMP = {"device": "NVIDIA H100", "commit": "0123456789ab", "torch": "2.13.0", "date": "2026-01-01T00:00:00+00:00"}
STAMP["wall_seconds"] = None
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
                "step_kind": "fast",
                "processes": None,
            }
            extent = {"train_examples": WHOLE[task], "data_official": True, "experiment": "accuracy"}
            lines.append(case | result | extent | STAMP | more)
    return pd.DataFrame(lines)


def near(mean: float, count: int = 3) -> list[float]:
    """Seeds about a mean, a sample deviation of 0.1 apart."""
    return [mean + 0.1 * step for step in np.linspace(-1, 1, count)]


def steps(times: dict[str, float], **more) -> pd.DataFrame:
    """Rows of training steps: milliseconds, and as many bytes, by what was timed in words."""
    lines = []
    for name, ms in times.items():
        attention, _, rest = name.partition(", ")
        compute = {"sat": "kernel", "dense": "sdpa"}.get(attention, rest)
        phase = rest.removesuffix(" phase") if attention == "sat" else "dense"
        line = {"task": "agnews", "attention": attention, "compute": compute, "phase": phase, "step_kind": "fast"}
        line |= {"preset": "released", "model": {}}
        line |= {"median_ms": ms, "low_ms": 0.9 * ms, "high_ms": 1.1 * ms, "peak_bytes": ms}
        lines.append(line | STAMP | more)
    return pd.DataFrame(lines)


def verdict_of(frames: dict[str, pd.DataFrame], words: str) -> pd.Series:
    """The line of the one claim that has these words."""
    lines = claims.verdict_table(frames)
    (number,) = lines.index[lines["claim"].str.contains(words, regex=False)]
    return lines.loc[number]


def committed_rows(root: Path = files.ROOT) -> dict[str, pd.DataFrame]:
    """Experiment -> the rows that are committed."""
    return {name: experiments.rows(name, "paper", measure=False, root=root) for name in SOURCES}
