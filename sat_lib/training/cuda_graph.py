"""Work for a GPU that Python doesn't have to wait for: steps as CUDA graphs, results that are read later."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree

WARM_UP = 3  # calls before the capture: compilers, caches and libraries have done by then what a graph can't hold


class Captured:
    """A function of tensors on a GPU that is repeated as one CUDA graph, launched at once, from its fourth call on.

    What it allocates lies in the graph's own memory. It may leave gradients in parameters, if it clears them itself;
    tensors that it returns are copied, since the next call overwrites them. Inputs of another shape begin anew.

    Each call names the function, always the same one, so that nothing keeps alive whom it belongs to.
    """

    def __init__(self, device: torch.device):
        self.stream, self.graph = torch.cuda.Stream(device), None
        self.release()

    def release(self) -> None:
        """Free the graph and its memory. The next call begins anew."""
        if self.graph is not None:
            self.graph.reset()
        self.calls, self.graph, self.inputs, self.outputs = 0, None, (), None

    def __call__(self, function: Callable, *inputs: Tensor):
        """`function(*inputs)`: tensors, in tuples or lists, None among them. It must not wait for the GPU."""
        if [(x.shape, x.dtype) for x in inputs] != [(x.shape, x.dtype) for x in self.inputs]:
            self.release()
            self.inputs = [x.clone() for x in inputs]
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._warm_up(function)
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.outputs = function(*self.inputs)
            self.graph = graph
        self.graph.replay()
        return _pytree.tree_map_only(Tensor, torch.clone, self.outputs)

    def _warm_up(self, function: Callable):
        """On the stream of the capture, since gradients remember the stream that they were first computed on."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = function(*self.inputs)
        current.wait_stream(self.stream)
        return outputs


class Reading:
    """A tensor on its way to the host. On a GPU the copy is queued behind what was queued before, and nothing waits."""

    def __init__(self, tensor: Tensor):
        self.host, self.event = tensor, None
        if tensor.is_cuda:
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self.event = torch.cuda.current_stream(tensor.device).record_event()

    def values(self) -> list:
        """The numbers, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()
