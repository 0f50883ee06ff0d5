"""What patterns keep of a run's attention maps, snapshot by snapshot: notebook 08."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import datasets
from ..attention.layout import BlockLayout
from ..attention.statistics import pool_blocks
from ..datasets.batches import to_device
from ..maps import choose, compare, encoder_maps, shrink
from ..training.checkpoint import load_model
from ..training.fit import fit, snapshot_path
from ..training.recipe import case_config
from .row_files import Context
from .training import load_data, run_case, run_folder

COARSE = 128  # side of the map that goes into a row


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
        model = load_model(snapshot_path(folder, step), tokens.device)
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


# ---- what patterns keep of a map: notebook 08 ------------------------------------------------------------------------


def pattern_cases(profile: str) -> list[dict]:
    """One SAT run with snapshots over its phases, and how its maps are compared.

    At the smoke profile it is made to switch half way; at the paper profile it is the published recipe in 2,000
    steps instead of 10,000: the maps settle early.
    """
    smoke = profile == "smoke"
    steps = [0, 50, 100, 200] if smoke else [0, 50, 100, 200, 500, 1_000, 2_000]
    compared = {"snapshots": steps, "examples": 8 if smoke else 16, "densities": [0.02, 0.05, 0.1, 0.25, 1.0]}
    changes = {} if smoke else {"steps": steps[-1]}
    return [run_case("digits" if smoke else "cifar10", "sat", 0, profile, **changes) | compared]


def patterns(case: dict, context: Context) -> dict:
    """Train the run, or read it, and compare what patterns keep of its maps; see `patterns.compare_snapshots`."""
    config, steps = case_config(case), tuple(case["snapshots"])
    data, folder = load_data(config), run_folder(case, context)
    result = fit(config, data, folder, context.device, snapshots=steps)
    tokens, _ = to_device(data.test, np.arange(case["examples"]), context.device)
    return {
        **{name: result[name] for name in ("test_accuracy", "transition_step", "seconds")},
        **datasets.provenance(config.recipe.task),
        "test_examples": result["best"][result["phase"]]["test_examples"],
        "folder": str(folder.relative_to(context.root)),
        "density": config.recipe.density,
        **compare_snapshots(folder, steps, tokens, tuple(case["densities"])),
    }
