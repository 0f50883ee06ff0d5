"""The attentions' definitions, entry by entry, and dense attention under such a mask: what tests compare with.

Masks are (B, H, L, L) or smaller, True where a query attends to a key, before padding. Written from the papers'
sentences; nothing here is shared with sat_lib but BigBird's random blocks, which no sentence tells.
"""

import math

import torch

from sat_lib.attention.static_patterns import bigbird_layout


def dense_mask(q, k, real):
    length = q.shape[2]
    return torch.ones(length, length, dtype=torch.bool)


def longformer_mask(q, k, real, window=64, dilation=1, global_token=False):
    length = q.shape[2]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for n in range(-(window // 2), window // 2 + 1):
            if 0 <= i + n * dilation < length:
                mask[i, i + n * dilation] = True
    if global_token:
        mask[0] = mask[:, 0] = True
    return mask


def bigbird_mask(q, k, real, block=32, random_blocks=3, seed=0, layer=0):
    heads, length = q.shape[1:3]
    blocks = -(-length // block)
    return bigbird_layout(heads, blocks, random_blocks, block, seed, layer).entries(length)


def lsg_mask(q, k, real, block=32, factor=2):
    """Position 0 is global; chunk b holds positions 1 + b * block and on."""
    batch, heads, length, _ = k.shape
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    mask[:, :, 0] = mask[:, :, :, 0] = True
    chunks = [range(start, min(start + block, length)) for start in range(1, length, block)]
    norms = k.detach().double().norm(dim=-1).tolist()
    for example in range(batch):
        for head in range(heads):
            offers = []
            for chunk in chunks:
                some = [j for j in chunk if real is None or real[example, j]]
                some.sort(key=norms[example][head].__getitem__, reverse=True)
                offers.append(some[: block // factor])
            for b, chunk in enumerate(chunks):
                seen = [j for c in (b - 1, b, b + 1) if 0 <= c < len(chunks) for j in chunks[c]]
                for step in range(2, 2 + factor):
                    seen += [j for c in (b - step, b + step) if 0 <= c < len(chunks) for j in offers[c]]
                for i in chunk:
                    mask[example, head, i, seen] = True
    return mask


MASKS = {
    "dense": dense_mask,
    "sat": dense_mask,
    "longformer": longformer_mask,
    "bigbird": bigbird_mask,
    "lsg": lsg_mask,
}


def masked_attention(q, k, v, mask, real=None):
    """softmax(q k^T / sqrt(D)) v over what the mask and the key padding leave; nothing left gives 0."""
    mask = mask.to(q.device)
    if real is not None:
        mask = mask & real[:, None, None]
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
    some = mask.any(-1, keepdim=True)
    return scores.masked_fill(~some, 0).softmax(-1) * some @ v
