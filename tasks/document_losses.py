"""How well each document was predicted: a row of `samples.parquet` each, and the scores over all of them.

N documents.
"""

import math
from array import array
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from common.files import sha256_bytes
from tasks.scores import Score

TASK = "perplexity"
ID_DIGITS = 16
PROMPT_CHARACTERS = 200
ROWS_AT_ONCE = 1024


class Document(NamedTuple):
    """A document that is scored."""

    id: str
    """The first digits of the SHA-256 of its text."""
    prompt: str
    """How it begins."""
    tokens: int
    words: int
    """What white space separates."""
    bytes: int
    """Those of UTF-8."""

    @classmethod
    def of(cls, text: str, tokens: int) -> Self:
        """The document with a text of so many tokens."""
        encoded = text.encode()
        start = text[:PROMPT_CHARACTERS]
        return cls(sha256_bytes(encoded)[:ID_DIGITS], start, tokens, len(text.split()), len(encoded))


class Measured(NamedTuple):
    """A measure over all documents."""

    value: float | None
    """Null where it is too large to be a number."""
    standard_error: float | None
    """Null for a single document."""


def ratio(totals_N: NDArray[np.float64], sizes_N: NDArray[np.float64]) -> tuple[float, float | None]:
    """sum(totals) / sum(sizes), with its standard error by the delta method, documents being drawn independently: that
    of the ratio estimator (Cochran, Sampling Techniques, 3rd edition, 1977, section 6.4)."""
    count, size = len(sizes_N), float(sizes_N.sum())
    value = float(totals_N.sum()) / size
    if count < 2:
        return value, None
    residuals_N = totals_N - value * sizes_N
    return value, math.sqrt(count / (count - 1) * float(residuals_N @ residuals_N)) / size


class DocumentLosses:
    """Takes the documents one by one, writes their rows, and knows the scores over all."""

    def __init__(self, path: Path) -> None:
        """Begins the file of rows. It is complete once `close` was called."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        text, count, number = pa.string(), pa.int64(), pa.float64()
        kinds = (text, text, count, count, count, number, number, number)
        names = (*Document._fields, "loss", "bits_per_byte", "word_loss")
        self._schema = pa.schema(list(zip(names, kinds, strict=True)))
        self._file = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._losses, self._tokens, self._words, self._bytes = (array("d") for _ in range(4))

    def add(self, document: Document, loss: float) -> None:
        """Takes a document and its −ln p, summed over its tokens."""
        sizes = (document.tokens, document.words, document.bytes)
        for column, value in zip((self._losses, self._tokens, self._words, self._bytes), (loss, *sizes), strict=True):
            column.append(value)
        per_token, per_word, per_byte = (loss / size if size else None for size in sizes)
        bits = None if per_byte is None else per_byte / math.log(2)
        measured = {"loss": per_token, "bits_per_byte": bits, "word_loss": per_word}
        self._rows.append({**document._asdict(), **measured})
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
        return {"documents": len(self._losses), **{name: int(sum(column)) for name, column in columns.items()}}

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
