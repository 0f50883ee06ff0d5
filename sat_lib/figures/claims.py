"""What the rows say of the paper's claims: a verdict and a sentence each, and tables of them. Nothing here measures.

    frames = {"accuracy": ..., "step": ...}     # experiment -> its rows, cases, results and stamps side by side
    verdict_table(frames)

An experiment without rows is "not run"; no value of ours is written down here, every published one is.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from ..common import files
from ..datasets.tasks import task
from ..model.encoder import Encoder
from ..training.recipe import PAPER_TASKS, PUBLISHED, model_config
from . import PUBLISHED_ACCURACY, PUBLISHED_SPEED_UP, TASK_NAMES, training
from .speed import OPERATIONS
from .training import run_seconds

REPRODUCED, IN_DIRECTION, NOT_REPRODUCED, NOT_RUN = WORDS = (
    "reproduced",
    "reproduced in direction",
    "not reproduced",
    "not run",
)
ENOUGH = 0.8  # of a published ratio or gain that ours has to reach to count as reproduced
WHOLE = 0.75  # of the official training examples: with fewer, a run is one on a part of the data
SOURCES = ("accuracy", "accuracy_short", "training", "step", "kernels", "data_parallel", "motivation", "finetuning",
           "pretrained_step", "patterns")  # fmt: skip

# The paper's, and the released runs' and checkpoints'; accuracies and operations are in figures.py.
PUBLISHED_PARAMETERS = {"cifar10": 160_650, "inaturalist": 177_550, "agnews": 245_252, "yelp": 244_994}
PUBLISHED_SWITCH = {
    "images": (("cifar10", "inaturalist"), 157, 459, "step 157 to 459"),
    "AG News": (("agnews",), 0, 400, "before step 400"),
    "Yelp": (("yelp",), 3_400, 10_400, "step 3,400 to 10,400"),
}
PUBLISHED_BIGBIRD = {"agnews": 2.48, "yelp": 2.45, "cifar10": 2.84, "inaturalist": 2.74}  # step time over SAT's
PUBLISHED_MEMORY = 6.87
PUBLISHED_GPUS = 4
PUBLISHED_DENSE_MS = {"QK^T": 2.4, "softmax": 9.4, "AV": 4.0}
PUBLISHED_MODELS = ("google/vit-base-patch16-224-in21k", "bert-base-uncased")
NAMES = {"dense": "dense", "longformer": "Longformer", "bigbird": "BigBird", "lsg": "LSG", "sat": "SAT"}
SPARSE_OPERATIONS = {"softmax": "softmax", "QK^T": "SDDMM", "AV": "SpMM"}
ALWAYS_ONE = {"mrpc": 100 * 1147 / 1725, "digits": 10.0}  # percent right by always giving the most frequent answer
SAT_STEPS = ("sat, sparse phase", "sat, sparse phase, plain")
SIMILAR = {"yelp": "imdb"}  # a task that the paper doesn't have, trained with the recipe of one that it has

# What may differ from the published case in a row that still counts as the published method.
_SAME_METHOD = {"steps", "warm_up", "eval_every"}

_RUN = ["task", "attention", "seed", "model", "recipe"]  # what makes two runs the same

Frames = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Verdict:
    """One claim; `command` may hold several, with ", " between them."""

    claim: str
    command: str
    output: str
    hardware: str
    minutes: str
    published: str
    ours: str
    verdict: str
    why: str

    def __post_init__(self):
        assert self.verdict in WORDS, self.verdict


# ---- rules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """Difference of two means over seeds, and its standard error (NaN where one of them has a single seed)."""

    difference: float
    error: float
    seeds: tuple[int, int]

    @property
    def beyond(self) -> bool:
        return abs(self.difference) > 2 * self.error

    @property
    def numbers(self) -> str:
        """The difference, with its error where there is one."""
        return f"{self.difference:+.2f}" + ("" if np.isnan(self.error) else f" ± {self.error:.2f}")

    def __str__(self) -> str:
        if np.isnan(self.error):
            seeds = "one seed" if self.seeds == (1, 1) else f"{self.seeds[0]} and {self.seeds[1]} seeds"
            return f"{self.numbers} ({seeds}, no spread)"
        return f"{self.numbers} ({'beyond' if self.beyond else 'within'} the spread)"


def gap(values: pd.Series, others: pd.Series) -> Gap | None:
    """Mean of `values` less mean of `others`; None where one of them has nothing."""
    if not len(values) or not len(others):
        return None
    error = np.sqrt(sum(part.std(ddof=1) ** 2 / len(part) for part in (values, others)))
    return Gap(values.mean() - others.mean(), error, (len(values), len(others)))


def judge_ratio(ours: float, published: float) -> str:
    """Of "so many times as much": most of the published ratio, more than once, or not even that."""
    if np.isnan(ours):
        return NOT_RUN
    return REPRODUCED if ours >= ENOUGH * published else IN_DIRECTION if ours > 1 else NOT_REPRODUCED


def judge_gain(found: Gap | None, published: float = 0.0) -> str:
    """Of "more than": beyond the spread, and most of the published gain, is all; the right sign is the direction.

    But a difference within the spread, and so far below the published one that this lies outside, is no reproduction.
    """
    if found is None:
        return NOT_RUN
    excluded = not found.beyond and published - found.difference > 2 * found.error
    if found.difference <= 0 or excluded:
        return NOT_REPRODUCED
    return REPRODUCED if found.beyond and found.difference >= ENOUGH * published else IN_DIRECTION


def judge_order(gaps: Iterable[Gap | None]) -> str:
    """Of "before all the others": the worst of the single comparisons; one that isn't there leaves the direction."""
    words = [judge_gain(found) for found in gaps]
    measured = [word for word in words if word != NOT_RUN]
    if not measured:
        return NOT_RUN
    if NOT_REPRODUCED in measured:
        return NOT_REPRODUCED
    return REPRODUCED if set(words) == {REPRODUCED} else IN_DIRECTION


