"""Processes that train one model together, and the few things that they say to one another.

Started by torchrun, by `launch` or by a SLURM job, each knows its place from RANK, WORLD_SIZE, LOCAL_RANK and
MASTER_*. Without these a process is alone, and everything below costs nothing.
"""

import contextlib
import math
import os
import signal
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import record

from .errors import require

T = TypeVar("T")
S = TypeVar("S", bound=Sequence | np.ndarray)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes for the length of a block, over NCCL on CUDA and gloo on a CPU.

    Yields:
        The device of this process: on CUDA the one of its number on this machine, LOCAL_RANK.

    Raises:
        InputError: a variable is missing, or there are more processes than GPUs on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and events without a device are this one's
        yield device
        return
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    require(not missing, f"environment: WORLD_SIZE is set and {missing} are not. Start with torchrun, see REPRODUCE.md")
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        _check_room(local + 1, device)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    # Not in a finally: after an exception the others may wait for this process, and destroying the group would wait for
    # them. The process's end frees all.
    yield device
    for thing in list(_holding):
        thing.release()
    dist.destroy_process_group()


_holding: weakref.WeakSet = weakref.WeakSet()


def release_at_the_end(thing) -> None:
    """Have `thing.release()` called before the processes part: NCCL waits for every graph that its kernels are in."""
    if size() > 1:
        _holding.add(thing)


def most_processes(device: torch.device) -> float:
    """As many as this machine has GPUs; on a CPU any number, math.inf."""
    return torch.cuda.device_count() if device.type == "cuda" else math.inf


def _check_room(processes: int, device: torch.device) -> None:
    there = most_processes(device)
    require(processes <= there, f"processes: wanted one at most for each of {there} GPUs here; got {processes}")


def launch(processes: int, device: torch.device, function: Callable[..., T], *arguments) -> T:
    """Call a function in new processes of this machine, joined, and return what process 0 does.

    They are started as `torchrun --standalone --nproc-per-node=PROCESSES` starts them, by the same code. They import
    the calling script anew, which therefore needs its `if __name__ == "__main__":`.

    Args:
        device: its type is that of all. function: `function(device, *arguments)`, device the process's own; of a
            module's top level, since it is pickled, like the arguments and what it returns.

    Raises:
        InputError: more processes than GPUs, or called by one of several processes.
        ChildFailedError: the function raised, and the message has its traceback; or a process was killed.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    require(size() == 1, f"processes: new ones are started by one that is alone; got {size()}. Start without torchrun")
    _check_room(processes, device)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    threads = max(1, torch.get_num_threads() // processes)
    with _signal_handlers_kept():
        return elastic_launch(settings, _as_launched)(threads, device.type, function, arguments)[0]


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """The launcher puts its own in their place, and raises SignalException where Ctrl-C is a KeyboardInterrupt."""
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    kept = {number: signal.getsignal(number) for number in handled}
    try:
        yield
    except SignalException as stopped:
        raise KeyboardInterrupt(str(stopped)) from stopped
    finally:
        for number, handler in kept.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@record
def _as_launched(threads: int, device: str, function: Callable, arguments: tuple):
    torch.set_num_threads(threads)
    with joined(torch.device(device)) as own:
        return function(own, *arguments)


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


def share(items: S) -> S:
    """This process's equal part of an array or a list, whose length the number of processes divides."""
    part = len(items) // size()
    return items[rank() * part : (rank() + 1) * part]


def copy_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor with process 0's. Unlike `from_first` it doesn't wait for a GPU."""
    if size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def mean(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean over the processes of each tensor; the same bits in all of them."""
    if size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors]) / size()
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def mean_gradients(parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
    """Put the mean over the processes in place of each parameter's gradient, and return that of a loss.

    All in one tensor at the end of the backward pass, 0.6 MB for CIFAR-10, instead of DistributedDataParallel's buckets
    during it: there is little to hide, and it goes into a CUDA graph. (The dense phase's maps are 8.4 MB.)
    """
    mean_loss, *means = mean([loss.detach(), *(parameter.grad for parameter in parameters)])
    for parameter, gradient in zip(parameters, means, strict=True):
        parameter.grad = gradient
    return mean_loss


def total(values: Tensor) -> Tensor:
    """The sum over the processes of a tensor."""
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values
