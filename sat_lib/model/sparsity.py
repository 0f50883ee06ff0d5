"""The sparsity parameter W^P: R~ = W^P (W^P)^T, its starts, its loss beside the task's, and its end."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.layout import BlockLayout
from ..common.errors import require

INITIALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "released": lambda weight: nn.init.uniform_(weight, 0.0, 1.0),  # R~ starts near width / 4, far above its target
    # Every entry of R~ starts near 1, with differences from which the rows of W^P can part. Entries of W^P are
    # 1 / sqrt(width): for a head size of 32, 0.18, which Adam covers in the published warm-up.
    "calibrated": lambda weight: nn.init.normal_(weight, 1.0, 0.1).div_(weight.shape[1] ** 0.5),
}


class SparsityParameter(nn.Module):
    """One layer's sparsity parameter W^P, trained in the dense phase to predict the pooled attention map.

    Args:
        blocks: N, block rows (and columns) of the attention map.
        width: columns of W^P; the head size d in the released code, the embedding size D in the paper.
        init: name in `INITIALISATIONS`. "released" draws uniformly from [0, 1), "calibrated" starts R~ near 1.
        length: L, where it is to predict an attention map; None, where the target is of the order of 1 already. Rows
            of the map sum to 1, so that the mean of the pooled map is 1 / L in every task. "calibrated" multiplies the
            target by L (`scale`), which puts its mean where R~ starts; "released" leaves it.

    Calling it returns R~ = W^P (W^P)^T, (N, N), symmetric to the last bit and in full precision under autocast too:
    its entries differ by less than bfloat16 can tell.
    """

    def __init__(self, blocks: int, width: int, init: str = "released", length: int | None = None):
        super().__init__()
        require(init in INITIALISATIONS, f"init: wanted one of {sorted(INITIALISATIONS)}; got {init!r}")
        self.scale = float(length) if init == "calibrated" and length is not None else 1.0
        self.weight = nn.Parameter(torch.empty(blocks, width))
        with torch.no_grad():
            INITIALISATIONS[init](self.weight)

    def forward(self) -> Tensor:
        with torch.autocast(self.weight.device.type, enabled=False):
            product = self.weight @ self.weight.T
        return (product + product.T) / 2


LOSS_WEIGHT = 0.01  # per layer, of the sparsity losses beside the task loss, as released


def sparsity_loss(parameter: SparsityParameter, pooled: Tensor) -> Tensor:
    """Mean square of R_n x scale - R~_n over the N x N blocks; the gradient reaches W^P only.

    `pooled` (N, N) is the batch-and-head mean of the pooled map. The published loss averages the square over batch
    and heads; the two differ by the variance of R_n over batch and heads, which no parameter here can change, so
    the gradients are the same.
    """
    return F.mse_loss(parameter(), pooled.detach() * parameter.scale)


def model_sparsity_loss(parameters: Iterable[SparsityParameter], pooled: Iterable[Tensor]) -> Tensor:
    """The sum of `sparsity_loss` over the layers, without its weight: `LOSS_WEIGHT` x layers."""
    return sum(sparsity_loss(parameter, target) for parameter, target in zip(parameters, pooled, strict=True))


def freeze(
    parameters: Sequence[SparsityParameter], layouts: Sequence[BlockLayout], heads: int, length: int
) -> list[BlockLayout]:
    """End the learning of W^P: the layouts, one per layer, on the parameters' device, for the sparse phase.

    Raises:
        InputError: another number of layouts, or one that doesn't fit the heads or the length. Nothing is frozen then.
    """
    require(len(layouts) == len(parameters), f"layouts: wanted {len(parameters)}, one per layer; got {len(layouts)}")
    for layout in layouts:
        layout.check(heads, length, length)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.weight.grad = None
    return [layout.to(parameter.weight.device) for layout, parameter in zip(layouts, parameters, strict=True)]
