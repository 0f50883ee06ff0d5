"""Imports inside sat_lib point downward only; modules of one level don't import one another."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sat_lib"
LEVELS = {
    "errors": 0,
    **dict.fromkeys(("files", "layout", "map_metrics", "distributed", "captured"), 1),
    **dict.fromkeys(("timing", "corpora", "downloads", "extension", "reference", "pattern", "weights"), 2),
    **dict.fromkeys(("embedded", "tasks", "ops", "layer_ops", "gathered", "transition"), 3),
    **dict.fromkeys(("baselines", "datasets"), 4),
    **dict.fromkeys(("attention", "sentence_pairs"), 5),
    **dict.fromkeys(("model", "pretrained"), 6),
    "signals": 7,
    "recipes": 8,
    "train": 9,
    **dict.fromkeys(("runs", "peers", "finetuning", "figures"), 10),
    **dict.fromkeys(("benchmarks", "comparison", "motivation", "pretraining", "stages", "notebook_run"), 11),
    "training_cases": 11,
    "ablations": 12,
    "parallel_figures": 11,
    **dict.fromkeys(("experiments", "map_figures", "pattern_figures", "verdicts"), 13),
    **dict.fromkeys(("reproduce", "explore", "verdict_figures", "ablation_figures", "sweep", "__init__"), 14),
    "paper": 15,
    "__main__": 16,
}


def imported(source: str) -> set[str]:
    """The modules of sat_lib that some source text imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("sat_lib.")}
        elif isinstance(node, ast.ImportFrom):
            inside = "sat_lib" if node.level else ""
            module = ".".join(filter(None, [inside, node.module]))
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "sat_lib" else {module}
    return {name.split(".")[1] for name in found if name.startswith("sat_lib.")} & LEVELS.keys()


def test_every_module_has_a_level():
    assert {path.stem for path in PACKAGE.glob("*.py")} <= LEVELS.keys()


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_downward(path):
    level = LEVELS[path.stem]
    upward = {name: LEVELS[name] for name in imported(path.read_text()) if LEVELS[name] >= level}
    assert not upward, f"{path.name} is on level {level} and imports {upward}"


def test_every_way_of_importing_is_seen():
    source = """
    from . import files, timing as clock
    from .model import Encoder
    from sat_lib import layout
    import sat_lib.train
    def late():
        from sat_lib.figures import draw
    """
    lines = "\n".join(line[4:] for line in source.splitlines())
    assert imported(lines) == {"files", "timing", "model", "layout", "train", "figures"}
