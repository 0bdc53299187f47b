"""Documents that repeat themselves, after Gopher.

D documents, W words, L lines or paragraphs, G n-grams.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.config import FrozenModel
from tasks.corpus.text import Texts
from tasks.corpus.words import Lines, Words, grouped

_PLACE_BITS = 32
_PLACES = (1 << _PLACE_BITS) - 1


class NgramShare(FrozenModel):
    """How much of a document its n-grams may make up."""

    n: int = Field(gt=0)
    """The words of an n-gram."""
    share: float = Field(ge=0, le=1)
    """The largest share of the document's characters."""


def _shares(*shares: tuple[int, float]) -> tuple[NgramShare, ...]:
    return tuple(NgramShare(n=n, share=share) for n, share in shares)


class Repetition(FrozenModel):
    """Documents that repeat too many of their lines, paragraphs or n-grams: Gopher's repetition rules (Rae et al.
    2021, arXiv 2112.11446, table A1, whose thresholds are the defaults).

    Words are what white space separates, lines and paragraphs have a word at least, and two of them are alike when
    their words are. A document passes a bound that is null.
    """

    rule: Literal["repetition"] = "repetition"
    """The rule's name."""
    duplicate_lines: float | None = Field(default=0.30, ge=0, le=1)
    """The largest share of lines that are like an earlier one."""
    duplicate_paragraphs: float | None = Field(default=0.30, ge=0, le=1)
    """The largest share of paragraphs that are like an earlier one."""
    duplicate_line_characters: float | None = Field(default=0.20, ge=0, le=1)
    """The characters of such lines, as a share of the document's."""
    duplicate_paragraph_characters: float | None = Field(default=0.20, ge=0, le=1)
    """The characters of such paragraphs, as a share of the document's."""
    top_ngrams: tuple[NgramShare, ...] = _shares((2, 0.20), (3, 0.18), (4, 0.16))
    """The n-gram of each size that occurs most often, all its occurrences together."""
    duplicate_ngrams: tuple[NgramShare, ...] = _shares(
        (5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)
    )
    """The n-grams of each size that occurred before, nothing counted twice."""

    def passes(self, texts: Texts) -> NDArray[np.bool_]:
        """Whether each document stays.

        The definitions are those of datatrove's GopherRepetitionFilter: characters are those of a line without the
        white space around it, those of an n-gram's words with a space between them where the most frequent one is
        sought (of several the first), and without where repeated ones are. It differs in what a word is, where
        datatrove asks a tokenizer of a language, and in that blank lines with spaces separate paragraphs too.
        """
        characters_D = np.maximum(texts.characters_D, 1)
        stays_D = np.ones(len(texts), np.bool_)
        for lines, share, character_share in (
            (texts.lines, self.duplicate_lines, self.duplicate_line_characters),
            (texts.paragraphs, self.duplicate_paragraphs, self.duplicate_paragraph_characters),
        ):
            again_L = _again_L(lines)
            if share is not None:
                stays_D &= lines.sum_D(again_L) / np.maximum(lines.count_D, 1) <= share
            if character_share is not None:
                stays_D &= lines.sum_D(again_L * lines.characters_L) / characters_D <= character_share
        sizes = {bound.n for bound in self.top_ngrams + self.duplicate_ngrams}
        for repeats in _repeats(texts.words, sizes, stays_D):
            for bound in self.top_ngrams:
                if bound.n == repeats.size:
                    stays_D &= repeats.top_characters_D() / characters_D <= bound.share
            for bound in self.duplicate_ngrams:
                if bound.n == repeats.size:
                    stays_D &= repeats.again_share_is_at_most(bound.share, stays_D, characters_D)
        return stays_D


def _again_L(lines: Lines) -> NDArray[np.bool_]:
    """Whether each line is like an earlier one of its document."""
    again_L = np.zeros(len(lines), np.bool_)
    order, new = grouped(lines.hash_L)
    new[1:] |= lines.document_L[order[1:]] != lines.document_L[order[:-1]]
    again_L[order] = ~new
    return again_L


