import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.scores import NEAR, Score, share, wilson


def score(**fields: Any) -> Score:
    return Score.model_validate({"task": "copa", "metric": "acc", "value": 0.6, "n": 100} | fields)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 4))
def test_the_interval_ends_where_what_was_found_is_so_many_deviations_away(
    case: tuple[int, int], deviations: float
) -> None:
    right, n = case
    low, high = wilson(right, n, deviations)
    assert 0 <= low <= right / n <= high <= 1
    assert low < high
    for end in (low, high):
        if 0 < end < 1:
            away = deviations * math.sqrt(end * (1 - end) / n)
            assert abs(right / n - end) == pytest.approx(away, rel=1e-5)


def test_the_interval_is_wilsons() -> None:
    # Newcombe (1998, doi 10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I, method 3.
    for (right, n), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(right, n) == pytest.approx(expected, abs=5e-5)


def test_the_interval_has_the_true_share_in_most_cases() -> None:
    random = np.random.default_rng(0)
    for true in (0.02, 0.5, 0.99):
        found = [wilson(int(right), 100) for right in random.binomial(100, true, 4000)]
        assert 0.92 < np.mean([low <= true <= high for low, high in found]) < 0.985


@pytest.mark.parametrize(
    ("correct", "chance", "near"),
    [
        ([True] * 3, 0.5, True),  # 3 of 3, of which Wilson's interval begins at 3/7
        ([True] * 4, 0.5, True),  # at 4/8
        ([True] * 5, 0.5, False),
        ([True], 0.25, True),
        ([True] * 2, 0.25, False),
        ([False] * 3, 0.5, True),
        ([False] * 300, 0.5, True),
    ],
)
def test_few_that_are_all_right_are_near_chance(correct: list[bool], chance: float, near: bool) -> None:
    assert share("copa", "acc", correct, chance=chance).near_chance is near


@given(st.integers(1, 99), st.floats(0.01, 0.99))
def test_other_shares_are_near_chance_by_their_error(right: int, chance: float) -> None:
    one = share("copa", "acc", [True] * right + [False] * (100 - right), chance=chance)
    assert one.value is not None
    assert one.standard_error is not None
    assert one.near_chance is (one.value - chance <= NEAR * one.standard_error)


def test_near_chance_where_less_is_better() -> None:
    perplexity = {"value": 1.0, "standard_error": 0.1, "higher_is_better": False}
    assert not score(**perplexity, chance=1.3).near_chance
    assert score(**perplexity, chance=1.1).near_chance
    assert score(**perplexity, chance=0.5).near_chance


def test_what_is_not_known_is_not_near_chance() -> None:
    for fields in ({"chance": None}, {"value": None, "chance": 0.5}, {"standard_error": None, "chance": 0.6}):
        assert not score(**{"standard_error": 0.1, **fields}).near_chance


@pytest.mark.parametrize("field", ["value", "standard_error", "chance", "majority"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_no_score(field: str, number: float) -> None:
    with pytest.raises(ValidationError, match=rf"{field}\n"):
        score(**{field: number})


@pytest.mark.parametrize(
    ("fields", "text", "chance"),
    [
        ({"value": 0.3124, "standard_error": 0.0104, "chance": 0.25}, "31.2% ± 1.0", "25.0%"),
        ({"value": 1.0, "standard_error": 0.0}, "100.0%", "—"),
        ({"value": 54.2149, "standard_error": 1.234, "chance": 50257.0}, "54.21 ± 1.2", "50,257"),
        ({"value": 145136.6, "standard_error": 7353.2}, "145,137 ± 7,353", "—"),
        ({"value": 0.9, "standard_error": None, "higher_is_better": False}, "0.9", "—"),
        ({"value": None, "higher_is_better": False}, "∞", "—"),
        ({"value": None, "n": 0}, "—", "—"),
    ],
)
def test_a_score_is_written_with_its_error_in_its_own_unit(fields: dict[str, Any], text: str, chance: str) -> None:
    one = score(**fields)
    assert (one.text, one.figure(one.chance)) == (text, chance)
