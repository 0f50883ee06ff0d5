"""Figures about pretrained models: their attention maps, and what fine-tuning with SAT costs. Drawn from rows."""

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..attention.statistics import pool_blocks
from . import PALETTE, document_table, new, new_halves
from .labels import at_ends, log_ticks
from .speed import attention_label

MODEL_NAMES = {"cifar-vit": "small ViT (CIFAR-10)", "minilm": "MiniLM"}
MODEL_NAMES |= {"bert-base-uncased": "BERT base", "google/vit-base-patch16-224-in21k": "ViT base"}
DATA_NAMES = {"digits": "digits", "mrpc": "MRPC", "docstrings": "docstring pairs", "cifar10": "CIFAR-10"}
MOMENTS = {
    "untrained": {"color": "0.55", "linestyle": "--"},
    "pretrained": {"color": PALETTE["dense"], "linestyle": ":"},
    "half way": {"color": PALETTE["sat"], "linestyle": "-."},
    "fine-tuned": {"color": PALETTE["sat"], "linestyle": "-"},
}
SHARES = {  # quantities by kind: name and title
    "image": {"small_share": "entries below 1/(10 L)", "top5_mass": "mass of top 5 %"},
    "text": {
        "small_share": "entries below 1/(10 L)",
        "small_share_real": "the same, tokens alone",
        "top5_mass": "mass of top 5 %",
        "diagonal_mass": "mass on the diagonal",
    },
}


# ---- 01: what the maps look like -------------------------------------------------------------------------------------


