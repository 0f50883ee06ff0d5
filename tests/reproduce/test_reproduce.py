"""Notebooks x profile: what runs again and why, what counts as a run, and what is left after a kill."""

import ast
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sat_lib import reproduce
from sat_lib.common import files
from sat_lib.common.errors import InputError
from sat_lib.reproduce import notebook
from sat_lib.reproduce.stages import Place, Stage, changes, stage_key

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and relies on prctl")

WRITE = """\
from pathlib import Path
from PIL import Image
from sat_lib.common.files import write_json
figures = Path("../figures") / profile
(figures / "a.csv").write_text("step,loss\\n1,0.5\\n")
(figures / "a.pdf").write_bytes(b"%PDF-1.4\\n%%EOF\\n")
Image.new("L", (2, 2)).save(figures / "a.png")
write_json(figures / "a.json", {"x": x})
"""
A = Stage("a", ("a.pdf", "a.png", "a.csv", "a.json"), "look at a", 0.1)


def put_notebook(root: Path, name: str, *cells: str, parameters: str = 'profile = "smoke"\nx = 1') -> None:
    sources = [("markdown", "# A question", []), ("code", parameters, ["parameters"])]
    sources += [("code", cell, []) for cell in cells]
    listed = [
        {"cell_type": kind, "id": f"c{number}", "metadata": {"tags": tags} if tags else {}, "source": source}
        | ({"execution_count": None, "outputs": []} if kind == "code" else {})
        for number, (kind, source, tags) in enumerate(sources)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    files.write_json(
        root / "notebooks" / f"{name}.ipynb", {"cells": listed, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    )


def write_cell(name: str) -> str:
    return f'open(f"../figures/{{profile}}/{name}", "w").write("v\\n1\\n")'


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A root whose only stage ran once, with what it printed in `printed`."""
    root = tmp_path_factory.mktemp("finished")
    put_notebook(root, "a", WRITE, "from sat_lib.common import errors")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        assert reproduce.run(root=root, stages=(A,)) == 0
    (root / "printed").write_text(printed.getvalue())
    return root


@pytest.fixture
def root(finished, tmp_path) -> Path:
    """A copy of it to change."""
    shutil.copytree(finished, tmp_path / "root")
    return tmp_path / "root"


def dry_run(root: Path, capsys, *stages: Stage) -> list[str]:
    capsys.readouterr()
    assert reproduce.run(root=root, stages=stages or (A,), dry_run=True) == 0
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def script(root: Path, *stages: Stage) -> list[str]:
    code = "import signal, sys\nfrom sat_lib.reproduce import run\nfrom sat_lib.reproduce.stages import Stage\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job of `sh -c '... &'` inherits it ignored
    return [sys.executable, "-c", code + f"status = run(root={str(root)!r}, stages={stages!r})\nsys.exit(status)"]


# ---- the stages of this repository -----------------------------------------------------------------------------------


def test_every_notebook_has_a_stage_and_every_stage_a_sound_notebook():
    notebooks = {path.stem for path in (files.ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks == {stage.name for stage in reproduce.STAGES}
    for stage in reproduce.STAGES:
        assert stage_key(stage, Place(files.ROOT, "smoke"))["parameters"]["profile"] == "'smoke'"


# ---- what is up to date, and why not ---------------------------------------------------------------------------------


def test_first_run_leaves_outputs_notebook_log_and_summary(finished):
    figures = finished / "figures/smoke"
    summaries = {"summary.csv", "summary.md", "summary.json"}
    assert {path.name for path in figures.iterdir()} == {*A.outputs, *summaries}
    assert json.loads((figures / "a.json").read_text()) == {"x": 1}
    assert {path.name for path in (finished / "runs/smoke").iterdir()} == {"lock", "logs", "notebooks", "stages"}
    assert (finished / "runs/smoke/notebooks/a.ipynb").exists()
    summary = json.loads((figures / "summary.json").read_text())
    assert summary["total_seconds"] > 0 and summary["environment"].keys() == {"python", "torch", "numpy"}
    (row,) = summary["stages"]
    assert row["written"] == "a.pdf .png .csv .json" and row["look at"] == "look at a"
    assert 20e6 < row["peak_rss_bytes"] < 4e9
    assert "| a |" in (figures / "summary.md").read_text()
    printed = (finished / "printed").read_text()
    assert "1 of 1 stages to run" in printed and "[1/1] a ... " in printed and "look at a" in printed


def test_up_to_date_is_fast_and_imports_nothing_heavy(root):
    command = script(root, A)
    command[-1] += "if not {'torch', 'papermill', 'pandas'} & sys.modules.keys() else 3"
    before = notebook.stamps(root / "figures/smoke")
    before_it = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    after_it = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout) == (0, "everything is up to date\n"), done
    assert sum(after_it[:2]) - sum(before_it[:2]) < 10, "seconds of the CPU, which is all it waits for"
    assert notebook.stamps(root / "figures/smoke") == before


def test_changed_cells_are_named(root, capsys):
    put_notebook(root, "a", WRITE + "# more", "from sat_lib.common import errors")
    assert dry_run(root, capsys) == ["a: would run, about 0.1 min", "cell 3 changed"]
    put_notebook(root, "a", WRITE, "print(1)", "from sat_lib.common import errors")
    assert dry_run(root, capsys)[1:] == ["cell 4 is new"]
    put_notebook(root, "a", "from sat_lib.common import errors", parameters='profile = "smoke"\nx = 1  # a remark')
    assert dry_run(root, capsys)[1:] == ["the earlier cell 3 is gone", "sat_lib/common/files.py is gone"]


def test_changed_parameters_are_named(root, capsys):
    put_notebook(root, "a", WRITE, "from sat_lib.common import errors", parameters='profile = "smoke"\nx = 2\ny = "z"')
    assert dry_run(root, capsys)[1:] == ["parameter x: 1 -> 2", "parameter y: absent -> 'z'"]


def test_given_parameters_count_and_have_to_exist(root, capsys):
    assert reproduce.run(root=root, stages=(A,), parameters={"x": 3}, dry_run=True) == 0
    assert "parameter x: 1 -> 3" in capsys.readouterr().out
    with pytest.raises(InputError, match="no parameter z; its parameters are profile, x"):
        reproduce.run(root=root, stages=(A,), parameters={"z": 3})


def test_outputs_that_changed_or_went_are_named(root, capsys):
    (root / "figures/smoke/a.csv").write_text("step,loss\n1,0.4\n")
    (root / "figures/smoke/a.pdf").unlink()
    assert dry_run(root, capsys)[1:] == ["output a.pdf is missing", "output a.csv was changed"]


def test_outputs_touched_but_equal_stay_up_to_date(root, capsys):
    for path in [*(root / "figures/smoke").iterdir(), root / "notebooks/a.ipynb"]:
        os.utime(path, (1, 1))
    assert dry_run(root, capsys) == ["a: up to date"]


def test_a_changed_sat_lib_file_is_named_and_others_do_not_count(root):
    shutil.copytree(files.ROOT / "sat_lib", root / "sat_lib", ignore=shutil.ignore_patterns("__pycache__"))
    command = script(root, A)
    command[-1] = command[-1].replace("run(root", "run(dry_run=True, root")
    for name in ("reproduce/__init__", "common/timing", "common/errors", "common/files"):
        with (root / f"sat_lib/{name}.py").open("a") as file:
            file.write("# changed\n")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    reasons = [line.strip() for line in done.stdout.splitlines()[1:]]
    assert reasons == ["sat_lib/common/errors.py changed", "sat_lib/common/files.py changed"]


def test_the_papers_numbers_are_a_source_of_what_draws_them(tmp_path):
    put_notebook(tmp_path, "a", "from sat_lib.figures import training")
    assert "data/published.toml" in stage_key(A, Place(tmp_path, "smoke"))["sources"]
    put_notebook(tmp_path, "a", "from sat_lib.common import files")
    assert "data/published.toml" not in stage_key(A, Place(tmp_path, "smoke"))["sources"]


def test_imports_that_name_no_module_count_the_whole_package(tmp_path):
    put_notebook(tmp_path, "a", "from sat_lib import SomePublicName")
    sources = stage_key(A, Place(tmp_path, "smoke"))["sources"]
    package = files.PACKAGE
    written = {path for path in package.rglob("*.py") if path.name != "__main__.py" and path.parent.name != "reproduce"}
    assert {str(path.relative_to(files.ROOT)) for path in written} <= sources.keys()
    assert "sat_lib/reproduce/stages.py" not in sources


def test_a_public_name_counts_what_it_is_made_of(tmp_path):
    put_notebook(tmp_path, "a", "from sat_lib import BlockLayout")
    sources = stage_key(A, Place(tmp_path, "smoke"))["sources"]
    assert {"sat_lib/__init__.py", "sat_lib/attention/layout.py", "sat_lib/csrc/attention.cu"} <= sources.keys()
    assert "sat_lib/training/fit.py" not in sources


def test_committed_rows_count_at_the_paper_profile_only(tmp_path):
    put_notebook(tmp_path, "a")
    stage = Stage("a", (), "", 1, rows=("data/results/*.jsonl",))
    before = {profile: stage_key(stage, Place(tmp_path, profile)) for profile in reproduce.PROFILES}
    files.append_row(tmp_path / "data/results/accuracy.jsonl", {"accuracy": 0.4})
    after = {profile: stage_key(stage, Place(tmp_path, profile)) for profile in reproduce.PROFILES}
    assert changes(before["paper"], after["paper"]) == ["data/results/accuracy.jsonl is new"]
    assert changes(before["smoke"], after["smoke"]) == []
    assert changes(after["smoke"], after["paper"])[0] == "parameter profile: 'smoke' -> 'paper'"


def test_rows_that_a_stage_measures_itself_do_not_make_it_stale(tmp_path, capsys):
    stage = Stage("a", ("a.csv",), "", 1, rows=("data/results/a.jsonl",))
    measure = 'from sat_lib.common.files import append_row\nappend_row("../data/results/a.jsonl", {"time_ms": 1})'
    put_notebook(tmp_path, "a", measure, write_cell("a.csv"))
    assert reproduce.run("paper", root=tmp_path, stages=(stage,)) == 0
    assert reproduce.run("paper", root=tmp_path, stages=(stage,)) == 0
    assert capsys.readouterr().out.endswith("everything is up to date\n")
    files.append_row(tmp_path / "data/results/a.jsonl", {"time_ms": 2})
    assert reproduce.run("paper", root=tmp_path, stages=(stage,), dry_run=True) == 0
    assert "data/results/a.jsonl changed" in capsys.readouterr().out


def test_another_environment_is_warned_of_and_kept(root, capsys):
    path = root / "runs/smoke/stages/a.json"
    state = json.loads(path.read_text())
    state["environment"]["torch"] = "1.0"
    files.write_json(path, state)
    assert reproduce.run(root=root, stages=(A,)) == 0
    printed = capsys.readouterr().out
    assert "up to date" in printed and "torch 1.0 -> " in printed


# ---- what is refused before anything runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("x = 1", "no parameter profile; its parameters are x"),
        ('profile = "smoke"\ny = 2 * 3', "`name = literal` only; got `y = 2 \\* 3`"),
        ('profile = "smoke"\nimport os', "`name = literal` only; got `import os`"),
    ],
)
def test_parameters_cell_holds_literals_and_a_profile(tmp_path, parameters, message):
    put_notebook(tmp_path, "a", parameters=parameters)
    with pytest.raises(InputError, match=message):
        reproduce.run(root=tmp_path, stages=(A,))


def test_parameters_cell_has_to_be_tagged_once(tmp_path):
    put_notebook(tmp_path, "a")
    path = tmp_path / "notebooks/a.ipynb"
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(InputError, match="one code cell has to be tagged parameters; 0 are"):
        reproduce.run(root=tmp_path, stages=(A,))


def test_shell_and_magic_lines_are_refused(tmp_path):
    put_notebook(tmp_path, "a", "x = 1\n!false")
    with pytest.raises(InputError, match=r"cell 3: plain Python wanted.*!false"):
        reproduce.run(root=tmp_path, stages=(A,))


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="has no notebook"):
        reproduce.run(root=tmp_path, stages=(A,))
    with pytest.raises(InputError, match="no stage 'b'; there are a"):
        reproduce.run(only=("b",), root=tmp_path, stages=(A,))
    with pytest.raises(InputError, match="profile must be one of smoke, paper; got 'full'"):
        reproduce.run("full", root=tmp_path, stages=(A,))


# ---- what counts as a run --------------------------------------------------------------------------------------------


LOADED = """
import json, os, sys
import matplotlib, pandas, scipy, seaborn, torch
for name, imports in json.loads(sys.stdin.read()).items():
    if os.fork() == 0:
        exec(imports)
        of_package = [module for key, module in sys.modules.items() if key.split(".")[0] == "sat_lib"]
        print(json.dumps([name, [module.__file__ for module in of_package]]), flush=True)
        os._exit(0)
    os.wait()
"""


@linux
def test_a_stage_is_made_of_every_module_that_its_imports_load():
    """Seen by loading them, whatever form an import has; an edit to any of these files makes the stage stale."""
    imports = {}
    for stage in reproduce.STAGES:
        path = files.ROOT / "notebooks" / f"{stage.name}.ipynb"
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        nodes = [node for cell in cells for node in ast.parse("".join(cell["source"])).body]
        lines = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        imports[stage.name] = "\n".join(line for line in lines if "sat_lib" in line)
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, input=json.dumps(imports), stdout=subprocess.PIPE, text=True, cwd=files.ROOT)
    loaded = dict(map(json.loads, done.stdout.splitlines()))
    assert loaded.keys() == imports.keys()
    for stage in reproduce.STAGES:
        paths = {str(Path(name).relative_to(files.ROOT)) for name in loaded[stage.name]}
        missing = paths - stage_key(stage, Place(files.ROOT, "smoke"))["sources"].keys()
        assert len(paths) > 10 and not missing, stage.name


def test_runs_that_do_not_count(tmp_path, capsys):
    """Each stage writes what it declares and fails all the same; the sound one between them still runs."""
    faults = {
        "exits": "import sys\nsys.exit(0)",
        "dies": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "strays": write_cell("stray.csv"),
    }
    stages = [Stage(name, (f"{name}.csv",), "", 0.1) for name in (*faults, "sound")]
    for name, fault in faults.items():
        put_notebook(tmp_path, name, write_cell(f"{name}.csv"), fault)
    put_notebook(tmp_path, "sound", write_cell("sound.csv"), "assert x == 2")
    assert reproduce.run(root=tmp_path, stages=tuple(stages), parameters={"x": 2}) == 1
    printed = capsys.readouterr().out
    assert "cell 4 raised SystemExit:\n    " in printed and "| sys.exit(0)" in printed
    assert "Kernel died" in printed and "cell 4 wasn't executed to its end" in printed
    assert "stray.csv was written but isn't declared in STAGES" in printed
    assert printed.rstrip().endswith("failed: exits, dies, strays")
    notebooks = {path.name for path in (tmp_path / "runs/smoke/notebooks").iterdir()}
    assert notebooks == {"exits.failed.ipynb", "dies.failed.ipynb", "strays.failed.ipynb", "sound.ipynb"}
    assert dry_run(tmp_path, capsys, stages[-1])[1:] == ["parameter x: 2 -> 1"]
    assert "its last run failed" in dry_run(tmp_path, capsys, stages[0])


def test_a_failing_run_keeps_the_earlier_copy(root, capsys):
    earlier = (root / "runs/smoke/notebooks/a.ipynb").read_bytes()
    put_notebook(root, "a", WRITE, "y = 0\nprint(x / y)")
    assert reproduce.run(root=root, stages=(A,)) == 1
    printed = capsys.readouterr().out
    assert "cell 4 raised ZeroDivisionError" in printed and "| print(x / y)" in printed and "a.failed.ipynb" in printed
    assert (root / "runs/smoke/notebooks/a.ipynb").read_bytes() == earlier
    assert "ZeroDivisionError" in (root / "runs/smoke/notebooks/a.failed.ipynb").read_text()


def test_outputs_have_to_be_rewritten_and_to_open(tmp_path):
    sound = {"a.pdf": b"%PDF-1.4\n%%EOF\n", "a.csv": b"x,y\n1,2\n", "a.json": b"{}", "a.md": b"| a |\n"}
    broken = {
        "b.pdf": b"%PDF-1.4\ncut off",
        "b.png": b"\x89PNG\r\n\x1a\n\0\0",
        "b.csv": b"x,y\n",
        "b.json": b"{",
        "b.md": b"\n",
    }
    (tmp_path / "old.csv").write_bytes(b"x\n1\n")
    before = notebook.stamps(tmp_path)
    for name, data in {**sound, **broken}.items():
        (tmp_path / name).write_bytes(data)
    outputs = ["old.csv", "absent.csv", *sound, *broken]
    problems = notebook.output_problems(tmp_path, outputs, [], before)
    assert problems[:2] == ["old.csv was declared but not written", "absent.csv was declared but not written"]
    assert [problem.split(" doesn't open: ")[0] for problem in problems[2:]] == list(broken)


def test_a_rewrite_with_equal_bytes_counts(tmp_path):
    files.write(tmp_path / "a.csv", "x\n1\n")
    before = notebook.stamps(tmp_path)
    files.write(tmp_path / "a.csv", "x\n1\n")
    assert notebook.output_problems(tmp_path, ["a.csv"], [], before) == []


# ---- cut off ---------------------------------------------------------------------------------------------------------


def processes_of(root: Path) -> list[str]:
    """The living processes that work in a root's notebooks: the child and its kernel."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            found += [path.parent.name] if path.readlink() == root / "notebooks" else []
    return found


def wait_until(condition) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@linux
def test_killed_or_interrupted_it_goes_on(tmp_path, capsys):
    """kill -9, then Ctrl-C, while the second stage hangs: no process stays, and the next run does only what is left."""
    stages = (Stage("a", ("a.csv",), "", 0.1), Stage("b", ("b.csv",), "", 0.1))
    hold, reached = tmp_path / "hold", tmp_path / "reached"
    wait = f"import time\nfrom pathlib import Path\nPath({str(reached)!r}).touch()\n"
    wait += f"while Path({str(hold)!r}).exists():\n    time.sleep(0.1)"
    put_notebook(tmp_path, "a", write_cell("a.csv"))
    put_notebook(tmp_path, "b", wait, write_cell("b.csv"))
    hold.touch()

    first = subprocess.Popen(script(tmp_path, *stages), stdout=subprocess.DEVNULL)
    wait_until(reached.exists)
    with pytest.raises(InputError, match="already running"):
        reproduce.run(root=tmp_path, stages=stages)
    assert len(processes_of(tmp_path)) == 2
    first.kill()
    first.wait()
    wait_until(lambda: not processes_of(tmp_path))
    done = files.file_digest(tmp_path / "runs/smoke/stages/a.json")
    left_over = [tmp_path / "figures/smoke/.b.csv.abcd_123.csv", tmp_path / "runs/smoke/stages/.b.json.0123456a.json"]
    for path in left_over:
        path.touch()
    assert dry_run(tmp_path, capsys, *stages)[::2] == ["a: up to date", "its last run was cut off"]

    reached.unlink()
    second = subprocess.Popen(script(tmp_path, *stages), stdout=subprocess.PIPE, text=True)
    wait_until(reached.exists)
    second.send_signal(signal.SIGINT)
    printed, _ = second.communicate(timeout=600)
    assert second.returncode == 130
    assert "a ... up to date" in printed and "b was cut off; the same command goes on from here" in printed
    assert not processes_of(tmp_path)
    assert not any(path.exists() for path in left_over)

    hold.unlink()
    assert reproduce.run(root=tmp_path, stages=stages) == 0
    assert (tmp_path / "figures/smoke/b.csv").exists()
    assert files.file_digest(tmp_path / "runs/smoke/stages/a.json") == done


# ---- the terminal ----------------------------------------------------------------------------------------------------


class OneSecond:
    """A process that ends once it was waited for a second."""

    def __init__(self):
        self.waits = iter([1, 2])

    def wait(self, timeout):
        if next(self.waits) == 1:
            raise subprocess.TimeoutExpired("", timeout)


def test_newest_progress_line_is_shown_on_a_terminal_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: 101.0)
    log = tmp_path / "log"
    log.write_bytes(b"epoch 1\n\r step 1/9\r\x1b[2K step 2/9 \r\n")
    assert notebook.last_line(log) == "step 2/9"
    for terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        reproduce._watch(OneSecond(), "[1/2] a", log, started=100.0)
        assert ("[1/2] a ... 1 s  step 2/9" in capsys.readouterr().out) == terminal
