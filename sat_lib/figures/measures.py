"""What is measured of a claim: from the claim and the rows to a `Finding`. Claims call a measure by its name."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from ..datasets.tasks import task
from ..model.encoder import Encoder
from ..training.recipe import model_config
from . import evidence
from .evidence import Frames, column, percent, task_runs, where
from .judge import PACES, Claim, Finding, Gap, Ratio, bench, gap, mean, span, told
from .published import attention_name, published_value, task_name
from .speed import OPERATIONS, step_labels
from .training import agree, run_seconds

Measure = Callable[[Claim, Frames], Finding]
Gaps = dict[str, Gap | None]  # by the name of the attention that another is compared with
MEASURES: dict[str, tuple[Measure, tuple[str, ...]]] = {}  # by name, with the keys that a claim must give for it


def measure(*needs: str) -> Callable[[Measure], Measure]:
    """Put a function among the measures."""
    return lambda function: MEASURES.setdefault(function.__name__, (function, needs))[0]


# ---- training --------------------------------------------------------------------------------------------------------


@measure()
def parameter_counts(claim: Claim, frames: Frames) -> Finding:
    """Counted in models that are built here."""
    counts = {name: Encoder(model_config(name)).parameter_count() for name in claim.value}
    off = ", ".join(task_name(name) for name, count in counts.items() if count != claim.value[name])
    ours = "; ".join(f"{count:,}" for count in counts.values())
    reason = told("{} differ", off) or "All four are the same, the sparsity parameter included"
    return Finding(pd.DataFrame({"device": ["CPU"], "wall_seconds": [None]}), ours, [reason], {"holds": [not off]})


@measure("tasks")
def switching(claim: Claim, frames: Frames) -> Finding:
    """Whether SAT's own test ended the dense phase, and when, over all seeds."""
    runs = evidence.switching_runs(frames, claim.tasks)
    if not len(runs):
        return Finding()
    part, steps = runs["part"].all(), column(runs, "transition_step").dropna()
    within = steps.between(claim.value["first"], claim.value["last"])
    outside, last = steps[~within], max(recipe.get("steps", 0) for recipe in runs["recipe"])
    similar = where(evidence.training_runs(frames, "accuracy", "accuracy_short"), task=claim.similar, attention="sat")
    counted = f"On {'parts of ' if part else ''}{' and '.join(map(task_name, runs['task'].unique()))} "
    counted += f"{len(steps)} of {len(runs)} runs switched"
    counted += f", {within.sum()} of them within the published range" if len(steps) else ""
    counted += told(" and {} outside it, at step {}", len(outside), span(outside, ",.0f"))
    too_short = told("their {:,} steps end before the published range", part and last < claim.value["first"] and last)
    other = told("{1}, with the same recipe: {2}", len(similar), task_name(claim.similar), _switches(similar))
    found = {"runs": len(runs), "switched": len(steps), "within": within.sum()}
    command, reasons = evidence.training_commands(runs), [counted, too_short, other]
    return Finding(runs, _switches(runs), reasons, found, judged=not part, command=command)


def _switches(runs: pd.DataFrame) -> str:
    """From the first to the last step, and how many switched."""
    steps = column(runs, "transition_step").dropna()
    return told("step {}; ", span(steps, ",.0f")) + f"{len(steps)} of {len(runs)} runs switched"


@measure("tasks", "attention", "against")
def most_accurate(claim: Claim, frames: Frames) -> Finding:
    """Whether an attention beats all the others on a task."""
    runs = task_runs(frames, claim.tasks[0])
    gaps = {other: gap(percent(runs, claim.attention), percent(runs, other)) for other in claim.against}
    compared = f"{attention_name(claim.attention)} is at {_against(gaps)}"
    return _accuracy(claim, frames, runs, gaps, compared, _means(runs))


@measure("tasks", "attention", "against")
def least_accurate(claim: Claim, frames: Frames) -> Finding:
    """Whether all the others beat an attention on a task."""
    runs = task_runs(frames, claim.tasks[0])
    gaps = {other: gap(percent(runs, other), percent(runs, claim.attention)) for other in claim.against}
    compared = f"against {attention_name(claim.attention)} {_against(gaps, '{1} {0}')}"
    lowest = min(filter(gaps.get, gaps), key=lambda other: gaps[other].difference, default=claim.attention)
    shown = [f"{attention_name(name)} {mean(percent(runs, name))}" for name in (claim.attention, lowest)]
    return _accuracy(claim, frames, runs, gaps, compared, ", lowest other ".join(shown))


