"""How well each document was predicted: rows of `samples.parquet`, one for each block of text, and the scores over
all of them.

A long document is told of in blocks, so that even the score of a single one has a standard error and is compared with
another model's. Blocks end at white space, at places that the text alone decides: models with different tokenizers have
the same ones, and are compared block by block in bits per byte.

N blocks, T tokens of a document.
"""

import math
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.files import sha256_bytes
from tasks.scores import Score

TASK = "perplexity"
ID_DIGITS = 16
PROMPT_CHARACTERS = 200
BLOCK_CHARACTERS = 4000
"""Characters of a block, about 1,000 tokens; a text has so many blocks of even length as come nearest to it."""
ROWS_AT_ONCE = 1024

_WHITE_SPACE = re.compile(r"\s")


class Block(NamedTuple):
    """A part of a document's text, the whole of one that is not long."""

    id: str
    """The first digits of the SHA-256 of the document's text, and the block's number in it, from 1. Documents of equal
    text have equal ids: they are told apart by their order."""
    prompt: str
    """How it begins."""
    tokens: int
    """Those that begin in it."""
    words: int
    """What white space separates."""
    bytes: int
    """Those of UTF-8."""


def blocks_of(text: str, starts_T: Sequence[int]) -> list[Block]:
    """The blocks of a text, the first characters of whose tokens are these, in their order."""
    ends = _ends(text)
    # No token begins before the one ahead of it, whatever a tokenizer says of tokens that stand for no character.
    steady_T = np.maximum.accumulate(np.array(starts_T, np.int64))
    tokens_N = np.diff(np.searchsorted(steady_T, ends[:-1]), prepend=0, append=len(steady_T))
    digest = sha256_bytes(text.encode())[:ID_DIGITS]
    parts = (text[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True))
    return [
        Block(f"{digest}/{number}", part[:PROMPT_CHARACTERS], tokens, len(part.split()), len(part.encode()))
        for number, (part, tokens) in enumerate(zip(parts, tokens_N.tolist(), strict=True), 1)
    ]


def _ends(text: str) -> list[int]:
    """Where the blocks of a text end: at the first white space behind even parts of it, so that no word is cut."""
    count = max(1, round(len(text) / BLOCK_CHARACTERS))
    found = (_WHITE_SPACE.search(text, part * len(text) // count) for part in range(1, count))
    return [*sorted({space.start() for space in found if space is not None}), len(text)]


class Measured(NamedTuple):
    """A measure over all documents."""

    value: float | None
    """Null where it is too large to be a number."""
    standard_error: float | None
    """Null for a single block."""


def ratio(totals_N: NDArray[np.float64], sizes_N: NDArray[np.float64]) -> tuple[float, float | None]:
    """sum(totals) / sum(sizes), with its standard error by the delta method, blocks being drawn independently: that of
    the ratio estimator (Cochran, Sampling Techniques, 3rd edition, 1977, section 6.4).

    Blocks of one document are not quite independent: what makes one hard makes its neighbours hard, so that over few
    long documents the error is somewhat too small. Of the difference between two models, which are given the same
    blocks, most of that goes out.
    """
    count, size = len(sizes_N), float(sizes_N.sum())
    value = float(totals_N.sum()) / size
    if count < 2:
        return value, None
    residuals_N = totals_N - value * sizes_N
    return value, math.sqrt(count / (count - 1) * float(residuals_N @ residuals_N)) / size


class DocumentLosses:
    """Takes the documents one by one, writes the rows of their blocks, and knows the scores over all."""

    def __init__(self, path: Path) -> None:
        """Begins the file of rows. It is complete once `close` was called."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        text, count, number = pa.string(), pa.int64(), pa.float64()
        kinds = (text, text, count, count, count, number, number, number)
        names = (*Block._fields, "loss", "bits_per_byte", "word_loss")
        self._schema = pa.schema(list(zip(names, kinds, strict=True)))
        self._file = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._documents = 0
        self._losses, self._tokens, self._words, self._bytes = (array("d") for _ in range(4))

    def add(self, blocks: Sequence[Block], losses_T: NDArray[np.float64]) -> None:
        """Takes a document's blocks and the −ln p of all its tokens."""
        self._documents += 1
        ends = np.cumsum([block.tokens for block in blocks])
        for block, losses in zip(blocks, np.split(losses_T, ends[:-1]), strict=True):
            self._add(block, float(losses.sum()))

    def _add(self, block: Block, loss: float) -> None:
        sizes = (block.tokens, block.words, block.bytes)
        for column, value in zip((self._losses, self._tokens, self._words, self._bytes), (loss, *sizes), strict=True):
            column.append(value)
        per_token, per_word, per_byte = (loss / size if size else None for size in sizes)
        bits = None if per_byte is None else per_byte / math.log(2)
        self._rows.append({**block._asdict(), "loss": per_token, "bits_per_byte": bits, "word_loss": per_word})
        if len(self._rows) >= ROWS_AT_ONCE:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa

        self._file.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def close(self) -> None:
        """Writes the rows that are left."""
        if self._rows:
            self._write()
        self._file.close()

    @property
    def sizes(self) -> dict[str, int]:
        """How much there is of each."""
        columns = {"tokens": self._tokens, "words": self._words, "bytes": self._bytes}
        counted = {"documents": self._documents, "blocks": len(self._losses)}
        return counted | {name: int(sum(column)) for name, column in columns.items()}

    def scores(self) -> list[Score]:
        """The mean loss per token, the perplexities per token and per word, and the bits per byte."""
        columns = (self._losses, self._tokens, self._words, self._bytes)
        losses_N, tokens_N, words_N, bytes_N = (np.frombuffer(column) for column in columns)
        found = {
            "loss": Measured(*ratio(losses_N, tokens_N)),
            "token_perplexity": _exponential(*ratio(losses_N, tokens_N)),
            "word_perplexity": _exponential(*ratio(losses_N, words_N)),
            "bits_per_byte": Measured(*ratio(losses_N / math.log(2), bytes_N)),
        }
        return [
            Score(task=TASK, metric=metric, n=len(losses_N), higher_is_better=False, **measured._asdict())
            for metric, measured in found.items()
        ]


def _exponential(value: float, standard_error: float | None) -> Measured:
    """e to a value; nothing where that is too large to be a number, as of a model that knows nothing and words of many
    tokens."""
    try:
        found = math.exp(value)
    except OverflowError:
        return Measured(None, None)
    # The delta method again: the derivative is the value itself.
    error = None if standard_error is None else found * standard_error
    return Measured(found, error if error is not None and math.isfinite(error) else None)
