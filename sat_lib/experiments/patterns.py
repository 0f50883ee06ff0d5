"""What patterns keep of a run's attention maps, snapshot by snapshot: notebook 08."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
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


def compare_snapshots(folder: Path, steps: tuple[int, ...], tokens: Tensor, densities: tuple[float, ...]) -> dict:
    """The comparison for the snapshots of a run, each map by itself, then averaged over examples; and maps to draw.

    Args:
        folder: of a run of "sat", with a snapshot of each of `steps`. tokens: (B, L) int64, the examples.
        densities: at which patterns are compared.

    Returns:
        As JSON takes it: `block`, `length`, `examples`, `comparison` (column -> values; a line per step, phase, layer,
        head, asked density and pattern), `shown_layer`, `shown_head` and `shown` (for the last step of each phase, see
        `_shown`, of the first example in the last layer's first head).
    """
    records, shown = [], {}
    for step in steps:
        model = load_model(snapshot_path(folder, step), tokens.device)
        block, state = model.config.block, {"step": step, "phase": "dense" if model.layouts is None else "sparse"}
        for layer, found in enumerate(encoder_maps(model, tokens)):
            maps, scores = found.cpu(), model.sparsity_parameters[layer]().detach().cpu()
            in_use = None if model.layouts is None else model.layouts[layer].to("cpu")
            for head, density, example in itertools.product(range(maps.shape[1]), densities, range(len(tokens))):
                place = state | {"layer": layer, "head": head, "asked_density": density}
                choices = choose(maps[example, head], density, block, scores, None, in_use, layer)
                records += [place | record for record in compare(maps[example, head], choices)]
        shown[state["phase"]] = state | _shown(maps[0, 0], scores, in_use, block)
    numbers = pd.DataFrame(records).drop(columns="note").dropna(subset="density")  # of the patterns that there are
    keys = ["step", "phase", "layer", "head", "asked_density", "pattern"]
    means = numbers.groupby(keys, sort=False).mean().round(6).reset_index().astype(object)
    return {
        "block": block,
        "length": model.config.length,
        "examples": len(tokens),
        "shown_layer": model.config.layers - 1,
        "shown_head": 0,
        "comparison": means.where(means.notna(), None).to_dict("list"),
        "shown": list(shown.values()),
    }


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
