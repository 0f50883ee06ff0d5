"""Compiles sat_lib/csrc with nvcc, the first time a CUDA tensor meets one of the operators, and loads the result.

The built library lies in ~/.cache/sat_lib (or $XDG_CACHE_HOME/sat_lib), in a folder named by a digest of the sources,
the flags, PyTorch, CUDA and the GPUs' architectures, so that a change of any of them builds anew. What the kernels of
attention don't take is refused here too; of tensors on a CPU nothing is asked.
"""

import contextlib
import os
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..common import files
from ..common.errors import InputError, require

SOURCES = files.PACKAGE / "csrc"
LIBRARY = "sat_lib_cuda"
CUDA_FLAGS = ["-O3"]
CXX_FLAGS = ["-O2"]
WAY_OUT = "SAT_LIB_IMPLEMENTATION=reference in the environment chooses the plain PyTorch implementation, much slower"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (16, 32, 64, 128)
LONGEST = 65_536
GRID = 65_536  # thread blocks along the grid's second and third axis


def check_operand(x: Tensor, length: int, block: int) -> None:
    """Raise InputError if x (B, H, L, D) is on a GPU and the kernels can't take it; `length`: the other operand's."""
    if x.device.type != "cuda":
        return
    require(max(x.shape[:2]) < GRID, f"batch, heads: the kernels take fewer than {GRID} each; got {tuple(x.shape[:2])}")
    size, longest = x.shape[-1], max(x.shape[-2], length)
    _check_format(x, block)
    require(
        size % 16 == 0 and 16 <= size <= 128,
        f"head size: the kernels take multiples of 16 up to 128; got {size}. Choose another number of heads",
    )
    require(longest <= LONGEST, f"length: the kernels take at most {LONGEST} positions; got {longest}")


def check_values(values: Tensor, block: int) -> None:
    """Raise InputError if a sparse map's values (B, T, b, b) are on a GPU and the kernels can't take them."""
    if values.device.type == "cuda":
        _check_format(values, block)
        require(len(values) < GRID, f"batch: the kernels take fewer than {GRID}; got {len(values)}")


def _check_format(x: Tensor, block: int) -> None:
    require(x.dtype in DTYPES, f"dtype: the kernels take {DTYPES}; got {x.dtype}. Convert it with .to(...)")
    require(block in BLOCKS, f"block: the kernels take {BLOCKS}; got {block}. {WAY_OUT}")


@cache
def load():
    """The compiled functions, built if need be: `torch.ops.sat_lib_cuda`.

    Raises:
        InputError: no nvcc, no ninja, a GPU older than compute capability 8.0, or nvcc failed.
    """
    devices = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    old = [device for device in devices if device < (8, 0)]
    require(not old, f"device: the kernels want compute capability 8.0 or later; this machine's has {old}. {WAY_OUT}")
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(f"{a}.{b}" for a, b in devices) or "8.0;9.0"
    texts = {path.name: files.file_digest(path) for path in sorted(SOURCES.iterdir()) if path.is_file()}
    made_of = [texts, CUDA_FLAGS, CXX_FLAGS, torch.__version__, torch.version.cuda, architectures]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "sat_lib" / files.digest(made_of)
    built = folder / "built"
    with files.lock(folder / "lock-of-build", "the build of the CUDA kernels", wait=True):
        if not built.exists():
            _build(folder, architectures)
            files.write(built, "")
        torch.ops.load_library(folder / f"{LIBRARY}.so")
    return getattr(torch.ops, LIBRARY)


def _build(folder: Path, architectures: str) -> None:
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    require(
        home is not None and (Path(home) / "bin" / "nvcc").exists(),
        f"nvcc: wanted CUDA {torch.version.cuda}'s compiler to build the kernels; found none on PATH or in CUDA_HOME. "
        f"Install the CUDA toolkit (conda install -c nvidia cuda-toolkit={torch.version.cuda}), or: {WAY_OUT}",
    )
    print(f"building the CUDA kernels for {architectures} in {folder}, once, about a minute ...", flush=True)
    start = time.perf_counter()
    (folder / "lock").unlink(missing_ok=True)  # PyTorch's own lock, which a killed build leaves behind for good
    saved = {name: os.environ.get(name) for name in ("TORCH_CUDA_ARCH_LIST", "PATH")}
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    with contextlib.suppress(ImportError):  # its program isn't on PATH where a virtual environment isn't activated
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    try:
        cpp_extension.load(
            LIBRARY,
            [str(path) for path in sorted(SOURCES.iterdir()) if path.suffix in (".cu", ".cpp")],
            extra_cflags=CXX_FLAGS,
            extra_cuda_cflags=CUDA_FLAGS,
            build_directory=str(folder),
            is_python_module=False,
        )
    except RuntimeError as error:
        raise InputError(f"the CUDA kernels could not be built: {error}\n{WAY_OUT}") from error
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
