"""SAT, the sparsity-aware Transformer: learn which blocks of the attention map matter, then train on those alone.

    from sat_lib import BlockLayout, block_sparse_attention, get_attention      # attention over kept blocks
    from sat_lib import Encoder, Trainer, fit                                   # the published model and training
    from sat_lib import SparseAttention                                         # SAT in a pretrained encoder

The method is ten files, in reading order: attention/layout, reference, ops, patterns, __init__; model/sparsity,
encoder; training/recipe, transition, trainer. Rooms, each importing only from those behind it: experiments, explorer;
figures, pretrained; training, maps; model; attention, datasets, reproduce; common. Kernels are in csrc.
"""

import importlib

PUBLIC = {  # public name -> where it is; imported when it is first asked for
    "BlockLayout": "attention.layout",
    "get_attention": "attention",
    "block_sparse_attention": "attention.ops",
    "Encoder": "model.encoder",
    "Trainer": "training.trainer",
    "fit": "training.fit",
    "SparseAttention": "pretrained.sparse_attention",
}
__all__ = sorted(PUBLIC)


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{PUBLIC[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *PUBLIC})
