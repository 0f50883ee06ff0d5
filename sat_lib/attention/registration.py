"""How an operator of `torch.ops.sat_lib` is told to PyTorch: schema, CPU form, CUDA kernel, autocast, gradient.

@operator("scaled(Tensor x, Tensor[] layout, float scale) -> Tensor", autocast=1)
def _scaled(x, layout, scale):                                   # on a CPU; on a GPU the compiled function "scaled"
    ...

@torch.library.register_fake("sat_lib::scaled", lib=library)     # shapes, dtypes and strides alone
def _(x, layout, scale):
    ...

@gradient("scaled", save=_save_scaled)
def _differentiate_scaled(ctx, grad):
    ...
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from . import build
from .reference import cast_as_autocast

library = torch.library.Library("sat_lib", "DEF")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_AUTOCAST |= torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


def operator(schema: str, *, autocast: int = 0, tf32: bool = False) -> Callable[[Callable], Callable]:
    """Define an operator. The decorated function is its CPU form; its CUDA kernel is built at the first call.

    Args:
        schema: in PyTorch's language, beginning with the operator's name.
        autocast: so many leading arguments are cast to autocast's dtype, as PyTorch does for its own attention.
        tf32: whether the kernel takes one argument more: whether it may multiply float32 as TF32.
    """
    name = schema.partition("(")[0]

    def on_cuda(*arguments):
        kernel = getattr(build.load(), name)
        if not tf32:
            return kernel(*arguments)
        return kernel(*arguments, torch.backends.cuda.matmul.fp32_precision == "tf32")

    def on_autocast(*arguments):
        cast = cast_as_autocast(*arguments[:autocast])
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return getattr(torch.ops.sat_lib, name)(*cast, *arguments[autocast:])

    def define(on_cpu: Callable) -> Callable:
        library.define(schema)
        library.impl(name, on_cpu, "CPU")
        library.impl(name, on_cuda, "CUDA")
        if autocast:
            library.impl(name, on_autocast, "AutocastCPU")
            library.impl(name, on_autocast, "AutocastCUDA")
        return on_cpu

    return define


def gradient(name: str, save: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function as an operator's gradient.

    `save(ctx, inputs, output)` keeps what `differentiate(ctx, *grads)` wants, as in torch.library.register_autograd.
    That one isn't used: it takes every Tensor[] apart at each call, which costs more than all else in the call. Here a
    list is one argument, whose gradient is None. Second derivatives raise: those of the kernels would be incomplete.
    """
    call = getattr(torch.ops.sat_lib, name).default

    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = call(*inputs)
        save(ctx, inputs, output)
        return output

    def register(differentiate: Callable) -> Callable:
        members = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(differentiate))}
        function = type(f"sat_lib_{name}", (torch.autograd.Function,), members)

        def with_autograd(*inputs):
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return function.apply(*inputs)
            with torch._C._AutoDispatchBelowAutograd():
                return call(*inputs)

        library.impl(name, with_autograd, "Autograd")
        return differentiate

    return register
