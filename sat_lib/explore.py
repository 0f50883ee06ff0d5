"""The interactive explorer: what would block-sparse attention keep of this attention map?

    source = RunSource(folder, data.test)       # the snapshots of a training run
    widget(source)                              # in JupyterLab
    figure, drawn = draw(view(source, State(step=100, example=0)))

A source hands out maps, R~ and layouts; `view` is a pure function of a source and a state; the widget only turns its
sliders into a state and shows the view.
"""

import functools
import html
import io
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from . import files, pretrained, runs
from .comparison import PATTERNS, Choice, choose, compare, encoder_maps, resize_scores, shrink
from .datasets import Split
from .errors import InputError, require
from .layout import BlockLayout
from .pattern_figures import NAMES, Picture, draw_view, kept_picture, map_picture, score_picture
from .recipes import config_from_dict
from .reference import pool_blocks

CPU = torch.device("cpu")
CACHED = 4  # maps of so many (step, example); 16 MiB each at 2 layers of 2 heads and L = 1024
BLOCKS = (16, 32, 64, 128)
DENSITIES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 1.0)
PIXELS = 512  # side of a picture, at most


# ---- sources ---------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """What can be explored. Layers, heads and examples are counted from 0."""

    label: str
    steps: tuple[int, ...]  # training steps, ascending
    examples: int  # how many
    layers: int
    heads: int
    length: int  # L
    block: int | None  # that W^P was trained for

    def maps(self, step: int, example: int) -> Tensor:
        """`A^s` of the model at that step, (layers, H, L, L) float32 on the CPU; rows of padding queries are 0."""

    def scores(self, step: int, layer: int) -> Tensor | None:
        """R~ (N, N), None without a sparsity parameter."""

    def layout(self, step: int, layer: int) -> BlockLayout | None:
        """The layout in use in the sparse phase, else None."""


class RunSource:
    """The snapshots of a training run: step-*.pt, and best-*.pt where their steps have none; of a recipe with
    `average` the latter hold averaged weights.

    Args:
        folder: the run's. data: the split that examples come from. examples: which of them.

    Raises:
        InputError: no snapshots, an attention other than "dense" and "sat", examples that there aren't, or data of
            another length.
    """

    def __init__(self, folder: Path, data: Split, examples: Iterable[int] = range(16), device: torch.device = CPU):
        self._device, chosen = device, np.array(list(examples))
        self._paths = _snapshots(Path(folder))
        self.steps = tuple(sorted(self._paths))
        state = runs.load_checkpoint(self._paths[self.steps[0]], CPU)
        config = config_from_dict(state["config"])
        name, model = config.model.attention, config.model
        require(name in ("dense", "sat"), f"folder: wanted a run of 'dense' or 'sat', whose map is A^s; got {name!r}")
        require(
            chosen.size > 0 and chosen.min() >= 0 and chosen.max() < len(data),
            f"examples: wanted some of 0 to {len(data) - 1}; got {chosen.tolist()}",
        )
        tokens = data.batch(chosen)[0]
        require(
            tokens.shape[1] == model.length,
            f"data: wanted examples of the run's {model.length} tokens; got {tokens.shape[1]}. Load the task "
            f"{config.recipe.task!r}",
        )
        self._tokens = torch.as_tensor(tokens)
        self.label = f"{config.recipe.task}, {name}, seed {config.recipe.seed}"
        self.examples, self.layers, self.heads = len(chosen), model.layers, model.heads
        self.length, self.block = model.length, model.block if name == "sat" else None
        self._model = functools.lru_cache(CACHED)(lambda step: runs.load_model(self._paths[step], device))
        self.maps = functools.lru_cache(CACHED)(self._maps)

    def _maps(self, step: int, example: int) -> Tensor:
        tokens = self._tokens[example : example + 1].to(self._device)
        return torch.stack([layer[0] for layer in encoder_maps(self._model(step), tokens)]).cpu()

    @torch.no_grad()
    def scores(self, step: int, layer: int) -> Tensor | None:
        parameters = self._model(step).sparsity_parameters
        return parameters[layer]().cpu() if parameters else None

    def layout(self, step: int, layer: int) -> BlockLayout | None:
        layouts = self._model(step).layouts
        return None if layouts is None else layouts[layer].to(CPU)


