"""The notebooks, executed end to end and incrementally: only a stage whose parts changed runs again.

    notebooks/<stage>.ipynb -> figures/<profile>/<stage>.pdf .png .csv .json, and there summary.csv .md .json
    runs/<profile>/notebooks/<stage>.ipynb    the executed notebook (<stage>.failed.ipynb: the last failure)
    runs/<profile>/logs/<stage>.log           what it printed

torch and papermill are imported by the stages' own processes alone, pandas besides once a stage has run, so it takes a
second to find that everything is up to date. The state of a stage is written when it ends: doit, which could run the
stages, writes all states when the command ends, and a kill would lose them. stages: what a stage is made of, and
whether that changed; notebook: one of them executed; documents: the tables that README and REPRODUCE quote.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ..common import files
from ..common.errors import require
from . import notebook
from .stages import Place, Stage, environment, stage_key

Names = tuple[str, ...]
PROFILES = ("smoke", "paper")
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}(\.\w+)?")  # names that files.atomic_path gives


def _figure(
    name: str, look: str, minutes: float, tables: Names = (), figures: Names = (), experiments: Names = ()
) -> Stage:
    """A notebook that draws a figure of its own name, others besides, and tables, from the rows of experiments."""
    rows = tuple(f"data/results/{experiment}.jsonl" for experiment in experiments or (name[3:],))
    return Stage(name, _outputs((name, *figures), tables), look, minutes, rows=rows)


def _outputs(figures: Names, tables: Names) -> Names:
    """The files of some figures and tables."""
    drawn = [f"{figure}.{kind}" for figure in figures for kind in ("pdf", "png", "csv", "json")]
    return (*drawn, *(f"{table}.{kind}" for table in tables for kind in ("csv", "md")))


STAGES = (
    _figure(
        "01_motivation",
        "Attention maps of a ViT and a BERT while they are fine-tuned: many entries near 0, the rhythm of the patch "
        "grid in images, a thick diagonal in text; the untrained models' maps are nearly even but for padding.",
        0.5,
        tables=("01_motivation_table",),
    ),
    _figure(
        "02_training",
        "At the transition the skewness of every layer is above theta and the change of its distance below delta; "
        "the loss goes on falling in the sparse phase.",
        0.5,
    ),
    _figure(
        "03_accuracy",
        "SAT beside the other attentions and the published means of five runs (published: SAT first on AG News and "
        "Yelp, Longformer first on CIFAR-10 and iNaturalist).",
        3.5,
        tables=("03_accuracy_table", "03_accuracy_short_table"),
        figures=("03_accuracy_short",),
        experiments=("accuracy", "accuracy_short"),
    ),
    _figure(
        "04_step_time",
        "Time of a training step by method (published: BigBird takes 2.45 to 2.84 times as long as SAT).",
        0.5,
        tables=("04_step_time_table",),
        experiments=("step",),
    ),
    _figure(
        "05_time_breakdown",
        "Which dense operation takes longest, and which gains (published: the softmax, 37.3 times; SDDMM 1.6, "
        "SpMM 2.3).",
        0.25,
        tables=("kernels",),
        experiments=("kernels",),
    ),
    _figure(
        "06_ablations",
        "Where the accuracy comes from: what W^P learns with the released and with a calibrated start, and the test "
        "accuracy by layout, rule for pruned entries, transition, rate, average of the weights, density and block. "
        "With one seed of small runs all layouts are within noise of each other; at the paper's scale those that hold "
        "most attention are the least accurate on CIFAR-10.",
        1.5,
        tables=("06_ablations_table", "06_switch_table", "06_diagnosis_table", "06_best_table"),
        figures=("06_changes", "06_diagnosis"),
        experiments=("ablations", "diagnosis", "best", "accuracy", "accuracy_short"),
    ),
    _figure(
        "07_scaling",
        "Time and peak memory over sequence length and density: dense attention grows with the square of the length, "
        "SAT with its kept blocks; memory against both dense kinds (published: up to 6.87 times less). And the "
        "throughput of several processes that train one model.",
        0.75,
        tables=("07_data_parallel_table", "07_data_parallel_runs"),
        figures=("07_data_parallel",),
        experiments=("kernels", "data_parallel"),
    ),
    _figure(
        "08_explore",
        "Mass of single attention maps that each pattern keeps: the best blocks hold several times their share, the "
        "learned ones about as much as random ones. The notebook also has the interactive explorer.",
        0.75,
        experiments=("patterns",),
    ),
    _figure(
        "09_finetuning",
        "Test accuracy of pretrained models fine-tuned dense and with SAT, by density, and the time of a step "
        "(published: SAT also serves for fine-tuning; no numbers).",
        1.5,
        tables=("09_finetuning_table", "09_finetuning_steps"),
        experiments=("finetuning", "pretrained_step"),
    ),
    Stage(
        "10_claims",
        _outputs(
            ("readme", "verdicts_figure"),
            ("verdicts", "verdicts_short", "reproduce", "verdict_counts", "findings", "attention_speed", "smoke"),
        ),
        "Which of the paper's claims hold, by the committed rows: our gains and ratios beside the published ones.",
        0.5,
        reads=("data/results/*.jsonl",),
    ),
)


def run(
    profile: str = "smoke",
    only: Names = (),
    force: bool = False,
    dry_run: bool = False,
    draw_only: bool = False,
    root: Path = files.ROOT,
    stages: tuple[Stage, ...] = STAGES,
    parameters: dict | None = None,
) -> int:
    """Bring the stages of a profile up to date and return the exit status: 0, 1 (a stage failed), 130 (Ctrl-C).

    Args:
        profile: "smoke" or "paper".
        only: names of stages, or beginnings of them such as "03"; all without it.
        force: run stages that are up to date too.
        dry_run: only say what would run and why.
        draw_only: measure nothing; the notebooks draw and check the rows that are there. A state of its own.
        root: the folder that holds notebooks, data, figures and runs.
        parameters: values for the notebooks' parameters, such as {"device": "cpu"}; another value makes stale.

    Raises:
        InputError: no notebooks, as in an installed wheel; an unknown profile or stage; a notebook that breaks the
            rules of `stages.stage_key`; or another run of this profile is going on.
    """
    require(profile in PROFILES, f"profile must be one of {', '.join(PROFILES)}; got {profile!r}")
    for wanted in only:
        known = [stage.name for stage in stages]
        require(any(name.startswith(wanted) for name in known), f"no stage {wanted!r}; there are {', '.join(known)}")
    chosen = [stage for stage in stages if stage.name.startswith(tuple(only) or "")]
    place = Place(Path(root), profile, parameters or {}, draw_only)
    absent = f"{root} has no notebooks. They are in the repository, not in a wheel: run this in a checkout"
    require((place.root / "notebooks").is_dir(), absent)
    if dry_run:
        for stage, reasons in {stage: place.why_stale(stage, force) for stage in chosen}.items():
            verdict = f"would run, about {place.minutes(stage):g} min" if reasons else "up to date"
            print("\n    ".join([f"{stage.name}: {verdict}", *reasons]))
        return 0
    with files.lock(place.runs / "lock", f"reproduce --profile {profile}"):
        _prepare(place)
        why = {stage: place.why_stale(stage, force) for stage in chosen}
        if not any(why.values()) and (draw_only or (place.figures / "summary.json").exists()):
            print("everything is up to date")
            for stage in chosen:
                _warn_of_environment(place, stage)
            return 0
        return _run_stages(place, why, stages)


def _prepare(place: Place) -> None:
    """Make the folders and sweep what a killed run left behind; the lock is held."""
    shutil.rmtree(place.runs / "work", ignore_errors=True)
    for folder in (place.figures, place.runs / "stages", place.runs / "notebooks"):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_file() and TEMPORARY.fullmatch(path.name):
                path.unlink()


# ---- running stages --------------------------------------------------------------------------------------------------


def _run_stages(place: Place, why: dict[Stage, list[str]], stages: tuple[Stage, ...]) -> int:
    minutes = sum(place.minutes(stage) for stage, reasons in why.items() if reasons)
    print(f"{sum(map(bool, why.values()))} of {len(why)} stages to run, about {minutes:g} min", flush=True)
    known = sorted({name for stage in stages for name in stage.outputs})
    failed = []
    for number, (stage, reasons) in enumerate(why.items(), 1):
        label = f"[{number}/{len(why)}] {stage.name}"
        if not reasons:
            print(f"{label} ... up to date", flush=True)
            _warn_of_environment(place, stage)
            continue
        try:
            if not _run_stage(place, stage, label, known):
                failed.append(stage.name)
        except KeyboardInterrupt:
            print(f"\n{stage.name} was cut off; the same command goes on from here", flush=True)
            return 130
    if not place.draw_only:  # its seconds say nothing of how long measuring takes
        _summarise(place, stages)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def _warn_of_environment(place: Place, stage: Stage) -> None:
    before, now = place.state(stage)["environment"], environment()
    differing = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if differing:
        print(f"    {stage.name} was made in another environment ({', '.join(differing)}); --force runs it again")


def _run_stage(place: Place, stage: Stage, label: str, known: list[str]) -> bool:
    """Execute one notebook, keep its executed copy and its state, print the outcome; whether it succeeded."""
    key, work, log = stage_key(stage, place), place.runs / "work", place.runs / "logs" / f"{stage.name}.log"
    place.record(stage, "running", key)
    work.mkdir()
    job = {
        "notebook": str(place.notebook(stage)),
        "parameters": place.given,
        "figures": str(place.figures),
        "outputs": stage.outputs,
        "known": known,
    }
    started = time.monotonic()
    process = notebook.start(job, work, log, None if place.draw_only else files.digest(key))
    try:
        _watch(process, label, log, started)
    except KeyboardInterrupt:
        notebook.stop(process)
        raise
    seconds = round(time.monotonic() - started, 1)
    report = notebook.report(work, log, process.returncode)
    failed = bool(report["problems"])
    if (work / "executed.ipynb").exists():
        (work / "executed.ipynb").replace(place.executed(stage, failed))
    shutil.rmtree(work)
    if failed:
        place.record(stage, "failed", key, seconds=seconds)
        lines = [line for problem in report["problems"] for line in problem.splitlines()]
        lines += [f"notebook: {place.executed(stage, failed)}", f"log: {log}"]
        _replace_line("\n    ".join([f"{label} ... FAILED after {seconds:.0f} s", *lines]))
        return False
    place.executed(stage, failed=True).unlink(missing_ok=True)
    after = stage_key(stage, place)
    key["rows"] = after["rows"]  # a notebook may measure, and so add to, the rows that it reads
    status = "done" if key == after else "changed"
    place.record(
        stage, status, key, outputs=place.outputs(stage), seconds=seconds, peak_rss_bytes=report["peak_rss_bytes"]
    )
    _replace_line(f"{label} ... {seconds:.0f} s")
    return True


def _watch(process: subprocess.Popen, label: str, log: Path, started: float) -> None:
    """Wait for a stage; show its newest progress line every second on a terminal, every minute elsewhere."""
    terminal, told = sys.stdout.isatty(), started
    while True:
        try:
            process.wait(timeout=1)
            return
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        line = f"{label} ... {now - started:.0f} s  {notebook.last_line(log)}"
        if terminal:
            width = shutil.get_terminal_size().columns
            print(f"\r{line[: width - 1]}\x1b[K", end="", flush=True)
        elif now - told >= 60:
            print(line, flush=True)
            told = now


def _replace_line(text: str) -> None:
    """Print a line in place of the progress line, if there is one."""
    print(f"\r\x1b[K{text}" if sys.stdout.isatty() else text, flush=True)


# ---- the summary -----------------------------------------------------------------------------------------------------


def _summarise(place: Place, stages: tuple[Stage, ...]) -> None:
    """Print the table of all stages, and write it as figures/<profile>/summary.csv, .md and .json."""
    import pandas as pd

    rows = [_summary_row(stage, place.state(stage) or {"status": "never run"}) for stage in stages]
    print(f"\n{'stage':20}{'seconds':>8}  written to {place.figures}, and what to look at")
    for row in rows:
        print(f"{row['stage']:20}{row['seconds']:>8}  {row['written']}\n{'':30}{row['look at']}", flush=True)
    table = pd.DataFrame(rows).drop(columns="peak_rss_bytes")
    files.write(place.figures / "summary.csv", table.to_csv(index=False))
    lines = [table.columns, ["---"] * len(table.columns), *table.astype(str).to_numpy()]
    files.write(place.figures / "summary.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    summary = {
        "profile": place.profile,
        "commit": files.commit(place.root),
        "environment": environment(),
        "device": f"{files.processor()}, {os.cpu_count()} cores",
        "total_seconds": round(sum(row["seconds"] or 0 for row in rows), 1),
        "stages": rows,
    }
    files.write_json(place.figures / "summary.json", summary)


def _summary_row(stage: Stage, state: dict) -> dict:
    """Kinds of one stem stand together: "a.pdf .png, b.csv"; what didn't finish says so instead."""
    stems = itertools.groupby(map(Path, stage.outputs), key=lambda path: path.stem)
    written = ", ".join(stem + " ".join(path.suffix for path in paths) for stem, paths in stems)
    finished = state["status"] in ("done", "changed")
    return {
        "stage": stage.name,
        "seconds": state.get("seconds", ""),
        "written": written if finished else f"nothing ({state['status']})",
        "look at": stage.look,
        "peak_rss_bytes": state.get("peak_rss_bytes"),
    }
