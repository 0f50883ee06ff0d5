"""Figures and tables from rows, and what is saved beside them. Nothing here measures.

    figure, drawn = speed.step_time(rows)
    figures.save("04_step_time", "smoke", figure, drawn, rows)

writes figures/smoke/04_step_time.pdf, .png, .csv (what is drawn) and .json (where it comes from). Files are named as
those of the experiments that they draw; claims, judge, measures and evidence say what of the paper holds.
"""

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ..common import files
from ..common.errors import require

COLUMN, PAGE = 3.3, 7.0  # widths in inches: one column, the whole page
_NUMBERS = {"dense": 0, "sat": 1, "sat, dense phase": 2, "longformer": 3, "bigbird": 4, "lsg": 9, "materialised": 6}
_SAME = {"sat, sparse phase": "sat", "fused": "sat", "sdpa": "dense", "reference": "longformer"}
_SAME |= {"flex": "bigbird", "flex 64": "bigbird"}
PALETTE = {name: sns.color_palette("colorblind")[number] for name, number in _NUMBERS.items()}
PALETTE |= {name: PALETTE[other] for name, other in _SAME.items()}


def style() -> None:
    """The look of all figures, which a notebook displays as pictures; `new` calls it."""
    sizes = dict.fromkeys(["font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"], 7)
    other = {"axes.titlesize": 7.5, "savefig.dpi": 200, "pdf.fonttype": 42}
    sns.set_theme("paper", "ticks", palette="colorblind", rc=sizes | other)
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:  # otherwise only pyplot asks a notebook to do so
        from IPython.core.pylabtools import select_figure_formats

        select_figure_formats(shell, {"png"}, bbox_inches=None)


def new(width: float, height: float, rows: int = 1, columns: int = 1, **settings) -> tuple[Figure, np.ndarray]:
    """A figure in inches with (rows, columns) axes, always as a 2-d array."""
    style()
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def new_halves(height: float, heights: Sequence[float]) -> tuple[Figure, np.ndarray]:
    """A figure of the page's width, and its upper and lower subfigure, which have `heights` to each other."""
    style()
    figure = Figure(figsize=(PAGE, height), layout="constrained")
    return figure, figure.subfigures(2, 1, height_ratios=heights)


# ---- saving ----------------------------------------------------------------------------------------------------------


def save(
    stage: str, profile: str, figure: Figure, drawn: pd.DataFrame, rows: pd.DataFrame, root: Path = files.ROOT
) -> list[Path]:
    """Write <stage>.pdf, .png, .csv and .json to figures/<profile>, each whole or not at all.

    Args:
        profile: where it goes. drawn: what the figure shows. rows: the rows it comes from, as `experiments.rows`
            returns them; of another profile where `rows.attrs["profile"]` says so.

    A figure of rows of the smoke profile says so on its face; one with missing cases says how many.
    """
    require(len(rows) > 0, f"rows: there are none for {stage} at the {profile} profile; nothing to draw")
    said = provenance(rows.attrs.get("profile", profile), rows)
    paths = {kind: Path(root) / "figures" / profile / f"{stage}.{kind}" for kind in ("pdf", "png", "csv", "json")}
    face = textwrap.fill(_face(said), int(16 * figure.get_figwidth()))  # 16 letters of 7 pt to the inch
    figure.supxlabel(face, fontsize=7, color="0.35")
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", None)):
        with files.atomic_path(paths[kind]) as path:
            figure.savefig(path, metadata=metadata)
    files.write(paths["csv"], drawn.to_csv(index=False))
    files.write_json(paths["json"], said)
    return list(paths.values())


def save_table(name: str, profile: str, table: pd.DataFrame, root: Path = files.ROOT) -> str:
    """Write <name>.csv and <name>.md to figures/<profile>; returns the Markdown."""
    text = to_markdown(table)
    folder = Path(root) / "figures" / profile
    files.write(folder / f"{name}.csv", table.to_csv(index=False))
    files.write(folder / f"{name}.md", text)
    return text


def cell(value, form: str = "", factor: float = 1) -> str:
    """A value as tables have it: a number times `factor` in a format such as ".2f", an absent one as a dash."""
    if pd.isna(value):
        return "-"
    return format(factor * value, form) if form else str(value)


def document_table(lines: pd.DataFrame, columns: dict[str, str | tuple]) -> pd.DataFrame:
    """Lines as a document has them.

    Args:
        columns: new name -> a column of `lines`, or one and what `cell` takes. Of one that isn't there all is absent.
    """
    table, absent = {}, [np.nan] * len(lines)
    for name, column in columns.items():
        column, *how = [column] if isinstance(column, str) else column
        values = lines.get(column, absent)
        table[name] = [cell(value, *how) for value in values] if how else list(values)
    return pd.DataFrame(table)


def to_markdown(table: pd.DataFrame) -> str:
    """A GitHub table; an absent value is a dash."""
    cells = [[cell(value) for value in line] for line in table.itertuples(index=False)]
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def provenance(profile: str, rows: pd.DataFrame) -> dict:
    """Where rows come from: commits, devices, versions, seeds, dates, how many cases are missing, a digest of all."""
    names = ("commit", "device", "python", "torch", "numpy", "experiment", "task", "seed", "data_digest")
    several = {name: sorted(set(map(str, rows[name].dropna()))) for name in names if name in rows}
    return {
        "profile": profile,
        **{name: values for name, values in several.items() if values},
        "measured": [min(rows["date"]), max(rows["date"])],
        "cases": len(rows),
        "official_data": bool(rows["data_official"].all()) if "data_official" in rows else None,
        "missing_cases": rows.attrs.get("missing", 0),
        "rows_digest": files.digest(json.loads(rows.to_json(orient="records"))),
        "stage": os.environ.get("SAT_LIB_STAGE"),
    }


def _face(said: dict) -> str:
    text = f"{', '.join(said['device'])}; PyTorch {', '.join(said['torch'])}"
    if said["profile"] == "smoke":
        text = f"smoke profile, not the paper's set-up: small runs on {text}"
    if said["official_data"] is False:
        text += "; data without the official archive's checksum"
    if said["missing_cases"]:
        text += f"; {said['missing_cases']} of {said['cases'] + said['missing_cases']} cases not measured yet"
    return text
