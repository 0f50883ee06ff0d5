"""Shared by all tests: a small data set, a small run, and the GPU marker."""

import numpy as np
import pytest
import torch

from sat_lib.datasets import Split, Splits
from sat_lib.recipes import run_config


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; PyTorch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu, id="cuda")]


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    return request.param
