import math
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from common.errors import UserError
from tasks.corpus.rules import Column, Length, Regex, Rule
from tasks.corpus.text import Texts
from tests.tasks.corpus.reference import TEXTS

RULES: TypeAdapter[Rule] = TypeAdapter(Rule)
PATIENT = settings(deadline=None)


@PATIENT
@given(st.lists(TEXTS, max_size=6), st.integers(0, 30), st.integers(0, 30), st.sampled_from(["characters", "words"]))
def test_lengths_are_those_of_plain_python(batch: list[str], one: int, other: int, unit: str) -> None:
    low, high = sorted((one, other))
    sizes = [len(text) if unit == "characters" else len(text.split()) for text in batch]
    texts = Texts.of(batch)
    both = Length.model_validate({f"min_{unit}": low, f"max_{unit}": high})
    assert both.passes(texts).tolist() == [low <= size <= high for size in sizes]
    assert Length.model_validate({f"min_{unit}": low}).passes(texts).tolist() == [low <= size for size in sizes]
    assert Length.model_validate({f"max_{unit}": high}).passes(texts).tolist() == [size <= high for size in sizes]
    assert Length().passes(texts).all()


@PATIENT
@given(
    st.lists(TEXTS, max_size=6),
    st.sampled_from(
        [r"\bthe\b", r"(?i)JAVA", r"^\S+$", r"(a b )+c", r"[^\x00-\x7f]{2}", r"\n\n", "", r"…|\.{3}", "é$"]
    ),
)
def test_expressions_are_found_as_in_plain_python(batch: list[str], pattern: str) -> None:
    # What the two syntaxes do not share: Python's classes know all of Unicode and its $ may stand before a newline.
    flags = re.ASCII if "\\" in pattern else re.UNICODE
    expected = [bool(re.search(pattern.replace("$", r"\Z"), text, flags)) for text in batch]
    texts = Texts.of(batch)
    # RE2 looks at "\s" without the vertical tab.
    comparable = [not ("\\S" in pattern and "\v" in text) for text in batch]
    found = Regex(pattern=pattern, keep="matching").passes(texts)
    assert found[comparable].tolist() == [own for own, fair in zip(expected, comparable, strict=True) if fair]
    assert (Regex(pattern=pattern).passes(texts) == ~found).all()


@pytest.mark.parametrize("pattern", ["(", "a(?=b)", r"(a)\1", "[b-a]", "x{2000}", r"\p{Nonsense}"])
def test_an_expression_that_is_none_is_refused_with_the_config(pattern: str) -> None:
    with pytest.raises(ValidationError, match=re.escape("pattern")):
        RULES.validate_python({"rule": "regex", "pattern": pattern})


def test_an_expression_takes_linear_time() -> None:
    text = "a" * 2_000_000
    assert Regex(pattern="(a*)*b").passes(Texts.of([text])).tolist() == [True]


def scored(**columns: Any) -> Texts:
    count = len(next(iter(columns.values())))
    return Texts(pa.table({"text": ["some text"] * count, **columns}))


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.int64(), pa.int8(), pa.uint32()])
def test_a_column_s_numbers_are_compared(kind: pa.DataType) -> None:
    values = [0, 1, 2, 3, None, 4, 5]
    texts = scored(
        score=pa.array([None if v is None else np.dtype(kind.to_pandas_dtype()).type(v) for v in values], kind)
    )
    assert Column(column="score", minimum=3).passes(texts).tolist() == [v is not None and v >= 3 for v in values]
    assert Column(column="score", minimum=2.5, maximum=4).passes(texts).tolist() == [
        v is not None and 2.5 <= v <= 4 for v in values
    ]
    assert Column(column="score", one_of=(1, 4)).passes(texts).tolist() == [v in (1, 4) for v in values]


def test_nan_and_null_fail() -> None:
    texts = scored(score=[math.nan, None, math.inf, -math.inf, 0.5])
    assert Column(column="score", minimum=0).passes(texts).tolist() == [False, False, True, False, True]
    assert Column(column="score", maximum=1).passes(texts).tolist() == [False, False, False, True, True]
    assert Column(column="score", minimum=0, maximum=1).passes(texts).tolist() == [False, False, False, False, True]


def test_a_column_s_value_is_one_of_some() -> None:
    texts = scored(language=["en", "de", None, "fr", "EN"], good=[True, False, None, True, False])
    assert Column(column="language", one_of=("en", "fr")).passes(texts).tolist() == [True, False, False, True, False]
    assert Column(column="good", one_of=(True,)).passes(texts).tolist() == [True, False, False, True, False]
    chunks = pa.chunked_array([["en"], [], ["de", "en"]])
    assert Column(column="language", one_of=("de",)).passes(scored(language=chunks)).tolist() == [False, True, False]


def test_a_column_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(UserError, match="no column 'scores'; did you mean 'score'"):
        Column(column="scores", minimum=1).passes(scored(score=[1], url=["x"]))
    with pytest.raises(UserError, match="no column 'quality'; known are: score, text, url"):
        Column(column="quality", minimum=1).passes(scored(score=[1], url=["x"]))


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        (Column(column="value", minimum=1), ["a"]),
        (Column(column="value", one_of=("a",)), [1.5]),
        (Column(column="value", one_of=(1,)), ["a"]),
        (Column(column="value", maximum=1), [["a"]]),
        (Column(column="value", one_of=("a", 1)), ["a"]),
    ],
)
def test_values_that_cannot_be_compared_are_refused(rule: Column, values: list[object]) -> None:
    with pytest.raises(UserError, match="rule column: the values of 'value' are of type"):
        rule.passes(scored(value=values))


@pytest.mark.parametrize(
    "config",
    [
        {"rule": "length", "min_words": 10, "max_words": 9},
        {"rule": "length", "min_characters": -1},
        {"rule": "column", "column": "score"},
        {"rule": "column", "minimum": 1},
        {"rule": "regex"},
        {"rule": "symbols", "max_bullet_lines": 2},
        {"rule": "c4", "min_sentences": "5"},
        {"rule": "gopher"},
    ],
)
def test_configs_that_make_no_sense_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RULES.validate_python(config)


@pytest.mark.parametrize("name", ["length", "symbols", "c4", "repetition"])
def test_rules_are_known_by_name_and_go_through_json(name: str) -> None:
    rule = RULES.validate_python({"rule": name})
    assert rule.rule == name
    assert RULES.validate_json(RULES.dump_json(rule)) == rule
    assert rule.passes(Texts.of([])).tolist() == []


def test_bounds_that_no_value_lies_between_are_refused() -> None:
    with pytest.raises(ValueError, match=r"minimum 3\.0 exceeds maximum 1\.0: no document would stay"):
        Column(column="score", minimum=3, maximum=1)
