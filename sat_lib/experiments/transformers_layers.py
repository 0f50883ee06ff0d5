"""The published layers of transformers in the place of our attention, to compare with.

    model = Encoder(model_config("agnews", attention="bigbird"))
    use_transformers(model)

The layers are LongformerSelfAttention and BigBirdBlockSparseAttention, unchanged but for BigBird's random blocks. They
compute with the model's own parameters, under their own names: checkpoints and optimisers don't see a difference.
"""

import itertools
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor, nn

from ..attention.static_patterns import bigbird_layout
from ..common.errors import require
from ..model.encoder import Encoder, ModelConfig, SelfAttention


def transformers_version() -> str | None:
    """The version of transformers that is installed, None without it."""
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None


def use_transformers(model: Encoder) -> None:
    """Let the published layer compute each layer's attention: same parameters, same random blocks, no dropout in it.

    The results are those of our attention at all real positions; padded ones, which no others see, differ.

    Raises:
        InputError: another attention than "longformer" and "bigbird", sizes that the published layer doesn't take, or
            transformers isn't installed. The model is then as it was.
    """
    config = model.config
    require(
        config.attention in PEERS,
        f"attention: transformers has layers for {list(PEERS)}; this model's is {config.attention!r}. Compare one of "
        "these",
    )
    require(
        transformers_version() is not None,
        "transformers: wanted the package, which is not installed. pip install transformers, or compare with "
        "implementation='library'",
    )
    published, masks = PEERS[config.attention](config)
    for layer, peer in zip(model.layers, published, strict=True):
        layer.attention = PublishedAttention(layer.attention, peer, masks)


class PublishedAttention(nn.Module):
    """A layer of transformers with the interface, the parameters and the parameter names of `SelfAttention`.

    Args:
        attention: whose projections to use.
        published: the layer of transformers. It is kept in evaluation mode: there is no dropout in it, and in training
            mode BigBird's reseeds NumPy's global generator (in older versions of transformers, in both).
        masks: shared by the layers of a model.
    """

    layout = sparsity = None  # of SAT alone

    def __init__(self, attention: SelfAttention, published: nn.Module, masks: "Masks"):
        super().__init__()
        published.eval()
        self.config = attention.config
        self.query, self.key, self.value, self.out = attention.query, attention.key, attention.value, attention.out
        self.global_projections = attention.global_projections
        published.query, published.key, published.value = self.query, self.key, self.value
        if self.config.attention == "longformer":
            parts = self.global_projections or [None] * 3  # without a global token they are never called
            published.query_global, published.key_global, published.value_global = parts
        self.published = (published,)  # in a tuple its parameters don't count a second time
        self.masks = masks
        self.train(attention.training)

    def forward(self, x: Tensor, mask: Tensor | None, statistics: bool) -> tuple[Tensor, None]:
        """x (B, L, width), mask (B, L) bool or None -> out (B, L, width), and None: there are no statistics.

        Raises:
            InputError: another length than the model's.
        """
        length = self.config.length
        require(x.shape[1] == length, f"x: wanted the model's length of {length} positions; got {x.shape[1]}")
        (published,) = self.published
        return self.out(published(x, **self.masks(x, mask))[0]), None


class Masks:
    """What the published layers are given beside x, made once per forward pass as in the models of transformers.

    `make` turns real positions, (B, L) of 1 and 0, into keyword arguments. Those of the last mask are kept: for the
    same tensor, which must not have been changed since, or for inputs of the same sort that go without one.
    """

    def __init__(self, make: Callable[[Tensor], dict]):
        self.make, self.mask, self.sort, self.made = make, None, None, {}

    def __call__(self, x: Tensor, mask: Tensor | None) -> dict:
        # A CPU's autocast, unlike a GPU's, leaves softmax in low precision, and BigBird wants one type.
        low = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if low else x.dtype
        sort = (x.shape[:2], x.device, dtype)
        if mask is not self.mask or sort != self.sort:
            with torch.inference_mode(False):  # what evaluation made must do for training too
                real = torch.ones(x.shape[:2], device=x.device) if mask is None else mask
                self.made = self.make(real.to(dtype))
            self.mask, self.sort = mask, sort
        return self.made


