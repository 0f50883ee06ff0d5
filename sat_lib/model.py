"""The encoder of the paper: embeddings, pre-norm layers, masked mean, two-layer head. Released sizes by default."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import get_attention
from .errors import require
from .layout import BlockLayout
from .ops import attention_statistics
from .pattern import SparsityParameter
from .reference import PRUNED_RULES, AttentionStatistics, sparse_statistics
from .tasks import task

LAYERS = {"image": 2, "text": 4, "symbols": 4}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model.

    `sparsity_width` is the width of W^P: "head" (d, released; the published parameter counts need it) or
    "embedding" (D, paper). `attention` names an entry of `attention.ATTENTION`.
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

    @property
    def blocks(self) -> int:
        """Block rows N of the attention map."""
        return -(-self.length // self.block)


def model_config(task_name: str, **changes) -> ModelConfig:
    """The published model for a task (2 layers for images, 4 for text), with `changes` by field name."""
    data = task(task_name)
    sizes = {
        "vocab": data.vocab,
        "classes": len(data.classes),
        "layers": LAYERS[data.kind],
        "length": data.length,
        "masked_attention": data.masked_attention,
    }
    return ModelConfig(**(sizes | changes))


class SelfAttention(nn.Module):
    """Multi-head self-attention: dense until `layout` is set, and with a sparsity parameter where the model is SAT."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.attend = get_attention(config.attention)
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.layout: BlockLayout | None = None
        self.sparsity = None
        if config.attention == "sat":
            width = config.width // config.heads if config.sparsity_width == "head" else config.width
            self.sparsity = SparsityParameter(config.blocks, width, config.sparsity_init)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, width) -> q, k, v, each (B, H, L, d)."""
        batch, length, _ = x.shape
        shape = (batch, length, self.config.heads, -1)
        return tuple(linear(x).view(shape).transpose(1, 2) for linear in (self.query, self.key, self.value))

    def forward(self, x: Tensor, mask: Tensor | None, statistics: bool) -> tuple[Tensor, AttentionStatistics | None]:
        q, k, v = self.heads(x)
        out = self.attend(q, k, v, layout=self.layout, key_padding_mask=mask, pruned=self.config.pruned)
        seen = self.statistics(q, k, mask) if statistics else None
        return self.out(out.transpose(1, 2).flatten(2)), seen

    def statistics(self, q: Tensor, k: Tensor, mask: Tensor | None) -> AttentionStatistics:
        """Batch-and-head mean of `A^s` in the dense phase, of `S^s` in the sparse phase."""
        if self.layout is None:
            return attention_statistics(q, k, self.config.block, key_padding_mask=mask)
        return sparse_statistics(q, k, self.layout, key_padding_mask=mask, pruned=self.config.pruned)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_feed_forward = nn.LayerNorm(config.width)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.width, config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.width),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor, mask: Tensor | None, statistics: bool) -> tuple[Tensor, AttentionStatistics | None]:
        attended, seen = self.attention(self.norm_attention(x), mask, statistics)
        x = x + self.dropout(attended)
        return x + self.feed_forward(self.norm_feed_forward(x)), seen


class Output(NamedTuple):
    """Logits (B, classes), and one `AttentionStatistics` per layer if they were asked for."""

    logits: Tensor
    statistics: list[AttentionStatistics]


class Encoder(nn.Module):
    """Classifier over token sequences of one length.

    Token 0 is padding: it drops out of the mean over positions in every task, and out of the attention where
    `config.masked_attention` says so. The mean divides by all L positions, as released.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.length, config.width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Sequential(
            nn.Linear(config.width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.classes)
        )

    def forward(self, tokens: Tensor, statistics: bool = False) -> Output:
        """tokens (B, L) int64 -> `Output`; with `statistics`, also the mean attention map of every layer.

        Raises:
            InputError: another length than the model's, or tokens that aren't int64.
        """
        require(
            tokens.dim() == 2 and tokens.shape[1] == self.config.length and tokens.dtype == torch.int64,
            f"tokens: wanted (B, {self.config.length}) int64; got {tuple(tokens.shape)} {tokens.dtype}",
        )
        real = tokens != 0  # (B, L)
        mask = real if self.config.masked_attention else None
        x = self.dropout(self.token(tokens) + self.position.weight)
        seen = []
        for layer in self.layers:
            x, layer_statistics = layer(x, mask, statistics)
            seen.append(layer_statistics)
        x = self.norm(x) * real[..., None]
        return Output(self.head(x.mean(1)), seen if statistics else [])

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
        require(len(layouts) == config.layers, f"layouts: wanted {config.layers}, one per layer; got {len(layouts)}")
        device = self.token.weight.device
        for layer, layout in zip(self.layers, layouts, strict=True):
            layout.check(config.heads, config.length, config.length)
            layer.attention.layout = layout.to(device)
        for parameter in self.sparsity_parameters:
            parameter.requires_grad_(False)
            parameter.weight.grad = None

    def parameter_count(self) -> int:
        """All parameters, W^P included: 160,650 for CIFAR-10 as published."""
        return sum(parameter.numel() for parameter in self.parameters())

