"""data/claims.toml and data/published.toml, and that the documents say what the committed rows give."""

import tomllib

import pandas as pd
import pytest
from made_rows import committed_rows, near, runs, steps

from sat_lib import figures
from sat_lib.common import files
from sat_lib.common.errors import InputError
from sat_lib.figures import claims, claims_figure, published
from sat_lib.figures.judge import NOT_RUN, REPRODUCED, RULES, WORDS
from sat_lib.figures.measures import MEASURES
from sat_lib.figures.published import published_value

# ---- the files -------------------------------------------------------------------------------------------------------

NEW = {
    "text": "LSG gains over dense attention",
    "measure": "gain",
    "rule": "gain",
    "published": 9.26,
    "shown": "{:+.1f} points",
    "command": "python -m sat_lib bench accuracy --profile paper --only task=agnews",
    "figure": "03_accuracy",
    "tasks": ["agnews"],
    "attention": "lsg",
    "against": ["dense"],
}


def write(path, **keys):
    """A file with one claim; keys given as None are left out."""
    lines = [f"{name} = {value!r}" for name, value in (NEW | keys).items() if value is not None]
    path.write_text("\n".join(["[[claims]]", *lines]) + "\n")
    return path


def test_every_claim_has_a_measure_and_a_rule_and_none_is_without_a_claim():
    found = claims.claims()
    assert len(found) == len({claim.text for claim in found}) == 31
    assert {claim.measure for claim in found} == MEASURES.keys()
    assert {claim.rule for claim in found} == RULES.keys()
    assert len(tomllib.loads(claims.PATH.read_text())["claims"]) == len(found)


def test_a_new_claim_is_a_few_lines(tmp_path):
    path = write(tmp_path / "claims.toml")
    (line,) = claims.verdict_table({"accuracy": runs("agnews", {"lsg": near(80), "dense": near(71)})}, path).to_dict(
        "records"
    )
    assert (line["claim"], line["published"], line["verdict"]) == (NEW["text"], "+9.3 points", REPRODUCED)
    assert line["ours"] == "+9.00 ± 0.08 (beyond the spread)"
    path = write(tmp_path / "steps.toml", text="a step of Longformer", measure="step_time", rule="ratio",
                 published=1.5, shown="{:.1f}", attention="longformer", against=["bigbird"])  # fmt: skip
    frames = {"step": steps({"sat, sparse phase": 10, "longformer, transformers": 20, "bigbird, kernel": 15})}
    (line,) = claims.verdict_table(frames, path).to_dict("records")
    assert line["verdict"] == REPRODUCED and line["ours"].startswith("layer of transformers 2.00")
    assert "BigBird's 1.50 times" in line["why"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"colour": "red"}, "key must be one of text, measure, .*; got 'colour'"),
        ({"rule": None, "figure": None}, "wanted rule, figure too"),
        ({"rule": "guess"}, "rule must be one of ratio, gain, .*; got 'guess'"),
        ({"measure": "guess"}, "measure must be one of parameter_counts, .*; got 'guess'"),
        ({"attention": None}, "measured by gain: wanted attention too"),
        ({"attention": "guess"}, "attention must be one of dense, .*; got 'guess'"),
        ({"against": ["guess"]}, "against must be one of dense, .*; got 'guess'"),
        ({"tasks": ["guess"]}, "tasks must be one of cifar10, .*; got 'guess'"),
        ({"tasks": "agnews"}, "tasks: wanted a list of names; got 'agnews'"),
        ({"operation": "guess"}, "operation must be one of .*; got 'guess'"),
        (
            {"published": "accuracy.guess"},
            "accuracy.guess: published.toml has no 'guess' there. It has dense, ",
        ),
        ({"published": "accuracy", "shown": "{guess}"}, "'{guess}' can't show 'accuracy'"),
    ],
)
def test_faults_in_a_claim_are_told(keys, said, tmp_path):
    with pytest.raises(InputError, match=said) as told:
        claims.claims(write(tmp_path / "claims.toml", **keys))
    assert str(told.value).startswith(f"claim {NEW['text']!r}")


