"""The rules by themselves, and the words that findings are told in."""

import numpy as np
import pandas as pd
import pytest
from made_rows import near

from sat_lib.common.errors import InputError
from sat_lib.figures.judge import (
    IN_DIRECTION,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    RULES,
    WORDS,
    Finding,
    Ratio,
    gap,
    judge,
    judge_order,
    judge_ratio,
    mean,
    span,
    told,
)

ROWS = pd.DataFrame({"device": ["NVIDIA H100"]})
CLEAR, UNCLEAR, SLOWER = Ratio(1.2, 1.1, 1.3), Ratio(1.2, 0.9, 1.3), Ratio(0.9, 0.8, 1.1)
BETTER, WORSE, SAME = (gap(pd.Series(near(mean)), pd.Series(near(2))) for mean in (3, 1, 2.01))
ALONE = gap(pd.Series([2.0]), pd.Series(near(2)))


@pytest.mark.parametrize(
    ("ours", "word"),
    [(2.5, REPRODUCED), (2.0, REPRODUCED), (1.99, IN_DIRECTION), (1.01, IN_DIRECTION), (1.0, NOT_REPRODUCED),
     (0.5, NOT_REPRODUCED), (np.nan, NOT_RUN)],
)  # fmt: skip
def test_a_ratio_has_to_reach_four_fifths_of_the_published_one(ours, word):
    assert judge_ratio(ours, 2.5) == word


def test_a_gap_knows_its_standard_error():
    found = gap(pd.Series([1.0, 2.0, 3.0]), pd.Series([0.0, 1.0, 2.0, 1.0]))
    assert found.difference == 1 and found.seeds == (3, 4)
    assert found.error == pytest.approx(np.sqrt(1 / 3 + (2 / 3) / 4))
    assert not found.beyond and "within the spread" in str(found)
    single = gap(pd.Series([9.0]), pd.Series([0.0, 1.0]))
    assert np.isnan(single.error) and not single.beyond and "1 and 2 seeds, no spread" in str(single)
    assert gap(pd.Series([], dtype=float), pd.Series([1.0])) is None


def test_an_order_is_as_good_as_its_worst_comparison():
    ahead, behind = (gap(pd.Series(near(mean)), pd.Series(near(2))) for mean in (3, 1))
    assert judge_order([ahead, ahead]) == REPRODUCED
    assert judge_order([ahead, None]) == IN_DIRECTION  # one of the others wasn't run
    assert judge_order([ahead, behind]) == NOT_REPRODUCED
    assert judge_order([None, None]) == NOT_RUN