@measure("tasks", "attention", "against")
def gain(claim: Claim, frames: Frames) -> Finding:
    """An attention's accuracy less another's."""
    finding = most_accurate(claim, frames)
    (found,) = finding.numbers.get("gaps", [None])
    if finding.judged and found:
        finding = replace(finding, ours=str(found), reasons=[found.beside(claim.value), *finding.reasons[1:]])
    return replace(finding, numbers={"found": found, "published": claim.value})


def _accuracy(claim: Claim, frames: Frames, runs: pd.DataFrame, gaps: Gaps, compared: str, ours: str) -> Finding:
    """The finding of a task's runs; those on a part, or with nothing to compare, are shown and not judged."""
    stand_in = f"{task_name(claim.similar)}, which the paper doesn't have, with {task_name(claim.tasks[0])}'s recipe"
    similar = told("{1}: {0}", _means(task_runs(frames, claim.similar)), stand_in)
    if not len(runs):
        return Finding(reasons=[*Finding().reasons, similar])
    part, reason = runs["part"].all(), compared[0].upper() + compared[1:]
    if part:
        ours, reason = f"on a part: {_means(runs)}", f"{_extent(runs)}: there {compared}"
    if not any(gaps.values()):
        ours, reason = _means(runs), "The runs to compare these with aren't there yet"
    never = column(where(runs, attention="sat"), "transition_step").isna().sum()
    never = told("{} of SAT's runs never switched and {} all the same", never, "count" if never > 1 else "counts")
    unofficial = told("the data lack the official archive's checksum", not runs["data_official"].astype(bool).all())
    reasons, command = [reason, never, unofficial, similar], evidence.training_commands(runs)
    return Finding(runs, ours, reasons, {"gaps": list(gaps.values())}, judged=not part, command=command)


def _means(runs: pd.DataFrame) -> str:
    """Every attention's mean, the best first."""
    values = {name: percent(runs, name) for name in published_value("attention_names")}
    ranked = sorted((name for name in values if len(values[name])), key=lambda name: -values[name].mean())
    return ", ".join(f"{attention_name(name)} {mean(values[name])}" for name in ranked)


def _against(gaps: Gaps, form: str = "{0} against {1}") -> str:
    """The comparisons in words, and those that nobody has run."""
    compared = ", ".join(form.format(found, attention_name(name)) for name, found in gaps.items() if found)
    return compared + told("; not run: {}", ", ".join(attention_name(name) for name in gaps if not gaps[name]))


def _extent(runs: pd.DataFrame) -> str:
    """How much less than the whole data and steps."""
    size, full = int(runs["train_examples"].max()), task(runs["task"].iloc[0]).sizes["train"]
    in_steps = told(" in {} steps", span({recipe["steps"] for recipe in runs["recipe"] if "steps" in recipe}, ","))
    return f"Only runs on {size:,} of {full:,} training examples{in_steps}, which the published accuracies aren't from"


# ---- time and memory -------------------------------------------------------------------------------------------------

COMPUTES = {"transformers": "layer of transformers", "library": "gathers and products of our own",
            "kernel": "through SAT's kernel"}  # fmt: skip


@measure("tasks", "attention", "against")
def step_time(claim: Claim, frames: Frames) -> Finding:
    """How many times as long as SAT's a step takes; judged by the implementations that the paper could use."""
    ratios = evidence.step_ratios(frames, claim.tasks[0])
    labels = {f"{claim.attention}, {compute}": label for compute, label in COMPUTES.items()}
    *others, kernel = labels
    compared = [step for step in others if step in ratios]
    if not compared:
        return Finding()
    least = min(compared, key=lambda step: ratios[step].value)
    steps = where(frames["step"].assign(name=step_labels(frames["step"])), task=claim.tasks[0])
    ours = "; ".join(f"{label} {ratios[step]}" for step, label in labels.items() if step in ratios)
    alone = ", ".join(label for step, label in labels.items() if step in set(steps["name"]) - ratios.keys())
    ours += told("; {}: not measured in the same way as SAT", alone)
    patterns = {kernel: f"{attention_name(claim.attention)}'s pattern"}
    patterns |= {f"{other}, kernel": f"{attention_name(other)}'s" for other in claim.against}
    dense = {"dense": "a dense step takes", "sat, dense phase": "one of SAT's dense phase"}
    reasons = [
        f"Judged by {'the smaller ratio, ' if len(compared) > 1 else ''}that of the {labels[least]}",
        told("the pattern alone, through SAT's own kernel: {} times", " and ".join(_times(ratios, patterns))),
        ", ".join(f"{text} times" for text in _times(ratios, dense)),
    ]
    return Finding(steps, ours, reasons, {"ours": ratios[least].value, "published": claim.value})