# ---- Longformer ------------------------------------------------------------------------------------------------------


def _longformer(config: ModelConfig) -> tuple[list[nn.Module], Masks]:
    require(
        set(config.dilations) == {1},
        f"dilation: transformers' Longformer has none, wanted 1; got {config.dilation}. Take 1, or compare with "
        "implementation='library'",
    )
    _require_multiple(config, "Longformer", "window", config.window)
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    sizes = LongformerConfig(
        hidden_size=config.width,
        num_attention_heads=config.heads,
        num_hidden_layers=config.layers,
        attention_window=[config.window] * config.layers,
        attention_probs_dropout_prob=0.0,
    )
    with torch.device("meta"):  # its own parameters are replaced
        layers = [LongformerSelfAttention(sizes, layer) for layer in range(config.layers)]

    def masks(real: Tensor) -> dict:
        """As LongformerModel and its encoder pass them: below 0 for padding, 0 for the window, above 0 for global."""
        values = 10_000 * (real - 1)
        if config.global_token:
            values[:, 0] += 10_000 * real[:, 0]
        return {
            "attention_mask": values,
            "is_index_masked": values < 0,
            "is_index_global_attn": values > 0,
            "is_global_attn": bool((values > 0).any()),
        }

    return layers, Masks(masks)


# ---- BigBird ---------------------------------------------------------------------------------------------------------


def _bigbird(config: ModelConfig) -> tuple[list[nn.Module], Masks]:
    require(
        config.random_blocks >= 1,
        f"random_blocks: transformers' BigBird wants 1 or more; got {config.random_blocks}. Take 1, or compare with "
        "implementation='library'",
    )
    _require_multiple(config, "BigBird", "block", config.block)
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    sizes = BigBirdConfig(
        hidden_size=config.width,
        num_attention_heads=config.heads,
        block_size=config.block,
        num_random_blocks=config.random_blocks,
        max_position_embeddings=config.length,
    )
    with torch.device("meta"):  # its own parameters are replaced
        layers = [BigBirdBlockSparseAttention(sizes, seed=layer) for layer in range(config.layers)]
    for layer, published in enumerate(layers):
        _set_random_blocks(published, config, layer)

    def masks(real: Tensor) -> dict:
        """As BigBirdModel and its layers pass them."""
        blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(real, config.block)
        by_block = {"from_blocked_mask": blocked, "to_blocked_mask": blocked}
        return by_block | {"band_mask": band, "from_mask": rows, "to_mask": columns}

    return layers, Masks(masks)


def _set_random_blocks(published: nn.Module, config: ModelConfig, layer: int) -> None:
    """Let a BigBird layer use our random blocks in place of its own, in training as in evaluation.

    Its own are drawn anew from a seed in each forward pass of training, and in evaluation are block 0 alone, which all
    rows see anyway. A plan is an int64 NumPy array (N - 2, random blocks) per head: what inner block rows keep beside
    window and edges. Lengths 1024, 3072 and 4096 ask for it head by head, others for all heads at once.
    """
    layout = bigbird_layout(config.heads, config.blocks, config.random_blocks, config.block, config.pattern_seed, layer)
    row = torch.arange(config.blocks)
    edges = (row == 0) | (row == config.blocks - 1)
    random = layout.grid & ~edges & ((row[:, None] - row).abs() > 1)
    plan = list(random[:, 1:-1].nonzero()[:, 2].reshape(config.heads, -1, config.random_blocks).numpy())
    heads = itertools.cycle(plan)
    published._bigbird_block_rand_mask = lambda *_, **__: next(heads)
    published._bigbird_block_rand_mask_with_head = lambda *_, **__: plan


def _require_multiple(config: ModelConfig, name: str, field: str, size: int) -> None:
    require(
        config.length % size == 0,
        f"length: transformers' {name} wants a multiple of its {field} of {size} positions; got {config.length}. "
        f"Change the length or the {field}, or compare with implementation='library'",
    )


PEERS = {"longformer": _longformer, "bigbird": _bigbird}  # config -> layers of transformers, their masks
