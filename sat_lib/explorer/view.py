"""The interactive explorer: what would block-sparse attention keep of this attention map?

    source = RunSource(folder, data.test)       # the snapshots of a training run
    widget(source)                              # in JupyterLab
    figure, drawn = draw(view(source, State(step=100, example=0)))

A source hands out maps, R~ and layouts; `view` is a pure function of a source and a state; the widget only turns its
sliders into a state and shows the view.
"""

import functools
import io
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..attention.layout import BlockLayout
from ..attention.statistics import pool_blocks
from ..common import files
from ..common.errors import require
from ..datasets.cache import Split
from ..figures.patterns import NAMES, Picture, draw_view, kept_picture, map_picture, score_picture
from ..maps import PATTERNS, Choice, choose, compare, encoder_maps, resize_scores, shrink
from ..pretrained.encoders import attention_maps
from ..training.checkpoint import config_from_dict, load_checkpoint, load_model

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
        chosen = np.array(list(examples))
        self._paths = _snapshots(Path(folder))
        self.steps = tuple(sorted(self._paths))
        config = config_from_dict(load_checkpoint(self._paths[self.steps[0]], CPU)["config"])
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
        self._tokens = torch.as_tensor(tokens, device=device)
        self.label = f"{config.recipe.task}, {name}, seed {config.recipe.seed}"
        self.examples, self.layers, self.heads = len(chosen), model.layers, model.heads
        self.length, self.block = model.length, model.block if name == "sat" else None
        self._model = functools.lru_cache(CACHED)(lambda step: load_model(self._paths[step], device))
        self.maps = functools.lru_cache(CACHED)(self._maps)

    def _maps(self, step: int, example: int) -> Tensor:
        return torch.cat(encoder_maps(self._model(step), self._tokens[example : example + 1])).cpu()

    @torch.no_grad()
    def scores(self, step: int, layer: int) -> Tensor | None:
        parameters = self._model(step).sparsity_parameters
        return parameters[layer]().cpu() if parameters else None

    def layout(self, step: int, layer: int) -> BlockLayout | None:
        layouts = self._model(step).layouts
        return None if layouts is None else layouts[layer].to(CPU)


def _snapshots(folder: Path) -> dict[int, Path]:
    """Step -> file."""
    best = {load_checkpoint(path, CPU)["step"]: path for path in sorted(folder.glob("best-*.pt"))}
    kept = {int(path.stem.removeprefix("step-")): path for path in folder.glob("step-*.pt")}
    require(
        bool(best or kept),
        f"folder: wanted a run's, with step-*.pt or best-*.pt; {folder} has none. Train it with "
        "fit(..., snapshots=(0, 50, 100))",
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
        maps = torch.cat(attention_maps(self._models[step], one)).float().cpu()
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
    rows = [row["case"] | row["result"] | {"device": row["stamp"]["device"]} for row in files.read_rows(path)]
    rows = pd.DataFrame([row for row in rows if row["sweep"] == "density"])
    if rows.empty:
        return None
    shape = ["batch", "heads", "length", "head_size", "block", "dtype"]
    times = rows.groupby(["device", *shape, "density", "method"], sort=False)["forward_backward_ms"].last()
    times = times.unstack().reindex(columns=["sdpa", "fused"]).astype(float)
    ratios = (times["sdpa"] / times["fused"]).dropna()
    if ratios.empty:
        return None
    (device, *sizes), ratios = max(ratios.groupby(["device", *shape], sort=False), key=lambda place: len(place[1]))
    ratios = ratios.droplevel(["device", *shape]).sort_index()
    words = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in zip(shape, sizes, strict=True))
    return Speed(tuple(ratios.index), tuple(ratios), f"{device}, forward and backward of attention alone, {words}")


# ---- state to view ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What is looked at. `head` may be "mean"; `pattern` is one of `maps.PATTERNS`."""

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

    The columns of `patterns` are those of `maps.compare`, with speed_up (measured; `measured` says on what) and
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
    table["speed_up"] = densities.map(speed.at, na_action="ignore").astype(float) if speed else np.nan
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
    factor = -(-source.length // PIXELS)
    block, layout, name = state.block, choice.layout, NAMES[state.pattern]
    if scores is None:
        resized, note = None, "none was trained here"
    else:
        resized, note = resize_scores(scores, source.block, block, source.length)
    if layout is None:
        pattern = Picture(name, None, choice.reason)
    else:  # over the means in the layout's own blocks
        means, kept = pool_blocks(attention, layout.block).numpy(), layout.grid.numpy()
        kept_words = f"{layout.kept_blocks} of {kept.size} blocks of {layout.block}"
        pattern = kept_picture(f"kept by {name}", means, kept, kept_words)
    shrunk = f"maxima of {factor} x {factor}" if factor > 1 else "every entry"
    return {
        "map": map_picture("attention map A^s", shrink(attention, PIXELS).numpy(), shrunk),
        "pooled": map_picture(f"means of {block} x {block}", pool_blocks(attention, block).numpy()),
        "scores": Picture("R~", None, note) if resized is None else score_picture("R~", resized.numpy(), note),
        "pattern": pattern,
    }


def _sentence(table: pd.DataFrame, state: State) -> str:
    """The chosen pattern in words, beside the best and a random one."""
    name, chosen = NAMES[state.pattern], table.loc[state.pattern]
    best, random = table.loc[["best", "random"], "mass_kept"]
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


def png(picture: Picture) -> bytes:
    """Every entry enlarged to a square of as many whole pixels as fit into `PIXELS`; grey where there is no picture."""
    colours = np.full((1, 1, 3), 235, np.uint8) if picture.colours is None else picture.colours
    times, file = max(1, PIXELS // max(colours.shape[:2])), io.BytesIO()
    ImageOps.scale(Image.fromarray(colours), times, Image.Resampling.NEAREST).save(file, "png", compress_level=1)
    return file.getvalue()
