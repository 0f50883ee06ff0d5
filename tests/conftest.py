"""Shared by all tests: a tiny task and the GPU marker."""

import os
import signal
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin for long take a busy CPU's cores
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for tests that interrupt processes, which inherit it

import numpy as np
import pytest
import torch

from sat_lib.datasets.cache import Split, Splits
from sat_lib.datasets.tasks import task
from sat_lib.training.recipe import RunConfig, run_config


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; PyTorch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=[torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)
def device(request):
    return request.param


class NumberFormat(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    tf32: bool
    rounding: float  # of a result, relative: what the format's products may lose


FORMATS = {
    "cpu": NumberFormat(torch.device("cpu"), torch.float64, False, 1e-14),
    "float32": NumberFormat(torch.device("cuda"), torch.float32, False, 2**-20),
    "tf32": NumberFormat(torch.device("cuda"), torch.float32, True, 2**-9),
    "bfloat16": NumberFormat(torch.device("cuda"), torch.bfloat16, False, 2**-7),
    "float16": NumberFormat(torch.device("cuda"), torch.float16, False, 2**-10),
}


@pytest.fixture(params=["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in FORMATS if name != "cpu")])
def number_format(request):
    """A format, with TF32 products allowed or not, and results of torch.empty filled with NaN."""
    chosen = FORMATS[request.param]
    saved = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if chosen.tf32 else "ieee"
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
    yield chosen
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.fp32_precision = saved


def tiny_splits(examples=40, seed=0) -> Splits:
    """Ten classes told by the brightness of the first half of 256 tokens: a few steps learn something."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, examples)
    tokens = random.integers(1, 20, (examples, 256))
    tokens[:, :128] += 20 * labels[:, None]
    split = Split(tokens.astype(np.uint8), np.arange(examples), labels)
    order = np.arange(examples)
    return Splits(task("digits16"), split.take(order[:24]), split.take(order[24:31]), split.take(order[31:]), "dev")


def tiny_config(attention="sat", preset="released", model=None, **changes) -> RunConfig:
    """A run of a second or two: 12 steps of 6 examples, switching at the end of step 4."""
    sizes = {"width": 32, "hidden": 16, "block": 32} | (model or {})
    recipe = {"steps": 12, "warm_up": 3, "eval_every": 4, "batch": 6, "density": 0.2, "switch_at": 4, "rate": 0.01}
    if attention == "dense":
        recipe["switch_at"] = None
    return run_config("digits16", attention, preset, model=sizes, **(recipe | changes))


def comparable(result: dict) -> dict:
    """What of a run's result doesn't depend on when and how fast it was made."""
    return {name: value for name, value in result.items() if name not in ("seconds", "stamp")}
