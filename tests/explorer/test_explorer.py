import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_config, tiny_splits
from made_maps import random_maps, symmetric
from PIL import Image

from sat_lib.attention.layout import BlockLayout
from sat_lib.attention.patterns import generate_layout
from sat_lib.attention.statistics import mass_kept
from sat_lib.common.errors import InputError
from sat_lib.common.files import append_row
from sat_lib.explorer.view import PretrainedSource, RunSource, State, draw, measured_speed, png, response_ms, view
from sat_lib.figures import patterns
from sat_lib.maps import block_sums, choose, encoder_maps, shrink
from sat_lib.training import fit
from sat_lib.training.checkpoint import load_model

widgets = pytest.importorskip("ipywidgets")
from sat_lib.explorer import widget  # noqa: E402, it wants ipywidgets

CPU = torch.device("cpu")
STEPS = (0, 4, 12)


class Maps:
    """A source over maps in memory: (examples, layers, H, L, L), the same at every step."""

    label, steps = "maps", (0, 10)

    def __init__(self, maps, scores=None, block=None, in_use=None):
        self.examples, self.layers, self.heads, self.length, _ = maps.shape
        self.values, self.block = maps, block
        self.all_scores, self.in_use = scores, in_use

    def maps(self, step, example):
        return self.values[example]

    def scores(self, step, layer):
        return self.all_scores

    def layout(self, step, layer):
        return self.in_use if step else None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fit.fit(tiny_config(), tiny_splits(), folder, CPU, progress=False, snapshots=STEPS)
    return folder


@pytest.fixture
def source(trained):
    return RunSource(trained, tiny_splits().test, range(4))


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_a_run_is_explored_at_its_snapshots(source, trained):
    best = json.loads((trained / "result.json").read_text())["best"]
    assert source.steps == tuple(sorted({*STEPS, *(phase["step"] for phase in best.values())}))
    assert (source.examples, source.layers, source.heads, source.length, source.block) == (4, 2, 2, 256, 32)
    assert source.label == "digits16, sat, seed 0"
    maps = source.maps(12, 3)
    assert maps.shape == (2, 2, 256, 256)
    assert maps.dtype == torch.float32
    assert maps.sum(-1).numpy() == pytest.approx(1, abs=1e-5)
    assert source.maps(12, 3) is maps
    model = load_model(fit.snapshot_path(trained, 12), CPU)
    tokens = torch.as_tensor(tiny_splits().test.batch(np.arange(4))[0])
    assert torch.allclose(maps, torch.stack([layer[3] for layer in encoder_maps(model, tokens)]), atol=1e-6)
    assert torch.equal(source.scores(12, 1), model.sparsity_parameters[1]())
    assert source.layout(12, 1) == model.layouts[1]
    assert source.layout(4, 1) is None


def test_the_learned_layout_at_the_training_density_is_the_one_in_use(source):
    for layer in (0, 1):
        state = State(12, 0, layer, density=tiny_config().recipe.density, block=32)
        lines = view(source, state).patterns.set_index("pattern")
        assert lines.loc["learned"].drop("note").equals(lines.loc["in use"].drop("note"))
    assert pd.isna(view(source, State(4, 0)).patterns.set_index("pattern").loc["in use", "density"])


def test_folders_and_examples_that_will_not_do_are_refused(trained, tmp_path):
    with pytest.raises(InputError, match=r"folder: wanted a run's, with step-\*.pt"):
        RunSource(tmp_path, tiny_splits().test)
    with pytest.raises(InputError, match=r"examples: wanted some of 0 to 8; got \[3, 9\]"):
        RunSource(trained, tiny_splits().test, [3, 9])
    short = tiny_splits().test
    short = type(short)(short.stored[:, :100], short.rows, short.labels)
    with pytest.raises(InputError, match=r"the run's 256 tokens; got 100\. Load the task 'digits16'"):
        RunSource(trained, short, [0])
    config = tiny_config("longformer", model={"window": 16})
    fit.fit(config, tiny_splits(), tmp_path / "x", CPU, progress=False, stop_at=5)
    with pytest.raises(InputError, match=r"wanted a run of 'dense' or 'sat', whose map is A\^s; got 'longformer'"):
        RunSource(tmp_path / "x", tiny_splits().test, [0])


