"""Which blocks of an attention map a pattern keeps, and how much of the map they hold: patterns side by side.

    maps = encoder_maps(model, tokens)                      # A^s of every layer, (B, H, L, L)
    choices = choose(maps[0][0, 0], density=0.05, block=32, scores=scores)
    records = compare(maps[0][0, 0], choices)               # mass kept, overlap, ... by pattern

`compare_snapshots` does that for the snapshots of a training run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import runs
from .errors import InputError, require
from .layout import BlockLayout
from .model import Encoder, SelfAttention
from .pattern import bigbird_layout, generate_layout, mass_kept, nearness, overlap, random_layout
from .reference import attention_map, pool_blocks

PATTERNS = ("learned", "best", "window", "bigbird", "random", "in use")
RANDOM_BLOCKS = 3  # of BigBird's pattern, as published
COARSE = 128  # side of the map that goes into a row


# ---- maps ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encoder_maps(model: Encoder, tokens: Tensor) -> list[Tensor]:
    """`A^s` of every layer, each (B, H, L, L) float32: the softmax of the raw scores that dense attention would take.

    In the sparse phase too: the layers' inputs are then those of the sparse model. The model runs in evaluation mode.
    Where padding is masked, padding keys and the rows of padding queries are 0.

    Args:
        tokens: (B, L) int64.

    Raises:
        InputError: the attention isn't "dense" or "sat", or tokens don't fit the model.
    """
    name = model.config.attention
    require(name in ("dense", "sat"), f"model: wanted attention 'dense' or 'sat', whose map is A^s; got {name!r}")
    maps, training = [], model.training

    def look(attention: SelfAttention, inputs: tuple) -> None:
        x, mask, _ = inputs
        q, k, _ = attention.heads(x)
        found = attention_map(q, k, mask)
        maps.append(found if mask is None else found.masked_fill(~mask[:, None, :, None], 0.0))

    hooks = [layer.attention.register_forward_pre_hook(look) for layer in model.layers]
    try:
        model.eval()(tokens)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return maps


def block_sums(attention: Tensor, block: int) -> Tensor:
    """(L, L) on the CPU -> (N, N) float64: the mass in every block, those of a partial last block included."""
    edges = np.arange(0, len(attention), block)
    rows = np.add.reduceat(attention.numpy(), edges, 0)  # several times as fast as sums over axes in PyTorch
    return torch.from_numpy(np.add.reduceat(rows, edges, 1, dtype=np.float64))


# ---- choosing blocks -------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A pattern's layout, or None and why there is none."""

    layout: BlockLayout | None
    reason: str = ""


