"""Inputs, layouts and the entry-by-entry definition that attention is tested against."""

import math

import torch

from sat_lib.attention.layout import BlockLayout


def definition(q, k, v, layout, mask=None, pruned="zero", window=None):
    """(output, map) over full L x L tensors, straight from the formula; no max subtraction, so mild scores only."""
    queries, keys = q.shape[2], k.shape[2]
    kept = layout.entries(max(queries, keys))[..., :queries, :keys].to(q.device)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if window is not None:
        query, key = torch.arange(queries)[:, None], torch.arange(keys)
        kept = kept & (((query - key).abs() <= window) | (key >= queries)).to(q.device)
    weights = scores.exp() * kept
    if mask is not None:
        weights = weights * mask[:, None, None]
    total = weights.sum(-1, keepdim=True)
    if pruned == "zero":
        total = total + (~kept).sum(-1, keepdim=True)
    attention = torch.where(total > 0, weights / total.clamp(min=1e-300), 0.0)
    return attention @ v, attention


def layouts(rows, columns, block, heads):
    grid = torch.zeros(rows, columns, dtype=torch.bool)
    some = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < 0.3
    one, row, column = grid.clone(), grid.clone(), grid.clone()
    one[rows // 2, 0] = True
    row[0], column[:, columns - 1] = True, True
    empty_row = some.clone()
    empty_row[0] = False
    empty_column = some.clone()
    empty_column[:, -1] = False
    per_head = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(2)) < 0.3
    per_head[0] = False
    grids = {
        "nothing": grid,
        "everything": ~grid,
        "one block": one,
        "diagonal": torch.eye(rows, columns).bool(),
        "full row": row,
        "full column": column,
        "random": some,
        "empty row": empty_row,
        "empty column": empty_column,
        "per head": per_head,
    }
    return {name: BlockLayout(grid, block) for name, grid in grids.items()}


LAYOUTS = list(layouts(4, 4, 8, 2))


def inputs(queries, keys, device="cpu", dtype=torch.float64, size=8, batch=3, heads=2, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, size) for length in (queries, keys, keys)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in made]


def padding_mask(kind, batch, keys, block):
    if kind == "none":
        return None
    lengths = {"ragged": [0, 1, block - 1], "block": [block, keys, keys - 1]}[kind]
    return torch.arange(keys)[None] < torch.tensor(lengths[:batch])[:, None]


def with_gradients(attend, inputs):
    out = attend(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
    return out.detach(), torch.autograd.grad((out * weight).sum(), inputs)


def assert_close(got, exact, peer, factor, rounding):
    """The error is at most `factor` times PyTorch's own in the same format, plus a rounding.

    PyTorch multiplies small or narrow float32 matrices without TF32 where that is allowed, hence the rounding.
    """
    assert got.isfinite().all()
    error, theirs = (got.double() - exact).norm(), (peer.double() - exact).norm()
    bound = factor * theirs + rounding * exact.norm() + 1e-14
    assert error <= bound, f"error {error:.3g}, PyTorch's {theirs:.3g}, bound {bound:.3g}"
