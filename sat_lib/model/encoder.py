"""The encoder of the paper: embeddings, pre-norm layers, masked mean, two-layer head. Released sizes by default."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import get_attention
from ..attention.baselines import BASELINES, IMPLEMENTATIONS, check_bigbird, check_longformer, check_lsg
from ..attention.layout import BlockLayout
from ..attention.ops import IMPLEMENTATION, attention_statistics
from ..attention.reference import PRUNED_RULES
from ..attention.statistics import block_correlation, sparse_statistics
from ..common.errors import require
from .fused import after_attention, before_attention, check_fusable, embed, masked_mean
from .sparsity import SparsityParameter, freeze


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model.

    `attention` names an entry of `attention.ATTENTION`. For "sat", `sparsity_width` is the width of W^P: "head" (d,
    released; the published parameter counts need it) or "embedding" (D, paper); `sparsity_init` an entry of
    `sparsity.INITIALISATIONS`; `sparsity_target` what W^P is trained to foretell: "attention", the pooled map, or
    "correlation", `statistics.block_correlation` (of several processes the mean of their shares'). `block` is BigBird's
    and LSG's too; `window` (positions), `dilation` (one for all layers, or one a layer) and `global_token` are
    Longformer's, `random_blocks` and `pattern_seed` BigBird's, `sparsity_factor` LSG's. `implementation` of these three
    is "kernel" or "library" (see `baselines`). `mean_over` is what the mean over the positions divides by: "length",
    all L, released; or "real", the tokens that aren't padding.
    """

    vocab: int
    classes: int
    layers: int
    length: int = 1024
    width: int = 64
    heads: int = 2
    hidden: int = 128
    dropout: float = 0.1
    masked_attention: bool = False
    attention: str = "sat"
    block: int = 32
    pruned: str = "zero"
    sparsity_width: str = "head"
    sparsity_init: str = "released"
    sparsity_target: str = "attention"
    window: int = 64
    dilation: int | tuple[int, ...] = 1
    global_token: bool = False
    random_blocks: int = 3
    pattern_seed: int = 0
    sparsity_factor: int = 2
    implementation: str = "kernel"
    mean_over: str = "length"

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
        require(
            self.sparsity_width in ("head", "embedding"),
            f"sparsity_width: wanted 'head' or 'embedding'; got {self.sparsity_width!r}",
        )
        require(
            self.sparsity_target in ("attention", "correlation"),
            f"sparsity_target: wanted 'attention' or 'correlation'; got {self.sparsity_target!r}",
        )
        require(
            self.mean_over in ("length", "real"), f"mean_over: wanted 'length' or 'real'; got {self.mean_over!r}"
        )
        require(
            self.implementation in (IMPLEMENTATIONS if self.attention in BASELINES else ("kernel",)),
            f"implementation: wanted one of {list(IMPLEMENTATIONS)}, 'kernel' for dense and sat; got "
            f"{self.implementation!r} for {self.attention!r}",
        )
        self._check_pattern()

    def _check_pattern(self) -> None:
        """The baselines' own sizes, which their attention would refuse later."""
        if isinstance(self.dilation, list):
            object.__setattr__(self, "dilation", tuple(self.dilation))
        require(
            len(self.dilations) == self.layers,
            f"dilation: wanted one number, or one for each of {self.layers} layers; got {self.dilation}",
        )
        if self.attention == "longformer":
            for dilation in self.dilations:
                check_longformer(self.length, self.window, dilation, self.global_token)
        elif self.attention == "bigbird":
            check_bigbird(self.length, self.block, self.random_blocks)
        elif self.attention == "lsg":
            check_lsg(self.length, self.block, self.sparsity_factor)

    def attention_options(self, layer: int) -> dict:
        """What the attention function of a layer (from 0) is given beside its inputs."""
        common = {"implementation": self.implementation}
        if self.attention == "longformer":
            sizes = {"window": self.window, "dilation": self.dilations[layer]}
            return common | sizes | {"global_token": self.global_token}
        if self.attention == "bigbird":
            random = {"random_blocks": self.random_blocks, "seed": self.pattern_seed, "layer": layer}
            return common | {"block": self.block} | random
        if self.attention == "lsg":
            return common | {"block": self.block, "factor": self.sparsity_factor}
        return {"pruned": self.pruned} if self.attention == "sat" else {}

    @property
    def dilations(self) -> tuple[int, ...]:
        """Longformer's dilation layer by layer."""
        return self.dilation if isinstance(self.dilation, tuple) else (self.dilation,) * self.layers

    @property
    def blocks(self) -> int:
        """Block rows N of the attention map."""
        return -(-self.length // self.block)


class LayerStatistics(NamedTuple):
    """What is looked at in a layer: `statistics.AttentionStatistics`, and what else W^P may be trained to foretell."""

    mean_map: Tensor  # (L, L)
    pooled: Tensor  # (N, N)
    correlation: Tensor | None = None  # (N, N), `statistics.block_correlation`, where it is `sparsity_target`


class SelfAttention(nn.Module):
    """Multi-head self-attention. SAT's has a sparsity parameter, and is dense until `layout` is set."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.attend = get_attention(config.attention, **config.attention_options(layer))
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.global_projections = None  # of Longformer's global token: query, key, value
        if config.attention == "longformer" and config.global_token:
            self.global_projections = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(3))
        self.layout: BlockLayout | None = None
        self.sparsity = None
        if config.attention == "sat":
            width = config.width // config.heads if config.sparsity_width == "head" else config.width
            length = config.length if config.sparsity_target == "attention" else None
            self.sparsity = SparsityParameter(config.blocks, width, config.sparsity_init, length)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, width) -> q, k, v, each (B, H, L, d)."""
        return tuple(self._split_heads(linear(x)) for linear in (self.query, self.key, self.value))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.config.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None, statistics: bool) -> tuple[Tensor, LayerStatistics | None]:
        more = {}
        if self.global_projections is not None:
            inputs = zip(self.global_projections, (x[:, :1], x, x), strict=True)
            more["global_qkv"] = tuple(self._split_heads(linear(part)) for linear, part in inputs)
        out, seen = self._join(self.heads(x), mask, statistics, **more)
        return self.out(out), seen

    def attended_fused(
        self, x: Tensor, norm: nn.LayerNorm, mask: Tensor | None, statistics: bool
    ) -> tuple[Tensor, Tensor, LayerStatistics | None]:
        """x to go on with; the heads' results of norm(x) side by side, (B, L, width), which `out` doesn't project."""
        *qkv, x = before_attention(x, norm, (self.query, self.key, self.value))
        return x, *self._join([self._split_heads(part) for part in qkv], mask, statistics)

    def _join(self, qkv: Sequence[Tensor], mask: Tensor | None, statistics: bool, **more):
        if self.layout is not None:
            more["layout"] = self.layout
        out = self.attend(*qkv, key_padding_mask=mask, **more)
        seen = self.statistics(*qkv, mask) if statistics else None
        return out.transpose(1, 2).flatten(2), seen

    def statistics(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> LayerStatistics:
        """Batch-and-head mean of `A^s` in the dense phase, of `S^s` in the sparse phase; correlations if wanted."""
        block = self.config.block
        if self.layout is not None:
            seen = sparse_statistics(q, k, self.layout, key_padding_mask=mask, pruned=self.config.pruned)
            return LayerStatistics(*seen)
        seen = attention_statistics(q, k, block, key_padding_mask=mask)
        wanted = self.config.sparsity_target == "correlation"
        return LayerStatistics(*seen, block_correlation(v, block, mask) if wanted else None)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). For `fused` see `Encoder.fuse`."""

    fused = False

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config, layer)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_feed_forward = nn.LayerNorm(config.width)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.width, config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.width),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor, mask: Tensor | None, statistics: bool) -> tuple[Tensor, LayerStatistics | None]:
        if self.fused:
            x, attended, seen = self.attention.attended_fused(x, self.norm_attention, mask, statistics)
            up, _, _, down, drop = self.feed_forward
            dropout = drop.p if self.training else 0.0
            return after_attention(x, attended, self.attention.out, self.norm_feed_forward, up, down, dropout), seen
        attended, seen = self.attention(self.norm_attention(x), mask, statistics)
        x = x + self.dropout(attended)
        return x + self.feed_forward(self.norm_feed_forward(x)), seen


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
    """

    fused = compiled = False

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
        x = self._embed(tokens)
        if self.global_token is not None and mask is not None:
            mask = F.pad(mask, (1, 0), value=True)
        seen = []
        for layer in self.layers:
            x, layer_statistics = layer(x, mask, statistics)
            seen.append(layer_statistics)
        if self.global_token is not None:
            x = torch.cat([x[:, :1], x[:, 2:]], 1)
        if self.fused:
            mean = masked_mean(x, real, self.norm, compiled=self.compiled and self.training)
        else:
            mean = (self.norm(x) * real[..., None]).mean(1)
        if self.config.mean_over == "real":
            mean = mean * (self.config.length / real.sum(1, keepdim=True).clamp(min=1))
        return Output(self.head(mean), seen if statistics else [])

    def _embed(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, L, width), LSG's global token before them."""
        if self.fused:
            dropout, compiled = self.dropout.p if self.training else 0.0, self.compiled and self.training
            return embed(
                tokens, self.token.weight, self.position.weight, self.global_token, dropout, compiled=compiled
            )
        x = self.token(tokens) + self.position.weight
        if self.global_token is not None:
            x = torch.cat([self.global_token.expand(len(x), -1, -1), x], 1)
        return self.dropout(x)

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

    def fuse(self, *, compiled: bool) -> None:
        """Compute with the operators of `fused` from now on, under bfloat16 autocast.

        The parameters stay what they are. Results differ by rounding, and by the masks that dropout draws.

        Args:
            compiled: whether what is left to PyTorch goes through torch.compile in training.

        Raises:
            InputError: the operators aren't made for this model or device.
        """
        config = self.config
        require(IMPLEMENTATION == "kernels", f"SAT_LIB_IMPLEMENTATION: {IMPLEMENTATION!r} has no fused layers")
        check_fusable(config.width, config.hidden, config.vocab, self.token.weight.device)
        for layer in self.layers:
            plain = type(layer.attention) is SelfAttention and layer.attention.global_projections is None
            require(plain, "attention: the fused layer is for SelfAttention without a global token's own projections")
        for part in (self, *self.layers):
            part.fused = True
        self.compiled = compiled

    def parameter_count(self) -> int:
        """All parameters, W^P included: 160,650 for CIFAR-10 as published."""
        return sum(parameter.numel() for parameter in self.parameters())
