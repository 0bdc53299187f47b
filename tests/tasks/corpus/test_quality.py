import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.quality import C4, Symbols
from tasks.corpus.text import Texts
from tests.tasks.corpus import reference
from tests.tasks.corpus.reference import TEXTS

PATIENT = settings(deadline=None)
_OFF: dict[str, Any] = dict.fromkeys(
    (
        "max_hashes",
        "max_ellipses",
        "max_bullet_lines",
        "max_ellipsis_lines",
        "min_alphabetic_words",
        "min_mean_word_length",
        "max_mean_word_length",
        "min_stop_words",
    )
)


def symbols(rule: Symbols, text: str) -> bool:
    """Gopher's rules as datatrove has them, on words that white space separates."""
    words, lines = text.split(), reference.lines(text)
    count, own_lines = max(1, len(words)), max(1, len(lines))
    mean = sum(map(len, words)) / count
    bullets = sum(line.startswith(("•", "-")) for line in lines)
    ellipses = sum(line.endswith(("...", "…")) for line in lines)
    alphabetic = sum(any(character.isalpha() for character in word) for word in words)
    return (
        (rule.max_hashes is None or text.count("#") / count <= rule.max_hashes)
        and (rule.max_ellipses is None or (text.count("...") + text.count("…")) / count <= rule.max_ellipses)
        and (rule.max_bullet_lines is None or bullets / own_lines <= rule.max_bullet_lines)
        and (rule.max_ellipsis_lines is None or ellipses / own_lines <= rule.max_ellipsis_lines)
        and (rule.min_alphabetic_words is None or alphabetic / count >= rule.min_alphabetic_words)
        and (rule.min_mean_word_length is None or mean >= rule.min_mean_word_length)
        and (rule.max_mean_word_length is None or mean <= rule.max_mean_word_length)
        and (rule.min_stop_words is None or len(set(rule.stop_words) & set(words)) >= rule.min_stop_words)
    )


@PATIENT
@given(
    st.lists(TEXTS, max_size=6),
    st.sampled_from(sorted(_OFF)),
    st.sampled_from([0, 0.05, 0.2, 0.34, 0.5, 0.67, 1]),
)
def test_each_bound_of_the_symbols_is_as_in_plain_python(batch: list[str], bound: str, share: float) -> None:
    scale = {"min_mean_word_length": 6, "max_mean_word_length": 6, "min_stop_words": 4}.get(bound, 1)
    value = int(share * scale) if bound == "min_stop_words" else share * scale
    rule = Symbols(**{**_OFF, bound: value}, stop_words=("the", "of", "戦", "wordywordywordy", "x" * 70, "be"))
    assert rule.passes(Texts.of(batch)).tolist() == [symbols(rule, text) for text in batch]


@PATIENT
@given(st.lists(TEXTS, max_size=6))
def test_all_symbols_together(batch: list[str]) -> None:
    rule = Symbols(max_hashes=0.2, max_ellipses=0.2, max_bullet_lines=0.5, min_mean_word_length=1.5, min_stop_words=1)
    assert rule.passes(Texts.of(batch)).tolist() == [symbols(rule, text) for text in batch]


def measured(bound: str, text: str) -> float:
    """What a bound is compared with."""
    words, lines = text.split(), reference.lines(text)
    count, own_lines = max(1, len(words)), max(1, len(lines))
    return {
        "max_hashes": text.count("#") / count,
        "max_ellipses": (text.count("...") + text.count("…")) / count,
        "max_bullet_lines": sum(line.startswith(("•", "-")) for line in lines) / own_lines,
        "max_ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / own_lines,
        "min_alphabetic_words": sum(any(character.isalpha() for character in word) for word in words) / count,
        "min_mean_word_length": sum(map(len, words)) / count,
        "max_mean_word_length": sum(map(len, words)) / count,
    }[bound]


@pytest.mark.parametrize("bound", sorted({*_OFF} - {"min_stop_words"}))
@PATIENT
@given(TEXTS | st.lists(st.sampled_from([*"ab# ", ".", "..", "...", "…", "\n", "7", "é"])).map("".join))
def test_each_bound_of_the_symbols_allows_its_very_value(bound: str, text: str) -> None:
    value, texts = measured(bound, text), Texts.of([text])
    limit = 1 if "lines" in bound or "alphabetic" in bound else np.inf
    other = np.nextafter(value, 0 if bound.startswith("max") else np.inf)
    assert Symbols.model_validate({**_OFF, bound: value}).passes(texts).all()
    if value > 0 or bound.startswith("min"):
        assert other > limit or not Symbols.model_validate({**_OFF, bound: other}).passes(texts).any()


