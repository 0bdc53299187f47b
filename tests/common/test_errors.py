import pytest

from common.errors import suggestion


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
