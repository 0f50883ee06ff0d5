"""Processes that train one model together, and the few things that they say to one another.

Started by torchrun or by a SLURM job, each knows its place from RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*. Without
these a process is alone, and everything below costs nothing.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import require

T = TypeVar("T")


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes for the length of a block, over NCCL on CUDA and gloo on a CPU.

    Yields:
        The device of this process: on CUDA the one of its number on this machine, LOCAL_RANK.

    Raises:
        InputError: a variable is missing, or there are more processes than GPUs on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)  # streams and events without a device are this one's
        yield device
        return
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    require(not missing, f"environment: WORLD_SIZE is set and {missing} are not. Start with torchrun, see README.md")
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(local < there, f"processes: wanted at most one for each of {there} GPUs; this is number {local + 1}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def size() -> int:
    """Number of processes, 1 for one that is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0. Process 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all others to come here too."""
    if size() > 1:
        dist.barrier()


def from_first(value: T) -> T:
    """Process 0's value, of any type that pickles, in all of them."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def first_alone(make: Callable[[], T]) -> T:
    """`make()`, in process 0 before the others: what it prepares they find."""
    value = make() if rank() == 0 else None
    barrier()
    return make() if rank() > 0 else value


def gathered(value: T) -> list[T]:
    """Everyone's value, in order, in all of them."""
    if size() == 1:
        return [value]
    values: list[T | None] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def mean(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean over the processes of each tensor; the same bits in all of them."""
    if size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors]) / size()
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def total(values: Tensor) -> Tensor:
    """The sum over the processes of a tensor."""
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values