def test_a_dense_run_has_maps_and_no_scores(tmp_path):
    fit.fit(tiny_config("dense"), tiny_splits(), tmp_path, CPU, progress=False, stop_at=4)
    source = RunSource(tmp_path, tiny_splits().test, [0])
    assert (source.steps, source.block, source.scores(4, 0)) == ((4,), None, None)
    seen = view(source, State(4, 0, density=0.2, pattern="best"))
    assert seen.pictures["scores"] == ("R~", None, "none was trained here")
    assert view(source, State(4, 0, density=0.2)).text.startswith("No layout for learned: no sparsity parameter")


def test_a_model_of_transformers_is_explored_with_its_padding():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64)
    torch.manual_seed(0)
    models = {step: transformers.BertModel(config).eval() for step in (0, 7)}
    inputs = {"input_ids": torch.randint(1, 50, (2, 48)), "attention_mask": torch.ones(2, 48, dtype=torch.int64)}
    inputs["attention_mask"][1, 40:] = 0
    source = PretrainedSource(models, inputs)
    assert (source.steps, source.examples, source.layers, source.heads) == ((0, 7), 2, 3, 4)
    assert (source.length, source.block, source.label) == (48, None, "BertModel")
    padded = source.maps(7, 1)
    assert not padded[..., 40:, :].any()
    assert not padded[..., 40:].any()
    assert padded[..., :40, :].sum(-1).numpy() == pytest.approx(1, abs=1e-5)
    assert source.maps(0, 1) is not padded
    seen = view(source, State(7, 1, 2, 3, 0.25, 16, "best"))
    assert seen.patterns.set_index("pattern").loc["best", "mass_kept"] > 2 / 9
    with pytest.raises(InputError, match="as many examples under every name"):
        PretrainedSource(models, inputs | {"input_ids": inputs["input_ids"][:1]})
    with pytest.raises(InputError, match="models: wanted one or more"):
        PretrainedSource({}, inputs)


# ---- view ------------------------------------------------------------------------------------------------------------


def test_a_view_shows_the_state_asked_for():
    maps = random_maps(40, examples=3, layers=2)
    source = Maps(maps, symmetric(5), 8)
    one = view(source, State(0, 2, 1, 0, 0.2, 8, "best")).patterns.set_index("pattern")
    best = generate_layout(block_sums(maps[2, 1, 0], 8), 0.2, 8)
    assert one.loc["best", "mass_kept"] == pytest.approx(mass_kept(maps[2, 1, 0], best), rel=1e-6)
    mean = view(source, State(0, 2, 1, "mean", 0.2, 8)).patterns.set_index("pattern")
    assert mean.loc["random", "mass_kept"] == pytest.approx(
        mass_kept(maps[2, 1].mean(0), choose(maps[2, 1, 0], 0.2, 8)["random"].layout), rel=1e-6
    )
    assert one.loc["best", "operation_bound"] == 5
    assert view(source, State(0, 2, 1, 0, 0.2, 8, "best")).text.startswith(
        f"best keeps {one.loc['best', 'mass_kept']:.1%} of the attention in 20.00% of the blocks. "
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 5}, r"step: wanted one of \[0, 10\]; got 5"),
        ({"example": 2}, "example: wanted 0 to 1; got 2"),
        ({"layer": -1}, "layer: wanted 0 to 0; got -1"),
        ({"head": 2}, "head: wanted 0 to 1, or 'mean'; got 2"),
        ({"head": "all"}, "head: wanted 0 to 1, or 'mean'; got 'all'"),
        ({"pattern": "lsg"}, "pattern: wanted one of .*; got 'lsg'"),
        ({"block": 33}, "block: wanted 1 to the length of 32 positions; got 33"),
        ({"density": 0.01}, "density: 0.01 of 16 blocks keeps none; wanted at least 0.0625. Raise the density"),
        ({"density": 1.5}, "density: wanted more than 0 and at most 1; got 1.5"),
    ],
)
def test_a_state_that_is_not_there_is_named(change, message):
    state = {"step": 0, "example": 0, "density": 0.25, "block": 8} | change
    with pytest.raises(InputError, match=message):
        view(Maps(random_maps(32), symmetric(4), 8), State(**state))


