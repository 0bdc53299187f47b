"""Which split a document belongs to.

D documents.
"""

import hashlib
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from common.config import FrozenModel
from tasks.corpus.sources import TEXT

if TYPE_CHECKING:
    import pyarrow as pa

TRAIN, VALIDATION, TEST = range(3)


class Fractions(FrozenModel):
    """Shares of the documents, chosen by a hash of their text, that are not trained on.

    A document stays in its split whatever else is in the source; a larger fraction takes documents from training
    alone.
    """

    validation: float = Field(default=0.0, ge=0, lt=1)
    """Share for validation."""
    test: float = Field(default=0.0, ge=0, lt=1)
    """Share for tests."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave nothing to train on")
        return self

    def splits(self, hash_D: NDArray[np.uint64]) -> NDArray[np.int8]:
        """The split of each document (an index into SPLITS): validation has the lowest hashes, test the highest."""
        split_D = np.full(len(hash_D), TRAIN, np.int8)
        # 2**64 times a float is exact, and the whole numbers below it are the hashes.
        split_D[hash_D < np.uint64(int(self.validation * 2**64))] = VALIDATION
        highest = int(self.test * 2**64)
        if highest:
            split_D[hash_D >= np.uint64(2**64 - highest)] = TEST
        return split_D


def text_hashes(table: "pa.Table") -> NDArray[np.uint64]:
    """The first 64 bits of the SHA-256 of each text in UTF-8, as a little-endian number."""
    import pyarrow as pa

    text_D = table[TEXT].combine_chunks().cast(pa.large_string())
    if not len(text_D):
        return np.empty(0, np.uint64)
    _, offsets, data = text_D.buffers()
    end_D = np.frombuffer(offsets, np.int64)[text_D.offset : text_D.offset + len(text_D) + 1].tolist()
    bytes_ = memoryview(data) if data is not None else memoryview(b"")
    digests = (hashlib.sha256(bytes_[first:last]).digest()[:8] for first, last in pairwise(end_D))
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