PROSE = "Whatever the weather, people have to be out with a purpose, and that is all there is to it. " * 3


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        (PROSE, True),
        ("", False),
        (PROSE + "# " * 8, False),
        (PROSE + "... " * 7, False),
        (PROSE + "… " * 7, False),
        ("\n".join(f"• {PROSE}" for _ in range(10)), False),
        ("\n".join([*(f"- {PROSE}" for _ in range(9)), PROSE]), True),
        ("\n".join([PROSE + "...", PROSE + "…", PROSE]), False),
        (PROSE + "1234 " * 20, False),
        ("a b c the of to I x y " * 10, False),
        ("incomprehensibilities the of counterrevolutionaries " * 10, False),
        (PROSE.replace("the", "der").replace("to", "zu").replace("have", "haben").replace("that", "das")[:95], True),
        ("Wer rastet der rostet, und wer wagt gewinnt. " * 5, False),
    ],
)
def test_gophers_own_bounds(text: str, stays: bool) -> None:
    rule = Symbols()
    assert symbols(rule, text) == stays
    assert rule.passes(Texts.of([text])).tolist() == [stays]


def c4(rule: C4, text: str) -> bool:
    """C4's rules as datatrove has them, with the differences that the rule tells of."""
    lower = re.sub("[A-Z]", lambda match: match[0].lower(), text)
    kept = 0
    for line in reference.lines(text):
        words, lower_line = line.split(), re.sub("[A-Z]", lambda match: match[0].lower(), line)
        if rule.max_word_length is not None and any(len(word) > rule.max_word_length for word in words):
            continue
        if rule.terminal_punctuation and (not line.endswith(tuple(".?!\"'”’")) or line.endswith("...")):
            continue
        if len(words) < rule.min_words_per_line:
            continue
        if rule.javascript and "javascript" in lower_line:
            continue
        policies = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
        if rule.policies and any(phrase in lower_line for phrase in policies):
            continue
        kept += reference.sentences(line)
    return (
        kept >= rule.min_sentences
        and not (rule.lorem_ipsum and "lorem ipsum" in lower)
        and not (rule.curly_brackets and "{" in text)
    )


_C4_PIECES = (
    *("One two three. ", "What? No! ", 'He "said so." ', "(Ja.)’ ", "JavaScript ", "Terms of use ", "a " * 3),
    *("\n", "\n", "\n ", "Lorem Ipsum ", "{", "so…\n", "etc...\n", "End.\u00a0\n", "we uſe cookies.\n", ".\"'”)"),
    *("w" * 30, "é" * 30, ". ", '"' * 7 + " ", "use of\ncookies", 'x."”) y', "x.'')] y", "x.'')]} y "),
)
C4_TEXTS = TEXTS | st.lists(st.sampled_from(_C4_PIECES), max_size=30).map("".join)


@PATIENT
@given(
    st.lists(C4_TEXTS, max_size=5),
    st.integers(0, 6),
    st.integers(0, 4),
    st.sampled_from([None, 1, 29, 30, 60]),
    st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_c4_is_as_in_plain_python(
    batch: list[str], sentences: int, words: int, longest: int | None, switches: list[bool]
) -> None:
    names = ("terminal_punctuation", "javascript", "policies", "lorem_ipsum", "curly_brackets")
    rule = C4(
        min_sentences=sentences,
        min_words_per_line=words,
        max_word_length=longest,
        **dict(zip(names, switches, strict=True)),
    )
    assert rule.passes(Texts.of(batch)).tolist() == [c4(rule, text) for text in batch]


@PATIENT
@given(C4_TEXTS, st.booleans())
def test_c4_counts_sentences_as_in_plain_python(text: str, terminal: bool) -> None:
    kept = [line for line in reference.lines(text) if not terminal or line.endswith(tuple(".?!\"'”’"))]
    count = sum(reference.sentences(line) for line in kept if not terminal or not line.endswith("..."))
    for least, stays in ((count, True), (count + 1, False)):
        rule = C4(
            min_sentences=least,
            min_words_per_line=0,
            terminal_punctuation=terminal,
            javascript=False,
            policies=False,
            lorem_ipsum=False,
            curly_brackets=False,
        )
        assert rule.passes(Texts.of([text])).tolist() == [stays]


@pytest.mark.parametrize(("closing", "sentences"), [(".", 2), (".”)", 2), ("?'”)]", 2), ("!'”)]}", 1), ("x", 1)])
def test_up_to_four_marks_close_a_sentence(closing: str, sentences: int) -> None:
    text = f"word{closing} end."
    assert reference.sentences(text) == sentences
    found = [C4(min_sentences=least, min_words_per_line=0).passes(Texts.of([text]))[0] for least in range(4)]
    assert found == [least <= sentences for least in range(4)]


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (("", ""), True),
        (("Five is", "{Five} is"), False),
        (("Five is", "Lorem ipsum is"), False),
        (("Four is", "Javascript is"), False),
        (("Four is", "Our privacy policy is"), False),
        (("four.", "four"), False),
        (("four.", "four..."), False),
        (("four.", "four.”"), True),
        (("Four is four.", "Four."), False),
        (("Four is", "Four is " + "x" * 1001), False),
        (("Four is four.", "Four is four. Not five.\nNothing"), True),
    ],
)
def test_c4_leaves_documents_with_five_sentences(change: tuple[str, str], stays: bool) -> None:
    text = "One is one.\nTwo is two.\nThree is three.\nFour is four.\nFive is five."
    rule = C4()
    text = text.replace(*change)
    assert c4(rule, text) == stays
    assert rule.passes(Texts.of([text, PROSE])).tolist() == [stays, c4(rule, PROSE)]