# ---- the claims, and helpers -----------------------------------------------------------------------------------------


def verdicts(frames: Frames) -> list[Verdict]:
    """A verdict for every claim, in the paper's order; `frames` needs no experiment that has no rows."""
    frames = {name: frames.get(name, pd.DataFrame()) for name in SOURCES}
    return [
        parameter_counts(),
        *(switching(frames, group) for group in PUBLISHED_SWITCH),
        *(first(frames, name) for name in PAPER_TASKS),
        *(dense_last(frames, name) for name in PAPER_TASKS),
        *(gain(frames, name) for name in PAPER_TASKS),
        *(step_ratio(frames, name) for name in PAPER_TASKS),
        *(operation(frames, name) for name in SPARSE_OPERATIONS),
        bottleneck(frames),
        attention_memory(frames),
        step_memory(frames),
        several_gpus(frames),
        sparse_maps(frames),
        fine_tuning(frames),
        fine_tuning_time(frames),
        mass_kept(frames),
    ]


def bench(experiment: str, *only: str) -> str:
    """The command that measures some cases of an experiment."""
    return " ".join([f"python -m sat_lib bench {experiment} --profile paper", *(["--only", *only] if only else [])])


def where(frame: pd.DataFrame, **equal) -> pd.DataFrame:
    """The rows with these values; none where a column isn't there."""
    for name, value in equal.items():
        frame = frame[frame[name] == value] if name in frame else frame.iloc[:0]
    return frame


def _number(frame: pd.DataFrame, name: str) -> pd.Series:
    return frame[name].astype(float) if name in frame else pd.Series(np.nan, frame.index, float)


def _hardware(rows: pd.DataFrame) -> str:
    return ", ".join(sorted({name.removeprefix("NVIDIA ") for name in rows["device"]}))


def _wall_minutes(rows: pd.DataFrame) -> str:
    """What measuring these rows took, as far as they tell."""
    seconds = _number(rows, "wall_seconds")
    if seconds.isna().all():
        return "-"
    return f"{'at least ' if seconds.isna().any() else ''}{seconds.sum() / 60:.1f}"


def _run_minutes(rows: pd.DataFrame) -> str:
    """From the shortest to the longest training run."""
    minutes = [sum(seconds.values()) / 60 for seconds in rows["seconds"]]
    return f"{_span(minutes, '.1f')} a run"


