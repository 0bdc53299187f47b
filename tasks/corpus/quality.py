"""Rules of thumb for web pages that are no running text, after Gopher and C4.

D documents, W words, L lines, N bytes.
"""

import re
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.config import FrozenModel
from tasks.corpus.characters import LETTER
from tasks.corpus.text import Texts
from tasks.corpus.words import Lines

_ELLIPSIS = 0x2026  # …
_ENDING = ".?!"
_QUOTES = "\"'”’"
_CLOSING = _QUOTES + ")]}»"
_MAX_CLOSING = 4
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


class Symbols(FrozenModel):
    """Documents with too many symbols, or too few words of a language: Gopher's quality rules (Rae et al. 2021,
    arXiv 2112.11446, appendix A.1.1), but for the length, which is a rule of its own.

    Words are what white space separates; lines have a word at least. A document passes a bound that is null.
    """

    rule: Literal["symbols"] = "symbols"
    """The rule's name."""
    max_hashes: float | None = Field(default=0.1, ge=0)
    """The most `#` for each word."""
    max_ellipses: float | None = Field(default=0.1, ge=0)
    """The most ellipses (`...` or `…`) for each word."""
    max_bullet_lines: float | None = Field(default=0.9, ge=0, le=1)
    """The largest share of lines that begin with `•` or `-`."""
    max_ellipsis_lines: float | None = Field(default=0.3, ge=0, le=1)
    """The largest share of lines that end in an ellipsis."""
    min_alphabetic_words: float | None = Field(default=0.8, ge=0, le=1)
    """The least share of words that have a letter."""
    min_mean_word_length: float | None = Field(default=3, ge=0)
    """The least mean of the characters of a word."""
    max_mean_word_length: float | None = Field(default=10, ge=0)
    """The greatest mean of the characters of a word."""
    min_stop_words: int | None = Field(default=2, ge=0)
    """How many of the stop words a document has at least."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """The stop words, as they are written: case counts."""

    def passes(self, texts: Texts) -> NDArray[np.bool_]:
        """Whether each document stays.

        The definitions are those of datatrove's GopherQualityFilter, but that words are not cut from punctuation.
        A share of nothing counts as 0.
        """
        data_N, words, lines = texts.data_N, texts.words, texts.lines
        count_D = np.maximum(words.count_D, 1)
        stays_D = np.ones(len(texts), np.bool_)
        if self.max_hashes is not None:
            stays_D &= texts.count_D(np.flatnonzero(data_N == ord("#"))) / count_D <= self.max_hashes
        if self.max_ellipses is not None:
            stays_D &= _ellipses_D(texts) / count_D <= self.max_ellipses
        if self.max_bullet_lines is not None:
            bullet_L = (data_N[lines.begin_L] == ord("-")) | _stands_at(data_N, lines.begin_L, "•")
            stays_D &= _share_D(lines, bullet_L) <= self.max_bullet_lines
        if self.max_ellipsis_lines is not None:
            stays_D &= _share_D(lines, _ends_in_ellipsis(data_N, lines.end_L)) <= self.max_ellipsis_lines
        if self.min_alphabetic_words is not None:
            stays_D &= words.sum_D(_alphabetic_W(texts)) / count_D >= self.min_alphabetic_words
        if self.min_mean_word_length is not None or self.max_mean_word_length is not None:
            mean_D = words.sum_D(words.characters_W) / count_D
            stays_D &= mean_D >= (self.min_mean_word_length or 0)
            stays_D &= (mean_D <= self.max_mean_word_length) if self.max_mean_word_length is not None else True
        if self.min_stop_words:
            stays_D &= _enough_words_D(texts, self.stop_words, self.min_stop_words)
        return stays_D


class C4(FrozenModel):
    """Documents of which C4's rules would leave too little (Raffel et al. 2020, arXiv 1910.10683, section 2.2).

    C4 takes lines out of a page, and drops pages of which few sentences are left. This rule looks at which lines C4
    would keep, drops the same documents, and leaves the others whole: lines stay if they end in terminal punctuation,
    have enough words, none of them too long, and mention neither JavaScript nor a policy.
    """

    rule: Literal["c4"] = "c4"
    """The rule's name."""
    min_sentences: int = Field(default=5, ge=0)
    """The sentences that the lines that would stay have at least."""
    min_words_per_line: int = Field(default=3, ge=0)
    """The words of a line that would stay."""
    max_word_length: int | None = Field(default=1000, gt=0)
    """The characters that each of its words has at most."""
    terminal_punctuation: bool = True
    """Whether it must end in `.`, `?`, `!` or a quotation mark, and not in `...`."""
    javascript: bool = True
    """Whether lines that mention JavaScript go."""
    policies: bool = True
    """Whether lines go that speak of terms of use, privacy or cookies, as in the code of C4."""
    lorem_ipsum: bool = True
    """Whether documents with "lorem ipsum" are dropped."""
    curly_brackets: bool = True
    """Whether documents with `{` are dropped."""

    def passes(self, texts: Texts) -> NDArray[np.bool_]:
        """Whether each document stays.

        As datatrove's C4QualityFilter, but: citations such as `[1]` are not taken off a line's end first; `{` and
        "lorem ipsum" count wherever they stand, as in the paper; and the sentences of a line are one and the words
        before its last that end with `.`, `?` or `!`, up to four closing quotation marks or brackets after it aside,
        where C4 asks NLTK.
        """
        data_N, words, lines = texts.data_N, texts.words, texts.lines
        keeps_L = lines.words_L >= self.min_words_per_line
        if self.max_word_length is not None:
            size_W = words.end_W - words.begin_W
            if (size_W > self.max_word_length).any():
                long_W = words.characters_W > self.max_word_length
                keeps_L &= np.add.reduceat(long_W, lines.first_L, dtype=np.int64) == 0
        if self.terminal_punctuation:
            keeps_L &= _ends_in(data_N, lines.end_L, _ENDING + _QUOTES) & ~_ends_with_dots(data_N, lines.end_L)
        unwanted = _places(texts, ("javascript",) * self.javascript + _POLICIES * self.policies)
        keeps_L[np.searchsorted(lines.begin_L, unwanted, side="right") - 1] = False
        stays_D = lines.sum_D(keeps_L * _sentences_L(texts)) >= self.min_sentences
        if self.lorem_ipsum:
            stays_D &= texts.count_D(_places(texts, ("lorem ipsum",))) == 0
        if self.curly_brackets:
            stays_D &= texts.count_D(np.flatnonzero(data_N == ord("{"))) == 0
        return stays_D


