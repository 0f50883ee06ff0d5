"""Saliency of every block, by criterion: scores for the generator.

    attention    mean mass, which the paper's R~ predicts; here without the rows of padding queries
    excess       mean mass beyond that of its block column: what the key's position alone doesn't explain
    content      standard deviation of the mass over the examples
    value        how far the block moves its queries' outputs: |sum over its keys of A^s (v - output)|
    taylor       how much the loss would rise without the block, to first order: -sum of A^s dL/dA^s
    gradient     how much the loss would fall with more weight on the block: -dL/d(a number added to its raw scores)
    fisher       mean square of that derivative over the examples
    gate         the number added to a block's raw scores that lowers the loss, trained with the model frozen
    correlation  of the blocks' mean values over the examples: do two blocks' contents go together?

All but the last describe what dense attention does at the moment. Scores are (layers, heads, N, N), from a set of
examples; `block_correlation` is also what W^P can be trained to predict, batch by batch.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.statistics import attention_map, block_correlation
from ..common.errors import require
from ..model.encoder import Encoder

CHUNK_ENTRIES = 2**25  # of a layer's maps at a time: 128 MiB in float32
BATCH = 64  # examples at a time where no map is written out, and in a step of the gate
GATE_STEPS, GATE_RATE = 100, 0.05


# ---- criteria of the map as it is ------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a forward and backward pass over b examples shows of a layer. L is an example's loss."""

    attention: Tensor  # A^s, (b, H, L, L); rows of padding queries are 0
    v: Tensor  # (b, H, L, d)
    out: Tensor  # the heads' results, (b, H, L, d)
    grad: Tensor  # dL/d(out), (b, H, L, d)


class Criterion(NamedTuple):
    """function: (Seen, block) -> (b, H, N, N), example by example. reduce: of its mean and mean square over them."""

    function: Callable[[Seen, int], Tensor]
    reduce: Callable[[Tensor, Tensor], Tensor] = lambda mean, square: mean


def _pool(entries: Tensor, block: int) -> Tensor:
    """(..., L, L) -> (..., N, N): sums over blocks."""
    beyond = -entries.shape[-1] % block
    padded = F.pad(entries, (0, beyond, 0, beyond))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum((-1, -3))


def _mass(seen: Seen, block: int) -> Tensor:
    return _pool(seen.attention, block)


def _moved(seen: Seen, block: int) -> Tensor:
    beyond = -seen.v.shape[-2] % block
    weights = F.pad(seen.attention, (0, beyond)).unflatten(-1, (-1, block))  # (b, H, L, N, block)
    values = F.pad(seen.v, (0, 0, 0, beyond)).unflatten(-2, (-1, block))  # (b, H, N, block, d)
    moved = torch.einsum("bhlnk,bhnkd->bhlnd", weights, values) - weights.sum(-1)[..., None] * seen.out[..., None, :]
    return F.pad(moved.norm(dim=-1), (0, 0, 0, beyond)).unflatten(-2, (-1, block)).sum(-2)


def _through_map(seen: Seen) -> Tensor:
    """A^s dL/dA^s, entry by entry."""
    return seen.attention * (seen.grad @ seen.v.transpose(-1, -2))


def _pull(seen: Seen, block: int) -> Tensor:
    through = _through_map(seen)
    return -_pool(through - seen.attention * through.sum(-1, keepdim=True), block)


OF_THE_MAP = {
    "attention": Criterion(_mass),
    "excess": Criterion(_mass, lambda mean, square: mean - mean.mean(-2, keepdim=True)),
    "content": Criterion(_mass, lambda mean, square: (square - mean.square()).clamp(min=0).sqrt()),
    "value": Criterion(_moved),
    "taylor": Criterion(lambda seen, block: -_pool(_through_map(seen), block)),
    "gradient": Criterion(_pull),
    "fisher": Criterion(_pull, lambda mean, square: square),
}
CRITERIA = (*OF_THE_MAP, "gate", "correlation")