def _span(values: Iterable[float], form: str = ".2f") -> str:
    """ "a to b", or one number where both look the same."""
    low, high = (f"{value:{form}}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _mean(percent: pd.Series) -> str:
    if len(percent) == 1:
        return f"{percent.iloc[0]:.2f} (1 seed)"
    return f"{percent.mean():.2f} ± {percent.std(ddof=1):.2f} ({len(percent)} seeds)"


def _head(claim: str, command: str, output: str, published: str) -> dict:
    return {"claim": claim, "command": command, "output": output, "published": published}


def _verdict(head: dict, rows: pd.DataFrame, ours: str, verdict: str, why: str) -> Verdict:
    minutes = _run_minutes(rows) if "seconds" in rows else _wall_minutes(rows)
    return Verdict(**head, hardware=_hardware(rows), minutes=minutes, ours=ours, verdict=verdict, why=why)


def _not_run(head: dict) -> Verdict:
    return Verdict(**head, hardware="-", minutes="-", ours="-", verdict=NOT_RUN, why="There are no rows yet.")


# ---- the model -------------------------------------------------------------------------------------------------------


def parameter_counts() -> Verdict:
    """Counted in models that are built here."""
    ours = {name: Encoder(model_config(name)).parameter_count() for name in PUBLISHED_PARAMETERS}
    off = [TASK_NAMES[name] for name, count in PUBLISHED_PARAMETERS.items() if ours[name] != count]
    return Verdict(
        "the model has the published number of parameters (" + ", ".join(map(TASK_NAMES.get, ours)) + ")",
        "make test",
        "tests/model/test_encoder.py",
        "CPU",
        "-",
        "; ".join(f"{count:,}" for count in PUBLISHED_PARAMETERS.values()),
        "; ".join(f"{count:,}" for count in ours.values()),
        NOT_REPRODUCED if off else REPRODUCED,
        f"{', '.join(off)} differ." if off else "All four are the same, the sparsity parameter included.",
    )


# ---- training runs ---------------------------------------------------------------------------------------------------


def training_runs(frames: Frames, *experiments: str) -> pd.DataFrame:
    """Runs of the published method, each once, whichever experiment has it; `part` marks those that can't be set
    beside a published accuracy, for fewer training examples or steps."""
    found = [frames[name] for name in experiments if len(frames.get(name, ()))]
    if not found:
        return pd.DataFrame()
    runs = pd.concat(found, ignore_index=True)
    runs = runs[[_is_published_method(case) for _, case in runs.iterrows()]]
    same = [files.digest([run[name] for name in _RUN]) for run in runs[_RUN].astype(object).to_dict("records")]
    runs = runs[~pd.Series(same, runs.index, dtype=object).duplicated()]
    return runs.assign(part=[_is_part(run) for _, run in runs.iterrows()])


def _is_published_method(run: pd.Series) -> bool:
    """Neither theta nor the density nor the model was changed; how a baseline is computed doesn't matter."""
    return set(run["recipe"]) <= _SAME_METHOD and set(run["model"]) <= {"implementation"}


def _is_part(run: pd.Series) -> bool:
    steps = PUBLISHED[run["task"]].steps
    fewer = run["train_examples"] < WHOLE * task(run["task"]).sizes["train"]
    return bool(fewer or run["recipe"].get("steps", steps) < steps)


def comparable(runs: pd.DataFrame, name: str, part: bool) -> pd.DataFrame:
    """A task's runs on the whole data or on parts, of the setting that has most of them: others aren't mixed in."""
    runs = where(runs, task=name, part=part)
    if not len(runs):
        return runs
    settings = runs["recipe"].map(files.digest) + runs["train_examples"].astype(str)
    return runs[settings == settings.value_counts().idxmax()]


def percent(runs: pd.DataFrame, attention: str) -> pd.Series:
    return 100 * _number(where(runs, attention=attention), "test_accuracy")


def switching(frames: Frames, group: str) -> Verdict:
    """Whether SAT's own test ended the dense phase, and when, over all seeds."""
    names, low, high, published = PUBLISHED_SWITCH[group]
    runs = training_runs(frames, "accuracy", "training", "accuracy_short")
    runs = where(runs, attention="sat")
    runs = runs[runs["task"].isin(names)] if len(runs) else runs
    if len(runs) and not runs["part"].all():
        runs = runs[~runs["part"]]  # parts speak only where nothing else does
    used = set(runs["task"]) if len(runs) else names[:1]
    head = _head(
        f"training switches by itself within few steps: {group}",
        ", ".join(
            _training_commands(runs[runs["task"] == name] if len(runs) else runs, name)
            for name in names
            if name in used
        ),
        "02_training, 03_accuracy_table",
        f"{published} (released runs)",
    )
    if not len(runs):
        return _not_run(head)
    steps = _number(runs, "transition_step").dropna()
    inside = steps.between(low, high)
    part = runs["part"].any()
    everything = len(steps) == len(runs) and inside.all()
    why = f"On {'parts of ' if part else ''}{' and '.join(TASK_NAMES[name] for name in names if name in used)} "
    why += f"{len(steps)} of {len(runs)} runs switched"
    why += f", {inside.sum()} of them within the published range" if len(steps) else ""
    outside = steps[~inside]
    why += f" and {len(outside)} outside it, at step {_span(outside, ',.0f')}" if len(outside) else ""
    last = max(recipe.get("steps", 0) for recipe in runs["recipe"])
    why += f"; their {last:,} steps end before the published range" if part and 0 < last < low else ""
    return _verdict(
        head,
        runs,
        _switches(runs),
        NOT_RUN if part else REPRODUCED if everything else IN_DIRECTION if len(steps) else NOT_REPRODUCED,
        why + _similar_switches(frames, names[0]) + ".",
    )


def _switches(runs: pd.DataFrame) -> str:
    steps = _number(runs, "transition_step").dropna()
    return (f"step {_span(steps, ',.0f')}; " if len(steps) else "") + f"{len(steps)} of {len(runs)} runs switched"


def _similar_switches(frames: Frames, name: str) -> str:
    """The same of a task that the paper doesn't have, where it stands in for this one."""
    other = SIMILAR.get(name)
    runs = where(training_runs(frames, "accuracy", "accuracy_short"), task=other, attention="sat")
    return f"; {TASK_NAMES[other]}, with the same recipe: {_switches(runs)}" if len(runs) else ""


def _training_commands(runs: pd.DataFrame, name: str) -> str:
    """The commands that the runs of a task come from."""
    experiments = list(dict.fromkeys(runs["experiment"])) if "experiment" in runs else []
    return ", ".join(bench(experiment, f"task={name}") for experiment in experiments or ["accuracy"])


def _accuracy(frames: Frames, name: str, claim: str, published: str) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    """What all claims on a task's accuracy begin with: the head, and the runs on the whole data and on a part."""
    runs = training_runs(frames, "accuracy", "accuracy_short")
    whole, part = (comparable(runs, name, wanted) for wanted in (False, True))
    head = _head(
        f"{TASK_NAMES[name]}: {claim}",
        _training_commands(whole if len(whole) else part, name),
        "03_accuracy, 03_accuracy_table",
        published,
    )
    return head, whole, part


def _accuracy_verdict(head: dict, runs: pd.DataFrame, ours: str, word: str, why: str) -> Verdict:
    never = where(runs, attention="sat")
    never = int(_number(never, "transition_step").isna().sum())
    if never:
        why += f"; {never} of SAT's runs never switched and {'count' if never > 1 else 'counts'} all the same"
    if "data_official" in runs and not runs["data_official"].astype(bool).all():
        why += "; the data lack the official archive's checksum"
    return _verdict(head, runs, ours, word, why + ".")


def _part_verdict(head: dict, part: pd.DataFrame, what: str) -> Verdict:
    """Runs on a part are shown, and aren't held against the published accuracy."""
    size, full = int(part["train_examples"].max()), task(part["task"].iloc[0]).sizes["train"]
    steps = {recipe.get("steps") for recipe in part["recipe"]} - {None}
    shorter = f" in {_span(steps, ',')} steps" if steps else ""
    why = f"Only runs on {size:,} of {full:,} training examples{shorter}, which the published accuracies aren't from"
    return _accuracy_verdict(head, part, f"on a part: {_means(part)}", NOT_RUN, f"{why}: there {what}")


def _means(runs: pd.DataFrame) -> str:
    """Every attention's mean, the best first."""
    values = {name: percent(runs, name) for name in NAMES}
    values = {name: percent for name, percent in values.items() if len(percent)}
    ranked = sorted(values, key=lambda name: -values[name].mean())
    return ", ".join(f"{NAMES[name]} {_mean(values[name])}" for name in ranked)


def _similar(frames: Frames, name: str) -> str:
    """What a task that the paper doesn't have shows, where it stands in for this one."""
    other = SIMILAR.get(name)
    if other is None:
        return ""
    runs = training_runs(frames, "accuracy", "accuracy_short")
    found = [comparable(runs, other, part) for part in (False, True)]
    found = next((some for some in found if len(some)), None)
    if found is None:
        return ""
    return f"; {TASK_NAMES[other]}, which the paper doesn't have, with {TASK_NAMES[name]}'s recipe: {_means(found)}."


def _with_similar(frames: Frames, name: str, found: Verdict) -> Verdict:
    more = _similar(frames, name)
    return replace(found, why=found.why.removesuffix(".") + more) if more else found


def _against(gaps: dict[str, Gap | None], form: str = "{gap} against {name}") -> str:
    """The comparisons in words, and those that nobody has run."""
    told = [form.format(gap=found, name=NAMES[name]) for name, found in gaps.items() if found is not None]
    absent = [NAMES[name] for name, found in gaps.items() if found is None]
    return ", ".join(told) + (f"; not run: {', '.join(absent)}" if absent else "")


def _incomplete(head: dict, runs: pd.DataFrame) -> Verdict:
    """Nothing to compare: no rows, or rows of other attentions alone."""
    if not len(runs):
        return _not_run(head)
    return _accuracy_verdict(head, runs, _means(runs), NOT_RUN, "The runs to compare these with aren't there yet")


def first(frames: Frames, name: str) -> Verdict:
    """Whether the published winner of a task wins."""
    means = {attention: PUBLISHED_ACCURACY[attention][name] for attention in NAMES}
    winner, *others = sorted(means, key=lambda attention: -means[attention])
    published = ", ".join(f"{NAMES[attention]} {means[attention]:.2f}" for attention in (winner, *others))
    head, runs, part = _accuracy(frames, name, f"{NAMES[winner]} is the most accurate", published)
    ours = runs if len(runs) else part
    gaps = {other: gap(percent(ours, winner), percent(ours, other)) for other in others}
    if not any(gaps.values()):
        found = _incomplete(head, ours)
    else:
        told = f"{NAMES[winner]} is at {_against(gaps)}"
        word = judge_order(gaps.values())
        found = (
            _accuracy_verdict(head, runs, _means(runs), word, told) if len(runs) else _part_verdict(head, part, told)
        )
    return _with_similar(frames, name, found)


def dense_last(frames: Frames, name: str) -> Verdict:
    """Whether every other attention beats dense attention."""
    others = [attention for attention in NAMES if attention != "dense"]
    means = {attention: PUBLISHED_ACCURACY[attention][name] for attention in NAMES}
    nearest = min(others, key=means.get)
    published = f"dense {means['dense']:.2f}, next {NAMES[nearest]} {means[nearest]:.2f}"
    head, runs, part = _accuracy(frames, name, "dense attention is the least accurate", published)
    ours = runs if len(runs) else part
    gaps = {other: gap(percent(ours, other), percent(ours, "dense")) for other in others}
    if not any(gaps.values()):
        return _incomplete(head, ours)
    told = f"against dense {_against(gaps, '{name} {gap}')}"
    if not len(runs):
        return _part_verdict(head, part, told)
    lowest = min((other for other in others if gaps[other]), key=lambda other: gaps[other].difference)
    shown = f"dense {_mean(percent(runs, 'dense'))}, lowest other {NAMES[lowest]} {_mean(percent(runs, lowest))}"
    return _accuracy_verdict(head, runs, shown, judge_order(gaps.values()), told[0].upper() + told[1:])


def gain(frames: Frames, name: str) -> Verdict:
    """SAT's accuracy less dense attention's."""
    published = PUBLISHED_ACCURACY["sat"][name] - PUBLISHED_ACCURACY["dense"][name]
    head, runs, part = _accuracy(frames, name, "accuracy that SAT gains over dense attention", f"{published:+.2f}")
    ours = runs if len(runs) else part
    found = gap(percent(ours, "sat"), percent(ours, "dense"))
    if found is None:
        return _incomplete(head, ours)
    if not len(runs):
        return _part_verdict(head, part, f"SAT is at {found} against dense")
    if np.isnan(found.error):
        why = "Without two seeds of both there is no spread to judge by"
    elif not found.beyond:
        why = f"The difference is less than twice its standard error of {found.error:.2f}"
    else:
        sign = "with the published sign" if found.difference > 0 else "with the opposite sign"
        share = found.difference / published
        why = f"Beyond twice its standard error of {found.error:.2f}, {sign}, {share:.2f} times the published gain"
    return _accuracy_verdict(head, runs, str(found), judge_gain(found, published), why)


# ---- whole steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """Of two medians, with the widest that their quartiles allow."""

    value: float
    low: float
    high: float
    step: str = ""  # "fast" or "plain", where the rows tell how the steps were taken

    def __str__(self) -> str:
        way = f", {self.step} steps" if self.step else ""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}{way})"