@pytest.mark.parametrize(
    ("rule", "numbers", "word"),
    [
        ("all_or_none", {"holds": [True, True]}, REPRODUCED),
        ("all_or_none", {"holds": [True, False]}, NOT_REPRODUCED),
        ("all_hold", {"holds": [True, True]}, REPRODUCED),
        ("all_hold", {"holds": [True, False]}, IN_DIRECTION),
        ("all_hold", {"holds": [False]}, NOT_REPRODUCED),
        ("all_hold_of_all", {"holds": [True], "complete": True}, REPRODUCED),
        ("all_hold_of_all", {"holds": [True], "complete": False}, IN_DIRECTION),
        ("all_hold_of_all", {"holds": [True, False], "complete": True}, NOT_REPRODUCED),
        ("all_within", {"runs": 2, "switched": 2, "within": 2}, REPRODUCED),
        ("all_within", {"runs": 2, "switched": 2, "within": 1}, IN_DIRECTION),
        ("all_within", {"runs": 2, "switched": 1, "within": 1}, IN_DIRECTION),
        ("all_within", {"runs": 2, "switched": 0, "within": 0}, NOT_REPRODUCED),
        ("no_worse", {"as_good": [True, True], "learns": [True, False]}, REPRODUCED),
        ("no_worse", {"as_good": [True, False], "learns": [True, True]}, IN_DIRECTION),
        ("no_worse", {"as_good": [False], "learns": [False]}, NOT_REPRODUCED),
        ("all_faster", {"ratios": [CLEAR, CLEAR]}, REPRODUCED),
        ("all_faster", {"ratios": [CLEAR, UNCLEAR]}, IN_DIRECTION),
        ("all_faster", {"ratios": [CLEAR, SLOWER]}, NOT_REPRODUCED),
        ("share_of_chance", {"share": 0.09}, REPRODUCED),
        ("share_of_chance", {"share": 0.1}, IN_DIRECTION),
        ("share_of_chance", {"share": 0.5}, NOT_REPRODUCED),
        ("agree_and_faster", {"agree": True, "faster": True, "accuracy": SAME, "complete": True}, REPRODUCED),
        ("agree_and_faster", {"agree": True, "faster": True, "accuracy": BETTER, "complete": True}, REPRODUCED),
        ("agree_and_faster", {"agree": True, "faster": True, "accuracy": SAME, "complete": False}, IN_DIRECTION),
        ("agree_and_faster", {"agree": True, "faster": True, "accuracy": ALONE, "complete": True}, IN_DIRECTION),
        ("agree_and_faster", {"agree": True, "faster": True, "accuracy": None, "complete": True}, IN_DIRECTION),
        ("agree_and_faster", {"agree": True, "faster": True, "accuracy": WORSE, "complete": True}, NOT_REPRODUCED),
        ("agree_and_faster", {"agree": False, "faster": True, "accuracy": SAME, "complete": True}, NOT_REPRODUCED),
        ("agree_and_faster", {"agree": True, "faster": False, "accuracy": SAME, "complete": True}, NOT_REPRODUCED),
    ],
)
def test_each_rule_has_its_own_numbers(rule, numbers, word):
    assert judge(rule, Finding(ROWS, numbers=numbers)) == word in WORDS
    assert judge(rule, Finding(numbers=numbers)) == NOT_RUN  # without rows
    assert judge(rule, Finding(ROWS, numbers=numbers, judged=False)) == NOT_RUN


def test_a_rule_takes_all_of_its_numbers_and_no_others():
    for rule in RULES:
        with pytest.raises(InputError, match=f"rule {rule}: wanted .*; the measure gives guess"):
            judge(rule, Finding(ROWS, numbers={"guess": 1}))


@pytest.mark.parametrize(
    ("values", "others", "published", "said"),
    [
        (near(12), near(10), 2.0, "Beyond twice its standard error of 0.08, with the published sign, 1.00 times"),
        (near(9), near(10), 2.0, "Beyond twice its standard error of 0.08, with the opposite sign, -0.50 times"),
        (near(10), near(10), 2.0, "The difference is less than twice its standard error of 0.08"),
        ([12.0], near(10), 2.0, "Without two seeds of both there is no spread to judge by"),
    ],
)
def test_a_gap_is_told_beside_its_error_and_the_published_one(values, others, published, said):
    assert gap(pd.Series(values), pd.Series(others)).beside(published).startswith(said)


def test_a_sentence_is_made_of_the_reasons_that_there_are():
    assert Finding(ROWS, "1.00", ["One thing", "", "another"]).why == "One thing; another."
    assert (Finding().ours, Finding().why) == ("-", "There are no rows yet.")
    assert told("{} of {:.1f}", 2, 3.0) == "2 of 3.0"
    assert not told("{}", None) and not told("{}", "") and not told("{} of {}", 0, 3)
    assert (span([1, 2.5, 2]), span([1.001, 1.002]), span([])) == ("1.00 to 2.50", "1.00", "")
    assert (mean(pd.Series([1.0])), mean(pd.Series(dtype=float))) == ("1.00 (1 seed)", "")
    assert mean(pd.Series([1.0, 3.0])) == "2.00 ± 1.41 (2 seeds)"
