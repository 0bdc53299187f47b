import pytest

from common.errors import one_line, suggestion


@pytest.mark.parametrize(
    ("wrong", "known", "said"),
    [
        ("tokeniser", ["tokenizer", "tokens"], "; did you mean 'tokenizer'?"),
        ("xyz", ["b", "a"], "; known are: a, b"),
        ("xyz", [], ""),
    ],
)
def test_a_suggestion_is_the_nearest_or_all(wrong: str, known: list[str], said: str) -> None:
    assert suggestion(wrong, known) == said


def test_what_went_wrong_underneath_is_said_in_a_line() -> None:
    wrapped = OSError("We could not connect.\n\nCheck your connection, or see the guide on offline use.")
    wrapped.__cause__ = ConnectionError("connection   refused\nby the proxy")
    assert one_line(wrapped) == "connection refused by the proxy"
    assert one_line(ValueError("\n")) == "ValueError"
    assert len(one_line(ValueError("bad input " * 99))) == 300
