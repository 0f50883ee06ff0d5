import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_config, tiny_splits
from made_maps import random_maps, symmetric

from sat_lib import maps
from sat_lib.attention.patterns import generate_layout
from sat_lib.attention.static_patterns import nearness
from sat_lib.attention.statistics import mass_kept
from sat_lib.common.errors import InputError
from sat_lib.experiments.patterns import compare_snapshots
from sat_lib.figures import patterns
from sat_lib.model.encoder import Encoder, ModelConfig
from sat_lib.training import fit
from sat_lib.training.checkpoint import load_model

CPU = torch.device("cpu")
STEPS = (0, 4, 12)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """A run's folder, three examples, and their maps."""
    folder = tmp_path_factory.mktemp("run")
    fit.fit(tiny_config(), tiny_splits(), folder, CPU, progress=False, snapshots=STEPS)
    tokens = torch.as_tensor(tiny_splits().test.batch(np.arange(3))[0])
    return folder, tokens, compare_snapshots(folder, STEPS, tokens, (0.2, 1.0))


@pytest.mark.parametrize("length", [32, 37])
def test_masses_and_counts_agree_with_adding_entry_by_entry(length):
    attention, block = random_maps(length)[0, 0, 0], 8
    blocks = -(-length // block)
    sums = [[0.0] * blocks for _ in range(blocks)]
    for row in range(length):
        for column in range(length):
            sums[row // block][column // block] += float(attention[row, column])
    assert torch.allclose(maps.block_sums(attention, block), torch.tensor(sums, dtype=torch.float64), rtol=1e-6)
    choices = maps.choose(attention, 0.3, block, symmetric(blocks))
    records = {record["pattern"]: record for record in maps.compare(attention, choices)}
    ranked = sorted((value for line in sums for value in line), reverse=True)
    kept = int(blocks * blocks * 0.3)
    assert records["best"]["mass_kept"] == pytest.approx(sum(ranked[:kept]) / length, rel=1e-6)
    for name in ("learned", "best", "window", "random"):
        layout, record = choices[name].layout, records[name]
        assert layout.kept_blocks == kept
        assert record["density"] == kept / blocks**2
        assert record["mass_kept"] == pytest.approx(mass_kept(attention, layout), rel=1e-6)
        places = {tuple(place) for place in layout.grid.nonzero().tolist()}
        shared = [place for place in choices["best"].layout.grid.nonzero().tolist() if tuple(place) in places]
        assert record["overlap"] == pytest.approx(len(shared) / kept)
        assert record["empty_rows"] == sum(not any(line) for line in layout.grid.tolist())
    assert records["bigbird"]["mass_kept"] is None
    assert "wants more than 11 blocks a side; there are" in records["bigbird"]["note"]
    assert records["in use"]["note"] == "no layout in the dense phase"


def test_everything_kept_is_all_the_mass_and_best_beats_the_others():
    attention = random_maps(96)[0, 0, 0]
    for density in (0.1, 0.4, 1.0):
        choices = maps.choose(attention, density, 8, symmetric(12))
        masses = {record["pattern"]: record["mass_kept"] for record in maps.compare(attention, choices)}
        assert choices["bigbird"].layout.grid.shape == (12, 12)
        masses.pop("in use"), masses.pop("bigbird")
        assert max(masses.values()) == masses["best"]
        if density == 1:
            assert list(masses.values()) == pytest.approx([1] * len(masses))


@pytest.mark.parametrize("blocks", [7, 32])
def test_the_window_grows_from_the_diagonal_and_is_spread_over_the_rows(blocks):
    layout = generate_layout(nearness(blocks), 1 / blocks, 8)
    assert torch.equal(layout.grid, torch.eye(blocks, dtype=torch.bool))
    distance = (torch.arange(blocks)[:, None] - torch.arange(blocks)).abs()
    more = generate_layout(nearness(blocks), 2 / blocks, 8).grid
    assert distance[more].max() == 1
    beside = (more & (distance == 1)).any(1).nonzero().flatten()
    assert beside.min() < blocks / 3
    assert beside.max() > 2 * blocks / 3


def test_scores_for_other_blocks_are_means_or_repeats():
    scores = symmetric(5)
    larger, said = maps.resize_scores(scores, 8, 16, 40)
    assert said == "mean of the trained blocks of 8"
    assert torch.allclose(larger[0, 0], scores[:2, :2].mean())
    assert torch.allclose(larger[2, 2], scores[4, 4])  # of a partial last block: those that there are
    smaller, said = maps.resize_scores(scores, 8, 4, 37)
    assert said == "trained blocks of 8, repeated"
    assert smaller.shape == (10, 10)
    assert all(smaller[r, c] == scores[r // 2, c // 2] for r in range(10) for c in range(10))
    assert maps.resize_scores(scores, 8, 8, 40)[0] is scores
    assert maps.resize_scores(scores, 8, 12, 40) == (
        None, "blocks of 12 neither divide the trained 8 nor are a multiple of it",
    )  # fmt: skip


def test_a_layout_in_other_blocks_is_compared_by_mass_but_not_by_overlap():
    attention = random_maps(32)[0, 0, 0]
    in_use = generate_layout(symmetric(2), 0.5, 16)
    choices = maps.choose(attention, 0.5, 8, in_use=in_use)
    record = maps.compare(attention, choices)[-1]
    assert record["mass_kept"] == pytest.approx(mass_kept(attention, in_use), rel=1e-6)
    assert record["overlap"] is None
    assert choices["learned"] == (None, "no sparsity parameter was trained here")


def test_maps_are_the_softmax_of_the_scores_with_padding_at_zero():
    sizes = {"vocab": 20, "classes": 2, "layers": 2, "length": 24, "width": 16, "hidden": 8, "block": 8}
    model = Encoder(ModelConfig(**sizes, masked_attention=True)).train()
    tokens = torch.randint(1, 20, (2, 24))
    tokens[0, 17:] = tokens[1] = 0
    layers = maps.encoder_maps(model, tokens)
    assert model.training
    assert [tuple(layer.shape) for layer in layers] == [(2, 2, 24, 24)] * 2
    model.eval()
    x = model.layers[0].norm_attention(model.token(tokens) + model.position.weight)
    q, k, _ = (part.detach() for part in model.layers[0].attention.heads(x))
    for row in range(24):
        raw = [math.exp(float(q[0, 1, row] @ k[0, 1, column]) / math.sqrt(8)) for column in range(17)]
        wanted = [value / sum(raw) for value in raw] + [0] * 7 if row < 17 else [0] * 24
        assert layers[0][0, 1, row].tolist() == pytest.approx(wanted, abs=1e-6)
    assert not layers[1][1].any()
    mean = model(tokens[:1, :], statistics=True).statistics[1].mean_map[:17]
    assert torch.allclose(layers[1][0].mean(0)[:17], mean, atol=1e-6)
    with pytest.raises(InputError, match=r"wanted attention 'dense' or 'sat'.*got 'lsg'"):
        maps.encoder_maps(Encoder(ModelConfig(**sizes | {"block": 4}, attention="lsg")), tokens)


def test_a_runs_comparison_is_the_mean_over_its_examples(said):
    folder, tokens, said = said
    table = pd.DataFrame(said["comparison"])
    assert [(shown["phase"], shown["step"]) for shown in said["shown"]] == [("dense", 4), ("sparse", 12)]
    assert (said["block"], said["length"], said["examples"]) == (32, 256, 3)
    assert set(table["pattern"]) == {"learned", "best", "window", "random", "in use"}  # 8 blocks: no BigBird
    full = table[(table["asked_density"] == 1) & (table["pattern"] != "in use")]
    assert full["mass_kept"].to_list() == pytest.approx([1] * len(full))
    model = load_model(fit.snapshot_path(folder, 12), CPU)
    attention = maps.encoder_maps(model, tokens)[1][:, 0]
    line = table.query("step == 12 and layer == 1 and head == 0 and asked_density == 0.2").set_index("pattern")
    wanted = np.mean([mass_kept(one, model.layouts[1]) for one in attention])
    assert line.loc["in use", "mass_kept"] == pytest.approx(wanted, abs=1e-5)
    assert line.loc["learned"].drop("pattern", errors="ignore").equals(line.loc["in use"])
    assert said["shown"][1]["in_use"] == model.layouts[1].grid.int().tolist()
    assert np.array(said["shown"][0]["map"]).shape == (128, 128)


def test_the_figure_is_drawn_from_a_row_alone(said, tmp_path):
    result = {"density": 0.2, "transition_step": 4, **said[2]}
    rows = pd.DataFrame([json.loads(json.dumps(result))])
    figure, drawn = patterns.patterns(rows)
    figure.savefig(tmp_path / "figure.png")
    assert len(drawn) == len(said[2]["comparison"]["step"])
    pictures = patterns.row_pictures(rows.iloc[0], rows.iloc[0]["shown"][0])
    assert pictures[3].title == "R~'s top 20%"
    scores = torch.tensor(said[2]["shown"][0]["scores"])
    kept = generate_layout(scores, 0.2, 32).grid.numpy()
    assert ((np.ptp(pictures[3].colours.astype(int), axis=-1) > 1) == kept).all()
    assert [axis.get_title() for axis in figure.axes][3] == "R~'s top 20%"
    assert patterns.row_pictures(rows.iloc[0], rows.iloc[0]["shown"][1])[3].title == "in use"


def test_a_run_that_never_switched_is_drawn_too(said, tmp_path):
    result = {"density": 0.2, "transition_step": None, **said[2], "shown": said[2]["shown"][:1]}
    table = pd.DataFrame(said[2]["comparison"])
    result["comparison"] = table[table["phase"] == "dense"].to_dict("list")
    figure, drawn = patterns.patterns(pd.DataFrame([result]))
    figure.savefig(tmp_path / "figure.png")
    assert set(drawn["pattern"]) == {"learned", "best", "window", "random"}
