"""The encoder of the paper: embeddings, pre-norm layers, masked mean, two-layer head. Released sizes by default.

One path leads through it, `Encoder.forward`. What it is made of is handed in, as `Parts`. `PLAIN` is
here, PyTorch's modules one by one; `model.fused` has fast parts of the same parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import get_attention
from ..attention.baselines import BASELINES, IMPLEMENTATIONS
from ..attention.layout import BlockLayout
from ..attention.ops import attention_statistics
from ..attention.reference import PRUNED_RULES
from ..attention.statistics import block_correlation, sparse_statistics
from ..common.errors import require
from .baseline_options import attention_options, check_baseline
from .sparsity import SparsityParameter, freeze


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model.

    Raises:
        InputError: a size or choice out of range, or sizes that the attention doesn't take.
    """

    vocab: int
    classes: int
    layers: int
    length: int = 1024
    width: int = 64
    heads: int = 2
    hidden: int = 128  # of the feed-forward blocks, and of the head
    dropout: float = 0.1
    masked_attention: bool = False  # whether padding drops out of the attention; out of the mean it always does
    attention: str = "sat"  # name in `attention.ATTENTION`
    block: int = 32  # entries per block side, of SAT, BigBird and LSG
    pruned: str = "zero"  # SAT's softmax over pruned entries, see `reference.PRUNED_RULES`
    sparsity_width: str = "head"  # of W^P: "head", d, released (the published counts need it); or "embedding", D, paper
    sparsity_init: str = "released"  # of W^P: name in `sparsity.INITIALISATIONS`
    sparsity_target: str = "attention"  # what W^P predicts: the pooled map, or "correlation", see `block_correlation`
    window: int = 64  # Longformer: positions
    dilation: int | tuple[int, ...] = 1  # Longformer: one for all layers, or one a layer
    global_token: bool = False  # Longformer
    random_blocks: int = 3  # BigBird: of each block row
    pattern_seed: int = 0  # BigBird: of its random blocks
    sparsity_factor: int = 2  # LSG
    implementation: str = "kernel"  # of the last three: "kernel" or "library", see `baselines`
    mean_over: str = "length"  # what the mean over positions divides by: all L, released; or the "real", unpadded ones

    def __post_init__(self):
        get_attention(self.attention)
        for name in ("vocab", "classes", "layers", "length", "width", "heads", "hidden", "block"):
            require(getattr(self, name) >= 1, f"{name}: wanted at least 1; got {getattr(self, name)}")
        require(
            self.width % self.heads == 0,
            f"heads: {self.heads} heads don't divide a width of {self.width}. Choose a divisor of the width",
        )
        require(0 <= self.dropout < 1, f"dropout: wanted 0 to below 1; got {self.dropout}")
        require(self.block <= self.length, f"block: wanted at most the length {self.length}; got {self.block}")
        require(self.pruned in PRUNED_RULES, f"pruned: wanted one of {PRUNED_RULES}; got {self.pruned!r}")
        for name, one, other in (
            ("sparsity_width", "head", "embedding"),
            ("sparsity_target", "attention", "correlation"),
            ("mean_over", "length", "real"),
        ):
            value = getattr(self, name)
            require(value in (one, other), f"{name}: wanted {one!r} or {other!r}; got {value!r}")
        require(
            self.implementation in (IMPLEMENTATIONS if self.attention in BASELINES else ("kernel",)),
            f"implementation: wanted one of {list(IMPLEMENTATIONS)}, 'kernel' for dense and sat; got "
            f"{self.implementation!r} for {self.attention!r}",
        )
        if isinstance(self.dilation, list):  # from JSON
            object.__setattr__(self, "dilation", tuple(self.dilation))
        check_baseline(self)

    @property
    def dilations(self) -> tuple[int, ...]:
        """Longformer's dilation layer by layer."""
        return self.dilation if isinstance(self.dilation, tuple) else (self.dilation,) * self.layers

    @property
    def blocks(self) -> int:
        """Block rows N of the attention map."""
        return -(-self.length // self.block)


class LayerStatistics(NamedTuple):
    """What is looked at in a layer: `statistics.AttentionStatistics`, and what else W^P may be trained to predict."""

    mean_map: Tensor  # (L, L)
    pooled: Tensor  # (N, N)
    correlation: Tensor | None = None  # (N, N), `statistics.block_correlation`, where it is `sparsity_target`


LayerResult = tuple[Tensor, LayerStatistics | None]  # what a layer, or a part of it, gives; statistics where asked for


class SelfAttention(nn.Module):
    """Multi-head self-attention. SAT's has a sparsity parameter, and is dense until `layout` is set."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.attend = get_attention(config.attention, **attention_options(config, layer))
        self.query, self.key, self.value, self.out = (nn.Linear(config.width, config.width) for _ in range(4))
        self.global_projections = None  # of Longformer's global token: query, key, value
        if config.attention == "longformer" and config.global_token:
            self.global_projections = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(3))
        self.layout: BlockLayout | None = None
        self.sparsity = None
        if config.attention == "sat":
            width = config.width // config.heads if config.sparsity_width == "head" else config.width
            length = config.length if config.sparsity_target == "attention" else None
            self.sparsity = SparsityParameter(config.blocks, width, config.sparsity_init, length)

    def forward(self, x: Tensor, mask: Tensor | None, statistics: bool) -> LayerResult:
        """x (B, L, width), mask (B, L) bool, True at keys that are seen -> (B, L, width), and statistics if wanted."""
        more = {}
        if self.global_projections is not None:
            inputs = zip(self.global_projections, (x[:, :1], x, x), strict=True)
            more["global_qkv"] = tuple(self.split_heads(linear(part)) for linear, part in inputs)
        joined, seen = self.attend_by_head(self.heads(x), mask, statistics, **more)
        return self.out(joined), seen

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, width) -> q, k, v, each (B, H, L, d)."""
        return tuple(self.split_heads(linear(x)) for linear in (self.query, self.key, self.value))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, H, L, d)."""
        return x.unflatten(2, (self.config.heads, -1)).transpose(1, 2)

    def attend_by_head(self, qkv: Sequence[Tensor], mask: Tensor | None, statistics: bool, **more) -> LayerResult:
        """q, k, v -> the heads' results side by side, (B, L, width), before the output projection; and statistics."""
        if self.layout is not None:
            more["layout"] = self.layout
        out = self.attend(*qkv, key_padding_mask=mask, **more)
        seen = self.statistics(*qkv, mask) if statistics else None
        return out.transpose(1, 2).flatten(2), seen

    def statistics(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> LayerStatistics:
        """Batch-and-head mean of `A^s` in the dense phase, of `S^s` in the sparse phase; correlations if wanted."""
        block, pruned = self.config.block, self.config.pruned
        if self.layout is not None:
            return LayerStatistics(*sparse_statistics(q, k, self.layout, key_padding_mask=mask, pruned=pruned))
        seen = attention_statistics(q, k, block, key_padding_mask=mask)
        wanted = self.config.sparsity_target == "correlation"
        return LayerStatistics(*seen, block_correlation(v, block, mask) if wanted else None)


class FeedForward(nn.Sequential):
    """Two linear layers with GELU between them, dropout behind each."""

    def __init__(self, width: int, hidden: int, dropout: float):
        up, down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        super().__init__(up, nn.GELU(), nn.Dropout(dropout), down, nn.Dropout(dropout))

    @property
    def up(self) -> nn.Linear:
        return self[0]

    @property
    def down(self) -> nn.Linear:
        return self[3]


class Layer(nn.Module):
    """The modules of one layer. What it computes of them is handed in: see `Parts.layer`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config, layer)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_feed_forward = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config.width, config.hidden, config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, statistics: bool, compute: Callable) -> LayerResult:
        return compute(self, x, mask, statistics)


class Parts(NamedTuple):
    """What the path through the encoder is made of: functions of its modules.

    embed: (encoder, tokens (B, L)) -> (B, L, width); of LSG (B, L + 1, width), its global token first.
    layer: (layer, x (B, L, width), mask (B, L) or None, statistics) -> (B, L, width), and `LayerStatistics` if wanted.
    pool: (encoder, x (B, L, width), real (B, L)) -> (B, width), the mean over all L of norm(x), 0 at padding.
    """

    embed: Callable[["Encoder", Tensor], Tensor]
    layer: Callable[[Layer, Tensor, Tensor | None, bool], LayerResult]
    pool: Callable[["Encoder", Tensor, Tensor], Tensor]


def _embed(encoder: "Encoder", tokens: Tensor) -> Tensor:
    x = encoder.token(tokens) + encoder.position.weight
    if encoder.global_token is not None:
        x = torch.cat([encoder.global_token.expand(len(x), -1, -1), x], 1)
    return encoder.dropout(x)


def _layer(layer: Layer, x: Tensor, mask: Tensor | None, statistics: bool) -> LayerResult:
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""
    attended, seen = layer.attention(layer.norm_attention(x), mask, statistics)
    x = x + layer.dropout(attended)
    return x + layer.feed_forward(layer.norm_feed_forward(x)), seen


def _pool(encoder: "Encoder", x: Tensor, real: Tensor) -> Tensor:
    return (encoder.norm(x) * real[..., None]).mean(1)


PLAIN = Parts(_embed, _layer, _pool)


class Output(NamedTuple):
    """Logits (B, classes), and one `LayerStatistics` per layer if they were asked for."""

    logits: Tensor
    statistics: list[LayerStatistics]


class Encoder(nn.Module):
    """Classifier over token sequences of one length.

    Token 0 is padding: it drops out of the mean over positions in every task, and out of the attention where
    `config.masked_attention` says so. The mean divides by all L positions, as released, unless `config.mean_over` says
    otherwise.

    LSG prepends a learned token (of the width's size, without a position), the global one, to the sequence. Behind the
    last layer it takes the place of position 0, as in the published code; where that is padding, it drops out with it.

    `parts` are `PLAIN` until `fused.fuse` puts others in their place.
    """

    parts = PLAIN

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.length, config.width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.global_token = None
        if config.attention == "lsg":
            self.global_token = nn.Parameter(torch.empty(1, 1, config.width))
            nn.init.normal_(self.global_token, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Sequential(
            nn.Linear(config.width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.classes)
        )

    def forward(self, tokens: Tensor, statistics: bool = False) -> Output:
        """tokens (B, L) int64 -> `Output`; with `statistics`, also the mean attention map of every layer.

        Raises:
            InputError: another length than the model's, tokens that aren't int64, or statistics of an attention whose
                map isn't `A^s`.
        """
        require(
            tokens.dim() == 2 and tokens.shape[1] == self.config.length and tokens.dtype == torch.int64,
            f"tokens: wanted (B, {self.config.length}) int64; got {tuple(tokens.shape)} {tokens.dtype}",
        )
        require(
            not statistics or self.config.attention not in BASELINES,
            f"statistics: there are those of dense and sat models; this one is {self.config.attention!r}",
        )
        real = tokens != 0  # (B, L)
        mask = real if self.config.masked_attention else None
        x = self.parts.embed(self, tokens)
        if self.global_token is not None and mask is not None:
            mask = F.pad(mask, (1, 0), value=True)
        seen = []
        for layer in self.layers:
            x, layer_statistics = layer(x, mask, statistics, self.parts.layer)
            seen.append(layer_statistics)
        if self.global_token is not None:
            x = torch.cat([x[:, :1], x[:, 2:]], 1)
        mean = self.parts.pool(self, x, real)
        if self.config.mean_over == "real":
            mean = mean * (self.config.length / real.sum(1, keepdim=True).clamp(min=1))
        return Output(self.head(mean), seen if statistics else [])

    @property
    def layouts(self) -> list[BlockLayout] | None:
        """The layers' layouts in the sparse phase, None in the dense phase."""
        layouts = [layer.attention.layout for layer in self.layers]
        return None if None in layouts else layouts

    @property
    def sparsity_parameters(self) -> list[SparsityParameter]:
        """W^P of every layer; empty unless the attention is SAT."""
        return [layer.attention.sparsity for layer in self.layers if layer.attention.sparsity is not None]

    def enter_sparse_phase(self, layouts: list[BlockLayout]) -> None:
        """Set one layout per layer and freeze W^P.

        Raises:
            InputError: the model isn't SAT, or the layouts don't fit its layers, heads or length.
        """
        config = self.config
        require(config.attention == "sat", f"only a 'sat' model has a sparse phase; this one is {config.attention!r}")
        placed = freeze(self.sparsity_parameters, layouts, config.heads, config.length)
        for layer, layout in zip(self.layers, placed, strict=True):
            layer.attention.layout = layout

    def parameter_count(self) -> int:
        """All parameters, W^P included: 160,650 for CIFAR-10 as published."""
        return sum(parameter.numel() for parameter in self.parameters())
