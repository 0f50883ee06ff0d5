"""pyproject.toml declares the environment once; everything that repeats it or relies on it is in step."""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = PROJECT["optional-dependencies"]["pinned"]
PRETRAINED = PROJECT["optional-dependencies"]["pretrained"]
BROWSER = PROJECT["optional-dependencies"]["browser"]
# Import names that differ from the distribution's, or come with another one that cannot do without them.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "IPython": "jupyterlab"}
DISTRIBUTIONS |= dict.fromkeys(("nbformat", "traitlets", "yaml"), "papermill")
DISTRIBUTIONS |= dict.fromkeys(("safetensors", "tokenizers"), "transformers")
DISTRIBUTIONS["cloudpickle"] = "submitit"


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


def test_conda_environment_repeats_the_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert (environment["name"], environment["channels"]) == ("sat_lib", ["conda-forge"])
    assert (python, pip) == (f"python {PROJECT['requires-python']}", "pip")
    assert packages["pip"] == [*PINNED, "-e ."]


def test_every_dependency_is_pinned_and_torch_to_the_version_that_was_measured():
    assert all(re.fullmatch(r"[\w.-]+==[\d.]+", requirement) for requirement in [*PINNED, *BROWSER])
    assert names(PROJECT["dependencies"]) | names(PRETRAINED) <= names(PINNED)
    assert "torch==2.13.0" in PINNED


def test_makefile_finds_the_torch_pin():
    rule = re.search(r"sed -n '(.*)' pyproject\.toml", (ROOT / "Makefile").read_text())[1]
    pattern = re.fullmatch(r"s/(.*)/\\1/p", rule)[1].replace(r"\(", "(").replace(r"\)", ")")
    assert re.findall(pattern, (ROOT / "pyproject.toml").read_text(), re.MULTILINE) == ["torch==2.13.0"]


def test_files_that_the_makefile_names_are_there():
    named = re.findall(r"(?<![\w/])(?:tests|notebooks|data)/[\w/]+\.\w+", (ROOT / "Makefile").read_text())
    assert len(named) >= 2
    assert not [name for name in named if not (ROOT / name).exists()]


def test_citation_gives_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["preferred-citation"]["doi"] == "10.1109/ACCESS.2024.3425638"


def third_party(source: str) -> set[str]:
    """Distributions that some source text imports: neither the standard library's nor this repository's."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    ours = {"sat_lib", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    return {DISTRIBUTIONS.get(name, name) for name in modules - ours - sys.stdlib_module_names}


def sources(folder: str) -> dict[str, str]:
    scripts = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / folder).rglob("*.py")}
    for path in (ROOT / folder).glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        scripts[path.name] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return scripts


@pytest.mark.parametrize("folder", ["sat_lib", "notebooks", "tests"])
def test_imports_are_declared(folder):
    more = {"tests": [*PINNED, *BROWSER], "sat_lib": PRETRAINED}.get(folder, [])
    declared = names(PROJECT["dependencies"]) | names(more)
    undeclared = {name: third_party(text) - declared for name, text in sources(folder).items()}
    assert not {name: missing for name, missing in undeclared.items() if missing}