def _snapshots(folder: Path) -> dict[int, Path]:
    """Step -> file."""
    best = {runs.load_checkpoint(path, CPU)["step"]: path for path in sorted(folder.glob("best-*.pt"))}
    kept = {int(path.stem.removeprefix("step-")): path for path in folder.glob("step-*.pt")}
    require(
        bool(best or kept),
        f"folder: wanted a run's, with step-*.pt or best-*.pt; {folder} has none. Train it with "
        "runs.fit(..., snapshots=(0, 50, 100))",
    )
    return best | kept


class PretrainedSource:
    """Models of transformers on some inputs, one model per training step: {0: model} for a single one.

    Args:
        models: of one architecture. inputs: a batch, by keyword as for the model; its examples are the source's.

    Raises:
        InputError: no models, or inputs without a common number of examples.
    """

    block = None

    def __init__(self, models: Mapping[int, nn.Module], inputs: Mapping[str, Tensor], label: str = ""):
        require(bool(models), "models: wanted one or more, by training step: {0: model}; got none")
        sizes = {name: len(value) for name, value in inputs.items()}
        require(len(set(sizes.values())) == 1, f"inputs: wanted as many examples under every name; got {sizes}")
        self._models, self._inputs = dict(models), dict(inputs)
        self.steps = tuple(sorted(self._models))
        self.label = label or type(self._models[self.steps[0]]).__name__
        (self.examples,) = set(sizes.values())
        require(self.examples > 0, "inputs: wanted one example or more; got none")
        self.maps = functools.lru_cache(CACHED)(self._maps)
        self.layers, self.heads, self.length, _ = self.maps(self.steps[0], 0).shape

    def _maps(self, step: int, example: int) -> Tensor:
        one = {name: value[example : example + 1] for name, value in self._inputs.items()}
        maps = torch.cat(pretrained.attention_maps(self._models[step], one)).float().cpu()
        if "attention_mask" in one:
            maps = maps * (one["attention_mask"][0] != 0).to(maps)[:, None]
        return maps

    def scores(self, step: int, layer: int) -> None:
        return None

    def layout(self, step: int, layer: int) -> None:
        return None


# ---- how much faster -------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """Measured time of dense attention over that of block-sparse attention, by density; and what was measured."""

    densities: tuple[float, ...]  # ascending
    ratios: tuple[float, ...]
    measured: str

    def at(self, density: float) -> float | None:
        """Interpolated over the logarithm of the density; None below the measured ones."""
        if density < 0.9 * self.densities[0]:
            return None
        return float(np.interp(np.log(density), np.log(self.densities), self.ratios))


@functools.lru_cache
def measured_speed(path: Path = files.ROOT / "data/results/kernels.jsonl") -> Speed | None:
    """From the rows of the experiment `kernels`: sdpa over fused, forward and backward. None without such rows.

    Of several devices or shapes the one with the most densities counts.
    """
    times: dict[tuple, dict[str, dict[float, float]]] = {}
    for row in files.read_rows(path):
        case, ms = row["case"], row["result"].get("forward_backward_ms")
        if case.get("sweep") == "density" and case["implementation"] in ("fused", "sdpa") and ms is not None:
            shape = {name: case[name] for name in ("batch", "heads", "length", "head_size", "block", "dtype")}
            place = times.setdefault((row["stamp"]["device"], *shape.items()), {"fused": {}, "sdpa": {}})
            place[case["implementation"]][case["density"]] = ms
    common = {place: sorted(ms["fused"].keys() & ms["sdpa"].keys()) for place, ms in times.items()}
    if not any(common.values()):
        return None
    place = max(common, key=lambda place: len(common[place]))
    ratios = tuple(times[place]["sdpa"][density] / times[place]["fused"][density] for density in common[place])
    device, *shape = place
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shape)
    return Speed(tuple(common[place]), ratios, f"{device}, forward and backward of attention alone, {words}")


