"""What the fast step computes beside attention, timed: a case of `layer` is an operator of `model.fused`, or a copy.

Floors are the bytes of each operand read or written once; the copy is what to divide them by.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..common import timing
from ..model import fused
from .kernels import calls_on


def layer_cases(profile: str) -> list[dict]:
    """The operators of the fast step at the main workload's number of tokens."""
    tokens = 2_048 if profile == "smoke" else 512 * 1024
    return [{"method": name, "tokens": tokens, "vocab": 256, "dropout": 0.1} for name in LAYER_OPERATORS]


def layer_time(case: dict, device: torch.device) -> dict:
    """Medians of the forward and the backward operator, with the bytes of their operands. None where there is none."""
    torch.manual_seed(0)
    x, grad = (torch.randn(case["tokens"], fused.WIDTH, device=device) for _ in range(2))
    result, directions = {}, LAYER_OPERATORS[case["method"]](x, grad, case)
    for name, (call, floor) in zip(("forward", "backward"), directions, strict=True):
        time = None if call is None else timing.time_calls(call, device, calls=calls_on(device)).median_ms
        result |= {f"floor_bytes_{name}": floor, f"{name}_ms": time}
    return result


NONE = (None, None)  # no such direction
Directions = tuple[tuple, tuple]  # forward and backward: what to call, and the bytes of its operands


def _copy(x: Tensor, grad: Tensor, case: dict) -> Directions:
    return (lambda: grad.copy_(x), 2 * x.nbytes), NONE


def _before(x: Tensor, grad: Tensor, case: dict) -> Directions:
    call, weights = torch.ops.sat_lib, _linear(3 * x.shape[1], x.shape[1], x.device)
    grads = call.before_attention(x, *weights, 1e-5)
    narrow = sum(part.nbytes for part in grads)
    return (
        (lambda: call.before_attention(x, *weights, 1e-5), x.nbytes + narrow),
        (lambda: call.before_attention_backward(*grads, grad, x, *weights, 1e-5), 3 * x.nbytes + narrow),
    )


def _after(x: Tensor, grad: Tensor, case: dict) -> Directions:
    call, width, hidden = torch.ops.sat_lib, fused.WIDTH, fused.HIDDEN
    attended = grad.bfloat16() if x.device.type == "cuda" else grad
    shapes = ((width, width), (hidden, width), (width, hidden))
    weights = [part for shape in shapes for part in _linear(*shape, x.device)]
    rest = (attended, *weights, torch.ones(1, dtype=torch.int64, device=x.device), case["dropout"], 1e-5)
    return (
        (lambda: call.after_attention(x, *rest), 2 * x.nbytes + attended.nbytes),
        (lambda: call.after_attention_backward(grad, x, *rest), 3 * x.nbytes + 2 * attended.nbytes),
    )


def _embedding(x: Tensor, grad: Tensor, case: dict) -> Directions:
    tokens = torch.randint(0, case["vocab"], (case["tokens"],), device=grad.device)
    call = torch.ops.sat_lib.embedding_gradient
    return NONE, (lambda: call(grad, tokens, case["vocab"]), grad.nbytes + tokens.nbytes)


def _linear(outs: int, ins: int, device: torch.device) -> list[Tensor]:
    return [torch.randn(outs, ins, device=device) / math.sqrt(ins), torch.randn(outs, device=device)]


LAYER_OPERATORS: dict[str, Callable[[Tensor, Tensor, dict], Directions]] = {
    "copy": _copy,
    "before_attention": _before,
    "after_attention": _after,
    "embedding_gradient": _embedding,
}
