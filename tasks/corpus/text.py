"""Batches of documents, and what the rules want to know of their texts, found for a whole batch at once.

D documents, N bytes.
"""

from collections.abc import Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.characters import SPACE, WORD, Wide
from tasks.corpus.words import SLACK, Lines, Words

if TYPE_CHECKING:
    import pyarrow as pa

_NEWLINE = ord("\n")


class Texts:
    """A batch of documents: a table with a column `text` of strings of valid UTF-8, none of them null.

    What was asked for once is kept, so one thread at a time may use it. All rules together take 25 times the bytes of
    prose, and up to 90 times those of words of one letter. A megabyte of text at a time is fastest; four take a tenth
    longer.
    """

    def __init__(self, table: "pa.Table") -> None:
        _keep_memory()
        self.table = table

    @classmethod
    def of(cls, texts: Sequence[str]) -> Self:
        """A batch of these texts alone."""
        import pyarrow as pa

        return cls(pa.table({"text": pa.array(texts, pa.large_string())}))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def bytes_D(self) -> NDArray[np.int64]:
        """The bytes of each document."""
        import pyarrow.compute as pc

        return np.asarray(pc.binary_length(self.table["text"]).to_numpy(), np.int64)

    @cached_property
    def characters_D(self) -> NDArray[np.int64]:
        """The characters (code points) of each document."""
        import pyarrow.compute as pc

        return np.asarray(pc.utf8_length(self.table["text"]).to_numpy(), np.int64)

    @cached_property
    def data_N(self) -> NDArray[np.uint8]:
        """The documents' bytes, a newline before each of them and some after the last."""
        import pyarrow as pa
        import pyarrow.compute as pc

        data_N = np.full(int(self.begin_D1[-1]) + SLACK, _NEWLINE, np.uint8)
        if len(self):
            column = self.table["text"].cast(pa.large_string())
            nothing, newline = (pa.scalar(text, pa.large_string()) for text in ("", "\n"))
            joined = pa.concat_arrays(pc.binary_join_element_wise(nothing, column, newline).chunks)
            size = int(self.begin_D1[-1]) - 1
            data_N[:size] = np.frombuffer(joined.buffers()[2], np.uint8, size)
        return data_N

    @cached_property
    def begin_D1(self) -> NDArray[np.int64]:
        """Where each document begins in the data, and where another one would."""
        return np.concatenate([np.ones(1, np.int64), 1 + np.cumsum(self.bytes_D + 1)])

    def count_D(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of these rising places in the data lie in each document."""
        return np.diff(np.searchsorted(places, self.begin_D1))

    @cached_property
    def wide(self) -> Wide:
        """The characters that are not ASCII."""
        return Wide(self.data_N)

    @cached_property
    def words(self) -> Words:
        """What white space separates, as `str.split` does."""
        data_N = self.data_N
        space_N = (data_N - 0x09) < 5
        space_N |= data_N == ord(" ")
        space_N |= (data_N - 0x1C) < 4
        self.wide.mark(space_N, self.wide.classes_C & SPACE != 0, True)
        return Words(data_N, ~space_N, self.begin_D1, self.wide)

    @cached_property
    def plain_words(self) -> Words:
        """Runs of letters, digits and marks (Unicode's categories L, N and M) in lower case; all else separates them.

        A letter whose lower case has another number of bytes stays as it is.
        """
        folded_N = self.data_N.copy()
        folded_N |= ((folded_N - ord("A")) < 26).view(np.uint8) << 5
        word_N = (folded_N - ord("a")) < 26
        word_N |= (folded_N - ord("0")) < 10
        word_N |= folded_N >= 0x80
        self.wide.lower(folded_N)
        self.wide.mark(word_N, self.wide.classes_C & WORD == 0, False)
        return Words(folded_N, word_N, self.begin_D1, self.wide)

    @cached_property
    def lines(self) -> Lines:
        """What newlines (U+000A) separate, white space around each and lines without a word left out."""
        after = self._after_newlines
        return Lines(self.words, after[np.diff(after, prepend=-1) > 0], self.wide)

    @cached_property
    def paragraphs(self) -> Lines:
        """What lines without a word separate, white space around each left out."""
        after, first_D1 = self._after_newlines, self.words.first_D1
        # They have two newlines before them, or begin a document.
        apart = np.union1d(after[np.diff(after, prepend=-1) == 0], first_D1[first_D1 < len(self.words)])
        return Lines(self.words, apart, self.wide)

    @cached_property
    def _after_newlines(self) -> NDArray[np.int64]:
        """The first word after each newline, of those that have one."""
        after = np.searchsorted(self.words.begin_W, np.flatnonzero(self.data_N == _NEWLINE))
        return after[: np.searchsorted(after, len(self.words))]


@cache
def _keep_memory() -> None:
    """Has glibc keep the memory of arrays for the next ones.

    It maps each one of more than 128 kB anew, and the system clears its pages, which takes as long as the work on them;
    once a larger one was given back, it keeps what is smaller.
    """
    np.empty(31 << 20, np.uint8)
