"""The words of a batch of documents, and the lines that they make up, as arrays with hashes.

N bytes, C characters that are not ASCII, D documents, W words, G n-grams, L lines or paragraphs.
"""

import hashlib
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.characters import Wide

_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd; 2^64 divided by the golden ratio
_READ = 8  # bytes of a word that are hashed at once
_LONG_WORD = 64  # bytes beyond which a word is hashed on its own
_FIRST_BYTES = np.array([(1 << 8 * size) - 1 for size in range(_READ + 1)], np.uint64)
Countable = NDArray[np.int64] | NDArray[np.bool_]
SLACK = _READ  # bytes that the data must have behind the last word


class Words:
    """Runs of bytes in some data, none of which goes over the end of a document."""

    def __init__(
        self, data_N: NDArray[np.uint8], inside_N: NDArray[np.bool_], begin_D1: NDArray[np.int64], wide: Wide
    ) -> None:
        """`inside_N` says which bytes are in words; the first and the last SLACK are not."""
        edges = np.flatnonzero(inside_N[1:] != inside_N[:-1]) + 1
        self.begin_W = np.ascontiguousarray(edges[::2])
        """Where each word begins in the data."""
        self.end_W = np.ascontiguousarray(edges[1::2])
        """Where it ends."""
        self.first_D1 = np.searchsorted(self.begin_W, begin_D1)
        """The first word of each document, or of a later one where it has none, and the number of all words."""
        self._data_N, self._wide = data_N, wide

    def __len__(self) -> int:
        return len(self.begin_W)

    @property
    def count_D(self) -> NDArray[np.int64]:
        """The words of each document."""
        return np.diff(self.first_D1)

    @cached_property
    def document_W(self) -> NDArray[np.int64]:
        """The number of the document that each word is in."""
        return np.repeat(np.arange(len(self.first_D1) - 1), self.count_D)

    @cached_property
    def characters_W(self) -> NDArray[np.int64]:
        """The characters (code points) of each word."""
        size_W: NDArray[np.int64] = self.end_W - self.begin_W
        place_C = self._wide.place_C
        if not len(place_C) or not len(self):
            return size_W
        word_C = np.searchsorted(self.begin_W, place_C, side="right") - 1
        within_C = (word_C >= 0) & (place_C < self.end_W[word_C])
        more_C = self._wide.size_C[within_C] - 1
        return size_W - np.bincount(word_C[within_C], more_C, minlength=len(self)).astype(np.int64)

    @cached_property
    def head_W(self) -> NDArray[np.uint64]:
        """The first eight bytes of each word as a little-endian number, zeros behind a word that has fewer."""
        size_W = self.end_W - self.begin_W
        head_W: NDArray[np.uint64] = self._reads()[self.begin_W] & _FIRST_BYTES[np.minimum(size_W, _READ)]
        return head_W

    def _reads(self) -> NDArray[np.uint64]:
        """The eight bytes from each byte of the data on."""
        return np.ndarray((len(self._data_N) - _READ + 1,), "<u8", self._data_N, strides=(1,))

    @cached_property
    def _characters_before_W1(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.characters_W)])

    def characters_of(self, first: NDArray[np.int64], count: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """The characters of `count` words from each first one on, or of those that there are, without what separates
        them."""
        before_W1 = self._characters_before_W1
        begin, end = np.minimum(first, len(self)), np.minimum(first + count, len(self))
        characters: NDArray[np.int64] = before_W1[end] - before_W1[begin]
        return characters

    @cached_property
    def hash_W(self) -> NDArray[np.uint64]:
        """64 bits that equal words have in common, and others only by chance.

        Eight bytes at a time go through the mixing of splitmix64 (Steele et al. 2014, with Stafford's constants);
        those of a word of more than 64 bytes are the start of its BLAKE2b.
        """
        size_W = self.end_W - self.begin_W
        reads = self._reads()
        hash_W = mix(self.head_W ^ size_W.astype(np.uint64) * _STEP)
        long_W = np.flatnonzero(size_W > _READ)
        for begin in range(_READ, _LONG_WORD, _READ):
            long_W = long_W[size_W[long_W] > begin]
            further = reads[self.begin_W[long_W] + begin] & _FIRST_BYTES[np.minimum(size_W[long_W] - begin, _READ)]
            hash_W[long_W] = mix(hash_W[long_W] ^ further)
        data = self._data_N.data
        for word in long_W[size_W[long_W] > _LONG_WORD].tolist():
            digest = hashlib.blake2b(data[self.begin_W[word] : self.end_W[word]], digest_size=8).digest()
            hash_W[word] = int.from_bytes(digest, "little")
        return hash_W

    def ngrams(self, size: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The hashes of all runs of `size` words in a document, and the number of each one's first word."""
        count = max(0, len(self) - size + 1)
        hash_G = self.hash_W[:count].copy()
        for further in range(1, size):
            hash_G *= _STEP
            hash_G += self.hash_W[further : further + count]
        whole_G = np.flatnonzero(self.document_W[:count] == self.document_W[size - 1 : size - 1 + count])
        return (hash_G if len(whole_G) == count else hash_G[whole_G]), whole_G

    def longer(self, hash_G: NDArray[np.uint64], first_G: NDArray[np.int64], size: int) -> NDArray[np.uint64]:
        """The hashes of runs of `size` words from those of the runs that are a word shorter."""
        return hash_G * _STEP + self.hash_W[first_G + size - 1]

    def where(self, word: str) -> NDArray[np.int64]:
        """The numbers of the words that are this one."""
        data = word.encode()
        found: NDArray[np.int64] = np.flatnonzero(self.head_W == np.uint64(int.from_bytes(data[:_READ], "little")))
        found = found[self.end_W[found] - self.begin_W[found] == len(data)]
        for place, byte in enumerate(data[_READ:], _READ):
            found = found[self._data_N[self.begin_W[found] + place] == byte]
        return found

    def any_W(self, flags_N: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether any byte of each word has a flag."""
        found_W: NDArray[np.bool_] = flags_N[self.begin_W]
        # Most words show it at once, and all bytes are looked at only for the others.
        other = np.flatnonzero(~found_W)
        second = (self.end_W[other] - self.begin_W[other] > 1) & flags_N[self.begin_W[other] + 1]
        found_W[other[second]] = True
        other = other[~second]
        size = self.end_W[other] - self.begin_W[other]
        first = np.cumsum(size) - size
        byte = np.arange(int(size.sum())) + np.repeat(self.begin_W[other] - first, size)
        if len(other):
            found_W[other] = np.logical_or.reduceat(flags_N[byte], first)
        return found_W

    def sum_D(self, values_W: Countable) -> NDArray[np.int64]:
        """The sum of a value over the words of each document."""
        so_far_W = np.concatenate([np.zeros(1, np.int64), np.cumsum(values_W)])
        return np.diff(so_far_W[self.first_D1])


class Lines:
    """Runs of words, which share out all words of a batch: its lines, or its paragraphs."""

    def __init__(self, words: Words, first_L: NDArray[np.int64], wide: Wide) -> None:
        self.first_L = first_L
        """The first word of each."""
        self.last_L = np.append(first_L[1:], len(words))[: len(first_L)] - 1
        """Its last word."""
        self.begin_L = words.begin_W[self.first_L]
        """Where its first word begins in the data."""
        self.end_L = words.end_W[self.last_L]
        """Where its last word ends."""
        self.first_D1 = np.searchsorted(first_L, words.first_D1)
        """The first line of each document, or of a later one where it has none, and the number of all lines."""
        self._words, self._wide = words, wide

    def __len__(self) -> int:
        return len(self.first_L)

    @property
    def count_D(self) -> NDArray[np.int64]:
        """The lines of each document."""
        return np.diff(self.first_D1)

    @cached_property
    def document_L(self) -> NDArray[np.int64]:
        """The number of the document that each line is in."""
        return np.repeat(np.arange(len(self.first_D1) - 1), self.count_D)

    @cached_property
    def words_L(self) -> NDArray[np.int64]:
        """The words of each line."""
        return self.last_L - self.first_L + 1

    @cached_property
    def characters_L(self) -> NDArray[np.int64]:
        """The characters (code points) of each line, white space between its words included."""
        more_C = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._wide.size_C - 1)])
        begin_C, end_C = (np.searchsorted(self._wide.place_C, place_L) for place_L in (self.begin_L, self.end_L))
        characters_L: NDArray[np.int64] = self.end_L - self.begin_L - (more_C[end_C] - more_C[begin_C])
        return characters_L

    @cached_property
    def hash_L(self) -> NDArray[np.uint64]:
        """64 bits that lines of equal words have in common, and others only by chance."""
        if not len(self):
            return np.zeros(0, np.uint64)
        place_W = np.arange(len(self._words)) - np.repeat(self.first_L, self.words_L)
        return np.add.reduceat(mix(self._words.hash_W + (place_W + 1).astype(np.uint64) * _STEP), self.first_L)

    def sum_D(self, values_L: Countable) -> NDArray[np.int64]:
        """The sum of a value over the lines of each document."""
        so_far_L = np.concatenate([np.zeros(1, np.int64), np.cumsum(values_L)])
        return np.diff(so_far_L[self.first_D1])


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes the bits of each number, in place: the finalizer of splitmix64, which no two numbers leave as one."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def grouped(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """An order that puts equal keys side by side, their places rising, and which in it are the first of their kind."""
    bits = np.uint64(max(1, (len(keys) - 1).bit_length()))
    places = (np.uint64(1) << bits) - np.uint64(1)
    # Keys and places in one number: NumPy sorts numbers faster than it finds the order of numbers.
    packed = keys & ~places
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    alike = (packed[1:] ^ packed[:-1]) <= places  # in the bits of the key that there was room for
    packed &= places
    order = packed.view(np.int64)
    found = keys[order]
    new = np.ones(len(keys), np.bool_)
    np.not_equal(found[1:], found[:-1], out=new[1:])
    if (alike & new[1:]).any():
        order = np.argsort(keys, kind="stable")
        found = keys[order]
        np.not_equal(found[1:], found[:-1], out=new[1:])
    return order, new