def metrics(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per model, moment, layer and head."""
    parts = [pd.DataFrame(row["metrics"]).assign(**row[["model", "data", "kind"]]) for _, row in rows.iterrows()]
    return pd.concat(parts, ignore_index=True)


def motivation(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """The paper's figure 1: one map of each model with its block means; below, a quantity a panel, by moment.

    Takes the first row of each kind, "image" and "text".
    """
    chosen = rows.drop_duplicates("kind").sort_values("kind")  # image, then text
    figure, (above, below) = new_halves(2.1 + 1.75 * len(chosen), (2.05, 1.75 * len(chosen)))
    maps, panels = above.subplots(1, 4, squeeze=False), below.subplots(len(chosen), 4, squeeze=False)
    lines = metrics(chosen)
    for place, (_, row) in enumerate(chosen.iterrows()):
        _map_and_blocks(maps[0, 2 * place : 2 * place + 2], row)
        names, part = SHARES[row["kind"]], lines[lines["kind"] == row["kind"]]
        for axis, (name, title) in zip(panels[place], names.items(), strict=False):
            _by_moment(axis, part, name, title)
        panels[place, 0].set_ylabel(f"{row['kind']} (%)")
        if row["kind"] == "image":
            wide, *rest = panels[place, len(names) :]
            wide.set_subplotspec(wide.get_gridspec()[place, len(names) :])
            _profile(wide, row)
            for axis in rest:
                axis.remove()
    for axis in maps[0, 2 * len(chosen) :]:
        axis.remove()
    return figure, lines


def _map_and_blocks(axes: np.ndarray, row: pd.Series) -> None:
    """A map and its block means, as multiples of an even map's entry."""
    values = row["length"] * np.array(row["shown"], float) / 1e5
    blocks = pool_blocks(torch.from_numpy(values), 16).numpy()
    name = f"{MODEL_NAMES.get(row['model'], row['model'])},\n{DATA_NAMES[row['data']]}"
    for axis, image, title in zip(axes, (values, blocks), (name, "the same,\nmeans of 16 x 16"), strict=True):
        top = np.quantile(image, 0.995) or image.max()
        shown = axis.imshow(image, cmap="viridis", norm=PowerNorm(0.5, 0, top), interpolation="nearest")
        bar = axis.figure.colorbar(shown, ax=axis, shrink=0.7, extend="max" if image.max() > top else "neither")
        bar.ax.set_title("x 1/L", fontsize=7, loc="left")
        bar.locator = MaxNLocator(3, integer=True)
        axis.set(xticks=[], yticks=[], title=title)
    axes[0].set_xlabel(f"layer {row['shown_layer'] + 1}, head {row['shown_head'] + 1}")
    if row["kind"] == "text":
        axes[1].set_xlabel(f"{row['tokens']} of {row['length']} are tokens")


def _by_moment(axis: Axes, part: pd.DataFrame, name: str, title: str) -> None:
    """A share before, during and after fine-tuning: layers as thin lines, their mean as a thick one."""
    layers = 100 * part.pivot_table(index="moment", columns="layer", values=name).reindex(MOMENTS)
    axis.plot(layers.mean(axis=1).to_numpy(), "-o", color=PALETTE["sat"], markersize=4, linewidth=1.6, zorder=3)
    axis.plot(layers.to_numpy(), color="0.65", linewidth=0.7)
    axis.set_xticks(range(len(layers)), layers.index, rotation=40, ha="right", rotation_mode="anchor")
    axis.set(title=title, ylim=(-3, 103), xlim=(-0.3, len(layers) - 0.7))
    last = layers.iloc[-1]
    if last.notna().any():
        ends = {int(last.idxmin()): last.min(), int(last.idxmax()): last.max()}
        at_ends(axis, [(value, f"layer {layer + 1}", "0.4") for layer, value in ends.items()])
    sns.despine(ax=axis)


def _profile(axis: Axes, row: pd.Series) -> None:
    """Mean entry by distance between two patches, over all layers; ticks at the rows of the grid."""
    profiles, ends = pd.DataFrame(row["profiles"]), []
    for moment, look in MOMENTS.items():
        some = profiles.loc[profiles["moment"] == moment, "profile"].tolist()
        if some:
            mean = np.mean(some, axis=0)
            axis.plot(mean, linewidth=0.9, **look)
            ends.append((mean[-1], moment, look["color"]))
    grid = int(row["grid"])
    axis.set(xlabel="distance (patches)", title="mean entry by distance (x mean of all)")
    axis.set_xticks(range(0, 4 * grid + 1, grid))
    at_ends(axis, ends)
    sns.despine(ax=axis)


def motivation_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over layers and heads, a line per model and moment."""
    names = {
        "small_share": "below 1/(10 L) %",
        "small_share_real": "the same, real tokens %",
        "top5_mass": "mass of top 5 % entries %",
        "diagonal_mass": "diagonal mass %",
        "diagonal_share": "diagonal entries %",
        "stride_mass": "stride mass %",
        "stride_share": "stride entries %",
        "padding_mass": "padding mass %",
        "padding_share": "padding keys %",
    }
    lines = metrics(rows).reindex(columns=["model", "data", "moment", *names])
    table = 100 * lines.groupby(["model", "data", "moment"], sort=False).mean()
    return table.round(1).rename(columns=names).reset_index()


# ---- 09: fine-tuning -------------------------------------------------------------------------------------------------

SETTINGS = ["model", "data", "attention", "pattern", "pruned", "density"]
LINES = {"learned": PALETTE["sat"], "pooled": PALETTE["bigbird"]}


def finetuning(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Test accuracy against density, a panel per model and data: each seed a mark, means joined; dense as a band."""
    drawn = rows[[*SETTINGS, "seed", "step_ms", "steps", "transition_step"]]
    drawn = drawn.assign(accuracy_percent=100 * rows["test_accuracy"])
    parts = list(drawn.groupby(["model", "data"], sort=False))
    figure, axes = new(max(3.3, 3.5 * len(parts)), 2.6, 1, len(parts))
    for axis, ((model, data), part) in zip(axes[0], parts, strict=True):
        dense = part[part["attention"] == "dense"]["accuracy_percent"]
        if len(dense):
            axis.axhspan(dense.min(), dense.max(), color=PALETTE["dense"], alpha=0.25, linewidth=0)
            axis.axhline(dense.mean(), color=PALETTE["dense"], label="dense, all seeds", linewidth=1)
        sat = part[part["attention"] == "sat"]
        for (pattern, pruned), some in sat.groupby(["pattern", "pruned"], sort=False):
            colour, mark = LINES[pattern], {"zero": "o", "drop": "^"}[pruned]
            look = {"markersize": 3, "alpha": 0.7, "color": colour, "label": f"{pattern}, pruned {pruned}"}
            axis.plot(some["density"], some["accuracy_percent"], mark, **look)
            mean = some.groupby("density")["accuracy_percent"].mean()
            axis.plot(mean.index, mean, linewidth=0.9, color=colour)
        axis.set(xlabel="density", title=f"{MODEL_NAMES.get(model, model)} on {DATA_NAMES[data]}")
        log_ticks(axis, sat["density"])
        sns.despine(ax=axis)
    axes[0, 0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure, drawn


def finetuning_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample deviation over seeds, mass kept, and the time of a step against dense."""
    of_sat, dense_ms = rows["attention"] == "sat", rows["step_ms"].where(rows["attention"] == "dense")
    lines = rows.assign(
        **{name: rows[name].astype(object).where(of_sat, "-") for name in SETTINGS[3:]},
        percent=100 * rows["test_accuracy"],
        kept=[100 * np.mean(mass) if isinstance(mass, list) else np.nan for mass in rows["mass_kept"]],
        dense_ms=dense_ms.groupby([rows["model"], rows["data"]]).transform("median"),
    )
    columns = {
        "runs": ("percent", "size"),
        "mean %": ("percent", "mean"),
        "deviation": ("percent", "std"),
        "mass kept %": ("kept", "mean"),
        "step ms": ("step_ms", "median"),
        "time / dense": ("dense_ms", "first"),
    }
    table = lines.groupby(SETTINGS, sort=False).agg(**columns).reset_index()
    table["time / dense"] = (table["step ms"] / table["time / dense"]).map("{:.2f}".format)
    table["step ms"] = table["step ms"].map("{:.3g}".format)
    return table.round({"mean %": 2, "deviation": 2, "mass kept %": 1}).replace(MODEL_NAMES | DATA_NAMES)


def pretrained_step_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per architecture, length and attention: time, ratio to SDPA, peak memory."""
    sdpa_ms = rows["median_ms"].where(rows["attention"] == "sdpa")
    sdpa_ms = sdpa_ms.groupby([rows["architecture"], rows["length"]]).transform("median")
    labels = list(map(attention_label, rows["attention"], rows["phase"]))
    columns = {
        "architecture": "architecture",
        "length": "length",
        "attention": "attention",
        "density": ("density", "g"),
        "step ms": ("median_ms", ".3g"),
        "time / sdpa": ("ratio", ".2f"),
        "peak GiB": ("peak_bytes", ".3g", 2**-30),
    }
    lines = rows.assign(attention=labels, ratio=rows["median_ms"] / sdpa_ms)
    return document_table(lines, columns)
