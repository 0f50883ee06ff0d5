"""Tables for a first look: what was found, how fast attention is, how many claims hold. Nothing here measures.

    frames = {"accuracy": ..., "step": ...}     # experiment -> its rows, as experiments.rows returns them
    findings(frames)

Numbers are taken from the tables of the other notebooks, so both say the same.
"""

import numpy as np
import pandas as pd

from . import ablations, claims, pretrained, speed, training
from .evidence import where, with_sources
from .judge import WORDS, Gap

SHAPES = (  # batch, length, head size, density: short, the published workload, long, wide, denser, everything kept
    (256, 512, 32, 0.05),
    (512, 1024, 32, 0.05),
    (8, 16384, 32, 0.05),
    (128, 1024, 128, 0.05),
    (512, 1024, 32, 0.25),
    (512, 1024, 32, 1.0),
)
MEAN = ["mean", "deviation", "runs"]


# ---- what was found --------------------------------------------------------------------------------------------------


def findings(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One line a finding: what was compared, by how much it differs, and the notebook that shows it.

    A difference of accuracies is one of means over seeds, with its standard error. "-" where a row isn't there.
    """
    lines = [
        ("accuracy: SAT as published less dense attention, CIFAR-10", _published(frames), "03_accuracy"),
        ("accuracy: LSG and Longformer less SAT as published, CIFAR-10", _neighbours(frames), "03_accuracy"),
        ('accuracy: SAT with the preset "best" less others, CIFAR-10', _best(frames), "06_ablations"),
        ('accuracy: "best" keeping 1.6 % of the blocks less "best" keeping all', _blocks(frames), "06_ablations"),
        ("accuracy: pruned entries left in the softmax, as published, less dropped", _pruned(frames), "06_ablations"),
        ("attention held by the blocks that SAT keeps as published, CIFAR-10", _kept(frames), "08_explore"),
        ("time of a training step over SAT's: CIFAR-10, AG News", _steps(frames), "04_step_time"),
        ("accuracy: MiniLM fine-tuned on MRPC, SAT at a density of 0.5 less dense", _tuned(frames), "09_finetuning"),
    ]
    return pd.DataFrame(lines, columns=["finding", "number", "notebook"])


def _published(frames: dict[str, pd.DataFrame]) -> str:
    table = _means(frames, "accuracy", training.accuracy_table)
    ours = difference(table, {"attention": "sat"}, {"attention": "dense"}, task="CIFAR-10")
    published = where(table, task="CIFAR-10").set_index("attention")["published mean %"] if len(table) else {}
    both = {"sat", "dense"} <= set(published.keys())
    return f"{ours} (published {published['sat'] - published['dense']:+.2f})" if both else ours


def _neighbours(frames: dict[str, pd.DataFrame]) -> str:
    table = _means(frames, "accuracy", training.accuracy_table)
    sat, task = {"attention": "sat"}, {"task": "CIFAR-10"}
    lsg, longformer = (difference(table, {"attention": name}, sat, **task) for name in ("lsg", "longformer"))
    return f"LSG {lsg}, Longformer {longformer}"


def _best(frames: dict[str, pd.DataFrame]) -> str:
    """Against the others as published, and with the average of the weights that "best" has."""
    table = ablations.best_table(frames) if len(frames["best"]) else pd.DataFrame()
    gains = {
        name: _cell(where(table, task="CIFAR-10", attention=name), "best gains")
        for name in ("dense", "dense, averaged", "longformer, averaged")
    }
    averaged = f"dense {gains['dense, averaged']}, Longformer {gains['longformer, averaged']}"
    return f"dense {gains['dense']}; others with its average of the weights: {averaged}"


def _blocks(frames: dict[str, pd.DataFrame]) -> str:
    return _of_tasks(frames, {"changed": "preset", "to": "best"}, {"changed": "preset", "to": "best, all blocks"})


def _pruned(frames: dict[str, pd.DataFrame]) -> str:
    base = {"changed": "layout", "to": "correlation, learned"}
    return _of_tasks(frames, {"changed": "pruned", "to": "zero"}, base)


def _of_tasks(frames: dict[str, pd.DataFrame], one: dict, other: dict) -> str:
    """A difference of two lines of the ablations, on both tasks."""
    table = _means(frames, "ablations", ablations.ablation_table)
    return ", ".join(f"{task} {difference(table, one, other, task=task)}" for task in ("CIFAR-10", "AG News"))


def _kept(frames: dict[str, pd.DataFrame]) -> str:
    (claim,) = (one for one in claims.claims() if "no more attention than random" in one.text)
    return claims.verdict(claim, with_sources(frames))["ours"]


def _steps(frames: dict[str, pd.DataFrame]) -> str:
    table = speed.step_table(frames["step"]) if len(frames["step"]) else pd.DataFrame()
    kinds = {
        "bigbird, kernel": "BigBird through SAT's kernel",
        "dense": "dense",
        "bigbird, transformers": "BigBird as transformers has it",
    }
    told = []
    for kind, label in kinds.items():
        cells = [_cell(where(table, **{"step of": kind}), f"{task} time / SAT's") for task in ("CIFAR-10", "AG News")]
        told.append(f"{label} {', '.join(cells)}")
    return "; ".join(told)


def _tuned(frames: dict[str, pd.DataFrame]) -> str:
    table = _means(frames, "finetuning", pretrained.finetuning_table)
    sat = {"attention": "sat", "pattern": "learned", "pruned": "zero", "density": 0.5}
    return difference(table, sat, {"attention": "dense"}, model="MiniLM", data="MRPC")


def _means(frames: dict[str, pd.DataFrame], experiment: str, make) -> pd.DataFrame:
    """An experiment's table, its accuracies under the names in MEAN; empty without rows."""
    if not len(frames[experiment]):
        return pd.DataFrame()
    return make(frames[experiment]).rename(columns={"mean %": "mean", "test %": "mean"})


def difference(table: pd.DataFrame, one: dict, other: dict, **both) -> str:
    """Percentage points by which the mean of one line is above another's, with the standard error; "-" without both."""
    lines = [where(table, **both, **equal) for equal in (one, other)]
    if not all(map(len, lines)):
        return "-"
    (mean, deviation, runs), (other_mean, other_deviation, other_runs) = (
        pd.to_numeric(line.iloc[-1][MEAN], errors="coerce") for line in lines
    )
    error = np.sqrt(deviation**2 / runs + other_deviation**2 / other_runs)
    return Gap(mean - other_mean, error, (runs, other_runs)).numbers


def _cell(lines: pd.DataFrame, column: str) -> str:
    return str(lines[column].iloc[-1]) if len(lines) else "-"


# ---- how fast --------------------------------------------------------------------------------------------------------


def attention_speed(lines: pd.DataFrame) -> pd.DataFrame:
    """Forward and backward of block-sparse attention at `SHAPES`, and how many times as long its peers take.

    Args:
        lines: of `experiments.kernel_summary`.

    bfloat16, blocks of 32. FlexAttention has the same layout, at its fastest block side; a dash where it wasn't timed.
    """
    lines = lines[lines["sweep"].isin(["length", "head_size", "density"])]
    fused = lines[(lines["method"] == "fused") & (lines["dtype"] == "bfloat16") & (lines["block"] == 32)]
    shape = ["batch", "length", "head_size", "density"]
    table = []
    for wanted in SHAPES:
        same = fused[np.isclose(fused[shape].astype(float), wanted).all(axis=1)]
        for _, line in same.iloc[:1].iterrows():
            table.append(
                {
                    "batch x heads x length x head size": f"{line['batch']} x {line['heads']} x {line['length']:,} x "
                    f"{line['head_size']}",
                    "density": f"{100 * line['density']:.0f} %",
                    "SAT ms": f"{line['forward + backward ms']:.3g}",
                    "SDPA / SAT": _times(line["sdpa"]),
                    "FlexAttention / SAT": _times(line["flex"]),
                }
            )
    return pd.DataFrame(table)


def _times(ratio: float) -> str:
    return "-" if pd.isna(ratio) else f"{ratio:.2f}"


# ---- how many claims hold --------------------------------------------------------------------------------------------


def verdict_counts(table: pd.DataFrame) -> pd.DataFrame:
    """How many claims have which verdict, from `claims.verdict_table`."""
    counts = table["verdict"].value_counts().reindex(WORDS, fill_value=0)
    return pd.DataFrame({"verdict": counts.index, "claims": counts.to_numpy()})


def claim_table(table: pd.DataFrame) -> pd.DataFrame:
    """`claims.verdict_table` without the reasons, the figure last."""
    columns = ["claim", "command", "hardware", "minutes", "published", "ours", "verdict", "output"]
    return table[columns].rename(columns={"output": "figure, table or test"})
