"""What claims say of made-up rows: every measure with its rule, through the table that they make."""

import pandas as pd
import pytest
from made_rows import STAMP, near, runs, steps, verdict_of

from sat_lib.figures import claims
from sat_lib.figures.evidence import step_ratios
from sat_lib.figures.judge import IN_DIRECTION, NOT_REPRODUCED, NOT_RUN, REPRODUCED
from sat_lib.figures.published import published_value, task_name
from sat_lib.training.recipe import PAPER_TASKS

# ---- accuracy and switching ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sat", "dense", "word"),
    [
        (near(80), near(70), REPRODUCED),
        ([70.0, 72.0], [69.0, 71.0], NOT_REPRODUCED),  # within the spread, and the published gain is far from it
        ([74.0, 86.0], [70.0, 72.0], IN_DIRECTION),  # within the spread, as the published gain is
        ([80.0], [70.0], IN_DIRECTION),  # one seed each
        ([80.0], near(70), IN_DIRECTION),  # one seed of one of them
        (near(72), near(70), IN_DIRECTION),  # beyond the spread, a fifth of the published gain
        (near(69), near(70), NOT_REPRODUCED),
        ([69.0], [70.0], NOT_REPRODUCED),
        ([69.0, 71.0], [69.5, 71.5], NOT_REPRODUCED),
        ([], near(70), NOT_RUN),
    ],
)
def test_a_gain_respects_sign_spread_and_size(sat, dense, word):
    frames = {"accuracy": runs("agnews", {"sat": sat, "dense": dense})}
    assert verdict_of(frames, "AG News: accuracy that SAT gains").verdict == word


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_rows_at_the_published_means_reproduce_every_claim_on_accuracy(name):
    published = {attention: means[name] for attention, means in published_value("accuracy").items()}
    means = {attention: [mean - 0.01, mean, mean + 0.01] for attention, mean in published.items()}
    lines, label = claims.verdict_table({"accuracy": runs(name, means)}), task_name(name)
    found = lines.loc[lines["verdict"] == REPRODUCED, "claim"]
    assert found.str.startswith(f"{label}: ").sum() == 3
    winner = {"agnews": "SAT", "yelp": "SAT", "cifar10": "Longformer", "inaturalist": "Longformer"}[name]
    first = verdict_of({"accuracy": runs(name, means)}, f"{label}: {winner} is the most accurate")
    assert first.minutes == "2.0 a run" and first.hardware == "H100" and "± 0.01 (3 seeds)" in first.ours


def test_single_seeds_show_a_direction_and_say_so():
    found = verdict_of({"accuracy": runs("cifar10", {"longformer": [44.0], "dense": [42.0]})}, "CIFAR-10: Longformer")
    assert found.verdict == IN_DIRECTION
    assert "one seed" in found.why and "not run: SAT, LSG, BigBird" in found.why


def test_runs_without_their_counterpart_are_shown():
    found = verdict_of({"accuracy": runs("inaturalist", {"sat": near(53)})}, "iNaturalist: accuracy that SAT gains")
    assert found.verdict == NOT_RUN and found.ours == "SAT 53.00 ± 0.10 (3 seeds)" and "aren't there" in found.why


def test_dense_is_last_only_if_it_is_below_all():
    frames = {"accuracy": runs("yelp", {"sat": near(81), "lsg": near(76), "dense": near(77)})}
    found = verdict_of(frames, "Yelp: dense attention")
    assert found.verdict == NOT_REPRODUCED and "LSG" in found.ours


def test_runs_on_a_part_are_shown_and_not_judged():
    parts = runs("agnews", {"sat": near(90), "dense": near(80)}, train_examples=5_000, data_official=False,
                 experiment="accuracy_short")  # fmt: skip
    for words in ("AG News: SAT is", "AG News: dense", "AG News: accuracy that SAT gains"):
        found = verdict_of({"accuracy_short": parts}, words)
        assert found.verdict == NOT_RUN and "SAT 90.00 ± 0.10 (3 seeds)" in found.ours
        assert "5,000 of 120,000" in found.why and found.command.startswith("`python -m sat_lib bench accuracy_short")
    whole = runs("agnews", {"sat": near(83), "dense": near(70)})
    found = verdict_of({"accuracy_short": parts, "accuracy": whole}, "AG News: accuracy that SAT gains")
    assert found.verdict == REPRODUCED and found.ours.startswith("+13.00")