def time_ratio(slower: pd.Series, faster: pd.Series) -> Ratio:
    """`slower`'s time over `faster`'s."""
    low, middle, high = (float(faster[name]) for name in ("low_ms", "median_ms", "high_ms"))
    return Ratio(slower["median_ms"] / middle, slower["low_ms"] / high, slower["high_ms"] / low, slower.get("step", ""))


def _pair(steps: pd.DataFrame, name: str, kind: str) -> tuple[pd.Series, pd.Series] | None:
    """A kind's and SAT's row of a task, both fast steps or both plain ones: else the ratio would be that of the ways.

    None where there is no such pair.
    """
    steps = where(steps, task=name)
    steps = steps[_number(steps, "median_ms").notna()]
    one, sat = where(steps, kind=kind), steps[steps["kind"].isin(SAT_STEPS)]
    if len(one) and "step" in steps:
        sat = where(sat, step=one["step"].iloc[-1])
    return (one.iloc[-1], sat.iloc[-1]) if len(one) and len(sat) else None


def step_ratios(steps: pd.DataFrame, name: str) -> dict[str, Ratio]:
    """Kind of step -> its time over SAT's sparse phase, for one task."""
    kinds = list(dict.fromkeys(steps["kind"])) if "kind" in steps else []
    pairs = {kind: _pair(steps, name, kind) for kind in kinds}
    return {kind: time_ratio(*pair) for kind, pair in pairs.items() if pair is not None}


