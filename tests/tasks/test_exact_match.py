import pytest

from common.errors import UserError
from tasks.exact_match import (
    MOST_GROUPS,
    grouped,
    grouping_columns,
    measured,
    scores,
    shown_groups,
    shown_lengths,
    summarise,
)
from tasks.scores import wilson


def test_the_summary_by_length() -> None:
    summary = summarise(["1", "2", "10", "20"], [True, False, True, True])
    assert summary["exact_match"] == 0.75
    assert summary["standard_error"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert summary["interval"] == list(wilson(3, 4))
    assert [group["length"] for group in summary["by_answer_length"]] == [1, 2]
    assert summary["by_answer_length"][1] == {"length": 2, **measured([True, True])}
    assert summary["by_answer_length"][1]["standard_error"] == 0
    # Two of two says little.
    assert summary["by_answer_length"][1]["interval"][0] == pytest.approx(0.3424, abs=1e-4)


def test_a_single_answer_has_no_standard_error() -> None:
    assert measured([True])["standard_error"] is None


def test_problems_are_grouped_by_what_they_are_about() -> None:
    prompts = ["1+2=", "10-2=", "7+100=", "3 + 4="]
    columns = grouping_columns(None, prompts, ["0"] * 4, {"phrasing": ["b", "a", None, "b"]})
    groups = grouped(columns, [True, False, True, False])
    assert {
        name: [(one["group"], one["n"], one["exact_match"]) for one in found] for name, found in groups.items()
    } == {
        "operator": [("+", 3, 2 / 3), ("-", 1, 0)],
        "digits": [("1", 2, 0.5), ("2", 1, 0), ("3", 1, 1)],
        "phrasing": [("a", 1, 0), ("b", 2, 0.5)],
    }
    found = scores("sums", summarise(["0"] * 4, [True, False, True, False]), groups)
    assert [score.group for score in found] == [
        None,
        *("operator: +", "operator: -", "digits: 1", "digits: 2", "digits: 3", "phrasing: a", "phrasing: b"),
    ]
    assert [score.n for score in found] == [4, 3, 1, 2, 1, 1, 1, 2]
    assert found[0].standard_error == pytest.approx((0.25 / 3) ** 0.5)
    assert {score.task for score in found} == {"sums"}


def test_numbers_are_in_their_order() -> None:
    prompts = [f"{'1' * digits}+1=" for digits in (10, 9, 2)]
    columns = grouping_columns(["digits"], prompts, ["0"] * 3, {})
    assert [group["group"] for group in grouped(columns, [True] * 3)["digits"]] == ["2", "9", "10"]


def test_what_only_some_problems_have_is_told_where_it_is_asked_for() -> None:
    prompts, targets = ["1+2=", "Why?"], ["3", "So."]
    assert grouping_columns(None, prompts, targets, {}) == {}
    columns = grouping_columns(["operator"], prompts, targets, {})
    assert [(group["group"], group["n"]) for group in grouped(columns, [True, True])["operator"]] == [("+", 1)]
    with pytest.raises(UserError, match=r"no problem is an expression such as 554\+456=, so that there is no digits"):
        grouping_columns(["digits"], ["Why?"], ["So."], {})
    assert grouping_columns([], ["1+2="], ["3"], {}) == {}


def test_a_column_comes_before_what_is_read() -> None:
    assert grouping_columns(None, ["1+2="], ["3"], {"operator": ["plus"]}) == {"operator": ["plus"], "digits": [1]}


def test_columns_that_make_no_groups_are_refused() -> None:
    with pytest.raises(UserError, match="by: the column 'x' has neither texts nor numbers"):
        grouped({"x": [["a"]]}, [True])
    with pytest.raises(UserError, match="by: the column 'x' has 1,001 values; 1,000 is the most"):
        grouped({"x": range(MOST_GROUPS + 1)}, [True] * (MOST_GROUPS + 1))


def test_many_lengths_are_not_shown_and_of_many_groups_the_worst() -> None:
    few, many = (summarise(["1" * length for length in range(count)], [True] * count) for count in (20, 21))
    assert len(shown_lengths(few["by_answer_length"])) == 20
    assert len(shown_lengths(many["by_answer_length"])) == 0
    groups = [{"group": str(number), "exact_match": 1 - number / 32} for number in range(22)]
    assert shown_groups(groups[:20]) == groups[:20]
    assert [group["group"] for group in shown_groups(groups)] == [str(number) for number in range(21, 1, -1)]