def _share_D(lines: Lines, chosen_L: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of each document's lines that are chosen."""
    return lines.sum_D(chosen_L) / np.maximum(lines.count_D, 1)


def _stands_at(data_N: NDArray[np.uint8], places: NDArray[np.int64], character: str) -> NDArray[np.bool_]:
    """Whether a character begins at each place."""
    found = np.ones(len(places), np.bool_)
    for offset, byte in enumerate(character.encode()):
        found &= data_N[places + offset] == byte
    return found


def _ends_in(data_N: NDArray[np.uint8], ends: NDArray[np.int64], characters: str) -> NDArray[np.bool_]:
    """Whether one of some characters stands before each place, of which the data has two bytes before it at least."""
    found = np.zeros(len(ends), np.bool_)
    for character in characters:
        found |= _stands_at(data_N, np.maximum(ends - len(character.encode()), 0), character)
    return found


def _ends_with_dots(data_N: NDArray[np.uint8], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    places = np.maximum(ends - 3, 0)
    dots: NDArray[np.bool_] = (data_N[places] == ord(".")) & (data_N[places + 1] == ord("."))
    dots &= data_N[places + 2] == ord(".")
    return dots


def _ends_in_ellipsis(data_N: NDArray[np.uint8], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    return _ends_with_dots(data_N, ends) | _ends_in(data_N, ends, "…")


def _ellipses_D(texts: Texts) -> NDArray[np.int64]:
    """How many `...`, none over another, and `…` each document has."""
    dot_N = texts.data_N == ord(".")
    threes = np.flatnonzero(dot_N[:-2] & dot_N[1:-1] & dot_N[2:])
    begins = np.flatnonzero(np.diff(threes, prepend=-2) > 1)
    runs = np.diff(begins, append=len(threes)) + 2
    so_far = np.concatenate([np.zeros(1, np.int64), np.cumsum(runs // 3)])
    of_dots_D = np.diff(so_far[np.searchsorted(threes[begins], texts.begin_D1)])
    return of_dots_D + texts.count_D(texts.wide.place_C[texts.wide.code_C == _ELLIPSIS])


def _alphabetic_W(texts: Texts) -> NDArray[np.bool_]:
    """Whether each word has a letter."""
    letter_N = ((texts.data_N | 0x20) - ord("a")) < 26
    texts.wide.mark(letter_N, texts.wide.classes_C & LETTER != 0, True)
    return texts.words.any_W(letter_N)


def _enough_words_D(texts: Texts, known: tuple[str, ...], least: int) -> NDArray[np.bool_]:
    """Whether each document has so many of the known words."""
    found_D = np.zeros(len(texts), np.int64)
    for word in dict.fromkeys(known):
        found_D += np.diff(np.searchsorted(texts.words.where(word), texts.words.first_D1)) > 0
        if (found_D >= least).all():  # most documents have the first ones
            break
    return found_D >= least


def _places(texts: Texts, phrases: tuple[str, ...]) -> NDArray[np.int64]:
    """Where in the data one of some phrases of ASCII stands, in any case; those that overlap count once."""
    import pyarrow.compute as pc

    if not phrases:
        return np.zeros(0, np.int64)
    pattern = "(?i)" + "|".join(phrases)
    documents = np.flatnonzero(pc.match_substring_regex(texts.table["text"], pattern).to_numpy())
    data, found = texts.data_N.data, []
    for document in documents.tolist():
        begin, end = texts.begin_D1[document : document + 2].tolist()
        found += [begin + match.start() for match in re.finditer(pattern.encode(), data[begin : end - 1])]
    return np.array(found, np.int64)


def _sentences_L(texts: Texts) -> NDArray[np.int64]:
    """The sentences of each line: one, and one for each word before its last that ends a sentence."""
    words, lines = texts.words, texts.lines
    data_N, last_W = texts.data_N, texts.data_N[words.end_W - 1]
    ends_W = (last_W == ord(".")) | (last_W == ord("?")) | (last_W == ord("!"))
    closed_W = np.flatnonzero(_closing_bytes()[last_W])
    end = words.end_W[closed_W]
    for _ in range(_MAX_CLOSING):
        end = end - sum(len(character.encode()) * _ends_in(data_N, end, character) for character in _CLOSING)
    ends_W[closed_W] = _ends_in(data_N, end, _ENDING)
    ends_W[lines.last_L] = False
    return np.add.reduceat(ends_W, lines.first_L, dtype=np.int64) + 1


@cache
def _closing_bytes() -> NDArray[np.bool_]:
    """Which bytes a closing mark may end with."""
    table = np.zeros(256, np.bool_)
    table[[character.encode()[-1] for character in _CLOSING]] = True
    return table