def step_ratio(frames: Frames, name: str) -> Verdict:
    """How many times as long as SAT's BigBird's step takes; judged by the implementations that the paper could use."""
    steps = where(frames["step"], task=name)
    head = _head(
        f"{TASK_NAMES[name]}: a training step of BigBird takes longer than SAT's",
        bench("step", f"task={name}"),
        "04_step_time, 04_step_time_table",
        f"{PUBLISHED_BIGBIRD[name]:.2f} times",
    )
    ratios = step_ratios(steps, name)
    compared = {kind: ratios[kind] for kind in ("bigbird, library", "bigbird, transformers") if kind in ratios}
    if not compared:
        return _not_run(head)
    least = min(compared, key=lambda kind: compared[kind].value)
    labels = {"bigbird, transformers": "layer of transformers", "bigbird, library": "gathers and products of our own",
              "bigbird, kernel": "through SAT's kernel"}  # fmt: skip
    ours = "; ".join(f"{label} {ratios[kind]}" for kind, label in labels.items() if kind in ratios)
    alone = [label for kind, label in labels.items() if kind in set(steps["kind"]) and kind not in ratios]
    ours += f"; {', '.join(alone)}: not measured in the same way as SAT" if alone else ""
    others = {"bigbird, kernel": "BigBird's pattern", "longformer, kernel": "Longformer's"}
    told = [f"{label} {ratios[kind].value:.2f}" for kind, label in others.items() if kind in ratios]
    why = f"Judged by {'the smaller ratio, ' if len(compared) > 1 else ''}that of the {labels[least]}"
    if told:
        why += f"; the pattern alone, through SAT's own kernel: {' and '.join(told)} times"
    told = {"dense": "a dense step takes", "sat, dense phase": "one of SAT's dense phase"}
    told = [f"{label} {ratios[kind].value:.2f} times" for kind, label in told.items() if kind in ratios]
    why += f"; {', '.join(told)}" if told else ""
    return _verdict(head, steps, ours, judge_ratio(compared[least].value, PUBLISHED_BIGBIRD[name]), why + ".")


# ---- operations and memory -------------------------------------------------------------------------------------------


def operations(frames: Frames) -> pd.DataFrame:
    """The rows that time single operations, with a label for the arithmetic."""
    rows = where(frames["kernels"], sweep="operations")
    if not len(rows):
        return rows
    tf32 = rows["tf32"].eq(True) if "tf32" in rows else pd.Series(False, rows.index)
    return rows.assign(arithmetic=rows["dtype"] + np.where(tf32, " with TF32", ""))


def operation(frames: Frames, name: str) -> Verdict:
    """How many times as long as its block-sparse form a dense operation takes, in both precisions."""
    dense, sparse = OPERATIONS[name]
    head = _head(
        f"{SPARSE_OPERATIONS[name]} is faster than its dense form (forward, CIFAR-10)",
        bench("kernels", "sweep=operations"),
        "05_time_breakdown",
        f"{PUBLISHED_SPEED_UP[name]:.2f} times",
    )
    rows = where(operations(frames), task="cifar10")
    ratios = _number(rows, f"{dense}_ms") / _number(rows, f"{sparse}_ms")
    rows, ratios = rows[ratios.notna()], ratios.dropna()
    if not len(rows):
        return _not_run(head)
    share = ratios.min() / PUBLISHED_SPEED_UP[name]
    why = f"The smaller of the two is {share:.2f} times the published one{_floor(frames, rows, sparse)}"
    fused, single = _fused_ms(frames), where(rows, dtype="bfloat16")
    if fused and len(single):
        why += f"; fused dense attention as a whole takes {fused:.2f} ms in bfloat16, this dense operation alone "
        why += f"{single[f'{dense}_ms'].iloc[0]:.2f}"
    return _verdict(
        head,
        rows,
        "; ".join(f"{label} {ratio:.1f}" for label, ratio in zip(rows["arithmetic"], ratios, strict=True)),
        judge_ratio(ratios.min(), PUBLISHED_SPEED_UP[name]),
        why + ".",
    )


def _fused_ms(frames: Frames) -> float | None:
    """Forward time of PyTorch's fused dense attention in bfloat16, on the main workload."""
    rows = where(frames["kernels"], sweep="main", implementation="sdpa", dtype="bfloat16")
    times = _number(rows, "forward_ms").dropna()
    return times.iloc[0] if len(times) else None


def _floor(frames: Frames, rows: pd.DataFrame, sparse: str) -> str:
    """How near the sparse operation is to the time that its bytes take, where a copy was measured."""
    copy = _number(where(frames["kernels"], sweep="copy"), "bandwidth_tb_s").dropna()
    if not len(copy):
        return ""
    times = _number(rows, f"{sparse}_ms") * copy.iloc[0] * 1e9 / _number(rows, f"{sparse}_floor_bytes")
    return f"; ours takes {_span(times)} times as long as its bytes need"


def bottleneck(frames: Frames) -> Verdict:
    """Whether the softmax takes longest of the three dense operations, in every task and precision."""
    share = 100 * PUBLISHED_DENSE_MS["softmax"] / sum(PUBLISHED_DENSE_MS.values())
    parts = [f"{name} {value:g}" for name, value in PUBLISHED_DENSE_MS.items()]
    head = _head(
        "the softmax is the bottleneck of dense attention",
        bench("kernels", "sweep=operations"),
        "05_time_breakdown",
        f"{share:.0f} % of the forward time (ms: {', '.join(parts)})",
    )
    rows = operations(frames)
    times = pd.DataFrame({name: _number(rows, f"{dense}_ms") for name, (dense, _) in OPERATIONS.items()}).dropna()
    if not len(times):
        return _not_run(head)
    rows = rows.loc[times.index]
    longest = times.idxmax(axis=1) == "softmax"
    shares = 100 * times["softmax"] / times.sum(axis=1)
    ours = [f"{_span(part, '.0f')} % in {label}" for label, part in shares.groupby(rows["arithmetic"], sort=False)]
    word = REPRODUCED if longest.all() else IN_DIRECTION if longest.any() else NOT_REPRODUCED
    why = f"With a map that is written out it takes longest in {longest.sum()} of {len(longest)} cases"
    fused, whole = _fused_ms(frames), times.loc[where(rows, dtype="bfloat16", task="cifar10").index].sum(axis=1)
    if fused and len(whole):
        why += (
            f"; fused dense attention never writes the map and takes {fused:.2f} ms in bfloat16, the three operations "
        )
        why += f"together {whole.iloc[0]:.2f}"
    return _verdict(head, rows, "; ".join(ours), word, why + ".")


