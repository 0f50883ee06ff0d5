"""Four words for a claim, and the rules that choose among them by what was found.

    judge("ratio", Finding(rows, numbers={"ours": 2.1, "published": 2.48}))  # "reproduced"

A new rule is a function of the numbers that it looks at, and a line in `RULES`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import pandas as pd

from ..common.errors import require
from .published import published_value

WORDS = ("reproduced", "reproduced in direction", "not reproduced", "not run")
REPRODUCED, IN_DIRECTION, NOT_REPRODUCED, NOT_RUN = WORDS
FASTER, UNCLEAR, SLOWER = PACES = ("faster beyond the quartiles", "within them", "slower")
ENOUGH = 0.8  # of a published ratio or gain that ours has to reach to count as reproduced
WHOLE = 0.75  # of the official training examples: with fewer, a run is one on a part of the data
CHANCE = 0.1  # of what the best blocks gain over random ones: the kept ones gain less, so they are at chance
HALF = 0.5  # of the same: they gain less, so they are nearer to chance than to the best


# ---- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """Difference of two means over seeds, and its standard error (NaN where one of them has a single seed)."""

    difference: float
    error: float
    seeds: tuple[int, int]

    @property
    def beyond(self) -> bool:
        """By more than twice the standard error."""
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

    def beside(self, published: float) -> str:
        """A sentence on its size: beside its error, and beside the published difference."""
        if np.isnan(self.error):
            return "Without two seeds of both there is no spread to judge by"
        error, share = f"twice its standard error of {self.error:.2f}", self.difference / published
        if not self.beyond:
            return f"The difference is less than {error}"
        sign = "published" if self.difference > 0 else "opposite"
        return f"Beyond {error}, with the {sign} sign, {share:.2f} times the published gain"


def gap(values: pd.Series, others: pd.Series) -> Gap | None:
    """Mean of `values` less mean of `others`; None where one of them has nothing."""
    if not len(values) or not len(others):
        return None
    error = np.sqrt(sum(part.std(ddof=1) ** 2 / len(part) for part in (values, others)))
    return Gap(values.mean() - others.mean(), error, (len(values), len(others)))


@dataclass(frozen=True)
class Ratio:
    """Of two medians, with the widest that their quartiles allow."""

    value: float
    low: float
    high: float
    step_kind: str = ""  # "fast" or "plain", where the rows tell how the steps were taken

    @property
    def pace(self) -> str:
        """One of `PACES`."""
        if self.value <= 1:
            return SLOWER
        return FASTER if self.low > 1 else UNCLEAR

    def __str__(self) -> str:
        way = f", {self.step_kind} steps" if self.step_kind else ""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}{way})"


def time_ratio(slower: pd.Series, faster: pd.Series) -> Ratio:
    """`slower`'s time over `faster`'s."""
    low, middle, high = faster[["low_ms", "median_ms", "high_ms"]]
    step_kind = slower.get("step_kind", "")
    return Ratio(slower["median_ms"] / middle, slower["low_ms"] / high, slower["high_ms"] / low, step_kind)


@dataclass(frozen=True)
class Claim:
    """One claim; data/claims.toml says what its keys mean."""

    text: str
    measure: str
    rule: str
    published: str | float
    command: str
    figure: str
    shown: str = ""
    tasks: Sequence[str] = ()
    attention: str = ""
    against: Sequence[str] = ()
    operation: str = ""
    similar: str = ""
    one_answer: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def value(self) -> Any:
        """The published number, or a table of them."""
        return published_value(self.published) if isinstance(self.published, str) else self.published

    @property
    def published_text(self) -> str:
        """The published value as the table has it."""
        if not self.shown:
            return str(self.published)
        return self.shown.format(**self.value) if isinstance(self.value, dict) else self.shown.format(self.value)


@dataclass(frozen=True, eq=False)
class Finding:
    """What the rows say of a claim; by default there are none.

    Args:
        rows: what all this comes from.
        ours: our value in words.
        reasons: parts of the sentence beside it; empty ones are left out.
        numbers: what the claim's rule looks at, by the names of its arguments.
        judged: whether the rows can be held against the published value.
        command: what measures these rows, where that isn't the claim's own command; several with ", " between them.
    """

    rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    ours: str = "-"
    reasons: Sequence[str] = ("There are no rows yet",)
    numbers: dict[str, Any] = field(default_factory=dict)
    judged: bool = True
    command: str = ""

    @property
    def why(self) -> str:
        """The reasons as one sentence."""
        return "; ".join(filter(None, self.reasons)) + "."


# ---- words -----------------------------------------------------------------------------------------------------------


def told(form: str, *values) -> str:
    """The form filled with the values; nothing where one of them is missing: None, empty or 0."""
    return form.format(*values) if all(values) else ""


def span(values: Iterable[float], form: str = ".2f") -> str:
    """ "a to b", one number where both look the same, or nothing."""
    values = list(values)
    ends = [f"{end(values):{form}}" for end in (min, max)] if values else []
    return " to ".join(dict.fromkeys(ends))


def mean(percents: pd.Series) -> str:
    """With the deviation over seeds, where there are several; nothing of nothing."""
    if len(percents) > 1:
        return f"{percents.mean():.2f} ± {percents.std(ddof=1):.2f} ({len(percents)} seeds)"
    return "".join(f"{percent:.2f} (1 seed)" for percent in percents)


def bench(experiment: str, name: str, values: Iterable[str]) -> str:
    """The commands that measure some cases of an experiment."""
    each = (f"python -m sat_lib bench {experiment} --profile paper --only {name}={value}" for value in values)
    return ", ".join(dict.fromkeys(each))


# ---- rules -----------------------------------------------------------------------------------------------------------


def judge(rule: str, finding: Finding) -> str:
    """The word for a finding, by a rule's name in `RULES`.

    Raises:
        InputError: the rule looks at other numbers than were measured.
    """
    if not len(finding.rows) or not finding.judged:
        return NOT_RUN
    wanted, got = signature(RULES[rule]).parameters, finding.numbers
    fits = f"rule {rule}: wanted {', '.join(wanted)}; the measure gives {', '.join(got)}. Take a rule that fits it"
    require(wanted.keys() == got.keys(), fits)
    return RULES[rule](**got)


def judge_ratio(ours: float, published: float) -> str:
    """Of "so many times as much": most of the published ratio, more than once, or not even that."""
    if np.isnan(ours):
        return NOT_RUN
    return _word(ours >= ENOUGH * published, ours > 1)


def judge_gain(found: Gap | None, published: float = 0.0) -> str:
    """Of "more than": beyond the spread, and most of the published gain, is all; the right sign is the direction.

    But a difference within the spread, and so far below the published one that this lies outside, is no reproduction.
    """
    if found is None:
        return NOT_RUN
    excluded = not found.beyond and published - found.difference > 2 * found.error
    if found.difference <= 0 or excluded:
        return NOT_REPRODUCED
    return _word(found.beyond and found.difference >= ENOUGH * published, True)


def judge_order(gaps: Iterable[Gap | None]) -> str:
    """Of "before all the others": the worst of the single comparisons; one that isn't there leaves the direction."""
    words = {judge_gain(found) for found in gaps}
    if words <= {NOT_RUN}:
        return NOT_RUN
    return _word(words == {REPRODUCED}, NOT_REPRODUCED not in words)