def _times(ratios: dict[str, Ratio], labels: dict[str, str]) -> list[str]:
    return [f"{label} {ratios[step].value:.2f}" for step, label in labels.items() if step in ratios]


@measure("tasks", "operation")
def operation_time(claim: Claim, frames: Frames) -> Finding:
    """How many times as long as its block-sparse form a dense operation takes, in both precisions."""
    rows, (dense, sparse) = where(evidence.operation_ratios(frames), task=claim.tasks[0]), OPERATIONS[claim.operation]
    ratios = column(rows, claim.operation).dropna()
    if not len(ratios):
        return Finding()
    rows = rows.loc[ratios.index]
    bandwidth = 1e9 * column(where(frames["kernels"], sweep="copy"), "bandwidth_tb_s").max()  # bytes a ms, or NaN
    beside_floor = (column(rows, f"{sparse}_ms") * bandwidth / column(rows, f"{sparse}_floor_bytes")).dropna()
    reasons = [
        f"The smaller of the two is {ratios.min() / claim.value:.2f} times the published one",
        told("ours takes {} times as long as its bytes need", span(beside_floor)),
        _fused(frames, "as a whole", "this dense operation alone", where(rows, dtype="bfloat16")[f"{dense}_ms"]),
    ]
    ours = "; ".join(f"{label} {ratio:.1f}" for label, ratio in zip(rows["arithmetic"], ratios, strict=True))
    return Finding(rows, ours, reasons, {"ours": ratios.min(), "published": claim.value})


def _fused(frames: Frames, how: str, what: str, ours: pd.Series) -> str:
    """PyTorch's fused dense attention on the main workload, forward in bfloat16, and the first of ours beside it."""
    rows = where(frames["kernels"], sweep="main", method="sdpa", dtype="bfloat16")
    fused = column(rows, "forward_ms").dropna()
    if not len(fused) or not len(ours):
        return ""
    return f"fused dense attention {how} takes {fused.iloc[0]:.2f} ms in bfloat16, {what} {ours.iloc[0]:.2f}"


@measure("operation")
def bottleneck(claim: Claim, frames: Frames) -> Finding:
    """Whether an operation takes longest of the three dense ones, in every task and precision."""
    rows = evidence.operation_ratios(frames)
    times = pd.DataFrame({name: column(rows, f"{dense}_ms") for name, (dense, _) in OPERATIONS.items()}).dropna()
    if not len(times):
        return Finding()
    rows, longest = rows.loc[times.index], times.idxmax(axis=1) == claim.operation
    shares = (100 * times[claim.operation] / times.sum(axis=1)).groupby(rows["arithmetic"], sort=False)
    whole = times.loc[where(rows, dtype="bfloat16", task="cifar10").index].sum(axis=1)
    reasons = [
        f"With a map that is written out it takes longest in {longest.sum()} of {len(longest)} cases",
        _fused(frames, "never writes the map and", "the three operations together", whole),
    ]
    ours = "; ".join(f"{span(part, '.0f')} % in {label}" for label, part in shares)
    return Finding(rows, ours, reasons, {"holds": longest})


@measure()
def several_gpus(claim: Claim, frames: Frames) -> Finding:
    """Whether the most processes that train one model agree and reach one's accuracy, and what they gain in time."""
    runs, steps = evidence.runs_by_most(frames)
    if not len(runs):
        return Finding()
    name, most, alike = runs["task"].iloc[0], int(steps["processes"].iloc[0]), agree(runs)
    one = evidence.runs_by_one(frames, name)
    accuracy, gains = gap(percent(runs, "sat"), percent(one, "sat")), most * steps["efficiency"]
    clocks = [span(run_seconds(part) if len(part) else (), ".0f") for part in (runs, one)]
    switched = told(" (over the seeds {})", span(column(runs, "transition_step").dropna(), ".0f"))
    reasons = [
        f"In {sum(alike)} of {len(runs)} runs all processes ended with the same transition step{switched}, layouts and "
        "weights, bit for bit",
        told("accuracy {} against one GPU", accuracy),
        f"a step takes {span(steps['median_ms'] - steps['share_ms'])} ms longer than on one GPU with its share alone",
        f"a run took {clocks[0]} s by the clock" + told(", by one GPU {} s", clocks[1]),
        told("not run: {} GPUs", most < claim.value and claim.value),
    ]
    by_batch = ", ".join(f"{span(part)} (batch {batch})" for batch, part in gains.groupby(steps["batch"]))
    ours = f"{most} GPUs: {by_batch} times the examples a second of one; {task_name(name)} {mean(percent(runs, 'sat'))}"
    ours += told(", one GPU {}", mean(percent(one, "sat")))
    rows, faster = frames["data_parallel"].drop(columns="seconds"), not (gains <= 1).any()
    found = {"agree": all(alike), "faster": faster, "accuracy": accuracy, "complete": most >= claim.value}
    return Finding(rows, ours, reasons, found)


