"""Which device a run is on, by the name a reader knows, and the stamp that says where a number comes from."""

import datetime
import platform
from importlib import metadata

import torch

from . import files
from .errors import require


def pick_device(name: str = "auto") -> torch.device:
    """`"auto"`: CUDA where there is one, else the CPU; any other name must be there.

    Raises:
        InputError: CUDA was asked for and PyTorch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    require(
        not name.startswith("cuda") or torch.cuda.is_available(),
        f"device: {name!r} was asked for, and PyTorch {torch.__version__} sees no CUDA device. "
        "Use --device cpu, or install a CUDA build of PyTorch and a driver",
    )
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The device as a reader knows it: the GPU's name, or the processor's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{files.processor()}, {torch.get_num_threads()} threads"


def stamp(device: torch.device) -> dict:
    """Where a number comes from: commit, device, versions, time (UTC, to the second)."""
    return {
        "commit": files.commit(),
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "numpy": metadata.version("numpy"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