def test_an_example_of_padding_alone_is_refused():
    with pytest.raises(InputError, match="all queries of this one are padding"):
        view(Maps(torch.zeros(1, 1, 1, 32, 32)), State(0, 0, density=0.25, block=8))


def test_pictures_are_true_to_the_values():
    maps = random_maps(32)
    maps[0, 0, :, 24:] = 0
    seen = view(Maps(maps, symmetric(4), 8), State(0, 0, 0, 1, 0.25, 8))
    values, colours = maps[0, 0, 1], seen.pictures["map"].colours
    assert colours.shape == (32, 32, 3)
    assert (colours[24:] == 205).all()
    assert not (colours[:24] == 205).all(-1).any()
    darkest, brightest = values[:24].argmin(), values[:24].argmax()
    flat = colours.reshape(-1, 3).tolist()
    assert flat[int(darkest)] == [68, 1, 84]
    assert flat[int(brightest)] == [253, 231, 37]
    kept = generate_layout(symmetric(4), 0.25, 8).grid.numpy()
    grey = np.ptp(seen.pictures["pattern"].colours.astype(int), axis=-1) <= 1
    assert (grey == ~kept).all()
    assert seen.pictures["pattern"].note == "4 of 16 blocks of 8"


def test_a_long_map_is_shown_by_its_maxima():
    attention = random_maps(1030, examples=1, heads=1)
    small = shrink(attention[0, 0, 0], 512)
    assert small.shape == (344, 344)
    assert small[0, 1] == attention[0, 0, 0, :3, 3:6].max()
    assert small[343, 343] == attention[0, 0, 0, 1029, 1029]
    seen = view(Maps(attention), State(0, 0, pattern="best"))
    assert seen.pictures["map"].note.startswith("maxima of 3 x 3, ")


def test_a_picture_becomes_a_png_of_whole_squares():
    colours = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(5, 5, 3)
    image = np.array(Image.open(io.BytesIO(png(patterns.Picture("x", colours)))))
    assert image.shape == (510, 510, 3)
    assert (image == colours.repeat(102, 0).repeat(102, 1)).all()
    nothing = np.array(Image.open(io.BytesIO(png(patterns.Picture("x", None)))))
    assert (nothing == 235).all()


def test_a_view_becomes_a_figure_and_what_it_draws(tmp_path):
    seen = view(Maps(random_maps(32)), State(0, 0, density=0.25, block=8, pattern="best"))
    figure, drawn = draw(seen)
    figure.savefig(tmp_path / "figure.png")
    assert drawn.equals(seen.patterns)
    assert figure.axes[-1].get_xlabel().startswith("mass kept (%)")
    assert [label.get_text() for label in figure.axes[-1].get_yticklabels()] == ["best", "window", "random"]


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed_row(method, density, ms, device="GPU", sweep="density"):
    shape = {"batch": 8, "heads": 2, "length": 64, "head_size": 32, "block": 32, "dtype": "bfloat16"}
    case = {"sweep": sweep, "method": method, "density": density, **shape}
    return {"case": case, "result": {"forward_backward_ms": ms}, "stamp": {"device": device}}


def test_the_measured_speed_is_interpolated_between_rows(tmp_path):
    path = tmp_path / "kernels.jsonl"
    for row in [
        speed_row("fused", 0.1, 1.0), speed_row("sdpa", 0.1, 4.0), speed_row("fused", 0.4, 2.0),
        speed_row("sdpa", 0.4, 4.0), speed_row("fused", 0.2, 1.0), speed_row("sdpa", 0.2, None),
        speed_row("flex 64", 0.2, 1.0), speed_row("fused", 0.2, 1.0, sweep="length"),
        speed_row("fused", 0.1, 1.0, "other"), speed_row("sdpa", 0.1, 9.0, "other"),
    ]:  # fmt: skip
        append_row(path, row)
    speed = measured_speed(path)
    assert (speed.densities, speed.ratios) == ((0.1, 0.4), (4.0, 2.0))
    assert speed.at(0.2) == pytest.approx(3)
    assert [speed.at(0.1), speed.at(0.4), speed.at(0.05)] == [4.0, 2.0, None]
    assert speed.measured.startswith("GPU, forward and backward of attention alone, batch 8, heads 2, length 64")
    assert measured_speed(path) is speed