def test_shorter_runs_count_as_a_part_and_other_methods_not_at_all():
    rows = runs("cifar10", {"sat": near(45), "dense": near(42)})
    shorter = rows.assign(recipe=[{"steps": 100}] * len(rows))
    assert verdict_of({"accuracy": shorter}, "CIFAR-10: accuracy that SAT").verdict == NOT_RUN
    changed = rows.assign(recipe=[{"density": 0.25}] * len(rows))
    assert verdict_of({"accuracy": changed}, "CIFAR-10: accuracy that SAT").ours == "-"


def test_a_task_that_the_paper_has_not_is_told_beside_the_one_it_stands_in_for():
    frames = {"accuracy_short": runs("imdb", {"sat": near(75), "dense": near(74)}, switched=(5_000,))}
    found = verdict_of(frames, "Yelp: SAT is")
    assert found.verdict == NOT_RUN and "IMDB" in found.why and "SAT 75.00" in found.why
    assert "IMDB" not in verdict_of(frames, "AG News: SAT is").why


@pytest.mark.parametrize(
    ("switched", "word", "ours"),
    [
        ((160, 450), REPRODUCED, "step 160 to 450; 2 of 2 runs switched"),
        ((145, 450), IN_DIRECTION, "step 145 to 450; 2 of 2 runs switched"),
        ((160, None), IN_DIRECTION, "step 160; 1 of 2 runs switched"),
        ((None, None), NOT_REPRODUCED, "0 of 2 runs switched"),
    ],
)
def test_switching_counts_the_runs_that_never_did(switched, word, ours):
    frames = {"accuracy": runs("cifar10", {"sat": [43.0, 43.0]}, switched=switched)}
    frames["training"] = frames["accuracy"].iloc[:1]  # the same run, in another experiment
    found = verdict_of(frames, "few steps: images")
    assert (found.verdict, found.ours) == (word, ours)


def test_a_forced_switch_says_nothing():
    rows = runs("cifar10", {"sat": [43.0]}).assign(recipe=[{"switch_at": 200}])
    assert verdict_of({"accuracy": rows}, "few steps: images").verdict == NOT_RUN


# ---- times and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "transformers", "word"),
    [(25, 50, REPRODUCED), (15, 50, IN_DIRECTION), (9, 50, NOT_REPRODUCED), (25, None, REPRODUCED)],
)
def test_step_time_is_judged_by_the_smaller_ratio(library, transformers, word):
    times = {"sat, sparse phase": 10, "bigbird, library": library, "bigbird, transformers": transformers,
             "bigbird, kernel": 11}  # fmt: skip
    found = verdict_of({"step": steps({kind: ms for kind, ms in times.items() if ms})}, "AG News: a training step")
    assert found.verdict == word
    assert "through SAT's kernel 1.10 (0.90 to 1.34, fast steps)" in found.ours


def test_fast_steps_are_compared_with_fast_ones_alone():
    plain = steps({"sat, sparse phase": 10, "bigbird, transformers": 60}, step_kind="plain")
    fast = steps({"sat, sparse phase": 5, "bigbird, library": 20}, wall_seconds=30.0)
    ratios = step_ratios({"step": pd.concat([plain, fast], ignore_index=True)}, "agnews")
    assert {kind: ratio.value for kind, ratio in ratios.items()} == {
        "sat, sparse phase, plain": 1, "sat, sparse phase": 1, "bigbird, library": 4, "bigbird, transformers": 6,
    }  # fmt: skip
    found = verdict_of({"step": fast}, "AG News: a training step")
    assert found.minutes == "1.0" and ", fast steps)" in found.ours
    mixed = pd.concat([plain[plain["attention"] != "sat"], fast], ignore_index=True)
    assert "bigbird, transformers" not in step_ratios({"step": mixed}, "agnews")
    found = verdict_of({"step": mixed}, "AG News: a training step")
    assert found.ours.endswith("; layer of transformers: not measured in the same way as SAT")


def operations(**changes) -> pd.DataFrame:
    row = {"sweep": "operations", "task": "cifar10", "dtype": "bfloat16", "tf32": None, "gemm_qk_ms": 2.4}
    row |= {f"{name}_floor_bytes": 1e9 for name in ("sddmm", "sparse_softmax", "spmm")}
    row |= {"softmax_ms": 9.4, "gemm_av_ms": 4.0, "sddmm_ms": 1.2, "sparse_softmax_ms": 0.25, "spmm_ms": 3.9}
    return pd.DataFrame([row | STAMP | changes, row | STAMP | changes | {"dtype": "float32", "tf32": True}])


