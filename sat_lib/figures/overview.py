"""Tables for a first look: what was found, how fast attention is, how many claims hold. Nothing here measures.

    frames = {"accuracy": ..., "step": ...}     # experiment -> its rows, as experiments.rows returns them
    findings(frames)

The rows are those of the other notebooks, so both say the same.
"""

import numpy as np
import pandas as pd

from . import ablations, cell, claims, document_table, speed
from .evidence import Frames, column, where, with_sources
from .judge import WORDS, gap
from .published import published_value, task_name

SHAPES = (  # batch, length, head size, density: short, the published workload, long, wide, denser, everything kept
    (256, 512, 32, 0.05),
    (512, 1024, 32, 0.05),
    (8, 16384, 32, 0.05),
    (128, 1024, 128, 0.05),
    (512, 1024, 32, 0.25),
    (512, 1024, 32, 1.0),
)
TASKS = ("cifar10", "agnews")


# ---- what was found --------------------------------------------------------------------------------------------------


def findings(frames: Frames) -> pd.DataFrame:
    """One line a finding: what was compared, by how much it differs, and the notebook that shows it.

    A difference of accuracies is one of means over seeds, with its standard error. "-" where a row isn't there.
    """
    less = lambda one, other: difference(frames["accuracy"], {"attention": one}, {"attention": other}, task="cifar10")
    ours = less("sat", "dense")
    published = "" if ours == "-" else f" (published {published_value('gain.cifar10'):+.2f})"
    neighbours = f"LSG {less('lsg', 'sat')}, Longformer {less('longformer', 'sat')}"

    change = lambda *pair: ", ".join(
        f"{task_name(task)} {difference(frames['ablations'], *pair, task=task)}" for task in TASKS
    )
    blocks = change({"group": "preset", "value": "best"}, {"group": "preset", "value": "best, all blocks"})
    pruned = change({"group": "pruned", "value": "zero"}, {"group": "layout", "value": "correlation, learned"})

    (claim,) = (one for one in claims.claims() if "no more attention than random" in one.text)
    kept = claims.verdict(claim, with_sources(frames))["ours"]
    sat = {"attention": "sat", "pattern": "learned", "pruned": "zero", "density": 0.5}
    tuned = difference(frames["finetuning"], sat, {"attention": "dense"}, model="minilm", data="mrpc")

    lines = [
        ("accuracy: SAT as published less dense attention, CIFAR-10", ours + published, "03_accuracy"),
        ("accuracy: LSG and Longformer less SAT as published, CIFAR-10", neighbours, "03_accuracy"),
        ('accuracy: SAT with the preset "best" less others, CIFAR-10', _best(frames), "06_ablations"),
        ('accuracy: "best" keeping 1.6 % of the blocks less "best" keeping all', blocks, "06_ablations"),
        ("accuracy: pruned entries left in the softmax, as published, less dropped", pruned, "06_ablations"),
        ("attention held by the blocks that SAT keeps as published, CIFAR-10", kept, "08_explore"),
        ("time of a training step over SAT's: CIFAR-10, AG News", _steps(frames), "04_step_time"),
        ("accuracy: MiniLM fine-tuned on MRPC, SAT at a density of 0.5 less dense", tuned, "09_finetuning"),
    ]
    return pd.DataFrame(lines, columns=["finding", "number", "notebook"])


def _best(frames: Frames) -> str:
    """Against the others as published, and with the average of the weights that "best" has."""
    table = where(ablations.best_table(frames), task="CIFAR-10")
    names = ("dense", "dense, averaged", "longformer, averaged")
    dense, averaged, longformer = (_last(table, "best gains", attention=name) for name in names)
    return f"dense {dense}; others with its average of the weights: dense {averaged}, Longformer {longformer}"


def _steps(frames: Frames) -> str:
    table = speed.step_table(frames["step"]) if len(frames["step"]) else pd.DataFrame()
    kinds = {
        "bigbird, kernel": "BigBird through SAT's kernel",
        "dense": "dense",
        "bigbird, transformers": "BigBird as transformers has it",
    }
    columns, told = [f"{task_name(task)} time / SAT's" for task in TASKS], []
    for kind, label in kinds.items():
        cells = [_last(table, column, **{"step of": kind}) for column in columns]
        told.append(f"{label} {', '.join(cells)}")
    return "; ".join(told)


def difference(rows: pd.DataFrame, one: dict, other: dict, **both) -> str:
    """Percentage points by which the mean accuracy of some runs is above that of others, with its standard error.

    Args:
        one, other, both: columns and their values. "-" where there are no such rows of one of them.
    """
    found = gap(*(100 * column(where(rows, **both, **equal), "test_accuracy") for equal in (one, other)))
    return "-" if found is None else found.numbers


def _last(table: pd.DataFrame, column: str, **equal) -> str:
    lines = where(table, **equal)
    return lines[column].iloc[-1] if len(lines) else "-"


# ---- how fast --------------------------------------------------------------------------------------------------------


def attention_speed(lines: pd.DataFrame) -> pd.DataFrame:
    """Forward and backward of block-sparse attention at `SHAPES`, and how many times as long its peers take.

    Args:
        lines: of `experiments.kernel_summary`.

    bfloat16, blocks of 32. FlexAttention has the same layout, at its fastest block side; a dash where it wasn't timed.
    """
    lines = lines[lines["sweep"].isin(["length", "head_size", "density"])]
    fused = lines[(lines["method"] == "fused") & (lines["dtype"] == "bfloat16") & (lines["block"] == 32)]
    shapes = fused[["batch", "length", "head_size", "density"]].astype(float)
    lines = pd.concat([fused[np.isclose(shapes, wanted).all(axis=1)].head(1) for wanted in SHAPES])
    sides = lines[["batch", "heads", "length", "head_size"]].itertuples(index=False)
    columns = {
        "batch x heads x length x head size": "shape",
        "density": "share",
        "SAT ms": ("forward + backward ms", ".3g"),
        "SDPA / SAT": ("sdpa", ".2f"),
        "FlexAttention / SAT": ("flex", ".2f"),
    }
    shape = [f"{batch} x {heads} x {length:,} x {head_size}" for batch, heads, length, head_size in sides]
    share = [cell(density, ".0f", 100) + " %" for density in lines["density"]]
    return document_table(lines.assign(shape=shape, share=share), columns)


# ---- how many claims hold --------------------------------------------------------------------------------------------


def verdict_counts(table: pd.DataFrame) -> pd.DataFrame:
    """How many claims have which verdict, from `claims.verdict_table`."""
    counts = table["verdict"].value_counts().reindex(WORDS, fill_value=0)
    return counts.rename_axis("verdict").reset_index(name="claims")


def claim_table(table: pd.DataFrame) -> pd.DataFrame:
    """`claims.verdict_table` without the reasons, the figure last."""
    columns = ["claim", "command", "hardware", "minutes", "published", "ours", "verdict", "output"]
    return table[columns].rename(columns={"output": "figure, table or test"})