def test_without_rows_only_the_bound_is_given(tmp_path, monkeypatch):
    assert measured_speed(tmp_path / "none.jsonl") is None
    monkeypatch.setattr("sat_lib.explorer.view.measured_speed", lambda: None)
    seen = view(Maps(random_maps(32)), State(0, 0, density=0.25, block=8, pattern="best"))
    assert seen.text.endswith("That is 4 times fewer operations.")
    assert seen.measured == "No speed-up was measured here."
    assert seen.patterns["speed_up"].isna().all()


# ---- widget ----------------------------------------------------------------------------------------------------------


def parts(box):
    """All widgets inside one; a control under its description, the others in order."""
    found = [box]
    for child in getattr(box, "children", ()):
        found += parts(child)
    return found


def test_every_control_changes_the_pictures(source):
    shown = parts(widget.widget(source))
    controls = {part.description: part for part in shown if getattr(part, "description", "")}
    images = [part for part in shown if isinstance(part, widgets.Image)]
    table = [part for part in shown if isinstance(part, widgets.HTML)][-1]
    assert set(controls) == {"example", "step", "layer", "head", "density", "block", "pattern"}
    assert [value for _, value in controls["head"].options] == ["mean", 0, 1]
    assert controls["block"].options == (16, 32, 64, 128)
    for name, value in {
        "example": 2, "step": 4, "layer": 1, "head": 1, "density": 0.2, "block": 64, "pattern": "window"
    }.items():  # fmt: skip
        before = [image.value for image in images], table.value
        controls[name].value = value
        after = [image.value for image in images], table.value
        assert before[0] != after[0], name
        assert (before[1] != after[1]) == (name != "pattern"), name
    assert "no layout in the dense phase" in table.value


def test_a_state_without_blocks_shows_why_and_keeps_the_pictures(source):
    shown = parts(widget.widget(source))
    controls = {part.description: part for part in shown if getattr(part, "description", "")}
    images = [part for part in shown if isinstance(part, widgets.Image)]
    messages = lambda: [part.value for part in shown if isinstance(part, widgets.HTML) and "b00020" in part.value]
    controls["block"].value = 128
    before = [image.value for image in images]
    assert len(messages()) == 1  # 5 % of 4 blocks
    assert "density: 0.05 of 4 blocks keeps none" in messages()[0]
    controls["density"].value = 0.04
    assert [image.value for image in images] == before
    controls["density"].value = 0.5
    assert messages() == []
    assert [image.value for image in images] != before


@pytest.mark.parametrize("length", [10, 20, 40, 100])
def test_short_maps_start_with_a_density_that_keeps_a_block(length):
    torch.manual_seed(0)
    shown = parts(widget.widget(Maps(torch.rand(1, 1, 2, length, length).softmax(-1))))
    assert all(part.value for part in shown if isinstance(part, widgets.Image))
    assert not [part for part in shown if isinstance(part, widgets.HTML) and "b00020" in part.value]


def test_response_times_are_one_per_state(source):
    times = response_ms(source, [State(12, 0, density=d) for d in (0.1, 0.2, 0.3)])
    assert len(times) == 3
    assert min(times) > 0


def test_shared_layouts_of_whole_grids_show_everything():
    full = BlockLayout.full(4, 4, 8)
    seen = view(Maps(random_maps(32), symmetric(4), 8, full), State(10, 0, density=0.25, block=8, pattern="in use"))
    assert seen.patterns.set_index("pattern").loc["in use", "mass_kept"] == pytest.approx(1)
