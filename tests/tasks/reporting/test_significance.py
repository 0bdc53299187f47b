"""Differences of two evaluations: against the definitions of the tests, and on samples of every sort."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tasks.reporting.significance import Difference, difference, differences
from tasks.scores import Score, share
from tests.tasks.reporting.made import evaluation

ACC = Score(task="arc_easy", metric="acc", value=0.5, n=4)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact test as its definition has it: twice the smaller tail of a fair coin's throws."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / math.pow(2, n))


def compared(folder: Path, first: Any, second: Any, score: Score = ACC, **fields: Any) -> Difference:
    """The difference of two evaluations of the same documents."""
    number = len(list(folder.iterdir()))
    mine = evaluation(folder / f"{number}-first", first, **fields)
    theirs = evaluation(folder / f"{number}-second", second, **fields)
    found = difference(mine, theirs, score)
    assert found is not None
    return found


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60), as_numbers=st.booleans())
def test_right_and_wrong_are_compared_by_the_exact_test_of_mcnemar(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[bool, bool]], as_numbers: bool
) -> None:
    first, second = ([float(one) if as_numbers else one for one in column] for column in zip(*pairs, strict=True))
    folder = tmp_path_factory.mktemp("pairs")
    found = compared(folder, first, second)
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    assert found.p == pytest.approx(mcnemar(only_first, only_second))
    assert found.difference == pytest.approx((only_first - only_second) / len(pairs))
    assert (found.first, found.second) == pytest.approx((sum(first) / len(pairs), sum(second) / len(pairs)))
    assert found.n == len(pairs)
    other = compared(folder, second, first)
    assert (other.p, other.difference) == pytest.approx((found.p, -found.difference))


def test_one_to_eight_is_no_accident_at_five_per_cent(tmp_path: Path) -> None:
    first = [True, *[False] * 8, *[True] * 20]
    second = [False, *[True] * 8, *[True] * 20]
    found = compared(tmp_path, first, second)
    assert found.p == pytest.approx(20 / 512)
    assert found.significant(0.05)
    assert not found.significant(0.01)
    assert found.is_fall(0.05)
    assert not found.is_rise(0.05)


def test_other_measures_are_compared_by_the_paired_t_test(tmp_path: Path) -> None:
    # Student's own: hours of sleep that two drugs gave the same ten patients.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = compared(tmp_path, first, second)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert found.difference == pytest.approx(-1.58)
    assert found.difference / found.standard_error == pytest.approx(-4.0621, abs=1e-4)
    assert found.interval == pytest.approx((-1.58 - 1.96 * found.standard_error, -1.58 + 1.96 * found.standard_error))
    rng = np.random.default_rng(0)
    many, others = rng.normal(size=(2, 500))
    assert compared(tmp_path, many, others).p == pytest.approx(stats.ttest_rel(many, others).pvalue)


def test_pairs_that_all_differ_by_the_same_are_judged_by_their_signs(tmp_path: Path) -> None:
    # The t-test would call two documents certain.
    assert compared(tmp_path, [0.5, 0.5], [0.2, 0.2]).p == pytest.approx(0.5)
    assert compared(tmp_path, [0.5, 0.6, 0.7], [0.4, 0.5, 0.6]).p == pytest.approx(0.25)
    assert compared(tmp_path, [0.5, 0.6], [0.5, 0.6]).p == 1


def test_less_may_be_better(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    losses = rng.normal(3, 0.1, 50)
    bits = share("wikitext", "bits_per_byte", losses.tolist()).model_copy(update={"higher_is_better": False})
    worse = compared(tmp_path, losses + rng.normal(0.1, 0.01, 50), losses, bits, metric="bits_per_byte")
    assert worse.difference > 0
    assert worse.is_fall()
    assert not worse.is_rise()
    better = compared(tmp_path, losses - rng.normal(0.1, 0.01, 50), losses, bits, metric="bits_per_byte")
    assert better.is_rise()
    assert not better.is_fall()


def test_documents_are_found_by_their_id_whatever_their_order(tmp_path: Path) -> None:
    first = evaluation(tmp_path / "a", [0.1, 0.2, 0.3, 0.9], ids=["p", "q", "r", "only here"])
    second = evaluation(tmp_path / "b", [0.5, 0.9, 0.3, 0.1, 0.1], ids=["r", "elsewhere", "q", "p", "another"])
    found = difference(first, second, ACC)
    assert found is not None
    assert found.n == 3
    assert (found.first, found.second) == pytest.approx((0.2, 0.3))


def test_documents_without_a_measure_are_left_out(tmp_path: Path) -> None:
    first = evaluation(tmp_path / "a", [0.1, None, 0.3, 0.2], scores=[ACC])
    second = evaluation(tmp_path / "b", [0.1, 0.5, math.inf, 0.4], scores=[ACC])
    found = difference(first, second, ACC)
    assert found is not None
    assert found.n == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": [10, 11, 12]},
        {"ids": [0, 11, 12]},  # one pair has no spread
        {"ids": ["0", "1", "2"]},
        {"metric": "acc_norm"},
    ],
)
def test_what_cannot_be_compared_is_no_difference(tmp_path: Path, changes: dict[str, Any]) -> None:
    first, second = evaluation(tmp_path / "a", [0.1, 0.2, 0.4]), evaluation(tmp_path / "b", [0.1, 0.2, 0.3], **changes)
    assert difference(first, second, ACC) is None
    assert difference(second, first, ACC) is None


def test_a_metric_that_is_no_number_or_has_no_samples_is_no_difference(tmp_path: Path) -> None:
    first, second = (evaluation(tmp_path / name, [0.1, 0.2], columns={"said": ["a", "b"]}) for name in "ab")
    assert difference(first, second, ACC.model_copy(update={"metric": "said"})) is None
    assert difference(first, second, ACC.model_copy(update={"metric": "word_perplexity"})) is None
    assert difference(first, second, ACC.model_copy(update={"group": "geography"})) is None
    (second / "samples.parquet").unlink()
    assert difference(first, second, ACC) is None


def test_a_question_that_is_asked_twice_is_two_pairs(tmp_path: Path) -> None:
    first = evaluation(tmp_path / "a", [0.1, 0.2, 0.9, 0.5], ids=["p", "q", "p", "p"])
    second = evaluation(tmp_path / "b", [0.1, 0.9, 0.3], ids=["p", "p", "q"])
    found = difference(first, second, ACC)
    assert found is not None
    assert found.n == 3
    assert (found.first, found.second) == pytest.approx((0.4, 1.3 / 3))
    assert found.difference == pytest.approx(-0.1 / 3)


def test_parts_are_compared_on_their_own_documents(tmp_path: Path) -> None:
    columns = {"digits": [1, 1, 2, 2, 2]}
    kinds = ["poetry", "poetry", "logic", "logic", "logic"]
    first = evaluation(tmp_path / "a", [1, 1, 0, 0, 1], categories=kinds, columns=columns)
    second = evaluation(tmp_path / "b", [0, 0, 0, 1, 1], categories=kinds, columns=columns)
    scores = [ACC, *(ACC.model_copy(update={"group": group}) for group in ("poetry", "digits: 2", "naming"))]
    whole, poetry, digits = differences(first, second, scores)
    assert (whole.group, whole.n) == (None, 5)
    assert whole.difference == pytest.approx(0.2)
    assert (poetry.group, poetry.n, poetry.first, poetry.second) == ("poetry", 2, 1, 0)
    assert (digits.group, digits.n) == ("digits: 2", 3)
    assert digits.difference == pytest.approx(-1 / 3)
