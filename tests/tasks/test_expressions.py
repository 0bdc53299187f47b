import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.expressions import Expression, expression_of

NUMBERS = st.integers(-(10**12), 10**12)
OPERATORS = "+-*/"


@given(NUMBERS, st.lists(st.tuples(st.sampled_from(OPERATORS), NUMBERS), min_size=1, max_size=7), st.booleans())
def test_what_was_written_is_read(first: int, rest: list[tuple[str, int]], spaced: bool) -> None:
    space = " " if spaced else ""
    text = str(first) + "".join(f"{space}{operator}{space}{operand}" for operator, operand in rest)
    operators = "".join(operator for operator in OPERATORS if operator in {one for one, _ in rest})
    digits = max(len(str(abs(operand))) for operand in (first, *(operand for _, operand in rest)))
    expected = Expression(operators, digits)
    assert expression_of(f"{text}=", "0") == expression_of(text, "") == expected
    assert expression_of("What is it?", f"{text} = <<{text}=1>>1") == expected


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("", ""),
        ("12=", "12"),
        ("-7=", "-7"),
        ("1 2+3=", "15"),
        ("1+=", "1"),
        ("2**3=", "8"),
        ("1.5+2=", "3.5"),
        ("What is 5 + 6?", "11"),
        ("How many clips?", "Natalia sold 48/2 = <<48/2=24>>24 clips."),
        ("1+1=2\n1+2=", "3"),
        ("What is it?", "2 x 3 = 6"),
    ],
)
def test_what_is_no_expression_is_none(prompt: str, target: str) -> None:
    assert expression_of(prompt, target) is None
