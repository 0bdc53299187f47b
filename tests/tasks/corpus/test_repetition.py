import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.repetition import NgramShare, Repetition
from tasks.corpus.text import Texts
from tests.tasks.corpus import reference
from tests.tasks.corpus.reference import TEXTS

PATIENT = settings(deadline=None)
OFF = {
    "duplicate_lines": None,
    "duplicate_paragraphs": None,
    "duplicate_line_characters": None,
    "duplicate_paragraph_characters": None,
    "top_ngrams": (),
    "duplicate_ngrams": (),
}
SHARES = st.sampled_from([0.0, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.75, 0.9])


def repetition(rule: Repetition, text: str) -> bool:
    """Gopher's rules as datatrove has them, on words that white space separates."""
    words, characters = text.split(), max(1, len(text))
    for parts, share, character_share in (
        (reference.lines(text), rule.duplicate_lines, rule.duplicate_line_characters),
        (reference.paragraphs(text), rule.duplicate_paragraphs, rule.duplicate_paragraph_characters),
    ):
        count, own = reference.duplicates(parts)
        if share is not None and count / max(1, len(parts)) > share:
            return False
        if character_share is not None and own / characters > character_share:
            return False
    return not any(
        reference.top_ngram_characters(words, bound.n) / characters > bound.share for bound in rule.top_ngrams
    ) and not any(
        reference.duplicate_ngram_characters(words, bound.n) / characters > bound.share
        for bound in rule.duplicate_ngrams
    )


@PATIENT
@given(st.lists(TEXTS, max_size=6), st.sampled_from(sorted(OFF)), st.integers(1, 7), SHARES)
def test_each_bound_is_as_in_plain_python(batch: list[str], bound: str, n: int, share: float) -> None:
    value = (NgramShare(n=n, share=share),) if bound.endswith("ngrams") else share
    rule = Repetition.model_validate({**OFF, bound: value})
    assert rule.passes(Texts.of(batch)).tolist() == [repetition(rule, text) for text in batch]


# Long enough for all sizes at once, of words so few that all of them repeat.
REPETITIVE = st.lists(st.sampled_from("ab"), max_size=80).map(" ".join) | st.lists(
    st.sampled_from(["a b c d e f g h i j k l", "m", "n o", "p\n", "q\n\n", "é"]), max_size=20
).map(" ".join)


def share_of(bound: str, n: int, text: str) -> float:
    """What a bound is compared with."""
    words, characters = text.split(), max(1, len(text))
    if bound == "top_ngrams":
        return reference.top_ngram_characters(words, n) / characters
    if bound == "duplicate_ngrams":
        return reference.duplicate_ngram_characters(words, n) / characters
    parts = reference.lines(text) if "line" in bound else reference.paragraphs(text)
    count, own = reference.duplicates(parts)
    return own / characters if "characters" in bound else count / max(1, len(parts))


@pytest.mark.parametrize("bound", sorted(OFF))
@PATIENT
@given(TEXTS | REPETITIVE, st.integers(1, 7))
def test_each_bound_allows_its_very_share(bound: str, text: str, n: int) -> None:
    share = share_of(bound, n, text)
    for allowed, stays in ((share, True), (np.nextafter(share, 0), share == 0)):
        if allowed > 1:  # the occurrences of "a a" lie over each other
            continue
        value = (NgramShare(n=n, share=allowed),) if bound.endswith("ngrams") else allowed
        assert Repetition.model_validate({**OFF, bound: value}).passes(Texts.of([text])).tolist() == [stays]


@PATIENT
@given(st.lists(REPETITIVE, max_size=5), st.floats(0.5, 6))
def test_all_bounds_together(batch: list[str], looser: float) -> None:
    own = Repetition()
    rule = Repetition(
        top_ngrams=tuple(NgramShare(n=b.n, share=min(1, looser * b.share)) for b in own.top_ngrams),
        duplicate_ngrams=tuple(NgramShare(n=b.n, share=min(1, looser * b.share)) for b in own.duplicate_ngrams),
        duplicate_lines=0.6,
        duplicate_line_characters=0.6,
    )
    assert rule.passes(Texts.of(batch)).tolist() == [repetition(rule, text) for text in batch]


def text_of(numbers: np.random.Generator, words: int) -> str:
    """A text whose words hardly ever repeat, some to a line."""
    own = numbers.integers(0, 1 << 40, words)
    return " ".join(f"{word:x}" + "\n" * (place % 12 == 11) for place, word in enumerate(own.tolist()))


def test_what_gopher_drops() -> None:
    numbers = np.random.default_rng(0)
    base = text_of(numbers, 400)
    lines = base.split("\n")
    cases = {
        "plain": (base, True),
        "a third of the lines again": ("\n".join([*lines, *lines[: len(lines) // 2]]), False),
        "one line now and then": ("\n".join([*lines, lines[0]]), True),
        "one word pair all over": (" ".join(f"{word} so it is" for word in base.split()), False),
        "paragraphs again": ("\n\n".join([*lines[:10], *lines[:10]]), False),
        "one passage of ten words four times": (base + " ".join(["", *([" ".join(base.split()[:20])] * 4)]), False),
        "empty": ("", True),
    }
    rule = Repetition()
    for name, (text, stays) in cases.items():
        assert repetition(rule, text) == stays, name
    found = rule.passes(Texts.of([text for text, _ in cases.values()]))
    assert found.tolist() == [stays for _, stays in cases.values()]


def test_ngrams_of_other_documents_do_not_count() -> None:
    base = text_of(np.random.default_rng(1), 300)
    assert Repetition().passes(Texts.of([base, base, base])).all()


@pytest.mark.parametrize("bounds", [{"duplicate_lines": 1.1}, {"top_ngrams": [{"n": 0, "share": 0.1}]}])
def test_bounds_that_are_none_are_refused(bounds: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Repetition.model_validate(bounds)
