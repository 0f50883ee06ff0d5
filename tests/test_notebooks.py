"""The notebooks' cells over what rows there are: all, a half of them, none."""

import json
import re
import shlex

import pytest

import sat_lib.figures.claims  # noqa: F401  it finds its file beside the code, before ROOT is another folder
from sat_lib import experiments, figures
from sat_lib.__main__ import _settings
from sat_lib.common import files
from sat_lib.common.errors import InputError

NOTEBOOKS = sorted(path.stem for path in (files.ROOT / "notebooks").glob("*.ipynb"))
KEPT = {"all": slice(None), "every other": slice(None, None, 2), "the others": slice(1, None, 2)}
FIGURES = {"10_claims": "verdicts_figure"}  # the others have one of their own name
COMMAND = r"^rows: no rows of .+ at the paper profile; measure them with: python -m sat_lib bench (.+)$"


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Folders with a part of the committed rows each."""
    made = {name: tmp_path_factory.mktemp("rows") for name in (*KEPT, "none")}
    for path in (files.ROOT / "data/results").glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        for name, part in KEPT.items():
            files.write(made[name] / "data/results" / path.name, "".join(lines[part]))
    return made


def run(name, root, monkeypatch) -> list[str]:
    """Run a notebook's cells at the paper profile without measuring; the names of what it saved."""
    saved = []
    monkeypatch.setattr(figures, "save", lambda stage, *_: saved.append(stage))
    monkeypatch.setattr(figures, "save_table", lambda stage, *_: saved.append(stage) or "")
    monkeypatch.setattr(experiments.rows, "__kwdefaults__", experiments.rows.__kwdefaults__ | {"root": root})
    path, space = files.ROOT / "notebooks" / f"{name}.ipynb", {}
    monkeypatch.setattr(files, "ROOT", root)
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), space)
        if "parameters" in cell["metadata"].get("tags", ()):
            space |= {"profile": "paper", "device": "cpu", "measure": False}
    return saved


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_draws_the_committed_rows_and_its_checks_hold(name, roots, monkeypatch):
    assert FIGURES.get(name, name) in run(name, roots["all"], monkeypatch)


@pytest.mark.parametrize("part", ["every other", "the others"])
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_with_a_part_of_its_rows_draws_them_or_says_how_to_measure_the_others(
    name, part, roots, monkeypatch
):
    try:
        saved = run(name, roots[part], monkeypatch)
    except InputError as error:
        check_command(str(error))
    else:
        assert FIGURES.get(name, name) in saved


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_without_rows_says_how_to_measure_them(name, roots, monkeypatch):
    with pytest.raises(InputError) as caught:
        run(name, roots["none"], monkeypatch)
    check_command(str(caught.value))


def check_command(message: str) -> None:
    """There are cases that the command in the message measures."""
    (found,) = re.findall(COMMAND, message)
    name, _, profile, *only = shlex.split(found)
    _, cases = experiments.select(name, profile, device="cpu", only=_settings(only[1:]))
    assert cases
