"""The rooms of sat_lib import downward only, as the contract in pyproject.toml says; importing the package is cheap."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sat_lib
from sat_lib.common import files

LINT = Path(sys.executable).with_name("lint-imports")
UPWARD = {
    "the model imports an experiment": ("model/encoder.py", "from ..experiments import training"),
    "attention imports the data sets beside it": ("attention/ops.py", "from ..datasets import tasks"),
    "a room that nobody placed": ("corner/__init__.py", ""),
}


def lint(root: Path) -> subprocess.CompletedProcess:
    command = [LINT, "--no-cache", "--no-logo", "pyproject.toml"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_rooms_import_downward():
    done = lint(files.ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("fault", UPWARD)
def test_the_contract_sees(fault, tmp_path):
    shutil.copytree(files.PACKAGE, tmp_path / "sat_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(files.ROOT / "pyproject.toml", tmp_path)
    name, line = UPWARD[fault]
    path = tmp_path / "sat_lib" / name
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(f"{line}\n")
    done = lint(tmp_path)
    assert done.returncode != 0 and ("BROKEN" in done.stdout or "corner" in done.stdout), done.stdout


def test_public_names_are_there_and_nothing_is_loaded_before_one_is_asked_for():
    loaded = "import sys, sat_lib; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, cwd=files.ROOT)
    assert done.stdout == "False\n"
    for name in sat_lib.__all__:
        assert getattr(sat_lib, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = sat_lib.Nothing


def test_what_decides_whether_to_run_starts_without_torch():
    code = "import sys, sat_lib.reproduce; print([name for name in ('torch', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=files.ROOT)
    assert done.stdout == "[]\n"