def choose(
    attention: Tensor,
    density: float,
    block: int,
    scores: Tensor | None = None,
    trained_block: int | None = None,
    in_use: BlockLayout | None = None,
    layer: int = 0,
    seed: int = 0,
) -> dict[str, Choice]:
    """The layout of every pattern in `PATTERNS`, each but "bigbird" and "in use" with int(N^2 x density) blocks.

    learned: the largest R~. best: the blocks that hold most of this map. window: the blocks nearest to the diagonal.
    bigbird: one head of BigBird's pattern, at its own density. random: the control. in use: the layout of the sparse
    phase, in its own blocks.

    Args:
        attention: (L, L). scores: R~ in blocks of `trained_block` (None: of `block`), or None where nothing was learnt.
        layer: for BigBird's draw. seed: of the random blocks.

    Raises:
        InputError: a block outside 1 to L, a density outside (0, 1] or so small that no block is kept.
    """
    length = len(attention)
    require(1 <= block <= length, f"block: wanted 1 to the length of {length} positions; got {block}")
    blocks = -(-length // block)
    top = lambda values: Choice(generate_layout(values, density, block))
    absent = "no sparsity parameter was trained here"
    learned = (None, absent) if scores is None else resize_scores(scores, trained_block or block, block, length)
    return {
        "learned": top(learned[0]) if learned[0] is not None else Choice(None, learned[1]),
        "best": top(block_sums(attention, block)),
        "window": top(nearness(blocks)),
        "bigbird": _bigbird(blocks, block, seed, layer),
        "random": Choice(random_layout(blocks, blocks, density, block, seed)),
        "in use": Choice(in_use, "" if in_use is not None else "no layout in the dense phase"),
    }


def resize_scores(scores: Tensor, trained: int, block: int, length: int) -> tuple[Tensor | None, str]:
    """R~ in blocks of `trained` positions for blocks of `block`: averaged over larger ones, repeated for smaller ones.

    Returns:
        (N, N) scores and how they came about; or None and the reason, where neither size divides the other.
    """
    blocks = -(-length // block)
    if block == trained:
        return scores, f"blocks of {trained}, as trained"
    if block % trained == 0:
        return pool_blocks(scores, block // trained), f"mean of the trained blocks of {trained}"
    if trained % block == 0:
        times = trained // block
        repeated = scores.repeat_interleave(times, 0).repeat_interleave(times, 1)
        return repeated[:blocks, :blocks], f"trained blocks of {trained}, repeated"
    return None, f"blocks of {block} neither divide the trained {trained} nor are a multiple of it"


def _bigbird(blocks: int, block: int, seed: int, layer: int) -> Choice:
    try:
        layout = bigbird_layout(1, blocks, RANDOM_BLOCKS, block, seed, layer)
    except InputError:
        return Choice(None, f"wants more than {5 + 2 * RANDOM_BLOCKS} blocks a side; there are {blocks}")
    return Choice(BlockLayout(layout.grid[0], block))


# ---- comparing -------------------------------------------------------------------------------------------------------


def compare(attention: Tensor, choices: Mapping[str, Choice]) -> list[dict]:
    """A record a pattern: density, mass_kept (0 to 1), overlap (its blocks that "best" keeps too), empty_rows, note.

    `overlap` is None for a layout in other blocks than "best"; an absent pattern has None everywhere and the reason.

    Args:
        attention: (L, L), some of it above 0.

    Raises:
        InputError: an empty map: every query is padding.
    """
    best = choices["best"].layout
    sums = {best.block: block_sums(attention, best.block)}
    require(bool(sums[best.block].any()), "map: wanted attention above 0; all queries of this one are padding")
    records = []
    for name, (layout, reason) in choices.items():
        record = {"pattern": name, "density": None, "mass_kept": None, "overlap": None, "empty_rows": None}
        if layout is not None:
            if layout.block not in sums:
                sums[layout.block] = block_sums(attention, layout.block)
            record |= {
                "density": layout.density,
                "mass_kept": mass_kept(sums[layout.block], BlockLayout(layout.grid, 1)),  # its "entries" are blocks
                "overlap": overlap(layout, best) if layout.block == best.block else None,
                "empty_rows": layout.empty_rows,
            }
        records.append(record | {"note": reason})
    return records


# ---- the snapshots of a run ------------------------------------------------------------------------------------------


def compare_snapshots(
    folder: Path, steps: tuple[int, ...], tokens: Tensor, densities: tuple[float, ...], shown_head: int = 0
) -> dict:
    """The comparison for the snapshots of a run, each map by itself, then averaged over examples; and maps to draw.

    Args:
        folder: of a run of "sat", with a snapshot of each of `steps`. tokens: (B, L) int64, the examples.
        densities: at which patterns are compared. shown_head: of the last layer, drawn for the first example.

    Returns:
        As JSON takes it: `block`, `length`, `examples`, `comparison` (column -> values; a line per step, phase, layer,
        head, asked density and pattern), `shown_layer`, `shown_head` and `shown` (for the last step of each phase, see
        `_shown`).
    """
    lines, shown = [], {}
    for step in steps:
        model = runs.load_model(runs.snapshot_path(folder, step), tokens.device)
        layouts = model.layouts or [None] * model.config.layers
        maps = [layer_maps.cpu() for layer_maps in encoder_maps(model, tokens)]
        with torch.no_grad():
            scores = [parameter().cpu() for parameter in model.sparsity_parameters]
        state = {"step": step, "phase": "dense" if model.layouts is None else "sparse"}
        for layer, (layer_maps, score, layout) in enumerate(zip(maps, scores, layouts, strict=True)):
            in_use = None if layout is None else layout.to("cpu")
            place = state | {"layer": layer}
            lines += _compare_layer(layer_maps, score, in_use, model.config.block, densities, place)
        shown[state["phase"]] = state | _shown(maps[-1][0, shown_head], scores[-1], in_use, model.config.block)
    columns = {name: [line[name] for line in lines] for name in lines[0]}
    config = {"block": model.config.block, "length": model.config.length, "examples": len(tokens)}
    place = {"shown_layer": model.config.layers - 1, "shown_head": shown_head}
    return config | place | {"comparison": columns, "shown": list(shown.values())}


def _compare_layer(
    maps: Tensor, scores: Tensor, in_use: BlockLayout | None, block: int, densities: tuple[float, ...], place: dict
) -> list[dict]:
    """Maps (B, H, L, L) of a layer -> means over the examples, a record per head, density and pattern."""
    lines = []
    for head in range(maps.shape[1]):
        for density in densities:
            each = [
                compare(attention, choose(attention, density, block, scores, None, in_use, place["layer"]))
                for attention in maps[:, head]
            ]
            for records in zip(*each, strict=True):
                if records[0]["density"] is not None:
                    mean = {name: _mean([record[name] for record in records]) for name in NUMBERS}
                    name = records[0]["pattern"]
                    lines.append(place | {"head": head, "asked_density": density, "pattern": name} | mean)
    return lines


NUMBERS = ("density", "mass_kept", "overlap", "empty_rows")


def _mean(values: list) -> float | None:
    return None if None in values else round(float(np.mean(values)), 6)


def _shown(attention: Tensor, scores: Tensor, in_use: BlockLayout | None, block: int) -> dict:
    """One map to draw: `map` (at most 128 x 128 maxima, in millionths), `pooled`, `scores`, `in_use` (0/1 or None)."""
    rounded = lambda values: np.round(values.double().numpy(), 7).tolist()
    return {
        "map": (shrink(attention, COARSE) * 1e6).round().int().tolist(),
        "pooled": rounded(pool_blocks(attention, block)),
        "scores": rounded(scores),
        "in_use": None if in_use is None else in_use.grid.int().tolist(),
    }


def shrink(attention: Tensor, side: int) -> Tensor:
    """(L, L) -> at most (side, side): maxima of squares, so that a single large entry stays visible."""
    factor = -(-len(attention) // side)
    return F.max_pool2d(attention[None, None], factor, ceil_mode=True)[0, 0] if factor > 1 else attention
