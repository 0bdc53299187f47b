from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.asking.answers import Exact, Form, Numeric, Regex, Set
from tasks.asking.scorers import is_right
from tasks.asking.words import names, normalised


def form(**checks: Any) -> Form:
    return Form.model_validate({"form": checks})


@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once
    assert normalised(f' "{text}." ') == once
    assert normalised(text.upper()) == normalised(text.upper().lower().upper())


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("cold", True),
        (" Cold. ", True),
        ("“COLD.”", True),
        ("**Cold**", True),
        ("\n\ncold\nBecause it is.", True),
        ("ice  COLD", True),
        ("cold water", False),
        ("col d", False),
        ("Because it is cold.\ncold", False),
        ("", False),
        (" \n", False),
    ],
)
def test_exact(said: str, right: bool) -> None:
    assert is_right(Exact(exact=("cold", "ice cold")), said) is right


@pytest.mark.parametrize(
    ("number", "said", "right"),
    [
        (42, "17 + 25 = 42", True),
        (42, "The answer is 42.", True),
        (42, "It is $42.00 in all", True),
        (42, "42 apples", True),
        (42, "42 apples, and not 43", False),
        (42, "I add 1 and get\n#### 42", True),
        (42, "forty-two", False),
        (42, "142", False),
        (-5, "It is −5 °C", True),
        (-5, "It is -5", True),
        (5, "10-5", True),
        (1234567, "1,234,567 people", True),
        (0.1, "0.1", True),
        (0.1, "0.10000001", False),
        (0, "zero", False),
        (0, "0", True),
    ],
)
def test_numeric(number: float, said: str, right: bool) -> None:
    assert is_right(Numeric(numeric=number), said) is right


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{} km", "It is {}.", "1 + 1 = {}%", "**{}**"]))
def test_a_number_is_found_however_it_is_written(number: int, text: str) -> None:
    answer = Numeric(numeric=number)
    assert is_right(answer, text.format(number))
    assert is_right(answer, text.format(f"{number:,}"))
    assert not is_right(answer, text.format(number + 1))


@given(st.floats(-1e6, 1e6), st.floats(0, 100))
def test_a_tolerance_is_kept(number: float, tolerance: float) -> None:
    answer = Numeric(numeric=round(number, 3), tolerance=round(tolerance, 3))
    assert is_right(answer, f"{answer.numeric + answer.tolerance / 2:.6f}") or answer.tolerance < 1e-5
    assert not is_right(answer, f"{answer.numeric + answer.tolerance + 0.01:.6f}")


def test_a_pattern_is_searched_whatever_the_case() -> None:
    answer = Regex(regex=r"\bparis\b")
    assert is_right(answer, "The capital is PARIS, of course.")
    assert not is_right(answer, "comparison")
    assert not is_right(Regex(regex=".*"), "\n")


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("red, blue and yellow", True),
        ("Yellow.\nRed.\nBlue.", True),
        ("red and blue", False),
        ("reddish, blue, yellow", False),
        ("red, blue, yellow and green", False),
        ("red, blue, yellow, evergreen", True),
        ("", False),
    ],
)
def test_a_set_is_named_whole_and_alone(said: str, right: bool) -> None:
    assert is_right(Set(set=("red", "blue", "yellow"), others=("green",)), said) is right


def test_some_of_a_set_may_do() -> None:
    answer = Set(set=("New York", "C++", "it's"), at_least=2)
    assert is_right(answer, "new\nyork and c++!")
    assert is_right(answer, "it’s C++")
    assert not is_right(answer, "New Yorkers like it's")


POEM = "The sea is wide,\nthe waves are high,\n\nand over them\nthe sea gulls fly."


@pytest.mark.parametrize(
    ("checks", "right"),
    [
        ({"min_lines": 4, "max_lines": 4}, True),
        ({"min_lines": 5}, False),
        ({"max_lines": 3}, False),
        ({"min_words": 15, "max_words": 15}, True),
        ({"min_words": 16}, False),
        ({"max_words": 14}, False),
        ({"contains": ["wave", "sea"]}, True),
        ({"contains": ["wave", "ship"]}, False),
        ({"contains": ["wave", "ship"], "at_least": 1}, True),
        ({"contains": ["gull fly"]}, False),
        ({"min_distinct": 0.8}, True),
        ({"min_distinct": 0.81}, False),
        ({"starts_with": "the SEA"}, True),
        ({"starts_with": "sea"}, False),
        ({"matches": r"high,\s+AND"}, True),
        ({"matches": "^and"}, False),
        ({"matches": "(?m)^and"}, True),
        ({"min_lines": 4, "matches": "ship"}, False),
    ],
)
def test_all_checks_of_a_form_hold(checks: dict[str, Any], right: bool) -> None:
    assert is_right(form(**checks), f"\n{POEM}\n") is right


def test_what_is_blank_has_no_form() -> None:
    assert not is_right(form(max_words=10), " \n ")
    assert not is_right(form(min_distinct=0.5), "")
    assert not is_right(form(min_words=1), "...")


@given(st.lists(st.sampled_from(["sea", "wave", "ship", "and"]), min_size=1, max_size=30))
def test_repetition_is_found(words: list[str]) -> None:
    assert is_right(form(min_distinct=0.5), " ".join(words)) == (len(set(words)) * 2 >= len(words))


@pytest.mark.parametrize(
    ("thing", "text", "found"),
    [
        ("berry", "berries", True),
        ("monkey", "Monkeys", True),
        ("monkey", "monkeyed", False),
        ("box", "Boxes!", True),
        ("star", "starship", False),
        ("star", "a starry sky", False),
    ],
)
def test_plurals_count(thing: str, text: str, found: bool) -> None:
    assert names(text, thing, plural=True) is found
    assert not names(text, thing)