# ---- state to view ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What is looked at. `head` may be "mean"; `pattern` is one of `comparison.PATTERNS`."""

    step: int
    example: int
    layer: int = 0
    head: int | str = "mean"
    density: float = 0.05
    block: int = 32
    pattern: str = "learned"


@dataclass(frozen=True)
class View:
    """What is seen: pictures (map, pooled, scores, pattern, in this order), the comparison, and the same in words.

    The columns of `patterns` are those of `comparison.compare`, with speed_up (measured; `measured` says on what) and
    operation_bound (1 / density).
    """

    state: State
    pictures: dict[str, Picture]
    patterns: pd.DataFrame
    text: str
    measured: str


def view(source: Source, state: State) -> View:
    """The view of a state. The same state gives the same view.

    Raises:
        InputError: a state that the source doesn't have, or a density that keeps no block.
    """
    check(source, state)
    maps = source.maps(state.step, state.example)[state.layer]
    attention = maps.mean(0) if state.head == "mean" else maps[state.head]
    scores, in_use = source.scores(state.step, state.layer), source.layout(state.step, state.layer)
    choices = choose(attention, state.density, state.block, scores, source.block, in_use, state.layer)
    table = pd.DataFrame(compare(attention, choices))
    speed = measured_speed()
    densities = table["density"].astype(float)
    table["speed_up"] = [None if speed is None or pd.isna(d) else speed.at(d) for d in densities]
    table["speed_up"] = table["speed_up"].astype(float)
    table["operation_bound"] = 1 / densities
    pictures = _pictures(attention, scores, choices[state.pattern], source, state)
    measured = f"Speed-up: time of sdpa / fused, {speed.measured}." if speed else "No speed-up was measured here."
    return View(state, pictures, table, _sentence(table.set_index("pattern"), state), measured)


def check(source: Source, state: State) -> None:
    """Raise InputError, naming the field, unless the source has that state."""
    require(state.step in source.steps, f"step: wanted one of {list(source.steps)}; got {state.step}")
    for name, count in (("example", source.examples), ("layer", source.layers)):
        value = getattr(state, name)
        require(0 <= value < count, f"{name}: wanted 0 to {count - 1}; got {value}")
    require(
        state.head == "mean" or (isinstance(state.head, int) and 0 <= state.head < source.heads),
        f"head: wanted 0 to {source.heads - 1}, or 'mean'; got {state.head!r}",
    )
    require(state.pattern in PATTERNS, f"pattern: wanted one of {list(PATTERNS)}; got {state.pattern!r}")


