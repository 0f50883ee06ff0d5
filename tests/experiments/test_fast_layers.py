"""What the fast step computes beside attention is timed with the bytes that it has to move."""

import pytest
import torch

from sat_lib.experiments.fast_layers import layer_cases, layer_time

TOKENS, WIDTH = 64, 64
STREAM = 4 * TOKENS * WIDTH  # bytes of the residual stream in float32


@pytest.mark.parametrize("case", layer_cases("smoke"), ids=lambda case: case["method"])
def test_a_direction_has_a_time_and_a_floor_or_neither(case):
    result = layer_time(case | {"tokens": TOKENS}, torch.device("cpu"))
    floors = {
        "copy": (2 * STREAM, None),
        "before_attention": (4 * STREAM, 6 * STREAM),  # x, q, k, v; these, their gradients but for x twice
        "after_attention": (3 * STREAM, 5 * STREAM),
        "embedding_gradient": (None, STREAM + 8 * TOKENS),
    }[case["method"]]
    assert (result["floor_bytes_forward"], result["floor_bytes_backward"]) == floors
    for direction, floor in zip(("forward", "backward"), floors, strict=True):
        time = result[f"{direction}_ms"]
        assert time is None if floor is None else time > 0