def all_or_none(holds: Iterable[bool]) -> str:
    """Of what has to hold everywhere: some of it is nothing."""
    return _word(all(holds), False)


def all_hold(holds: Sequence[bool]) -> str:
    """Of what holds everywhere, somewhere or nowhere."""
    return _word(all(holds), any(holds))


def all_hold_of_all(holds: Iterable[bool], complete: bool) -> str:
    """Of what has to hold everywhere; with a part of the published cases alone it is the direction."""
    holds = all(holds)
    return _word(holds and complete, holds)


def all_within(runs: int, switched: int, within: int) -> str:
    """Of runs that have to switch within a range of steps: all did, some switched at all, or none."""
    return _word(switched == runs == within, switched > 0)


def no_worse(as_good: Iterable[bool], learns: Iterable[bool]) -> str:
    """Of "no worse than": no case is worse beyond the spread, or at least all of them learn something."""
    return _word(all(as_good), all(learns))


def all_faster(ratios: Iterable[Ratio]) -> str:
    """Of "faster": beyond the quartiles in every case, or at least slower in none."""
    paces = {ratio.pace for ratio in ratios}
    return _word(paces == {FASTER}, SLOWER not in paces)


def share_of_chance(share: float) -> str:
    """Of "no better than chance": `share` is what is gained over chance, of what the best choice gains."""
    return _word(share < CHANCE, share < HALF)


def agree_and_faster(agree: bool, faster: bool, accuracy: Gap | None, complete: bool) -> str:
    """Of several processes: they end alike, are faster than one, and no less accurate beyond the spread.

    `complete`: there are as many as the paper's. With fewer, or without a spread of accuracies, it is the direction.
    """
    worse = accuracy is not None and accuracy.beyond and accuracy.difference < 0
    clear = complete and accuracy is not None and not np.isnan(accuracy.error)
    holds = agree and faster and not worse
    return _word(holds and clear, holds)


def _word(reproduced: bool, in_direction: bool) -> str:
    if reproduced:
        return REPRODUCED
    return IN_DIRECTION if in_direction else NOT_REPRODUCED


RULES: dict[str, Callable[..., str]] = {
    "ratio": judge_ratio,
    "gain": judge_gain,
    "order": judge_order,
    "all_or_none": all_or_none,
    "all_hold": all_hold,
    "all_hold_of_all": all_hold_of_all,
    "all_within": all_within,
    "no_worse": no_worse,
    "all_faster": all_faster,
    "share_of_chance": share_of_chance,
    "agree_and_faster": agree_and_faster,
}
