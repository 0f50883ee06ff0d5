"""Figures and tables of the paper scale from committed rows."""

from functools import partial
from pathlib import Path

import pandas as pd

from .. import experiments, figures
from ..common import files
from ..figures import ablations, claims, claims_figure, evidence, patterns, pretrained, speed, training

# stage -> experiment whose rows it draws, which of them (None: all), and how
FIGURES = {
    "01_motivation": ("motivation", None, pretrained.motivation),
    "02_training": ("training", None, training.training),
    "03_accuracy": ("accuracy", None, training.accuracy),
    "03_accuracy_short": ("accuracy_short", None, partial(training.accuracy, published=False)),
    "04_step_time": ("step", None, speed.step_time),
    "05_time_breakdown": ("kernels", {"sweep": "operations"}, speed.time_breakdown),
    "06_ablations": ("ablations", None, ablations.ablations),
    "06_diagnosis": ("diagnosis", None, ablations.diagnosis),
    "07_scaling": ("kernels", {"sweep": "length"}, speed.scaling),
    "07_data_parallel": ("data_parallel", {"sweep": "step"}, training.data_parallel),
    "08_explore": ("patterns", None, patterns.patterns),
    "09_finetuning": ("finetuning", None, pretrained.finetuning),
}
# name -> experiment whose rows it sums up, and how
TABLES = {
    "01_motivation_table": ("motivation", pretrained.motivation_table),
    "03_accuracy_table": ("accuracy", training.accuracy_table),
    "03_accuracy_short_table": ("accuracy_short", partial(training.accuracy_table, published=False)),
    "04_step_time_table": ("step", speed.step_table),
    "06_ablations_table": ("ablations", ablations.ablation_table),
    "06_switch_table": ("ablations", ablations.switch_table),
    "06_diagnosis_table": ("diagnosis", ablations.diagnosis_table),
    "07_data_parallel_table": ("data_parallel", training.steps_table),
    "07_data_parallel_runs": ("data_parallel", training.runs_table),
    "09_finetuning_table": ("finetuning", pretrained.finetuning_table),
    "09_finetuning_steps": ("pretrained_step", pretrained.pretrained_step_table),
}
# name -> how the rows of all experiments are summed up
SUMMARIES = {"verdicts": claims.verdict_table, "verdicts_short": claims.short_table}
SUMMARIES |= {"06_best_table": ablations.best_table}


def draw_committed(root: Path = files.ROOT) -> int:
    """Draw every figure and table that data/results has rows for, and say which it hasn't.

    Returns the exit status, 0.
    """
    for stage, (experiment, only, draw) in FIGURES.items():
        rows = experiments.rows(experiment, "paper", measure=False, only=only, root=root)
        missing = rows.attrs["missing"]
        if not len(rows):
            print(f"{stage:18} no rows yet: python -m sat_lib bench {experiment} --profile paper (GPU)")
            continue
        figure, drawn = draw(rows)
        figures.save(stage, "paper", figure, drawn, rows, root)
        absent = f", {missing} cases without a row yet" if missing else ""
        print(f"{stage:18} {len(rows)} rows from {rows['device'][0]}{absent}")
    for name, (experiment, make) in TABLES.items():
        rows = experiments.rows(experiment, "paper", measure=False, root=root)
        if len(rows):
            figures.save_table(name, "paper", make(rows), root)
    _draw_kernel_table(root)
    _draw_verdicts(root)
    smoke = files.read_rows(root / "data/results/smoke.jsonl")
    if smoke:
        figures.save_table("smoke", "paper", smoke_table(smoke[-1]), root)
    return 0


def _draw_kernel_table(root: Path) -> None:
    """figures/paper/kernels.md, once both the main workload and the copy are measured."""
    copy, main = (
        experiments.rows("kernels", "paper", measure=False, only={"sweep": sweep}, root=root)
        for sweep in ("copy", "main")
    )
    if len(copy) and len(main):
        figures.save_table("kernels", "paper", speed.kernel_table(main, copy["bandwidth_tb_s"][0]), root)


def _draw_verdicts(root: Path) -> None:
    """What all rows say of the paper's claims: the tables, which without rows say "not run", and the figure."""
    frames = all_rows(root)
    for name, make in SUMMARIES.items():
        table = make(frames)
        if len(table):
            figures.save_table(name, "paper", table, root)
    rows = claims_figure.figure_rows(frames)
    if len(rows):
        figures.save("verdicts_figure", "paper", *claims_figure.verdict_figure(frames), rows, root)


def all_rows(root: Path = files.ROOT) -> dict[str, pd.DataFrame]:
    """Experiment -> its rows."""
    names = (*evidence.SOURCES, "best")
    return {name: experiments.rows(name, "paper", measure=False, root=root) for name in names}


def smoke_table(row: dict) -> pd.DataFrame:
    """The stages of one recorded smoke reproduction."""
    stages = [(stage["stage"], round(stage["seconds"]), stage["look at"]) for stage in row["stages"]]
    return pd.DataFrame(stages, columns=["stage", "seconds", "look at"])