@dataclass(frozen=True)
class _Repeats:
    """The n-grams of one size that occur more than once in their document, in the order of the text."""

    words: Words
    size: int
    """The words of each."""
    first_G: NDArray[np.int64]
    """The number of the first word of each occurrence."""
    group_G: NDArray[np.int64]
    """A number that the occurrences of an n-gram in a document share."""
    again_G: NDArray[np.bool_]
    """Whether an earlier one is like it."""

    @cached_property
    def document_G(self) -> NDArray[np.int64]:
        """The document of each."""
        return self.words.document_W[self.first_G]

    def top_characters_D(self) -> NDArray[np.int64]:
        """The characters of each document's most frequent n-gram, with spaces between words, in all its occurrences."""
        count = np.bincount(self.group_G)
        known = ~self.again_G
        # The first of those that occur most often: each document's greatest pair of count and nearness to the start.
        # Without a repeated one that is its very first.
        first_D = self.words.first_D1[:-1]
        best_D = np.where(self.words.count_D >= self.size, 1 << _PLACE_BITS | _PLACES - first_D, _PLACES)
        pair = count[self.group_G[known]] << _PLACE_BITS | _PLACES - self.first_G[known]
        np.maximum.at(best_D, self.document_G[known], pair)
        count_D, first_D = best_D >> _PLACE_BITS, _PLACES - (best_D & _PLACES)
        return count_D * (self.words.characters_of(first_D, self.size) + self.size - 1)

    def again_share_is_at_most(
        self, share: float, asked_D: NDArray[np.bool_], characters_D: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether n-grams that occurred before make up no more than a share of each document that is asked for."""
        # Counting takes a walk through the document, which few need: most have little that could be counted.
        within_D = self.covered_characters_D() / characters_D <= share
        for document in np.flatnonzero(asked_D & ~within_D).tolist():
            within_D[document] = self.again_characters(document) / characters_D[document] <= share
        return within_D

    def covered_characters_D(self) -> NDArray[np.int64]:
        """The characters of the words of each document that lie in n-grams which occurred before."""
        first = self.first_G[self.again_G]
        own = np.minimum(np.diff(first, append=len(self.words)), self.size)
        characters = self.words.characters_of(first, own)
        documents = len(self.words.count_D)
        return np.bincount(self.document_G[self.again_G], characters, minlength=documents).astype(np.int64)

    def again_characters(self, document: int) -> int:
        """The characters of the n-grams that occurred before, read from the start, each behind the end of the last.

        An n-gram that begins in one that was counted is neither counted nor remembered.
        """
        begin, end = np.searchsorted(self.document_G, [document, document + 1])
        characters = self.words.characters_of(self.first_G[begin:end], self.size)
        seen, total, free = set(), 0, 0
        for first, group, own in zip(
            self.first_G[begin:end].tolist(), self.group_G[begin:end].tolist(), characters.tolist(), strict=True
        ):
            if first < free:
                continue
            if group in seen:
                total, free = total + own, first + self.size
            else:
                seen.add(group)
        return total


def _repeats(words: Words, sizes: set[int], asked_D: NDArray[np.bool_]) -> Iterator[_Repeats]:
    """The repeated n-grams of each of some sizes, rising, in the documents that are asked for by then.

    Those of a size begin where shorter ones are repeated too, so only the shortest are looked for in all the text.
    """
    if not sizes:
        return
    hash_G, first_G = words.ngrams(min(sizes))
    for size in range(min(sizes), max(sizes) + 1):
        document_G = words.document_W[first_G]
        wanted_G = asked_D[document_G]
        if size > min(sizes):
            wanted_G &= first_G + size <= words.first_D1[document_G + 1]
        if not wanted_G.all():
            hash_G, first_G, document_G = hash_G[wanted_G], first_G[wanted_G], document_G[wanted_G]
        if size > min(sizes):
            hash_G = words.longer(hash_G, first_G, size)
        order, new = grouped(hash_G)
        # Those of another document are others.
        alike = np.flatnonzero(~new)
        new[alike] = document_G[order[alike]] != document_G[order[alike - 1]]
        repeated = np.flatnonzero(~(new & np.append(new[1:], True)))
        group, place, again = np.cumsum(new[repeated]) - 1, order[repeated], ~new[repeated]
        in_text = np.argsort(place)
        place = place[in_text]
        hash_G, first_G = hash_G[place], first_G[place]
        if size in sizes:
            yield _Repeats(words, size, first_G, group[in_text], again[in_text])
