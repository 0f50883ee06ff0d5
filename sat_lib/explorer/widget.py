"""The interactive explorer in JupyterLab: sliders that make a state, and the view of it."""

import html

import ipywidgets as widgets
import pandas as pd

from ..common.errors import InputError
from ..figures import cell
from ..figures.patterns import NAMES, Picture
from ..maps import PATTERNS
from .view import BLOCKS, DENSITIES, Source, State, png, view

BIG, SMALL = 356, 170  # sides of the pictures on the screen, in pixels; all fits beside Lab's file browser


def widget(source: Source) -> widgets.Widget:
    """Sliders, pictures and the comparison. A state that can't be shown says why, and the last pictures stay."""
    controls = _controls(source)
    pictures = {name: _picture_box(BIG if name == "map" else SMALL) for name in ("map", "pooled", "scores", "pattern")}
    table, message = widgets.HTML(), widgets.HTML()
    text = widgets.HTML(layout=widgets.Layout(width=f"{SMALL}px"))

    def update(_=None) -> None:
        try:
            seen = view(source, State(**{name: control.value for name, control in controls.items()}))
        except InputError as error:
            message.value = f'<div style="color:#b00020; line-height:1.3">{html.escape(str(error))}</div>'
            return
        for name, box in pictures.items():
            _show(box, seen.pictures[name])
        text.value, message.value = SMALL_TEXT.format(html.escape(seen.text)), ""
        table.value = _table(seen.patterns) + SMALL_TEXT.format(html.escape(seen.measured))

    for control in controls.values():
        control.observe(update, "value")
    update()
    grid = widgets.Layout(grid_template_columns="240px 240px 140px 180px", grid_gap="2px 4px")
    tiles = widgets.VBox(
        [widgets.HBox([pictures["pooled"], pictures["scores"]]), widgets.HBox([pictures["pattern"], text])]
    )
    label = widgets.HTML(f'<div style="font-size:12px; margin-left:8px"><b>{html.escape(source.label)}</b></div>')
    panel = widgets.GridBox([*controls.values(), label], layout=grid)
    return widgets.VBox([panel, message, widgets.HBox([pictures["map"], tiles]), table])


def _controls(source: Source) -> dict[str, widgets.Widget]:
    """A control per field of `State`. Those that ask the model again wait until the slider is let go."""
    blocks = sorted({block for block in (*BLOCKS, source.block) if block and block <= source.length}) or [source.length]
    block = source.block or min(blocks, key=lambda block: abs(block - 32))
    most = (-(-source.length // block)) ** 2
    density = min(density for density in DENSITIES if density >= 0.05 and int(density * most) > 0)
    densities = [(f"{density:.0%}", density) for density in DENSITIES]
    names, pattern = [(NAMES[name], name) for name in PATTERNS], "learned" if source.block else "best"
    numbered = lambda count: [(str(place + 1), place) for place in range(count)]
    later = {"continuous_update": False}
    controls = {  # as they stand in the grid, row by row
        "example": widgets.IntSlider(0, 0, source.examples - 1, **later),
        "step": widgets.SelectionSlider(options=source.steps, value=source.steps[-1], **later),
        "layer": widgets.Dropdown(options=numbered(source.layers)),
        "head": widgets.Dropdown(options=[("mean", "mean"), *numbered(source.heads)]),
        "density": widgets.SelectionSlider(options=densities, value=density),
        "pattern": widgets.Dropdown(options=names, value=pattern),
        "block": widgets.Dropdown(options=blocks, value=block),
    }
    for name, control in controls.items():
        narrow = name in ("layer", "head", "block")
        control.description, control.layout.width = name, "136px" if narrow else "236px"
        control.style.description_width = "40px" if narrow else "60px"
    return controls


def _picture_box(side: int) -> widgets.VBox:
    """A title, an image of a fixed size, a note."""
    size = {"width": f"{side}px", "height": f"{side}px"}
    image = widgets.Image(format="png", layout=widgets.Layout(**size, object_fit="fill"))
    whole = widgets.Layout(width=f"{side + 8}px", overflow="hidden")
    return widgets.VBox([widgets.HTML(), image, widgets.HTML()], layout=whole)


def _show(box: widgets.VBox, picture: Picture) -> None:
    line = '<div style="line-height:1.25; font-size:{}px; color:{}">{}</div>'
    title, image, note = box.children
    title.value = line.format(12, "inherit", f"<b>{html.escape(picture.title)}</b>")
    note.value = line.format(11, "#666", html.escape(picture.note))
    image.value = png(picture)


SMALL_TEXT = '<div style="line-height:1.35; font-size:12px; color:#444; margin:2px 0 0 2px">{}</div>'
COLUMNS = {  # of the table: heading, format
    "density": ("density", ".2%"),
    "mass_kept": ("mass kept", ".1%"),
    "overlap": ("also in best", ".0%"),
    "empty_rows": ("empty block rows", ".0f"),
    "speed_up": ("speed-up, measured", ".2f"),
    "operation_bound": ("1 / density", ".1f"),
}


def _table(patterns: pd.DataFrame) -> str:
    right = "padding:0 10px; text-align:right"
    head = "".join(f'<th style="{right}">{heading}</th>' for heading, _ in COLUMNS.values())
    lines = []
    for record in patterns.to_dict("records"):
        cells = [cell(record[name], form) for name, (_, form) in COLUMNS.items()]
        body = "".join(f'<td style="{right}">{text}</td>' for text in cells)
        if pd.isna(record["density"]):
            body = f'<td colspan="{len(COLUMNS)}" style="padding:0 10px; color:#666">{html.escape(record["note"])}</td>'
        lines.append(f"<tr><td>{html.escape(NAMES[record['pattern']])}</td>{body}</tr>")
    style = "line-height:1.3; font-size:12px; border-collapse:collapse"
    return f'<table style="{style}"><tr><th style="text-align:left">pattern</th>{head}</tr>{"".join(lines)}</table>'
