"""Attention alone, timed: each operation, whole implementations beside their peers, and what the memory allows.

A case of `kernels` is one measurement of one sweep, and its method what is timed: "fused" is
`ops.block_sparse_attention`, "three operations" are `ops.sddmm`, `sparse_softmax` and `spmm`, "reference" is plain
PyTorch. Peers: "materialised" and "sdpa" are dense, "flex N" is torch's flex_attention on the layout coarsened to
blocks of N, "cusparse" PyTorch's CSR products, forward only. Floors are the bytes of each operand read or written once.
Nothing here reads or writes files.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..attention import ops, reference, statistics
from ..attention.layout import BlockLayout
from ..attention.static_patterns import random_layout
from ..common import timing
from ..training.recipe import PAPER_TASKS, run_config

OURS = ("fused", "three operations", "reference")
# What a row of one method has, None where it wasn't or couldn't be measured.
TIMES = ("forward_ms", "forward_backward_ms", "low_ms", "high_ms", "peak_bytes", "operations", "floor_bytes_forward",
         "floor_bytes_backward", "kept_blocks", "error")  # fmt: skip


# ---- cases -----------------------------------------------------------------------------------------------------------


def _shape(profile: str, batch: int, **changes) -> dict:
    shape = {"batch": batch, "heads": 2, "length": 1024, "head_size": 32, "block": 32, "density": 0.05}
    return shape | {"dtype": "float32" if profile == "smoke" else "bfloat16", "tf32": None} | changes


def attention_cases(profile: str) -> list[dict]:
    """The comparison that a CPU user can check at once: SDPA against block-sparse attention at 5 % density."""
    shape = _shape(profile, 16 if profile == "smoke" else 512)
    return [{"method": method, **shape} for method in ("dense", "sat")]


def kernel_cases(profile: str) -> list[dict]:
    """The sweeps, the most important first. A float32 case of a GPU says whether its products may be TF32."""
    shape = partial(_shape, profile)
    if profile == "smoke":
        cases = [{"sweep": "copy", "bytes": 64 * 2**20}]
        cases += _cases("main", (*OURS, "materialised", "sdpa"), shape(4))
        cases.append({"sweep": "operations", "task": "cifar10", **shape(4)})
        for length in (256, 512, 1024, 2048):
            cases += _cases("length", ("fused", "materialised", "sdpa"), shape(4 * 1024 // length, length=length))
        return cases
    main, single = shape(512), shape(512, dtype="float32", tf32=True)
    cases = [{"sweep": "copy", "bytes": 2**30}]
    cases += _cases("main", (*OURS, "materialised", "sdpa", "flex 32", "flex 64", "flex 128"), main)
    cases += _cases("main", ("fused",), single | {"tf32": False})
    cases += _cases("main", (*OURS, "materialised", "sdpa", "flex 64", "cusparse"), single)
    for base in (single, main):
        for task in PAPER_TASKS:
            cases.append({"sweep": "operations", "task": task, **base, "density": run_config(task).recipe.density})
    for base in (main, single):
        cases += _cases("statistics", ("kernel", "reference"), base)
    for density in (0.01, 0.05, 0.1, 0.25, 0.5, 1.0):
        names = ("fused", "sdpa", "flex 64") if density in (0.05, 0.25) else ("fused", "sdpa")
        cases += _cases("density", names, main | {"density": density})
    for length in (512, 1024, 2048, 4096, 8192, 16384):  # the maps of "materialised" take up to 26 GB
        names = ("fused", "reference", "materialised", "sdpa", "flex 64")
        cases += _cases("length", names, shape(128 * 1024 // length, length=length))
    cases += _cases("length", ("fused", "sdpa"), shape(8, length=16384, head_size=64, block=64))
    for size in (16, 32, 64, 128):
        cases += _cases("head_size", ("fused", "sdpa"), shape(512 * 32 // max(32, size), head_size=size))
    for block in (16, 32, 64, 128):
        cases += _cases("block", ("fused",), main | {"block": block})
    return cases


def _cases(sweep: str, methods: tuple[str, ...], shape: dict) -> list[dict]:
    return [{"sweep": sweep, "method": method, **shape} for method in methods]


def qkv(case: dict, device: torch.device, grad: bool) -> list[Tensor]:
    """Three random (B, H, L, D) tensors of a case, the same at every call."""
    torch.manual_seed(0)
    shape = (case["batch"], case["heads"], case["length"], case["head_size"])
    dtype = getattr(torch, case["dtype"])
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=grad) for _ in range(3)]


def block_layout(case: dict, device: torch.device) -> BlockLayout:
    """The random layout of a case, the same at every call."""
    blocks = -(-case["length"] // case["block"])
    return random_layout(blocks, blocks, case["density"], case["block"], seed=0).to(device)


# ---- methods ---------------------------------------------------------------------------------------------------------

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, H, L, D) -> (B, H, L, D)


def attention_of(method: str, layout: BlockLayout, heads: int, length: int) -> Attention:
    """The attention of a method under a layout; `heads` counts those of the whole batch, B * H.

    What can be prepared from the layout is prepared here, outside of what is timed. SAT's own take pruned="zero", the
    peers weigh the kept keys alone, as pruned="drop".
    """
    if method.startswith("flex "):
        return flex_on_blocks(layout, int(method.removeprefix("flex ")), length)
    if method == "cusparse":
        return csr_attention(layout, heads, length)
    return {
        "fused": partial(ops.block_sparse_attention, layout=layout),
        "three operations": partial(three_operations, layout=layout),
        "reference": partial(reference.block_sparse_attention, layout=layout),
        "materialised": materialised_attention,
        "sdpa": F.scaled_dot_product_attention,
    }[method]


def three_operations(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> Tensor:
    """Block-sparse attention as three operations, the values of the sparse map in memory in between."""
    scores = ops.sddmm(q, k, layout)
    weights = ops.sparse_softmax(scores, layout, q.shape[1], k.shape[2])
    return ops.spmm(weights, v, layout, q.shape[2])


def materialised_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The paper's dense baseline: GEMM, softmax, GEMM, with the L x L map of every head in memory."""
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def coarsened(layout: BlockLayout, side: int) -> BlockLayout:
    """The layout in blocks of `side`, a multiple of its own: a block is kept where any block within it is."""
    grid = layout.grid.to(torch.float32)[None]
    return BlockLayout(F.max_pool2d(grid, side // layout.block, ceil_mode=True)[0] > 0, side)


def flex_on_blocks(layout: BlockLayout, side: int, length: int) -> Attention:
    """flex_attention on a layout (R, C) coarsened to `side`: compiled on a GPU, as it is on a CPU.

    Where `side` divides the length every kept block is a full one, and no mask is computed within the blocks.
    """
    grid = coarsened(layout, side).grid
    kept = lambda batch, head, query, key: grid[query // side, key // side]
    mask = create_block_mask(kept, None, None, length, length, device=grid.device, BLOCK_SIZE=side)
    if grid.device.type == "cpu":
        return partial(flex_attention, block_mask=mask)
    torch._dynamo.reset()  # each shape is compiled for itself: after eight, dynamo would run it uncompiled
    return partial(torch.compile(flex_attention, dynamic=False, fullgraph=True), block_mask=mask)


def csr_attention(layout: BlockLayout, heads: int, length: int) -> Attention:
    """Forward attention through PyTorch's CSR products (cuSPARSE on a GPU, MKL on a CPU).

    All heads stand in one block-diagonal CSR matrix of heads * length rows, so each product is one call.
    """
    entries = layout.entries(length)
    counts = entries.sum(1).repeat(heads)  # (heads * L,)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    first = length * torch.arange(heads, device=entries.device)[:, None]
    columns = (entries.nonzero()[:, 1] + first).flatten().int()
    rows = torch.arange(len(counts), device=entries.device).repeat_interleave(counts, output_size=len(columns))
    side = (len(counts), len(counts))

    def matrix(values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(offsets.int(), columns, values, side, check_invariants=False)

    pattern = matrix(torch.zeros(len(columns), device=entries.device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat_q, flat_k, flat_v = (x.reshape(-1, x.shape[-1]) for x in (q, k, v))
        scale = 1 / math.sqrt(q.shape[-1])
        scores = torch.sparse.sampled_addmm(pattern, flat_q, flat_k.T, beta=0, alpha=scale).values()
        peaks = torch.segment_reduce(scores, "max", offsets=offsets)
        weights = (scores - peaks[rows]).exp()
        totals = torch.segment_reduce(weights, "sum", offsets=offsets)
        return (matrix(weights / totals[rows]) @ flat_v).reshape(v.shape)

    return attend


# ---- measurements ----------------------------------------------------------------------------------------------------


def kernel_time(case: dict, device: torch.device) -> dict:
    """Measure one case of `kernel_cases`; the keys of the result depend on its sweep.

    Float32 products on a GPU are TF32 where the case says so, IEEE elsewhere.
    """
    measurements = {"copy": copy_time, "operations": operation_times, "statistics": statistics_time}
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if case.get("tf32") else "ieee"
    try:
        result = measurements.get(case["sweep"], method_time)(case, device)
    finally:
        matmul.fp32_precision = before
    torch.cuda.empty_cache()
    return result


def calls_on(device: torch.device) -> int:
    """So many calls are timed."""
    return 7 if device.type == "cpu" else 30


def copy_time(case: dict, device: torch.device) -> dict:
    """A copy on the device: its time, and the bandwidth, bytes read and bytes written together."""
    source = torch.ones(case["bytes"], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    taken = timing.time_calls(lambda: target.copy_(source), device, calls=calls_on(device)).median_ms
    return {"copy_ms": taken, "bandwidth_tb_s": 2 * case["bytes"] / taken / 1e9}


def operation_times(case: dict, device: torch.device) -> dict:
    """Time of each attention operation, dense against sparse, and of how many bytes it must move at least.

    The last two are gradients: of `spmm` for its dense operand, and of `sparse_softmax`.
    """
    q, k, v = qkv(case, device, grad=False)
    layout = block_layout(case, device)
    heads, length = case["heads"], case["length"]
    raw, values = q @ k.transpose(-1, -2), ops.sddmm(q, k, layout)
    some_v, some_values = v.clone().requires_grad_(), values.clone().requires_grad_()
    out = ops.spmm(values, some_v, layout, length)
    weights = ops.sparse_softmax(some_values, layout, heads, length)
    grad = partial(torch.autograd.grad, retain_graph=True)
    one, dense, kept = q.nbytes, raw.nbytes, values.nbytes
    operations = {
        "gemm_qk": (lambda: torch.matmul(q, k.transpose(-1, -2)), 2 * one + dense),
        "softmax": (lambda: raw.softmax(-1), 2 * dense),
        "gemm_av": (lambda: torch.matmul(raw, v), dense + 2 * one),
        "sddmm": (lambda: ops.sddmm(q, k, layout), 2 * one + kept),
        "sparse_softmax": (lambda: ops.sparse_softmax(values, layout, heads, length), 2 * kept),
        "spmm": (lambda: ops.spmm(values, v, layout, length), kept + 2 * one),
        "spmm_transposed": (lambda: grad(out, some_v, q), kept + 2 * one),
        "sparse_softmax_backward": (lambda: grad(weights, some_values, values), 3 * kept),
    }
    result = {"kept_blocks": layout.kept_blocks}
    for name, (call, floor) in operations.items():
        result[f"{name}_ms"] = timing.time_calls(call, device, calls=10 if device.type == "cpu" else 50).median_ms
        result[f"{name}_floor_bytes"] = floor
    return result


def statistics_time(case: dict, device: torch.device) -> dict:
    """Time of the dense phase's statistics of one layer."""
    q, k, _ = qkv(case, device, grad=False)
    module = {"kernel": ops, "reference": statistics}[case["method"]]
    call = partial(module.attention_statistics, q, k, case["block"])
    return dict.fromkeys(TIMES) | {"forward_ms": timing.time_calls(call, device, calls=calls_on(device)).median_ms}


def method_time(case: dict, device: torch.device) -> dict:
    """Times and peak memory of one method; "error" in place of what a peer couldn't do.

    Times are None where there is none: forward and backward of what has only a forward pass, and after an error.
    """
    name, layout = case["method"], block_layout(case, device)
    backward = name != "cusparse"
    used = coarsened(layout, int(name.removeprefix("flex "))) if name.startswith("flex ") else layout
    one = case["batch"] * case["heads"] * case["length"] * case["head_size"] * getattr(torch, case["dtype"]).itemsize
    result = {
        **dict.fromkeys(TIMES),
        "operations": attention_operations(case, None if name in ("materialised", "sdpa") else used),
        "floor_bytes_forward": 4 * one,  # q, k, v, out
        "floor_bytes_backward": 8 * one if backward else None,  # these, their gradients
        "kept_blocks": layout.kept_blocks,
    }
    try:
        attend = attention_of(name, layout, case["batch"] * case["heads"], case["length"])
        result.update(_attention_times(case, attend, device, backward))  # after an error with what came before it
    except RuntimeError as error:  # of a peer: out of memory, or what inductor and cuSPARSE raise
        if name in OURS:
            raise
        result["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return result


def attention_time(case: dict, device: torch.device) -> dict:
    """Forward, and forward and backward, of attention alone; its peak memory and its counted operations."""
    layout = block_layout(case, device) if case["method"] == "sat" else None
    name = {"sat": "fused", "dense": "sdpa"}[case["method"]]
    times = dict(_attention_times(case, attention_of(name, layout, 0, 0), device, backward=True))
    return times | {"operations": attention_operations(case, layout)}


def _attention_times(
    case: dict, attend: Attention, device: torch.device, backward: bool
) -> Iterator[tuple[str, float]]:
    """Medians of forward, then of forward and backward with its quartiles, then the peak memory of the latter."""
    q, k, v = qkv(case, device, grad=backward)
    gradient = torch.randn_like(q)

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v)

    def forward_backward() -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), gradient)

    whole = forward_backward if backward else forward
    taken = timing.time_calls(forward, device, calls=calls_on(device))
    yield "forward_ms", taken.median_ms
    if backward:
        taken = timing.time_calls(forward_backward, device, calls=calls_on(device))
        yield "forward_backward_ms", taken.median_ms
    peak = timing.peak_bytes(whole, device)
    yield from [("low_ms", taken.low_ms), ("high_ms", taken.high_ms), ("peak_bytes", peak)]


def attention_operations(case: dict, layout: BlockLayout | None) -> int:
    """Multiply-adds counted as two, exponentials as one, of forward attention: (4 d + 1) per kept entry.

    Dense attention keeps L^2 entries per head, SAT the entries of its kept blocks, so its operations are the density
    times the dense ones: O(density x L^2 x d).
    """
    entries = case["length"] ** 2 if layout is None else int(layout.entries(case["length"]).sum())
    return case["batch"] * case["heads"] * entries * (4 * case["head_size"] + 1)
