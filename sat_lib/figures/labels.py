"""Words beside what they name, ticks, and the interval of a mean. Nothing here knows what is drawn."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.typing import ColorType


def at_ends(axis: Axes, ends: Iterable[tuple[float, str, ColorType]], apart: float = 0.13) -> None:
    """Name lines at the right edge of a panel, in place of a legend, once all of it is drawn.

    Names that would overlap are moved apart, in the order of their heights, and stay beside the panel.

    Args:
        ends: of each line where it ends, its name and its colour; one that ends at NaN gets no name. apart: the least
            between two names, as a share of the panel's height.
    """
    scale = axis.yaxis.get_transform()
    low, high = scale.transform(axis.get_ylim())
    ends = sorted((end for end in ends if not np.isnan(end[0])), key=lambda end: end[0])
    steps = apart * np.arange(len(ends))
    heights = (scale.transform([value for value, _, _ in ends]) - low) / (high - low)
    heights = np.maximum.accumulate(heights - steps) + steps  # moved upward, then downward from the upper edge
    for height, (_, text, colour) in zip(np.minimum(heights, 1 - steps[::-1]), ends, strict=True):
        dark = np.multiply(to_rgb(colour), 0.8)  # pale colours are hard to read as letters
        axis.text(1.02, height, text, color=dark, va="center", transform=axis.transAxes)


def above(axis: Axes, at: float, text: str, colour: ColorType) -> None:
    """Name a vertical line at its upper end, outside the panel."""
    look = {"color": colour, "ha": "center", "va": "bottom", "annotation_clip": False}
    axis.annotate(text, (at, 1), (0, 2), xycoords=axis.get_xaxis_transform(), textcoords="offset points", **look)


def log_ticks(axis: Axes, values: Iterable[float]) -> None:
    """A logarithmic x axis with a tick at each of these values and nowhere else; from 1,024 on they read 1k, 2k, ..."""
    values = sorted(set(values))
    axis.set_xscale("log")
    axis.set_xticks(values, [f"{value / 1024:g}k" if value >= 1024 else f"{value:g}" for value in values])
    axis.xaxis.minorticks_off()


def places_downward(
    groups: Iterable[tuple[str, ColorType, Iterable[str]]], apart: float
) -> tuple[dict[str, float], dict[str, tuple[float, ColorType]]]:
    """Rows of a panel from 0 downward, as `list_downward` takes them.

    Args:
        groups: heading, its colour, and what stands below it. apart: rows from the last one of a group to the next
            heading.
    """
    places, headings, row = {}, {}, 0.0
    for heading, colour, texts in groups:
        headings[heading] = (row, colour)
        for text in texts:
            row += 1
            places[text] = row
        row += apart
    return places, headings


def list_downward(axis: Axes, places: dict[str, float], headings: dict[str, tuple[float, ColorType]]) -> None:
    """Name the rows of a panel, from 0 downward, at its left; headings (row, colour) are bold."""
    labels = {**places, **{text: row for text, (row, _) in headings.items()}}
    axis.set_yticks(list(labels.values()), list(labels))
    axis.set_ylim(max(labels.values(), default=0) + 0.7, -0.7)
    axis.tick_params(axis="y", length=0)
    for label in axis.get_yticklabels():
        if label.get_text() in headings:
            label.set(color=headings[label.get_text()][1], fontweight="bold")


def two_errors(lines: pd.DataFrame) -> pd.Series:
    """Two standard errors of each mean, from `deviation` and `runs`; NaN for a single run."""
    return 2 * lines["deviation"].astype(float) / np.sqrt(lines["runs"])
