"""The tables for a first look say what the other tables and the committed rows say."""

import pandas as pd
import pytest
from made_rows import committed_rows

from sat_lib import experiments, figures
from sat_lib.common import files
from sat_lib.experiments.kernel_summary import kernel_summary
from sat_lib.figures import ablations, claims, overview, overview_figure, speed
from sat_lib.figures.judge import WORDS


@pytest.fixture(scope="module")
def frames() -> dict[str, pd.DataFrame]:
    more = {name: experiments.rows(name, "paper", measure=False) for name in ("ablations", "best")}
    return committed_rows() | more


@pytest.fixture(scope="module")
def verdicts(frames) -> pd.DataFrame:
    return claims.verdict_table(frames)


def test_the_committed_tables_are_those_of_the_committed_rows(frames, verdicts):
    tables = {
        "findings": overview.findings(frames),
        "attention_speed": overview.attention_speed(kernel_summary(frames["kernels"], bandwidth_tb_s=1.0)),
        "verdict_counts": overview.verdict_counts(verdicts),
        "reproduce": overview.claim_table(verdicts),
    }
    for name, table in tables.items():
        assert figures.to_markdown(table) == (files.ROOT / f"figures/paper/{name}.md").read_text(), "run `make figures`"


def test_findings_are_at_most_eight_and_name_their_notebooks(frames):
    table = overview.findings(frames)
    assert 1 <= len(table) <= 8 and not table["number"].str.contains("nan").any()
    assert all((files.ROOT / "notebooks" / f"{name}.ipynb").exists() for name in table["notebook"])


def test_findings_agree_with_the_verdicts(frames, verdicts):
    """Both take differences of the same runs."""
    number = dict(overview.findings(frames)[["finding", "number"]].to_numpy())
    ours = verdicts.set_index("claim")["ours"]
    gain = ours["CIFAR-10: accuracy that SAT gains over dense attention"].split(" (")[0]
    assert number["accuracy: SAT as published less dense attention, CIFAR-10"].startswith(gain)
    why = verdicts.set_index("claim")["why"]
    ahead = why["CIFAR-10: Longformer is the most accurate"].split("Longformer is at ")[1].split(" (")[0]
    assert ahead in number["accuracy: LSG and Longformer less SAT as published, CIFAR-10"]
    tuned = number["accuracy: MiniLM fine-tuned on MRPC, SAT at a density of 0.5 less dense"]
    assert tuned in why["SAT also fine-tunes pretrained models"]


def test_findings_without_rows_are_dashes(frames):
    table = overview.findings({name: frame.iloc[:0] for name, frame in frames.items()} | {"accuracy": pd.DataFrame()})
    assert len(table) == 8 and all("-" in number for number in table["number"])


def test_a_difference_has_the_standard_error_of_its_means():
    rows = pd.DataFrame({"name": list("xxyyz"), "task": "a", "test_accuracy": [0.06, 0.04, 0.03, 0.01, 0.5]})
    assert overview.difference(rows, {"name": "x"}, {"name": "y"}, task="a") == "+3.00 ± 1.41"
    assert overview.difference(rows, {"name": "z"}, {"name": "y"}) == "+48.00"
    assert overview.difference(rows, {"name": "x"}, {"name": "y"}, task="b") == "-"


def test_speed_is_of_the_shapes_that_were_asked_for(frames):
    table = overview.attention_speed(kernel_summary(frames["kernels"], bandwidth_tb_s=1.0))
    assert len(table) == len(overview.SHAPES)
    slower = table["SDPA / SAT"].astype(float) < 1
    assert list(table.loc[slower, "density"]) == ["100 %"], "where everything is kept, dense attention is faster"


@pytest.mark.parametrize("measured", [1, 10, 40])
def test_tables_of_kernels_are_made_of_what_has_been_measured(frames, measured):
    lines = kernel_summary(frames["kernels"].iloc[:measured], bandwidth_tb_s=1.0)
    shapes = overview.attention_speed(lines)
    assert "SAT ms" in shapes and len(shapes) < len(overview.SHAPES)
    assert len(speed.kernel_table(lines)) == (lines["sweep"] == "main").sum()
    assert "fused is faster" in speed.kernel_table(lines.iloc[:0])


def test_every_claim_has_one_verdict(verdicts):
    counts = overview.verdict_counts(verdicts)
    assert counts["claims"].sum() == len(verdicts) == len(overview.claim_table(verdicts))
    assert list(counts["verdict"]) == list(WORDS)


# ---- the figure of the first page ------------------------------------------------------------------------------------


def test_the_figure_draws_what_the_other_tables_say(frames):
    figure, drawn = overview_figure.overview_figure(frames)
    fast = overview.attention_speed(kernel_summary(frames["kernels"], bandwidth_tb_s=1.0))
    longest = fast[fast["batch x heads x length x head size"].str.contains("16,384")].iloc[0]
    at_longest = drawn[(drawn["length"] == 16384) & (drawn["density"] == 0.05)].set_index("method")["over_sat"]
    assert f"{at_longest['sdpa']:.2f}" == longest["SDPA / SAT"]
    assert f"{at_longest['flex']:.2f}" == longest["FlexAttention / SAT"]
    table = ablations.best_table(frames)
    of_table = table[table["task"] == "CIFAR-10"].set_index("attention")["test %"].astype(float)
    lines = drawn[(drawn["panel"] == "accuracy") & (drawn["steps"] == 10_000)]
    for line in lines.itertuples():
        name = {"sat": "sat, released"}.get(line.attention, line.attention)
        name += ", averaged" if line.averaged and name != "sat, best" else ""
        assert of_table[name] == round(line.percent, 2)
    assert {"dense", "bigbird", "longformer", "lsg", "sat", "sat, best"} <= set(lines["attention"])
    named = [text.get_text() for text in figure.axes[1].texts]
    assert sorted(named) == ["averaged weights", "ours", "published"]


def test_the_figure_draws_few_rows(frames):
    kernels = frames["kernels"]
    few = {"kernels": kernels[(kernels["sweep"] == "length") & (kernels["method"] == "sdpa")]}
    _, drawn = overview_figure.overview_figure(few)
    assert set(drawn["panel"]) == {"time"} and drawn["over_sat"].isna().all()
    _, drawn = overview_figure.overview_figure({"best": frames["best"].iloc[:1]})
    assert set(drawn["panel"]) <= {"accuracy"}
    assert not len(overview_figure.overview_figure({})[1])