def memory_ratios(kernels: pd.DataFrame, implementation: str) -> pd.Series:
    """Length -> peak memory of attention alone over the fused kernel's, at the same head size."""
    keys = ["length", "head_size", "batch"]
    rows = where(kernels, sweep="length")
    peaks = [where(rows, implementation=name) for name in (implementation, "fused")]
    if not all(map(len, peaks)):
        return pd.Series(dtype=float)
    both = peaks[0].merge(peaks[1], on=keys, suffixes=("", "_fused")).sort_values("length")
    return (both["peak_bytes"] / both["peak_bytes_fused"]).set_axis(both["length"]).dropna()


def attention_memory(frames: Frames) -> Verdict:
    """Peak memory of attention alone, forward and backward, against dense attention that writes its map."""
    head = _head(
        "less peak memory: attention alone",
        bench("kernels", "sweep=length"),
        "07_scaling",
        f"up to {PUBLISHED_MEMORY} times",
    )
    written, fused = (memory_ratios(frames["kernels"], name) for name in ("materialised", "sdpa"))
    if not len(written):
        return _not_run(head)
    rows = where(frames["kernels"], sweep="length")
    lengths = f"L = {written.index.min():,.0f} to {written.index.max():,.0f}"
    ours = f"{_span(written, '.0f')} times against the written-out map ({lengths})"
    ours += f"; {_span(fused)} against fused dense attention" if len(fused) else ""
    return _verdict(
        head,
        rows,
        ours,
        judge_ratio(written.max(), PUBLISHED_MEMORY),
        "Judged against a map that is written out, whose memory grows with the square of the length; fused dense "
        f"attention stores none either{f', and needs {_span(fused)} times as much as ours' if len(fused) else ''}.",
    )


def step_memory_ratios(steps: pd.DataFrame) -> pd.DataFrame:
    """Task and kind -> peak memory of a whole step over that of SAT's sparse phase."""
    kinds = list(dict.fromkeys(steps["kind"])) if "kind" in steps else []
    lines = []
    for name in dict.fromkeys(steps["task"]) if kinds else []:
        for kind in kinds:
            pair = _pair(steps, name, kind)
            if pair is not None and not kind.startswith("sat"):
                lines.append({"task": name, "kind": kind, "ratio": pair[0]["peak_bytes"] / pair[1]["peak_bytes"]})
    return pd.DataFrame(lines, columns=["task", "kind", "ratio"]).dropna()


def step_memory(frames: Frames) -> Verdict:
    """Peak memory of whole training steps against the most wasteful of the other kinds."""
    head = _head(
        "less peak memory: a whole training step",
        bench("step"),
        "04_step_time, 04_step_time_table",
        f"up to {PUBLISHED_MEMORY} times",
    )
    ratios = step_memory_ratios(frames["step"])
    if not len(ratios):
        return _not_run(head)
    most = ratios.loc[ratios["ratio"].idxmax()]
    by_kind = ratios.groupby("kind", sort=False)["ratio"]
    shown = [most["kind"], "bigbird, kernel", *(kind for kind in by_kind.groups if kind.split(",")[0] == "dense")]
    told = [f"{kind} {_span(by_kind.get_group(kind))}" for kind in dict.fromkeys(shown) if kind in by_kind.groups]
    why = f"The most is {most['ratio']:.2f} times, against {most['kind']} on {TASK_NAMES[most['task']]}"
    same_kernel = ratios[ratios["kind"].str.endswith(", kernel")]["ratio"]
    why += (
        f"; through SAT's own kernel the baselines need {_span(same_kernel)} times as much" if len(same_kernel) else ""
    )
    return _verdict(
        head, frames["step"], "; ".join(told) + " times SAT's", judge_ratio(most["ratio"], PUBLISHED_MEMORY), why + "."
    )


# ---- several GPUs ----------------------------------------------------------------------------------------------------


def several_gpus(frames: Frames) -> Verdict:
    """Whether the most processes that train one model agree and reach one's accuracy, and what they gain in time."""
    head = _head(
        "SAT trains one model on several GPUs",
        bench("data_parallel"),
        "07_data_parallel, 07_data_parallel_table, 07_data_parallel_runs",
        f"trained on {PUBLISHED_GPUS}, without a comparison",
    )
    rows = frames["data_parallel"]
    runs, steps = where(rows, sweep="training"), where(rows, sweep="step")
    steps = training.steps(steps).dropna(subset=["efficiency", "share_ms"]) if len(steps) else steps
    both = set(runs.get("processes", ())) & set(steps.get("processes", ()))
    if not both:
        return _not_run(head)
    most = int(max(both))
    runs, steps = where(runs, processes=most), where(steps, processes=most)
    one = _by_one(frames, runs["task"].iloc[0])
    several, alone = percent(runs, "sat"), percent(one, "sat")
    found, agreeing = gap(several, alone), sum(training.agree(runs))
    slower = (most * steps["efficiency"] <= 1).any()
    worse = found is not None and found.beyond and found.difference < 0
    clear = most >= PUBLISHED_GPUS and found is not None and not np.isnan(found.error)
    cost = steps["median_ms"] - steps["share_ms"]
    switched = _number(runs, "transition_step").dropna()
    return _verdict(
        head,
        rows.drop(columns="seconds", errors="ignore"),
        f"{most} GPUs: {_gains(steps)}; {TASK_NAMES[runs['task'].iloc[0]]} {_mean(several)}"
        + (f", one GPU {_mean(alone)}" if len(one) else ""),
        NOT_REPRODUCED if agreeing < len(runs) or slower or worse else REPRODUCED if clear else IN_DIRECTION,
        f"In {agreeing} of {len(runs)} runs all processes ended with the same transition step"
        + (f" (over the seeds {_span(switched, '.0f')})" if len(switched) else "")
        + ", layouts and weights, bit for bit"
        + (f"; accuracy {found} against one GPU" if found is not None else "")
        + f"; a step takes {_span(cost)} ms longer than on one GPU with its share alone"
        + f"; a run took {_clock(runs)} by the clock"
        + (f", by one GPU {_clock(one)}" if len(one) else "")
        + (f"; not run: {PUBLISHED_GPUS} GPUs" if most < PUBLISHED_GPUS else "")
        + ".",
    )