def test_operations_and_their_bottleneck():
    frames = {"kernels": operations()}
    words = ["softmax is faster", "SDDMM is faster", "SpMM is faster", "the softmax is the bottleneck"]
    assert [verdict_of(frames, claim).verdict for claim in words] == [REPRODUCED, REPRODUCED, IN_DIRECTION, REPRODUCED]
    assert verdict_of(frames, "SDDMM is").ours == "bfloat16 2.0; float32 with TF32 2.0"
    assert verdict_of({"kernels": operations(softmax_ms=1.0)}, "bottleneck").verdict == NOT_REPRODUCED
    assert verdict_of({"kernels": operations(spmm_ms=None)}, "SpMM is").verdict == NOT_RUN


def test_memory_against_the_map_that_is_written_out():
    lines = [
        {"sweep": "length", "length": length, "head_size": 32, "batch": 4, "method": name, "peak_bytes": peak}
        for length in (512, 1024)
        for name, peak in (("fused", 10), ("sdpa", 12), ("materialised", 10 * length // 256))
    ]
    frames = {"kernels": pd.DataFrame([line | STAMP for line in lines])}
    found = verdict_of(frames, "memory: attention")
    assert found.verdict == IN_DIRECTION and found.ours.startswith("2 to 4 times") and "1.20 against" in found.ours
    frames = {"step": steps({"sat, sparse phase": 10, "bigbird, kernel": 10, "lsg, library": 60, "dense": 10})}
    found = verdict_of(frames, "memory: a whole")
    assert found.verdict == REPRODUCED and found.ours == (
        "lsg, library 6.00; bigbird, kernel 1.00; dense 1.00 times SAT's"
    )


# ---- pretrained models and kept blocks -------------------------------------------------------------------------------


def test_fine_tuning_may_cost_accuracy_and_time():
    sat = {"attention": "sat", "pattern": "learned", "pruned": "zero", "density": 0.5}
    lines = [{"attention": "dense", "test_accuracy": value} for value in (0.80, 0.81)]
    lines += [sat | {"test_accuracy": value} for value in (0.70, 0.71)]
    rows = pd.DataFrame([{"model": "minilm", "data": "mrpc"} | line | STAMP for line in lines])
    assert verdict_of({"finetuning": rows}, "also fine-tunes").verdict == IN_DIRECTION
    poor = rows.assign(test_accuracy=rows["test_accuracy"] - 0.1)
    assert verdict_of({"finetuning": poor}, "also fine-tunes").verdict == NOT_REPRODUCED
    others = rows.assign(pruned="drop")  # not by the released rule
    assert verdict_of({"finetuning": others}, "also fine-tunes").verdict == NOT_RUN
    equal = rows.assign(test_accuracy=[0.80, 0.81, 0.80, 0.81])
    assert verdict_of({"finetuning": equal}, "also fine-tunes").verdict == REPRODUCED
    shape = {"architecture": "bert-base", "length": 128, "low_ms": 10.0, "median_ms": 10.0, "high_ms": 10.0}
    dense = {"attention": "sdpa"} | STAMP
    sparse = {"attention": "sat", "phase": "sparse"} | STAMP
    for ms, word in ((8.0, REPRODUCED), (12.0, NOT_REPRODUCED)):
        times = dict.fromkeys(("low_ms", "median_ms", "high_ms"), ms)
        rows = pd.DataFrame([shape | dense, shape | sparse | times])
        assert verdict_of({"pretrained_step": rows}, "gets faster").verdict == word


@pytest.mark.parametrize(("kept", "word"), [(0.05, REPRODUCED), (0.08, IN_DIRECTION), (0.25, NOT_REPRODUCED)])
def test_kept_blocks_beside_random_ones(kept, word):
    lines = [
        {"step": 9, "layer": layer, "head": 0, "asked_density": 0.05, "pattern": pattern, "mass_kept": mass + jitter}
        for layer, jitter in enumerate((0.0, 0.001))
        for pattern, mass in (("in use", kept), ("random", 0.05), ("best", 0.3))
    ]
    row = {"attention": "sat", "density": 0.05, "comparison": pd.DataFrame(lines).to_dict("list")} | STAMP
    rows = pd.DataFrame([row | {"seconds": {"dense": 30.0, "sparse": 30.0}}])
    assert verdict_of({"patterns": rows}, "no more attention").verdict == word