@measure()
def attention_memory(claim: Claim, frames: Frames) -> Finding:
    """Peak memory of attention alone, forward and backward, against dense attention that writes its map."""
    written, fused = evidence.memory_ratios(frames, "materialised"), span(evidence.memory_ratios(frames, "sdpa"))
    if not len(written):
        return Finding()
    lengths = f"L = {written.index.min():,.0f} to {written.index.max():,.0f}"
    ours = f"{span(written, '.0f')} times against the written-out map ({lengths})"
    ours += told("; {} against fused dense attention", fused)
    reasons = [
        "Judged against a map that is written out, whose memory grows with the square of the length",
        "fused dense attention stores none either" + told(", and needs {} times as much as ours", fused),
    ]
    rows = where(frames["kernels"], sweep="length")
    return Finding(rows, ours, reasons, {"ours": written.max(), "published": claim.value})


@measure()
def step_memory(claim: Claim, frames: Frames) -> Finding:
    """Peak memory of whole training steps against the most wasteful of the others."""
    ratios = evidence.step_memory_ratios(frames)
    if not len(ratios):
        return Finding()
    most, spans = ratios.loc[ratios["ratio"].idxmax()], ratios.groupby("name")["ratio"].agg(span)
    shown = dict.fromkeys([most["name"], "bigbird, kernel", *where(ratios, attention="dense")["name"]])
    through = span(where(ratios, compute="kernel")["ratio"])
    reasons = [
        f"The most is {most['ratio']:.2f} times, against {most['name']} on {task_name(most['task'])}",
        told("through SAT's own kernel the baselines need {} times as much", through),
    ]
    ours = "; ".join(f"{name} {spans[name]}" for name in shown if name in spans) + " times SAT's"
    return Finding(frames["step"], ours, reasons, {"ours": most["ratio"], "published": claim.value})


# ---- pretrained models, and what the kept blocks are worth ----------------------------------------------------------


def _of_models(experiment: str, rows: pd.DataFrame, parts: list[Finding], **numbers) -> Finding:
    """The findings of single models as one, with the published models that have no rows."""
    if not parts:
        return Finding()
    absent = ", ".join(name for name in published_value("models") if name not in set(rows["model"]))
    reasons = [*(reason for part in parts for reason in part.reasons), told("not run: {}", absent)]
    numbers |= {name: [part.numbers[name] for part in parts] for name in parts[0].numbers}
    ours, command = "; ".join(part.ours for part in parts), bench(experiment, "model", rows["model"])
    return Finding(rows, ours, reasons, numbers, command=command)


@measure()
def sparse_maps(claim: Claim, frames: Frames) -> Finding:
    """Whether fine-tuned maps have more entries near 0 than untrained ones; padding, which has none, left out."""
    rows = frames["motivation"]
    complete = set(published_value("models")) <= set(rows.get("model", ()))
    return _of_models("motivation", rows, [_maps(row) for _, row in rows.iterrows()], complete=complete)


def _maps(row: pd.Series) -> Finding:
    """Of one model: its small entries; diagonals beside their share of the entries, padding beside real tokens."""
    shares = 100 * pd.DataFrame(row["metrics"]).groupby("moment").mean(numeric_only=True)
    before, now = shares.loc["untrained"], shares.loc["half way"]
    ours = f"{row['model']} on {row['data']}: {now['small_share']:.0f} % of the entries below 1/(10 L) half way "
    ours += f"through fine-tuning, {before['small_share']:.0f} % untrained; the largest 5 % hold "
    ours += f"{now['top5_mass']:.0f} % of the mass"
    reason = f"{row['model']}: the diagonal holds {now['diagonal_mass']:.1f} % of the mass with "
    reason += f"{now['diagonal_share']:.1f} % of the entries"
    if not pd.isna(now.get("stride_mass", np.nan)):
        reason += f", the strides {now['stride_mass']:.1f} with {now['stride_share']:.1f} %"
    if now["padding_share"] > 0:
        reason += f"; {now['padding_share']:.0f} % of the keys are padding, and among real tokens "
        reason += f"{now['small_share_real']:.0f} % of the entries are small"
    return Finding(row, ours, [reason], {"holds": now["small_share_real"] > before["small_share_real"]})