def _by_one(frames: Frames, name: str) -> pd.DataFrame:
    """SAT's runs of a whole task by a single process."""
    runs = where(comparable(training_runs(frames, "accuracy"), name, part=False), attention="sat")
    return runs[~(_number(runs, "processes") > 1)]


def _gains(steps: pd.DataFrame) -> str:
    """Examples a second over one process's, by batch."""
    gains = [
        f"{_span(part['processes'] * part['efficiency'])} (batch {batch})" for batch, part in steps.groupby("batch")
    ]
    return f"{', '.join(gains)} times the examples a second of one"


def _clock(runs: pd.DataFrame) -> str:
    """From the shortest to the longest run."""
    return f"{_span(run_seconds(runs), '.0f')} s"


# ---- pretrained models -----------------------------------------------------------------------------------------------


def _stand_ins(rows: pd.DataFrame) -> str:
    absent = [name for name in PUBLISHED_MODELS if name not in set(rows["model"])]
    return f"; not run: {', '.join(absent)}" if absent else ""


def sparse_maps(frames: Frames) -> Verdict:
    """Whether fine-tuned maps have more entries near 0 than untrained ones; padding, which has none, left out."""
    rows = frames["motivation"]
    head = _head(
        "attention maps of pretrained models are sparse: a diagonal and its strides in images, a thick "
        "diagonal and empty padding in text",
        ", ".join(bench("motivation", f"model={name}") for name in _models(rows)),
        "01_motivation, 01_motivation_table",
        "a figure, no numbers",
    )
    if not len(rows):
        return _not_run(head)
    ours, told, holds = [], [], []
    for _, row in rows.iterrows():
        means = 100 * pd.DataFrame(row["metrics"]).groupby("moment").mean(numeric_only=True)
        before, middle = means.loc["untrained"], means.loc["half way"]
        holds.append(middle["small_share_real"] > before["small_share_real"])
        ours.append(
            f"{row['model']} on {row['data']}: {middle['small_share']:.0f} % of the entries below 1/(10 L) half way "
            f"through fine-tuning, {before['small_share']:.0f} % untrained; the largest 5 % hold "
            f"{middle['top5_mass']:.0f} % of the mass"
        )
        told.append(_shape_of_maps(row["model"], middle))
    complete = set(PUBLISHED_MODELS) <= set(rows["model"])
    word = NOT_REPRODUCED if not all(holds) else REPRODUCED if complete else IN_DIRECTION
    return _verdict(head, rows, "; ".join(ours), word, "; ".join(told) + _stand_ins(rows) + ".")


def _models(rows: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(rows["model"])) if len(rows) else list(PUBLISHED_MODELS)


def _shape_of_maps(model: str, means: pd.Series) -> str:
    """Diagonals beside their share of the entries, or padding beside what real tokens show."""
    text = f"{model}: the diagonal holds {means['diagonal_mass']:.1f} % of the mass with "
    text += f"{means['diagonal_share']:.1f} % of the entries"
    if not pd.isna(means.get("stride_mass", np.nan)):
        text += f", the strides {means['stride_mass']:.1f} with {means['stride_share']:.1f} %"
    if means["padding_share"] > 0:
        text += f"; {means['padding_share']:.0f} % of the keys are padding, and among real tokens "
        text += f"{means['small_share_real']:.0f} % of the entries are small"
    return text


def fine_tuning(frames: Frames) -> Verdict:
    """Accuracy of SAT by the released rule against dense fine-tuning, at every density."""
    rows = frames["finetuning"]
    head = _head(
        "SAT also fine-tunes pretrained models",
        ", ".join(bench("finetuning", f"model={name}") for name in _models(rows)),
        "09_finetuning, 09_finetuning_table",
        "no numbers",
    )
    parts = {
        key: part
        for key, part in (rows.groupby(["model", "data"], sort=False) if len(rows) else ())
        if {"dense", "sat"} <= set(part["attention"])
    }
    if not parts:
        return _not_run(head)
    ours, told, as_good, learns = [], [], [], []
    for (model, data), part in parts.items():
        dense = percent(part, "dense")
        sat = where(part, attention="sat", pattern="learned", pruned="zero")
        by_density = {density: 100 * some["test_accuracy"] for density, some in sat.groupby("density")}
        shown = [f"{_mean(by_density[density])} at {density:g}" for density in sorted(by_density, reverse=True)]
        ours.append(f"{model} on {data}: dense {_mean(dense)}, SAT {', '.join(shown)}")
        gaps = {density: gap(percent, dense) for density, percent in by_density.items()}
        best = max(gaps, key=lambda density: gaps[density].difference)
        as_good.append(gaps[best].difference >= 0 or not (np.isnan(gaps[best].error) or gaps[best].beyond))
        learns.append(by_density[best].mean() > ALWAYS_ONE.get(data, 0))
        pooled = percent(where(part, pattern="pooled", pruned="zero", density=best), "sat")
        more = f", {_mean(pooled)} where the blocks are those that hold most attention" if len(pooled) else ""
        told.append(
            f"{model} at its best density of {best:g}: {gaps[best]} against dense{more}{_no_better(by_density, data)}"
        )
    word = REPRODUCED if all(as_good) else IN_DIRECTION if all(learns) else NOT_REPRODUCED
    return _verdict(head, rows, "; ".join(ours), word, "; ".join(told) + _stand_ins(rows) + ".")


