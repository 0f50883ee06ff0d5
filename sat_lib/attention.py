"""Attention by name, with one signature for all.

    attend = get_attention("sat")
    out = attend(q, k, v, layout=layout, key_padding_mask=mask, pruned="zero")

q, k, v are (B, H, L, D), the mask (B, L) bool with True for real tokens; out is (B, H, L, D).
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .errors import require
from .layout import BlockLayout
from .ops import block_sparse_attention
from .reference import check_attention_inputs


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: BlockLayout | None = None,
    key_padding_mask: Tensor | None = None,
    pruned: str = "zero",
) -> Tensor:
    """The original Transformer's attention through PyTorch's scaled_dot_product_attention.

    An example without any real token gives 0 (a softmax over nothing would be NaN). `pruned` has nothing to act on.

    Raises:
        InputError: shapes don't fit, or a layout is given, which dense attention would ignore.
    """
    check_attention_inputs(q, k, v, key_padding_mask)
    require(layout is None, "layout: dense attention takes none. Use 'sat' for block-sparse attention")
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    some = key_padding_mask.any(-1, keepdim=True)  # (B, 1)
    allowed = (key_padding_mask | ~some)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed) * some[:, None, None]


def sat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: BlockLayout | None = None,
    key_padding_mask: Tensor | None = None,
    pruned: str = "zero",
) -> Tensor:
    """SAT's attention: dense until there is a layout, block-sparse under it (see `ops.block_sparse_attention`)."""
    if layout is None:
        return dense_attention(q, k, v, key_padding_mask=key_padding_mask)
    return block_sparse_attention(q, k, v, layout, key_padding_mask=key_padding_mask, pruned=pruned)


ATTENTION: dict[str, Callable[..., Tensor]] = {"dense": dense_attention, "sat": sat_attention}


def get_attention(name: str) -> Callable[..., Tensor]:
    """The attention function of that name.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    require(name in ATTENTION, f"attention: wanted one of {sorted(ATTENTION)}; got {name!r}")
    return ATTENTION[name]
