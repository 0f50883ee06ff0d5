"""Attention by name, with one signature for all.

    attend = get_attention("bigbird", block=32, layer=1)
    out = attend(q, k, v, key_padding_mask=mask)

q, k, v are (B, H, L, D), the mask (B, L) bool with True for real tokens; out is (B, H, L, D). What else an attention
takes are its options, by keyword, here or at the call.

layout: which blocks are kept; patterns, static_patterns: rules for it. reference: formulas; ops: the same as operators,
made by registration and build. statistics: numbers of a map. baselines, gather: what SAT is compared with.
"""

import inspect
from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..common.errors import require
from .baselines import BASELINES, dense_attention
from .layout import BlockLayout
from .ops import block_sparse_attention


def sat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    layout: BlockLayout | None = None,
    pruned: str = "zero",
) -> Tensor:
    """SAT's attention: dense until there is a layout, block-sparse under it (see `ops.block_sparse_attention`)."""
    if layout is None:
        return dense_attention(q, k, v, key_padding_mask=key_padding_mask)
    return block_sparse_attention(q, k, v, layout, key_padding_mask=key_padding_mask, pruned=pruned)


ATTENTION: dict[str, Callable[..., Tensor]] = {"dense": dense_attention, **BASELINES, "sat": sat_attention}


def get_attention(name: str, **options) -> Callable[..., Tensor]:
    """The attention function of that name, with these options.

    Raises:
        InputError: there is none, or it takes no such option; the message lists those there are.
    """
    require(name in ATTENTION, f"attention: wanted one of {list(ATTENTION)}; got {name!r}")
    parameters = inspect.signature(ATTENTION[name]).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name != "key_padding_mask"]
    unknown = sorted(options.keys() - set(known))
    require(not unknown, f"attention: {name!r} takes no {', '.join(unknown)}; its options are {known}")
    return partial(ATTENTION[name], **options)