def _pictures(
    attention: Tensor, scores: Tensor | None, choice: Choice, source: Source, state: State
) -> dict[str, Picture]:
    small, block = shrink(attention, PIXELS), state.block
    factor = -(-source.length // PIXELS)
    shrunk = f"maxima of {factor} x {factor}" if factor > 1 else "every entry"
    pooled = pool_blocks(attention, block).numpy()
    absent = scores is None
    resized = (None, "none was trained here") if absent else resize_scores(scores, source.block, block, source.length)
    name = NAMES.get(state.pattern, state.pattern)
    return {
        "map": map_picture("attention map A^s", small.numpy(), shrunk),
        "pooled": map_picture(f"means of {block} x {block}", pooled),
        "scores": Picture("R~", None, resized[1])
        if resized[0] is None
        else score_picture("R~", resized[0].numpy(), resized[1]),
        "pattern": Picture(name, None, choice.reason)
        if choice.layout is None
        else _kept(f"kept by {name}", attention, choice.layout),
    }


def _kept(title: str, attention: Tensor, layout: BlockLayout) -> Picture:
    """Over the means in the layout's own blocks."""
    note = f"{layout.kept_blocks} of {layout.grid.numel()} blocks of {layout.block}"
    return kept_picture(title, pool_blocks(attention, layout.block).numpy(), layout.grid.numpy(), note)


def _sentence(table: pd.DataFrame, state: State) -> str:
    """The chosen pattern in words, beside the best and a random one."""
    name, chosen = NAMES.get(state.pattern, state.pattern), table.loc[state.pattern]
    best, random = (table.loc[pattern, "mass_kept"] for pattern in ("best", "random"))
    control = f"The best {100 * state.density:.3g}% for this map would hold {best:.1%}, random ones hold {random:.1%}."
    if pd.isna(chosen["density"]):
        return f"No layout for {name}: {chosen['note']}. {control}"
    kept = f"{name} keeps {chosen['mass_kept']:.1%} of the attention in {chosen['density']:.2%} of the blocks."
    operations = f"That is {chosen['operation_bound']:.3g} times fewer operations"
    ratio = f" and about {chosen['speed_up']:.2g} times the speed of dense attention."
    return f"{kept} {control} {operations}{'.' if pd.isna(chosen['speed_up']) else ratio}"


def draw(seen: View) -> tuple[Figure, pd.DataFrame]:
    """A view as a figure for paper: its pictures, and the mass kept by pattern beside the density."""
    return draw_view(list(seen.pictures.values()), seen.patterns), seen.patterns


def response_ms(source: Source, states: Iterable[State]) -> list[float]:
    """Milliseconds from each state to the finished pictures, in turn: what the widget makes one wait."""
    times = []
    for state in states:
        start = time.perf_counter()
        for picture in view(source, state).pictures.values():
            png(picture)
        times.append(1e3 * (time.perf_counter() - start))
    return times


# ---- the widget ------------------------------------------------------------------------------------------------------

BIG, SMALL = 356, 170  # sides of the pictures on the screen, in pixels; all fits beside Lab's file browser


def widget(source: Source) -> widgets.Widget:
    """Sliders, pictures and the comparison. A state that can't be shown says why, and the last pictures stay."""
    controls = _controls(source)
    pictures = {name: _PictureBox(BIG if name == "map" else SMALL) for name in ("map", "pooled", "scores", "pattern")}
    table, message = widgets.HTML(), widgets.HTML()
    text = widgets.HTML(layout=widgets.Layout(width=f"{SMALL}px"))

    def update(_=None) -> None:
        try:
            seen = view(source, State(**{name: control.value for name, control in controls.items()}))
        except InputError as error:
            message.value = f'<div style="color:#b00020; line-height:1.3">{html.escape(str(error))}</div>'
            return
        for name, box in pictures.items():
            box.show(seen.pictures[name])
        text.value, message.value = SMALL_TEXT.format(html.escape(seen.text)), ""
        table.value = _table(seen.patterns) + SMALL_TEXT.format(html.escape(seen.measured))

    for control in controls.values():
        control.observe(update, "value")
    update()
    places = ("example", "step", "layer", "head", "density", "pattern", "block")  # row by row
    grid = widgets.Layout(grid_template_columns="240px 240px 140px 180px", grid_gap="2px 4px")
    tiles = widgets.VBox(
        [
            widgets.HBox([pictures["pooled"].box, pictures["scores"].box]),
            widgets.HBox([pictures["pattern"].box, text]),
        ]
    )
    label = widgets.HTML(f'<div style="font-size:12px; margin-left:8px"><b>{html.escape(source.label)}</b></div>')
    panel = widgets.GridBox([*(controls[name] for name in places), label], layout=grid)
    return widgets.VBox([panel, message, widgets.HBox([pictures["map"].box, tiles]), table])


def _controls(source: Source) -> dict[str, widgets.Widget]:
    """A control per field of `State`. Those that ask the model again wait until the slider is let go."""
    wide, narrow = (
        {"layout": widgets.Layout(width=width), "style": {"description_width": description}}
        for width, description in (("236px", "60px"), ("136px", "40px"))
    )
    blocks = sorted({block for block in (*BLOCKS, source.block) if block and block <= source.length})
    blocks = blocks or [source.length]
    block = source.block or min(blocks, key=lambda block: abs(block - 32))
    heads = [("mean", "mean"), *((str(head + 1), head) for head in range(source.heads))]
    densities = [(f"{density:.0%}", density) for density in DENSITIES]
    most = (-(-source.length // block)) ** 2
    density = min(density for density in DENSITIES if density >= 0.05 and int(density * most) > 0)
    names = [(NAMES.get(name, name), name) for name in PATTERNS]
    later = {"continuous_update": False}
    pattern = "learned" if source.block else "best"
    layers = [(str(layer + 1), layer) for layer in range(source.layers)]
    return {
        "example": widgets.IntSlider(0, 0, source.examples - 1, description="example", **later, **wide),
        "step": widgets.SelectionSlider(
            options=source.steps, value=source.steps[-1], description="step", **later, **wide
        ),
        "layer": widgets.Dropdown(options=layers, description="layer", **narrow),
        "head": widgets.Dropdown(options=heads, description="head", **narrow),
        "density": widgets.SelectionSlider(options=densities, value=density, description="density", **wide),
        "block": widgets.Dropdown(options=blocks, value=block, description="block", **narrow),
        "pattern": widgets.Dropdown(options=names, value=pattern, description="pattern", **wide),
    }


class _PictureBox:
    """A title, an image of a fixed size, a note."""

    def __init__(self, side: int):
        size = {"width": f"{side}px", "height": f"{side}px"}
        self.title, self.note = widgets.HTML(), widgets.HTML()
        self.image = widgets.Image(format="png", layout=widgets.Layout(**size, object_fit="fill"))
        self.box = widgets.VBox(
            [self.title, self.image, self.note], layout=widgets.Layout(width=f"{side + 8}px", overflow="hidden")
        )

    def show(self, picture: Picture) -> None:
        line = '<div style="line-height:1.25; font-size:{}px; color:{}">{}</div>'
        self.title.value = line.format(12, "inherit", f"<b>{html.escape(picture.title)}</b>")
        self.note.value = line.format(11, "#666", html.escape(picture.note))
        self.image.value = png(picture)


def png(picture: Picture) -> bytes:
    """Every entry enlarged to a square of as many whole pixels as fit into `PIXELS`; grey where there is no picture."""
    colours = np.full((1, 1, 3), 235, np.uint8) if picture.colours is None else picture.colours
    image = Image.fromarray(colours)
    times = max(1, PIXELS // max(image.size))
    file = io.BytesIO()
    enlarged = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    enlarged.save(file, "png", compress_level=1)
    return file.getvalue()


SMALL_TEXT = '<div style="line-height:1.35; font-size:12px; color:#444; margin:2px 0 0 2px">{}</div>'
COLUMNS = {  # of the table: heading, format
    "density": ("density", "{:.2%}"),
    "mass_kept": ("mass kept", "{:.1%}"),
    "overlap": ("also in best", "{:.0%}"),
    "empty_rows": ("empty block rows", "{:.0f}"),
    "speed_up": ("speed-up, measured", "{:.2f}"),
    "operation_bound": ("1 / density", "{:.1f}"),
}


def _table(patterns: pd.DataFrame) -> str:
    cell = '<td style="padding:0 10px; text-align:right">{}</td>'
    head = "".join(f'<th style="padding:0 10px; text-align:right">{heading}</th>' for heading, _ in COLUMNS.values())
    lines = []
    for record in patterns.to_dict("records"):
        cells = [_cell(record[name], form) for name, (_, form) in COLUMNS.items()]
        name = html.escape(NAMES.get(record["pattern"], record["pattern"]))
        body = "".join(map(cell.format, cells))
        if pd.isna(record["density"]):
            body = f'<td colspan="{len(COLUMNS)}" style="padding:0 10px; color:#666">{html.escape(record["note"])}</td>'
        lines.append(f"<tr><td>{name}</td>{body}</tr>")
    style = "line-height:1.3; font-size:12px; border-collapse:collapse"
    return f'<table style="{style}"><tr><th style="text-align:left">pattern</th>{head}</tr>{"".join(lines)}</table>'


def _cell(value: float | None, form: str) -> str:
    return "-" if pd.isna(value) else form.format(value)