def block_saliency(model: Encoder, criterion: str, tokens: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
    """Scores of every block, (layers, heads, N, N) float32 on the model's device; the model stays as it is.

    In the sparse phase the layers' inputs and gradients are those of the sparse model, the maps those that dense
    attention would have.

    Args:
        criterion: one of `CRITERIA`. tokens: (B, L) int64, labels: (B,) int64. seed: of the gate's batches.

    Raises:
        InputError: an unknown criterion, or a model whose attention isn't "dense" or "sat".
    """
    require(criterion in CRITERIA, f"criterion: wanted one of {CRITERIA}; got {criterion!r}")
    attention = model.config.attention
    require(attention in ("dense", "sat"), f"model: wanted attention 'dense' or 'sat'; got {attention!r}")
    probe = _plain_copy(model)
    if criterion == "gate":
        return _train_gate(probe, tokens, labels, seed)
    if criterion == "correlation":
        return _correlations(probe, tokens)
    function, reduce = OF_THE_MAP[criterion]
    sums, squares = 0.0, 0.0
    for layers in _passes(probe, tokens, labels):
        each = torch.stack([function(seen, model.config.block) for seen in layers])  # (layers, b, H, N, N)
        sums, squares = sums + each.double().sum(1), squares + each.double().square().sum(1)
    return reduce(sums / len(tokens), squares / len(tokens)).float()


def _plain_copy(model: Encoder) -> Encoder:
    """The model with PyTorch's modules, for evaluation in its parameters' precision, in the same phase."""
    with torch.random.fork_rng(devices=[]):  # its first weights, which are replaced, must not cost random numbers
        probe = Encoder(model.config).to(model.token.weight.device)
    if model.layouts is not None:
        probe.enter_sparse_phase(model.layouts)
    probe.load_state_dict(model.state_dict())
    return probe.eval().requires_grad_(False)


def _passes(probe: Encoder, tokens: Tensor, labels: Tensor) -> Iterator[list[Seen]]:
    """Forward and backward, some examples at a time: what is seen of every layer."""
    config, seen = probe.config, []

    def attend_and_look(attend, q, k, v, *, key_padding_mask=None, **more):
        out = attend(q, k, v, key_padding_mask=key_padding_mask, **more).requires_grad_()
        out.retain_grad()
        attention = attention_map(q.detach(), k.detach(), key_padding_mask)
        if key_padding_mask is not None:
            attention = attention * key_padding_mask[:, None, :, None]
        seen.append((attention, v.detach(), out))
        return out

    for layer in probe.layers:
        layer.attention.attend = partial(attend_and_look, layer.attention.attend)
    chunk = max(1, CHUNK_ENTRIES // (config.heads * config.length**2))
    for some, right in zip(tokens.split(chunk), labels.split(chunk), strict=True):
        seen.clear()
        with torch.enable_grad():
            F.cross_entropy(probe(some).logits, right, reduction="sum").backward()
        yield [Seen(attention, v, out.detach(), out.grad) for attention, v, out in seen]


# ---- a trained criterion, and one of the contents --------------------------------------------------------------------


def _train_gate(probe: Encoder, tokens: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Adam on a number for every block, 0 at first, that is added to its raw scores; dense attention throughout."""
    config = probe.config
    gate = torch.zeros(config.layers, config.heads, config.blocks, config.blocks, device=tokens.device)
    gate.requires_grad_()

    def attend(layer, q, k, v, *, key_padding_mask=None, **_):
        spread = gate[layer].repeat_interleave(config.block, -1).repeat_interleave(config.block, -2)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + spread[:, : config.length, : config.length]
        if key_padding_mask is not None:
            scores = scores.masked_fill(~key_padding_mask[:, None, None], -torch.inf)
        return scores.softmax(-1).nan_to_num(nan=0.0) @ v

    for layer, part in enumerate(probe.layers):
        part.attention.attend, part.attention.layout = partial(attend, layer), None
    optimiser = torch.optim.Adam([gate], GATE_RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(GATE_STEPS):
        some = torch.randperm(len(tokens), generator=generator)[:BATCH].to(tokens.device)
        with torch.enable_grad():
            loss = F.cross_entropy(probe(tokens[some]).logits, labels[some])
        (gate.grad,) = torch.autograd.grad(loss, gate)
        optimiser.step()
    return gate.detach()


def _correlations(probe: Encoder, tokens: Tensor) -> Tensor:
    """Of the means that all examples' blocks have, a head at a time."""
    config, values = probe.config, [[] for _ in probe.layers]
    for layer, part in enumerate(probe.layers):
        look = lambda attention, inputs, seen=values[layer]: seen.append(attention.heads(inputs[0])[2])
        part.attention.register_forward_pre_hook(look)
    with torch.no_grad():
        for some in tokens.split(BATCH):
            probe(some)
    mask = tokens != 0 if config.masked_attention else None
    of_heads = lambda v: torch.stack([block_correlation(v[:, [h]], config.block, mask) for h in range(config.heads)])
    return torch.stack([of_heads(torch.cat(of_layer)) for of_layer in values])
