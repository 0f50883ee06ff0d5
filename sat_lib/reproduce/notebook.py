"""One notebook, executed by papermill in a process of its own, and believed only after inspection.

papermill's own verdict isn't enough: `sys.exit()` in a cell ends "successfully", and a kernel that was killed leaves a
notebook that looks clean. So a run counts only if no cell shows an error, every cell was executed, and every declared
output was rewritten during the run and opens.

`start` and `stop` are for the parent process; `main` is what the child process does: it reads `job.json` in its work
folder and leaves `executed.ipynb` and `report.json` there.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

from ..common import files

INSERTED = {"injected-parameters", "papermill-error-cell-tag"}  # cells that papermill adds; they aren't numbered
CHILD = "import pathlib, sys; from sat_lib.reproduce.notebook import main; main(pathlib.Path(sys.argv[1]))"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


# ---- the parent's side -----------------------------------------------------------------------------------------------


def start(job: dict, work: Path, log: Path, stage_digest: str | None) -> subprocess.Popen:
    """Start the child that executes a notebook; it and its kernel end when this process does.

    Args:
        job: `notebook` (path), `parameters` (name -> value), `figures` (folder that the notebook writes to), `outputs`
            (names that it has to write there), `known` (names there that may be written besides).
        work: an empty folder for the job, the executed notebook and the report.
        log: file for everything that the notebook prints.
        stage_digest: handed to the notebook as `SAT_LIB_STAGE`, for the provenance stamp of what it writes; None: a
            figure drawn from committed rows is stamped with these alone.
    """
    bin_folder = Path(sys.executable).parent
    files.write_json(work / "job.json", {**job, "log": str(log), "parent": os.getpid()})
    environment = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}",  # where ninja is
        "PYTHONPATH": os.pathsep.join(filter(None, [str(files.ROOT), os.environ.get("PYTHONPATH")])),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "IPYTHONDIR": str(work / "ipython"),  # no start-up files of the user
    }
    environment.pop("SAT_LIB_STAGE", None)
    if stage_digest is not None:
        environment["SAT_LIB_STAGE"] = stage_digest
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(work)],
            cwd=Path(job["notebook"]).parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then calls `stop`
        )


def stop(process: subprocess.Popen) -> None:
    """End a child and its kernel, and wait until they are gone."""
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_line(log: Path) -> str:
    """The newest non-empty line of a log; a progress bar's carriage return begins a line too."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = re.split(r"[\r\n]", ANSI.sub("", file.read().decode(errors="replace")))
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def report(work: Path, log: Path, status: int) -> dict:
    """What the child found: `problems` (none: the run counts) and `peak_rss_bytes` of its kernel."""
    path = work / "report.json"
    if status == 0 and path.exists():
        return json.loads(path.read_text())
    tail = "".join(f"\n    {line}" for line in log.read_text(errors="replace").splitlines()[-8:])
    problem = f"its process ended with status {status}; the log's last lines:{tail}"
    return {"problems": [problem], "peak_rss_bytes": None}


# ---- the child's side ------------------------------------------------------------------------------------------------


def main(work: Path) -> None:
    """Execute the notebook of `work/job.json`, inspect what came of it, write `work/report.json`."""
    job = json.loads((work / "job.json").read_text())
    die_with(job["parent"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so the kernel is shut down
    figures = Path(job["figures"])
    before = stamps(figures)
    problems = execute(job, work / "executed.ipynb")
    problems = problems or output_problems(figures, job["outputs"], job["known"], before)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    files.write_json(work / "report.json", {"problems": problems, "peak_rss_bytes": peak})


def die_with(parent: int) -> None:
    """Have this process killed when its parent dies (Linux). The kernel watches this process in the same way."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def execute(job: dict, executed: Path) -> list[str]:
    """Run the notebook into `executed` and list what is wrong with it as a run; empty when nothing is."""
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    work = executed.parent
    sockets = os.path.relpath(work / "socket")  # relative to the notebook's folder: a socket's path has to be short
    manager = {"transport": "ipc", "ip": sockets, "connection_file": str(work / "kernel.json")}
    failure = []
    with Path(job["log"]).open("a") as log:
        try:
            papermill.execute_notebook(
                job["notebook"],
                str(executed),
                parameters=job["parameters"],
                kernel_name="python3",
                progress_bar=False,
                stdout_file=log,
                stderr_file=log,
                config=Config({"KernelManager": manager}),
            )
        except PapermillExecutionError as error:
            failure = [ANSI.sub("", str(error)).strip()]
        except RuntimeError as error:  # from nbclient: the kernel died or doesn't answer
            failure = [f"{error} (killed from outside, out of memory, or a crash in compiled code)"]
    cells = json.loads(executed.read_text())["cells"] if executed.exists() else []
    return cell_problems(cells, failure)


def cell_problems(cells: list[dict], failure: list[str]) -> list[str]:
    """The first cell of an executed notebook that failed or wasn't executed, with what `failure` says beside it.

    Of a failing cell these are its number, the first lines of its source, the last lines of its traceback.
    """
    original = [cell for cell in cells if not INSERTED & set(cell["metadata"].get("tags", ()))]
    for number, cell in enumerate(original, 1):
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        errors = [output for output in cell["outputs"] if output["output_type"] == "error"]
        source = "\n".join(f"    | {line}" for line in "".join(cell["source"]).splitlines()[:4])
        if errors:
            error = errors[0]
            traceback = ANSI.sub("", "\n".join(error["traceback"])) or f"{error['ename']}: {error['evalue']}"
            lines = [f"    {line}" for line in traceback.splitlines() if line.strip()][-4:]
            return ["\n".join([f"cell {number} raised {error['ename']}:", source, *lines])]
        if cell["execution_count"] is None or "shell.execute_reply" not in cell["metadata"].get("execution", {}):
            return [*failure, f"cell {number} wasn't executed to its end:\n{source}"]
    return failure


# ---- what it wrote ---------------------------------------------------------------------------------------------------


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """File name -> inode and times, which a rewrite changes even where the bytes stay the same; no hidden files."""
    listed = {path.name: path.stat() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in listed.items()}


def output_problems(figures: Path, outputs: list[str], known: list[str], before: dict) -> list[str]:
    """Declared outputs that weren't rewritten or don't open, and written files that nobody declared."""
    written = {name for name, stamp in stamps(figures).items() if before.get(name) != stamp}
    missing = [f"{name} was declared but not written" for name in outputs if name not in written]
    unknown = [f"{name} was written but isn't declared in STAGES" for name in sorted(written - {*outputs, *known})]
    faults = {name: defect(figures / name) for name in outputs if name in written}
    return missing + unknown + [f"{name} doesn't open: {fault}" for name, fault in faults.items() if fault]


def defect(path: Path) -> str | None:
    """What keeps a figure, table or data file from being readable; None for a sound one."""
    data = path.read_bytes()
    if not data.strip():
        return "it is empty"
    try:
        match path.suffix:
            case ".pdf" if not data.startswith(b"%PDF") or b"%%EOF" not in data[-1024:]:
                return "not a whole PDF"
            case ".png":
                from PIL import Image

                with Image.open(path) as image:
                    image.load()
            case ".csv":
                import pandas

                if pandas.read_csv(path).empty:
                    return "a header and no rows"
            case ".json":
                json.loads(data)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow reports a broken chunk as SyntaxError
        return str(error)
    return None
