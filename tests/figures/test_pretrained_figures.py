"""Figures and tables of pretrained models, from rows of known content."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from sat_lib.figures import pretrained

MOMENTS = ("untrained", "pretrained", "half way", "fine-tuned")


def motivation_row(kind, length, grid):
    names = ("small_share", "small_share_real", "top5_mass", "diagonal_mass", "diagonal_share")
    names += ("padding_mass", "padding_share", *(("stride_mass", "stride_share") if grid else ()))
    return {
        "model": {"image": "cifar-vit", "text": "minilm"}[kind],
        "data": {"image": "digits", "text": "mrpc"}[kind],
        "kind": kind,
        "length": length,
        "tokens": length - 5,
        "grid": grid,
        "shown": np.full((length, length), round(1e5 / length)).tolist(),
        "shown_layer": 1,
        "shown_head": 0,
        "metrics": [
            {"moment": moment, "step": 0, "layer": layer, "head": head}
            | {name: 0.1 * place + 0.01 * layer + 0.001 * head for place, name in enumerate(names)}
            for moment in MOMENTS
            for layer in range(2)
            for head in range(3)
        ],
        "profiles": [
            {"moment": moment, "layer": layer, "period": grid, "height": 0.5, "profile": [1.0] * (4 * grid + 1)}
            for moment in MOMENTS
            for layer in range(2)
            if grid
        ],
    }


def test_motivation():
    rows = pd.DataFrame([motivation_row("text", 40, None), motivation_row("image", 65, 8)])
    figure, drawn = pretrained.motivation(rows)
    image, blocks, text = (figure.axes[place].images[0].get_array() for place in (0, 1, 2))
    assert (image.shape, blocks.shape, text.shape) == ((65, 65), (5, 5), (40, 40))
    assert len(drawn) == 2 * 4 * 2 * 3
    panel = next(axis for axis in figure.axes if axis.get_ylabel() == "image (%)")
    mean, first, second = (line.get_ydata() for line in panel.lines)
    np.testing.assert_allclose(mean, [0.6] * len(MOMENTS))  # heads 0.001, layers 0.01 apart
    np.testing.assert_allclose(second - first, [1.0] * len(MOMENTS))
    assert [label.get_text() for label in panel.get_xticklabels()] == list(MOMENTS)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles.count("entries below 1/(10 L)") == 2 and titles.count("the same, tokens alone") == 1


@pytest.mark.parametrize("kind", ["image", "text"])
def test_motivation_of_one_kind_alone(kind):
    rows = pd.DataFrame([motivation_row(kind, 65, 8 if kind == "image" else None)])
    figure, _ = pretrained.motivation(rows)
    assert len(figure.axes) == 2 * 2 + {"image": 3, "text": 4}[kind]  # maps with colour bars, quantities


def test_motivation_table():
    rows = pd.DataFrame([motivation_row("image", 65, 8), motivation_row("text", 40, None)])
    table = pretrained.motivation_table(rows)
    assert list(table["moment"]) == [*MOMENTS, *MOMENTS]
    assert table["mass of top 5 % entries %"].tolist() == pytest.approx([20.6] * 8)  # layers 0.005, heads 0.001
    assert table["stride mass %"].notna().tolist() == [True] * 4 + [False] * 4


def finetuning_rows():
    base = {"model": "minilm", "data": "mrpc", "steps": 40, "transition_step": 10, "step_ms": 6.0}
    dense = [base | {"attention": "dense", "seed": seed, "test_accuracy": 0.8 + 0.02 * seed} for seed in range(2)]
    sat = [
        base
        | {"attention": "sat", "pattern": pattern, "pruned": "zero", "density": density, "seed": seed}
        | {"test_accuracy": 0.7 + density / 10 + 0.01 * seed, "step_ms": 3.0, "mass_kept": [density, density + 0.2]}
        for pattern in ("learned", "pooled")
        for density in (0.25, 0.5)
        for seed in range(2)
    ]
    return pd.DataFrame(dense + sat)


def test_finetuning():
    figure, drawn = pretrained.finetuning(finetuning_rows())
    (axis,) = figure.axes
    assert len(drawn) == 10 and axis.get_title() == "MiniLM on MRPC"
    place = next(place for place, line in enumerate(axis.lines) if line.get_label() == "learned, pruned zero")
    seeds, means = axis.lines[place : place + 2]
    np.testing.assert_allclose(seeds.get_ydata(), [72.5, 73.5, 75.0, 76.0])
    np.testing.assert_allclose(means.get_ydata(), [73.0, 75.5])


def test_finetuning_table():
    table = pretrained.finetuning_table(finetuning_rows()).set_index(["attention", "pattern", "density"])
    dense = table.loc[("dense", "-", "-")]
    assert (dense["mean %"], dense["runs"], dense["time / dense"]) == (81.0, 2, "1.00")
    learned = table.loc[("sat", "learned", 0.25)]
    assert (learned["mean %"], learned["deviation"], learned["mass kept %"]) == (73.0, 0.71, 35.0)
    assert learned["time / dense"] == "0.50"


def test_finetuning_without_sat():
    """As after `bench finetuning --only attention=dense`."""
    rows = finetuning_rows()
    dense = rows[rows["attention"] == "dense"]
    figure, _ = pretrained.finetuning(dense)
    assert len(figure.axes) == 1
    assert pretrained.finetuning_table(dense)["mean %"].tolist() == [81.0]


def test_pretrained_step_table():
    rows = pd.DataFrame(
        [
            {"architecture": "bert-base", "length": 128, "attention": name, "phase": phase, "density": density}
            | {"median_ms": ms, "peak_bytes": 2**30}
            for name, phase, density, ms in (
                ("sdpa", "dense", None, 10.0),
                ("eager", "dense", None, 20.0),
                ("sat", "sparse", 0.25, 5.0),
            )
        ]
    )
    table = pretrained.pretrained_step_table(rows)
    assert table["attention"].tolist() == ["sdpa", "eager", "sat, sparse phase"]
    assert table["time / sdpa"].tolist() == ["1.00", "2.00", "0.50"]
    assert table["density"].tolist() == ["-", "-", "0.25"] and set(table["peak GiB"]) == {"1"}


def test_notebooks_show_figures_as_pictures():
    """In a shell of its own: IPython's instance is one for the whole process."""
    code = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
from sat_lib import figures
figure, _ = figures.new(2, 1)
data, _ = shell.display_formatter.format(figure)
assert data["image/png"], data.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
