"""Attention maps and kept blocks as pictures, and the figure about what patterns keep of a map. Drawn from rows."""

import textwrap
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..attention.patterns import generate_layout
from . import PAGE, PALETTE, new, new_halves
from .labels import log_ticks

COLOURS = {
    "learned": PALETTE["sat"],
    "best": "0.15",
    "window": PALETTE["longformer"],
    "bigbird": PALETTE["bigbird"],
    "random": "0.65",
    "in use": PALETTE["sat, dense phase"],
}
NAMES = {name: name for name in COLOURS} | {"bigbird": "BigBird"}
_VIRIDIS = (mpl.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
_PALE = (mpl.colormaps["Greys"](np.linspace(0.04, 0.4, 256))[:, :3] * 255).round().astype(np.uint8)
_NOTHING = np.uint8(205)  # grey of rows without any attention: padding


class Picture(NamedTuple):
    """Colours (rows, columns, 3) uint8, or None and the reason in the note."""

    title: str
    colours: np.ndarray | None
    note: str = ""


# ---- pictures --------------------------------------------------------------------------------------------------------


def map_picture(title: str, values: np.ndarray, note: str = "") -> Picture:
    """Attention of at least 0: colours by the square root, from the smallest to the largest value of the rows that
    have any; rows without are grey."""
    rows = values.any(1)
    colours = np.full((*values.shape, 3), _NOTHING)
    colours[rows] = _VIRIDIS[_levels(np.sqrt(values[rows]))]
    return Picture(title, colours, _with_span(note, values[rows]))


def score_picture(title: str, scores: np.ndarray, note: str = "") -> Picture:
    """R~, colours in proportion from the smallest to the largest score."""
    return Picture(title, _VIRIDIS[_levels(scores)], _with_span(note, scores))


def kept_picture(title: str, pooled: np.ndarray, kept: np.ndarray, note: str = "") -> Picture:
    """The pooled map, in colours where a block is kept and in pale greys elsewhere; both (N, N)."""
    levels = _levels(np.sqrt(pooled))
    return Picture(title, np.where(kept[..., None], _VIRIDIS[levels], _PALE[levels]), note)


def _with_span(note: str, values: np.ndarray) -> str:
    span = f"{values.min():.3g} to {values.max():.3g}" if values.size else "empty"
    return f"{note}, {span}" if note else span


def _levels(values: np.ndarray) -> np.ndarray:
    """0 for the smallest value to 255 for the largest; all 0 where they are equal."""
    if not values.size:
        return np.zeros(values.shape, np.uint8)
    low, high = values.min(), values.max()
    return ((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)


# ---- figures ---------------------------------------------------------------------------------------------------------


def draw_view(pictures: list[Picture], comparison: pd.DataFrame) -> Figure:
    """Pictures side by side, and a bar a pattern: the mass it keeps, with its density as a mark."""
    figure, (axes,) = new(PAGE, 2.1, 1, len(pictures) + 1, width_ratios=[1] * len(pictures) + [1.25])
    for axis, picture in zip(axes[:-1], pictures, strict=True):
        _show(axis, picture)
    _bars(axes[-1], comparison)
    return figure


def _show(axis: Axes, picture: Picture) -> None:
    axis.set(xticks=[], yticks=[], title=picture.title)
    axis.set_xlabel(textwrap.fill(picture.note, 24))
    if picture.colours is None:
        axis.set_aspect("equal")
        axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", va="center", color="0.5")
    else:
        axis.imshow(picture.colours, interpolation="nearest")


def _bars(axis: Axes, comparison: pd.DataFrame) -> None:
    """Columns pattern, density, mass_kept; a bar a pattern with a mark at its density, which is what chance keeps.

    Several lines of a pattern become a bar at their mean and a dot each.
    """
    parts = list(comparison.dropna(subset="mass_kept").groupby("pattern", sort=False))
    for place, (name, part) in enumerate(parts):
        mass, density = 100 * part["mass_kept"], 100 * part["density"].mean()
        axis.barh(place, mass.mean(), 0.75, color=COLOURS[name], alpha=0.8)
        if len(part) > 1:
            axis.plot(mass, [place] * len(part), "o", color="black", markersize=1.5)
        axis.plot([density] * 2, [place - 0.42, place + 0.42], color="0.3", linestyle=":", linewidth=1)
        end = max(mass.max(), density)
        axis.annotate(f"{mass.mean():.3g}", (end, place), (2, 0), textcoords="offset points", va="center")
    axis.set(yticks=range(len(parts)), yticklabels=[NAMES[name] for name, _ in parts])
    axis.set(xlabel="mass kept (%); dotted: density", ylim=(len(parts) - 0.4, -0.6))
    axis.margins(x=0.2)
    sns.despine(ax=axis)


def patterns(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """What each pattern keeps of a run's maps. Takes the first row.

    Above: one map of the last dense and of the last sparse snapshot, with its block means, R~, and the blocks that
    were kept (in the dense phase: that R~ would keep). Below: mass kept by pattern in the last of these snapshots, a
    dot for each layer and head; then in multiples of the density, which is what chance keeps, against the density and
    over the steps.
    """
    run = rows.iloc[0]
    drawn, shown = pd.DataFrame(run["comparison"]), run["shown"]
    figure, (above, below) = new_halves(1.95 + 1.85 * len(shown), (1.85 * len(shown), 1.95))
    axes = above.subplots(len(shown), 4, squeeze=False)
    for line, moment in zip(axes, shown, strict=True):
        for axis, picture in zip(line, row_pictures(run, moment), strict=True):
            _show(axis, picture)
        line[0].set_ylabel(f"step {moment['step']}, {moment['phase']} phase")
    _charts(*below.subplots(1, 3, width_ratios=[1.1, 1, 1]), drawn, run)
    below.legend(*below.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure, drawn


def row_pictures(run: pd.Series, moment: dict) -> list[Picture]:
    """The four pictures of one entry of a row's `shown`."""
    values, pooled, scores = (np.array(moment[name], float) for name in ("map", "pooled", "scores"))
    in_use, block = moment["in_use"], int(run["block"])
    side = -(-run["length"] // len(values))
    title = f"layer {run['shown_layer'] + 1}, head {run['shown_head'] + 1}"
    if in_use is None:
        kept = generate_layout(torch.from_numpy(scores), run["density"], block).grid.numpy()
        name = f"R~'s top {run['density']:.0%}"
    else:
        name, kept = "in use", np.array(in_use, bool)
    return [
        map_picture(f"A^s, {title}", values / 1e6, f"max of {side} x {side}"),
        map_picture(f"means of {block} x {block}", pooled),
        score_picture("R~", scores),
        kept_picture(name, pooled, kept, f"{kept.sum()} of {kept.size} blocks"),
    ]


def _charts(bars: Axes, over_density: Axes, over_steps: Axes, drawn: pd.DataFrame, run: pd.Series) -> None:
    step, usual = drawn["step"].max(), drawn[np.isclose(drawn["asked_density"], run["density"])]
    last = drawn[drawn["step"] == step]
    _bars(bars, usual[usual["step"] == step])
    bars.set_title(f"step {step}")
    over_density.set_title(f"step {step}")
    for axis, name, some in ((over_density, "density", last), (over_steps, "step", usual)):
        for pattern, part in some.groupby("pattern", sort=False):
            mean = (part["mass_kept"] / part["density"]).groupby(part[name]).mean()
            look = {"markersize": 2.5, "linewidth": 0.8, "color": COLOURS[pattern], "label": NAMES[pattern]}
            axis.plot(mean.index, mean, "o-", **look)
        axis.axhline(1, color="0.4", linestyle=":", linewidth=1)
        axis.set(xlabel=name, ylabel="mass kept / density")
        sns.despine(ax=axis)
    log_ticks(over_density, last["asked_density"])
    if not pd.isna(run["transition_step"]):
        over_steps.axvline(run["transition_step"], color="0.4", linestyle=":", linewidth=1)
    over_steps.set_title(f"at a density of {run['density']:g}")