def test_files_that_are_not_there_are_told(tmp_path):
    for read in (claims.claims, published.read):
        with pytest.raises(InputError, match="not in a wheel"):
            read(tmp_path / "absent.toml")


def test_published_numbers_have_one_place():
    assert published_value("accuracy")["sat"]["agnews"] == published_value("accuracy.sat.agnews") == 82.42
    gains, accuracy = published_value("gain"), published_value("accuracy")
    assert gains == {name: accuracy["sat"][name] - accuracy["dense"][name] for name in accuracy["sat"]}
    times = published_value("dense_ms")
    (bottleneck,) = (claim for claim in claims.claims() if claim.measure == "bottleneck")
    assert bottleneck.published_text.startswith(f"{100 * times['softmax'] / sum(times.values()):.0f} % ")
    for claim in claims.claims():
        if claim.measure == "most_accurate":
            means = {name: accuracy[name][claim.tasks[0]] for name in (claim.attention, *claim.against)}
            assert list(means) == sorted(accuracy, key=lambda name: -means[name])


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_without_rows_only_the_model_is_judged():
    found = claims.verdict_table({})
    assert list(found["verdict"]) == [REPRODUCED] + [NOT_RUN] * (len(found) - 1)
    assert set(found["ours"][1:]) == set(found["hardware"][1:]) == set(found["minutes"][1:]) == {"-"}


def test_files_may_be_absent(tmp_path):
    assert all(not len(frame) for frame in committed_rows(tmp_path).values())


@pytest.fixture(scope="module")
def committed() -> dict[str, pd.DataFrame]:
    return committed_rows()


def test_every_verdict_is_one_of_four_words_and_every_command_can_be_given(committed):
    for _, line in pd.concat([claims.verdict_table(committed), claims.verdict_table({})]).iterrows():
        assert line.verdict in WORDS
        assert all(part.startswith(("`python -m sat_lib ", "`make ")) for part in line.command.split(", ")), line
        assert all(text and "|" not in text and "nan" not in text.split() for text in line), line


def test_the_committed_tables_are_what_the_committed_rows_give(committed):
    """`test_cli` holds the documents against figures/paper; this holds figures/paper against the rows."""
    table = claims.verdict_table(committed)
    for name, made in {"verdicts": table, "verdicts_short": claims.short_table(table)}.items():
        text = (files.ROOT / f"figures/paper/{name}.md").read_text()
        assert figures.to_markdown(made) == text, "run `make figures`"


def test_the_figure_draws_what_there_is(committed):
    few = {"accuracy_short": runs("agnews", {"sat": near(90), "dense": near(80)}, train_examples=5_000)}
    for frames in (committed, few, few | {"step": steps({"sat, sparse phase": 10, "bigbird, library": 25})}):
        figure, drawn = claims_figure.verdict_figure(frames)
        assert len(figure.axes) == 2 and drawn["published"].notna().all()
    assert drawn["ours"].notna().sum() == 1 + 3 + 2  # a mean, three seeds, a ratio of times, one of memory


def test_the_figure_joins_ours_with_the_published_value_in_the_colour_of_the_verdict(committed):
    figure, drawn = claims_figure.verdict_figure(committed)
    table, left = claims.verdict_table(committed).set_index("claim"), figure.axes[0]
    gain = drawn[(drawn["name"] == "CIFAR-10") & (drawn["series"] == "mean")].iloc[0]
    joins = [line for line in left.lines if list(line.get_xdata()) == [gain["published"], gain["ours"]]]
    word = table.loc["CIFAR-10: accuracy that SAT gains over dense attention", "verdict"]
    assert [line.get_color() for line in joins] == [claims_figure.WORD_MARKS[word][1]]
    assert f"{gain['ours']:+.2f} ({gain['published']:+.2f})" in [text.get_text() for text in left.texts]