def _no_better(by_density: dict[float, pd.Series], data: str) -> str:
    """The densities at which as much would be right by always giving one answer."""
    least = ALWAYS_ONE.get(data, 0)
    poor = [f"{density:g}" for density, percent in by_density.items() if percent.mean() <= least]
    return f" (at {', '.join(poor)} no better than one answer for all, {least:.1f} %)" if poor else ""


def fine_tuning_time(frames: Frames) -> Verdict:
    """A step of fine-tuning with fused dense attention over one in SAT's sparse phase, by shape."""
    rows = frames["pretrained_step"]
    head = _head("fine-tuning gets faster", bench("pretrained_step"), "09_finetuning_steps", "not claimed")
    found = fine_tuning_ratios(rows)
    if not found:
        return _not_run(head)
    best = [max(ratios, key=lambda ratio: ratio.value) for ratios in found.values()]
    ours = [f"{shape}: {_span([ratio.value for ratio in ratios])}" for shape, ratios in found.items()]
    clear = [shape for shape, top in zip(found, best, strict=True) if top.low > 1]
    slower = [shape for shape, top in zip(found, best, strict=True) if top.value <= 1]
    unclear = [shape for shape in found if shape not in (*clear, *slower)]
    word = NOT_REPRODUCED if slower else IN_DIRECTION if unclear else REPRODUCED
    shares = {"faster beyond the quartiles": clear, "within them": unclear, "slower": slower}
    told = [f"{label} for {', '.join(shapes)}" for label, shapes in shares.items() if shapes]
    return _verdict(
        head,
        rows,
        "fused dense attention's step over SAT's, over the densities: " + "; ".join(ours),
        word,
        f"At its best density SAT's step is {'; '.join(told)}.",
    )


def fine_tuning_ratios(rows: pd.DataFrame) -> dict[str, list[Ratio]]:
    """Shape -> step time of fused dense attention over SAT's sparse phase, one for each density."""
    found = {}
    for (name, length), part in rows.groupby(["architecture", "length"], sort=False) if len(rows) else ():
        dense, sat = where(part, attention="sdpa"), where(part, attention="sat, sparse phase")
        if len(dense) and len(sat):
            ratios = [time_ratio(dense.iloc[-1], line) for _, line in sat.iterrows()]
            found[f"{name}, {length} tokens"] = ratios
    return found


# ---- what the kept blocks are worth ----------------------------------------------------------------------------------


def mass_kept(frames: Frames) -> Verdict:
    """Mass of the attention maps in the kept blocks beside as many random ones, at the end of a run."""
    head = _head(
        "the blocks that SAT keeps hold no more attention than random ones (not in the paper: seen on the "
        "released checkpoints)",
        bench("patterns"),
        "08_explore",
        "3.9 to 4.9 % of the mass at a density of 5 %",
    )
    rows = where(frames["patterns"], attention="sat")
    lines = [_last_masses(row) for _, row in rows.iterrows()]
    lines = pd.concat(lines, ignore_index=True) if lines else pd.DataFrame()
    if not {"kept", "random", "best"} <= set(lines.columns):
        return _not_run(head)
    kept, random, best = (lines[name].mean() for name in ("kept", "random", "best"))
    more = lines["kept"] - lines["random"]
    share = (kept - random) / (best - random)  # of what choosing by attention would gain over chance
    word = REPRODUCED if share < 0.1 else IN_DIRECTION if share < 0.5 else NOT_REPRODUCED
    why = (
        f"{more.mean():+.2f} points against random ones, {100 * share:.0f} % of what the best blocks gain, over "
        f"{len(more)} layers and heads of {len(rows)} {'run' if len(rows) == 1 else 'runs'}{_at_transition(frames)}."
    )
    return _verdict(
        head,
        rows,
        f"kept {kept:.1f} %, random {random:.1f} %, best {best:.1f} % at a density of {rows['density'].iloc[0]:g}",
        word,
        why,
    )


def _last_masses(row: pd.Series) -> pd.DataFrame:
    """A line per layer and head: percent of the mass by pattern in the last snapshot, at the run's density."""
    lines = pd.DataFrame(row["comparison"])
    lines = lines[np.isclose(lines["asked_density"], row["density"]) & (lines["step"] == lines["step"].max())]
    table = 100 * lines.pivot_table(index=["layer", "head"], columns="pattern", values="mass_kept")
    return table.rename(columns={"in use" if "in use" in table else "learned": "kept"}).reset_index(drop=True)


def _at_transition(frames: Frames) -> str:
    """The same over the seeds of the accuracy runs on CIFAR-10, from their mean maps at the transition."""
    runs = where(training_runs(frames, "accuracy", "training"), task="cifar10", attention="sat")
    shares = [
        100 * (np.array(kept, float) * values).sum() / np.sum(values)
        for maps in runs.get("maps", ())
        if isinstance(maps, dict) and {"kept", "transition"} <= maps.keys()
        for kept, values in zip(maps["kept"], np.array(maps["transition"], float), strict=True)
    ]
    if not shares:
        return ""
    return f"; at the transition of the CIFAR-10 runs the layers' kept blocks hold {_span(shares, '.1f')} %"


# ---- tables ----------------------------------------------------------------------------------------------------------


def verdict_table(frames: Frames) -> pd.DataFrame:
    """A line per claim, commands as code."""
    table = pd.DataFrame([asdict(line) for line in verdicts(frames)])
    table["command"] = [", ".join(f"`{one}`" for one in several.split(", ")) for several in table["command"]]
    return table


def short_table(frames: Frames) -> pd.DataFrame:
    """What of it fits a first page: the claims that something was run for."""
    table = verdict_table(frames)
    return table.loc[table["verdict"] != NOT_RUN, ["claim", "published", "ours", "verdict"]]