@measure()
def fine_tuning(claim: Claim, frames: Frames) -> Finding:
    """Accuracy of SAT by the released rule against dense fine-tuning, at every density."""
    rows = frames["finetuning"]
    parts = [part for _, part in rows.groupby(["model", "data"], sort=False)] if len(rows) else []
    pairs = [(part, where(part, attention="sat", pattern="learned", pruned="zero")) for part in parts]
    found = [_tuned(claim, part, sat) for part, sat in pairs if len(sat) and len(percent(part, "dense"))]
    return _of_models("finetuning", rows, found)


def _tuned(claim: Claim, part: pd.DataFrame, sat: pd.DataFrame) -> Finding:
    """Of one model and data set; `sat` are its runs by the released rule."""
    (model, data), dense = part[["model", "data"]].iloc[0], percent(part, "dense")
    right, of = claim.one_answer.get(data, (0, 1))
    least = 100 * right / of  # where every example gets the same answer
    by_density = {density: percent(some, "sat") for density, some in sat.groupby("density")}
    gaps = {density: gap(percents, dense) for density, percents in by_density.items()}
    best = max(gaps, key=lambda density: gaps[density].difference)
    shown = ", ".join(f"{mean(by_density[density])} at {density:g}" for density in reversed(by_density))
    pooled = mean(percent(where(part, pattern="pooled", pruned="zero", density=best), "sat"))
    poor = ", ".join(f"{density:g}" for density, percents in by_density.items() if percents.mean() <= least)
    reason = f"{model} at its best density of {best:g}: {gaps[best]} against dense"
    reason += told(", {} where the blocks are those that hold most attention", pooled)
    reason += told(" (at {} no better than one answer for all, {:.1f} %)", poor, least)
    as_good = gaps[best].difference >= 0 or not (np.isnan(gaps[best].error) or gaps[best].beyond)
    found = {"as_good": as_good, "learns": by_density[best].mean() > least}
    return Finding(part, f"{model} on {data}: dense {mean(dense)}, SAT {shown}", [reason], found)


@measure()
def fine_tuning_time(claim: Claim, frames: Frames) -> Finding:
    """A step of fine-tuning with fused dense attention over one in SAT's sparse phase, by shape."""
    ratios = evidence.fine_tuning_ratios(frames)
    best = {shape: max(some, key=lambda ratio: ratio.value) for shape, some in ratios.items()}
    if not best:
        return Finding()
    by_pace = {pace: ", ".join(shape for shape in best if best[shape].pace == pace) for pace in PACES}
    paces = "; ".join(f"{pace} for {shapes}" for pace, shapes in by_pace.items() if shapes)
    ours = "; ".join(f"{shape}: {span(ratio.value for ratio in some)}" for shape, some in ratios.items())
    ours = f"fused dense attention's step over SAT's, over the densities: {ours}"
    reason = f"At its best density SAT's step is {paces}"
    return Finding(frames["pretrained_step"], ours, [reason], {"ratios": best.values()})


@measure()
def mass_kept(claim: Claim, frames: Frames) -> Finding:
    """Mass of the attention maps in the kept blocks beside as many random ones, at the end of a run."""
    rows, lines = where(frames["patterns"], attention="sat"), evidence.last_masses(frames)
    if not {"kept", "random", "best"} <= set(lines.columns):
        return Finding()
    kept, random, best = lines[["kept", "random", "best"]].mean()
    share = (kept - random) / (best - random)
    at_transition = span(evidence.masses_at_transition(frames), ".1f")
    of = f"{len(lines)} layers and heads of {len(rows)} {'run' if len(rows) == 1 else 'runs'}"
    reasons = [
        f"{kept - random:+.2f} points against random ones, {100 * share:.0f} % of what the best blocks gain, over {of}",
        told("at the transition of the CIFAR-10 runs the layers' kept blocks hold {} %", at_transition),
    ]
    ours = f"kept {kept:.1f} %, random {random:.1f} %, best {best:.1f} % at a density of {rows['density'].iloc[0]:g}"
    return Finding(rows, ours, reasons, {"share": share})
