"""What the rules are about in plain Python, a document at a time, and documents to compare on."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from hypothesis import strategies as st

_ODD = (
    " \t\n\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u200a\u2028\u2029\u202f\u205f\u3000"  # white space
    "\u200b\ufeff\u2060\x00\x7f\x80\u00ad"  # what looks like it
    "éÉßẞİıǅΣσςЖжﬁＡ가戦の\u0301\u0939\u093f𝐀𐐀😀²½٣Ⅷ"  # letters, digits, marks
    "#.…•-–—“”’‘\"'»)]}{?!_@\U000e0001\U0010ffff"
)
_WORDS = ("the", "be", "to", "of", "and", "that", "a", "an", "one", "two", "The", "javascript", "terms of use", "lorem")
_PIECES = (
    *_WORDS,
    "...",
    "....",
    "…",
    "• ",
    "- ",
    "\n",
    "\n\n",
    "\r\n",
    "end. ",
    'said." ',
    "no?”",
    "x" * 70,
    "wordy" * 3,
)
_BLANKS = (" ", "  ", "\n", "\u00a0", "\t")

TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from(_ODD + "abAB z"), max_size=60),
    st.lists(st.sampled_from([*_PIECES, *_BLANKS, *_BLANKS]), max_size=60).map("".join),
    # Few words, so that they are repeated.
    st.lists(st.sampled_from(["a b", "c", "a b c d", "é", "a b c d e f.", "x y\nz", "q\n\nq"]), max_size=40).map(
        " ".join
    ),
)
"""Documents of all sorts."""


def plain_words(text: str) -> list[str]:
    """Runs of letters, digits and marks in lower case."""
    words, word = [], ""
    for character in text + " ":
        if unicodedata.category(character)[0] in "LMN":
            lower = character.lower()
            word += lower if len(lower) == 1 and len(lower.encode()) == len(character.encode()) else character
        else:
            words += [word] * bool(word)
            word = ""
    return words


def lines(text: str) -> list[str]:
    """Lines that have a word, without the white space around them."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def paragraphs(text: str) -> list[str]:
    """What blank lines separate, without the white space around it."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            found[-1].append(line)
        else:
            found.append([])
    return ["\n".join(paragraph).strip() for paragraph in found if paragraph]


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words."""
    return [tuple(words[first : first + n]) for first in range(len(words) - n + 1)]


def top_ngram_characters(words: Sequence[str], n: int) -> int:
    """As datatrove's find_top_duplicate."""
    counter = Counter(ngrams(words, n))
    if not counter:
        return 0
    ngram, count = counter.most_common(1)[0]
    return len(" ".join(ngram)) * count


def duplicate_ngram_characters(words: Sequence[str], n: int) -> int:
    """As datatrove's find_all_duplicate."""
    unique, characters, first = set(), 0, 0
    while first < len(words) - n + 1:
        ngram = tuple(words[first : first + n])
        if ngram in unique:
            characters += len("".join(ngram))
            first += n
        else:
            unique.add(ngram)
            first += 1
    return characters


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """As datatrove's find_duplicates: how many parts are like an earlier one, and their characters."""
    unique, count, characters = set(), 0, 0
    for part in parts:
        key = tuple(part.split())
        if key in unique:
            count, characters = count + 1, characters + len(part)
        unique.add(key)
    return count, characters


def sentences(line: str) -> int:
    """One, and one for each word before the last that ends a sentence."""
    return 1 + sum(bool(re.search(r"""[.?!]["'”’)\]}»]{0,4}$""", word)) for word in line.split()[:-1])
