"""Token shards as they fill up: documents are gathered, and a file is written whenever one is full.

N tokens, D documents.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.identity import Digest, FileName
from common.config import FrozenModel
from models.training.shards import write_shard


class TokenShard(FrozenModel):
    """A token shard's file, and what is in it."""

    name: FileName
    """Its file name where it was written."""
    documents: int
    tokens: int
    counted_tokens: int
    """Tokens that are trained on."""
    sha256: Digest
    size: int
    """Bytes of the file."""


class Writer:
    """Writes documents into shards of `models.training.shards`, each whole or absent. Documents are never divided."""

    def __init__(self, folder: Path, name: Callable[[int], str], capacity: int, together: int = 1) -> None:
        """`name` gives the file of each shard by its number; `capacity` is in tokens; so many documents that follow
        each other stay `together`."""
        self.shards: list[TokenShard] = []
        self._folder, self._name, self._capacity, self._together = folder, name, capacity, together
        self._clear()

    def _clear(self) -> None:
        self._tokens = 0
        self._ids: list[NDArray[Any]] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._counted: list[NDArray[np.bool_]] = []

    def add(self, ids_N: NDArray[Any], lengths_D: NDArray[np.int64], counted_N: NDArray[np.bool_] | None) -> None:
        """Adds documents, whole groups of those that stay together: their ids (uint16 or uint32), the length of each,
        and which tokens count, None in every call where all do. Raises OSError where a shard cannot be written."""
        ends_D = np.cumsum(lengths_D)
        first, start = 0, 0
        while first < len(lengths_D):
            room = self._capacity - self._tokens
            last = int(np.searchsorted(ends_D, start + room, side="right"))
            last -= last % self._together
            if last <= first and self._tokens:
                self._write()
                continue
            last = max(last, first + self._together)
            end = int(ends_D[last - 1])
            self._ids.append(ids_N[start:end])
            self._lengths.append(lengths_D[first:last])
            if counted_N is not None:
                self._counted.append(counted_N[start:end])
            self._tokens += end - start
            first, start = last, end

    def close(self) -> None:
        """Writes what is left."""
        if self._lengths:
            self._write()

    def _write(self) -> None:
        lengths_D = np.concatenate(self._lengths)
        mask_N = np.concatenate(self._counted) if self._counted else None
        name = self._name(len(self.shards))
        written = write_shard(self._folder / name, np.concatenate(self._ids), np.cumsum(lengths_D), mask_N)
        self.shards.append(
            TokenShard(
                name=name,
                documents=len(lengths_D),
                tokens=self._tokens,
                counted_tokens=self._tokens if mask_N is None else int(mask_N.sum()),
                sha256=written.sha256,
                size=written.size,
            )
        )
        self._clear()
