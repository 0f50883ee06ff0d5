"""How much each block of a layer's attention map matters, by what is meant with that: scores for the generator.

    attention    mean mass, which the paper's R~ foretells; here without the rows of padding queries
    excess       mean mass beyond that of its block column: what the key's position alone doesn't explain
    content      standard deviation of the mass over the examples
    value        how far the block moves its queries' outputs: |sum over its keys of A^s (v - output)|
    taylor       how much the loss would rise without the block, to first order: -sum of A^s dL/dA^s
    gradient     how much the loss would fall with more weight on the block: -dL/d(a number added to its raw scores)
    fisher       mean square of that derivative over the examples
    gate         the number added to a block's raw scores that lowers the loss, learnt for a while with the model frozen
    correlation  of the blocks' mean values over the examples: do two blocks' contents go together?

All but the last describe what dense attention does at the moment. Scores are (layers, heads, N, N), from a set of
examples; `block_correlation` is also what W^P can be trained to foretell, batch by batch.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.statistics import attention_map, block_correlation
from ..common.errors import require
from ..model.encoder import Encoder

SIGNALS = ("attention", "excess", "content", "value", "taylor", "gradient", "fisher", "gate", "correlation")
CHUNK_ENTRIES = 2**25  # of a layer's maps at a time: 128 MiB in float32
BATCH = 64  # examples at a time where no map is written out, and in a step of the gate
GATE_STEPS, GATE_RATE = 100, 0.05


def block_signal(model: Encoder, name: str, tokens: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
    """Scores of every block, (layers, heads, N, N) float32 on the model's device; the model stays as it is.

    In the sparse phase the layers' inputs and gradients are those of the sparse model, the maps those that dense
    attention would have.

    Args:
        name: one of `SIGNALS`. tokens: (B, L) int64, labels: (B,) int64. seed: of the gate's batches.

    Raises:
        InputError: an unknown name, or a model whose attention isn't "dense" or "sat".
    """
    require(name in SIGNALS, f"signal: wanted one of {SIGNALS}; got {name!r}")
    attention = model.config.attention
    require(attention in ("dense", "sat"), f"model: wanted attention 'dense' or 'sat'; got {attention!r}")
    probe = _plain_copy(model)
    if name == "gate":
        return _learn_gate(probe, tokens, labels, seed)
    if name == "correlation":
        return _correlations(probe, tokens)
    sums, squares = 0.0, 0.0
    for layers in _passes(probe, tokens, labels):
        each = torch.stack([_OF_ONE_MAP[name](*seen) for seen in layers])  # (layers, b, H, N, N)
        sums, squares = sums + each.double().sum(1), squares + each.double().square().sum(1)
    mean, square = sums / len(tokens), squares / len(tokens)
    finished = {
        "excess": lambda: mean - mean.mean(-2, keepdim=True),
        "content": lambda: (square - mean.square()).clamp(min=0).sqrt(),
        "fisher": lambda: square,
    }
    return finished.get(name, lambda: mean)().float()


def _plain_copy(model: Encoder) -> Encoder:
    """The model with PyTorch's modules, for evaluation in its parameters' precision, in the same phase."""
    with torch.random.fork_rng(devices=[]):  # its first weights, which are replaced, must not cost random numbers
        probe = Encoder(model.config).to(model.token.weight.device)
    if model.layouts is not None:
        probe.enter_sparse_phase(model.layouts)
    probe.load_state_dict(model.state_dict())
    return probe.eval().requires_grad_(False)


# ---- of the map as it is ---------------------------------------------------------------------------------------------


def _passes(probe: Encoder, tokens: Tensor, labels: Tensor) -> Iterator[list[tuple]]:
    """Forward and backward, some examples at a time: for every layer A^s, v, the output, dL/d(output), and the block.

    All (b, H, L, ...); L is an example's loss. Rows of padding queries are 0 in A^s.
    """
    config, seen = probe.config, {}

    def look(layer: int, attend):
        def attend_and_look(q, k, v, *, key_padding_mask=None, **more):
            out = attend(q, k, v, key_padding_mask=key_padding_mask, **more).requires_grad_()
            out.retain_grad()
            attention = attention_map(q.detach(), k.detach(), key_padding_mask)
            if key_padding_mask is not None:
                attention = attention * key_padding_mask[:, None, :, None]
            seen[layer] = attention, v, out
            return out

        return attend_and_look

    for layer, part in enumerate(probe.layers):
        part.attention.attend = look(layer, part.attention.attend)
    chunk = max(1, CHUNK_ENTRIES // (config.heads * config.length**2))
    for start in range(0, len(tokens), chunk):
        part = slice(start, start + chunk)
        with torch.enable_grad():
            F.cross_entropy(probe(tokens[part]).logits, labels[part], reduction="sum").backward()
        yield [(a, v.detach(), out.detach(), out.grad, config.block) for a, v, out in map(seen.get, sorted(seen))]


def _pool(entries: Tensor, block: int) -> Tensor:
    """(..., L, L) -> (..., N, N): sums over blocks."""
    beyond = -entries.shape[-1] % block
    padded = F.pad(entries, (0, beyond, 0, beyond))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum((-1, -3))


def _mass(attention, v, out, grad, block):
    return _pool(attention, block)


def _moved(attention, v, out, grad, block):
    beyond = -v.shape[-2] % block
    weights = F.pad(attention, (0, beyond)).unflatten(-1, (-1, block))  # (b, H, L, N, block)
    values = F.pad(v, (0, 0, 0, beyond)).unflatten(-2, (-1, block))  # (b, H, N, block, d)
    moved = torch.einsum("bhlnk,bhnkd->bhlnd", weights, values) - weights.sum(-1)[..., None] * out[..., None, :]
    return F.pad(moved.norm(dim=-1), (0, 0, 0, beyond)).unflatten(-2, (-1, block)).sum(-2)


def _through_map(attention, v, grad):
    """A^s dL/dA^s, entry by entry."""
    return attention * (grad @ v.transpose(-1, -2))


def _rise(attention, v, out, grad, block):
    return -_pool(_through_map(attention, v, grad), block)


def _pull(attention, v, out, grad, block):
    through = _through_map(attention, v, grad)
    return -_pool(through - attention * through.sum(-1, keepdim=True), block)


_OF_ONE_MAP = {
    "attention": _mass,
    "excess": _mass,
    "content": _mass,
    "value": _moved,
    "taylor": _rise,
    "gradient": _pull,
    "fisher": _pull,
}


# ---- learnt, and of the contents -------------------------------------------------------------------------------------


def _learn_gate(probe: Encoder, tokens: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Adam on a number for every block, 0 at first, that is added to its raw scores; dense attention throughout."""
    config = probe.config
    gate = torch.zeros(config.layers, config.heads, config.blocks, config.blocks, device=tokens.device)
    gate.requires_grad_()

    def gated(layer: int):
        def attend(q, k, v, *, key_padding_mask=None, **_):
            spread = gate[layer].repeat_interleave(config.block, -1).repeat_interleave(config.block, -2)
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + spread[:, : config.length, : config.length]
            if key_padding_mask is not None:
                scores = scores.masked_fill(~key_padding_mask[:, None, None], -torch.inf)
            return scores.softmax(-1).nan_to_num(nan=0.0) @ v

        return attend

    for layer, part in enumerate(probe.layers):
        part.attention.attend, part.attention.layout = gated(layer), None
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
