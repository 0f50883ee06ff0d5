"""Time and memory of calls, on any device."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from . import distributed
from .errors import require

FLUSH_BYTES = 256 * 2**20  # written between timed calls on a GPU: several times its L2 cache
FLUSHES = 20  # times it is written: 1.8 ms on an H100, in which Python gets ahead of the GPU by a call's launches
QUARTILES = (0.5, 0.25, 0.75)  # in the order of `Timing`


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single calls: the median, the quartiles, and how many calls."""

    median_ms: float
    low_ms: float
    high_ms: float
    calls: int


def time_calls(
    call: Callable[[], object], device: torch.device, *, warm_up: int = 3, calls: int = 20, seconds: float = 20.0
) -> Timing:
    """Time single calls after `warm_up` untimed ones; stops early, after 3 calls or more, once `seconds` are over.

    On CUDA: events around each call, and the L2 cache overwritten before it, for long enough that the GPU doesn't wait
    for Python between a call's kernels. On CPU: the wall clock.
    """
    require(calls >= 1, f"calls: wanted at least 1; got {calls}")
    for _ in range(warm_up):
        call()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    taken, start = [], time.perf_counter()
    while len(taken) < calls and (len(taken) < 3 or time.perf_counter() - start < seconds):
        taken.append(_milliseconds(call, flush))
    return Timing(*np.quantile(taken, QUARTILES).tolist(), len(taken))


def _milliseconds(call: Callable[[], object], flush: torch.Tensor | None) -> float:
    """Time of one call: on a GPU by events, after `flush` has been written there; without it by the wall clock."""
    if flush is None:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000
    for _ in range(FLUSHES):
        flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(flush.device)
    start.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end)


def time_rounds(
    call: Callable[[], object], device: torch.device, *, warm_up: int = 5, rounds: int = 10, calls: int = 50
) -> Timing:
    """Time calls one after another, as a training run makes them: the wall clock over a round of `calls`.

    Processes that were joined all call this; they start each round together, and the slowest counts.
    """
    for _ in range(warm_up):
        call()
    taken = []
    for _ in range(rounds):
        _wait(device)
        distributed.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        taken.append((time.perf_counter() - start) * 1000 / calls)
    slowest = np.max(distributed.gathered(taken), axis=0)
    return Timing(*np.quantile(slowest, QUARTILES).tolist(), rounds * calls)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensor memory held at once during a call, beyond what was held before it.

    On CUDA from the caching allocator; on CPU from the profiler's record of every allocation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    cpu_only = [torch.profiler.ProfilerActivity.CPU]
    with _stderr_closed(), torch.profiler.profile(activities=cpu_only, profile_memory=True) as profile:
        call()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """Send the process's error output nowhere: the profiler of PyTorch 2.13 writes two lines there at every use."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
