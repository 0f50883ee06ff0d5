"""The interactive explorer in JupyterLab: sliders that make a state, and the view of it."""

import html

import ipywidgets as widgets
import pandas as pd

from ..common.errors import InputError
from ..figures.patterns import NAMES, Picture
from ..maps import PATTERNS
from .view import BLOCKS, DENSITIES, Source, State, png, view

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
    names = [(NAMES[name], name) for name in PATTERNS]
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
        name = html.escape(NAMES[record["pattern"]])
        body = "".join(map(cell.format, cells))
        if pd.isna(record["density"]):
            body = f'<td colspan="{len(COLUMNS)}" style="padding:0 10px; color:#666">{html.escape(record["note"])}</td>'
        lines.append(f"<tr><td>{name}</td>{body}</tr>")
    style = "line-height:1.3; font-size:12px; border-collapse:collapse"
    return f'<table style="{style}"><tr><th style="text-align:left">pattern</th>{head}</tr>{"".join(lines)}</table>'


def _cell(value: float | None, form: str) -> str:
    return "-" if pd.isna(value) else form.format(value)
