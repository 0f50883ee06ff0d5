"""Words beside what they name, in place of a legend, and the interval of a mean. Nothing here knows what is drawn."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

APART = 0.13  # of a panel's height: the least between two labels


def at_ends(axis: Axes, ends: Sequence[tuple[float, str, object]]) -> None:
    """Name lines at the right edge of a panel, whose limits are set: (height in data, text, colour) of each.

    Labels that would overlap are moved apart, in the order of their heights, and stay beside the panel.
    """
    low, high = axis.get_ylim()
    ends = sorted(ends, key=lambda end: end[0])
    heights = _moved_apart([(height - low) / (high - low) for height, _, _ in ends])
    for height, (_, text, colour) in zip(heights, ends, strict=True):
        axis.annotate(text, (1, height), (3, 0), xycoords="axes fraction", textcoords="offset points", fontsize=7,
                      color=colour, va="center", annotation_clip=False)  # fmt: skip


def _moved_apart(heights: list[float]) -> list[float]:
    """Ascending heights, at least `APART` from each other: upward first, then downward from the upper edge."""
    moved, lowest, highest = [], -np.inf, 1.0
    for height in heights:
        lowest = max(height, lowest + APART)
        moved.append(lowest)
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place], highest)
        highest = moved[place] - APART
    return moved


def above(axis: Axes, at: float, text: str, colour) -> None:
    """Name a vertical line at its upper end, outside the panel."""
    axis.annotate(text, (at, 1), (0, 2), xycoords=axis.get_xaxis_transform(), textcoords="offset points", fontsize=7,
                  color=colour, ha="center", va="bottom", annotation_clip=False)  # fmt: skip


def list_downward(axis: Axes, places: dict[str, float], headings: dict[str, tuple[float, object]]) -> None:
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
