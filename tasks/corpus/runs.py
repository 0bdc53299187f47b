"""Pairs of numbers on disk, found by the first of a pair: sorted files that are merged as they grow in number.

Keys are hashes, spread evenly over all 64-bit numbers. Q queries, M matches.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.files import fsync_file

_MEMORY_PAIRS = 1 << 20  # pairs that wait in memory, 16 MiB, before they become a file
_FANOUT = 4  # files of about one size that become one
_MERGE_PAIRS = 1 << 19  # pairs that are in memory while files are merged


@dataclass(frozen=True)
class _Run:
    """Pairs in the order of their keys, in memory or mapped from a file."""

    keys: NDArray[np.uint64]
    values: NDArray[np.uint64]
    name: str = ""
    """The file's, or nothing."""

    @property
    def level(self) -> int:
        """About how often pairs of it were merged; files of one level are of about one size."""
        return max(0, int(math.log(len(self.keys) / _MEMORY_PAIRS * _FANOUT, _FANOUT)))


class Runs:
    """Pairs of a key and a value, for one thread; what is added is found at once, and durable when it was saved."""

    def __init__(self, folder: Path, prefix: str, names: Sequence[str] = ()) -> None:
        """Opens the files that `save` named. Raises OSError or ValueError where they are gone or damaged."""
        self._folder, self._prefix = folder, prefix
        self._files = [_mapped(folder, name) for name in names]
        self._memory: list[_Run] = []
        self._number = 1 + max((int(name.rpartition("-")[2].partition(".")[0]) for name in names), default=-1)

    def add(self, keys: NDArray[np.uint64], values: NDArray[np.uint64]) -> None:
        """Adds pairs. Raises OSError where they have to be written and cannot be."""
        if not len(keys):
            return
        self._memory.append(_merged([_Run(keys, values)]))
        while len(self._memory) > 1 and len(self._memory[-2].keys) <= 2 * len(self._memory[-1].keys):
            self._memory[-2:] = [_merged(self._memory[-2:])]
        if sum(len(run.keys) for run in self._memory) >= _MEMORY_PAIRS:
            self._spill()

    def find(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """For each pair whose key is asked for, the place of that key in `keys`, and the value; in no order."""
        order = np.argsort(keys)
        asked = keys[order]
        queries, values = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for run in (*self._files, *self._memory):
            first = np.searchsorted(run.keys, asked)
            hit = np.flatnonzero(run.keys[np.minimum(first, len(run.keys) - 1)] == asked)
            if len(hit):
                count = np.searchsorted(run.keys, asked[hit], side="right") - first[hit]
                queries.append(np.repeat(order[hit], count))
                values.append(
                    run.values[np.repeat(first[hit] - np.cumsum(count) + count, count) + np.arange(count.sum())]
                )
        return np.concatenate(queries), np.concatenate(values)

    def save(self) -> list[str]:
        """Forces all pairs onto the disk; gives the names of the files that hold them.

        Files that are in use no more, for they were merged, are left to the caller, who may still need them.
        """
        self._spill()
        while len(files := self._crowded()) > 1:
            self._files[-len(files) :] = [self._write(files)]
        return [run.name for run in self._files]

    def _crowded(self) -> list[_Run]:
        """The last files, if they are so many of about one size that they should be one."""
        if not self._files:
            return []
        level = self._files[-1].level
        larger = [place for place, run in enumerate(self._files) if run.level > level]
        last = self._files[larger[-1] + 1 if larger else 0 :]
        return last if len(last) >= _FANOUT else []

    def _spill(self) -> None:
        if self._memory:
            self._files.append(self._write(self._memory))
            self._memory = []

    def _write(self, runs: Sequence[_Run]) -> _Run:
        """The pairs of some runs in a file of their own."""
        total = sum(len(run.keys) for run in runs)
        name = f"{self._prefix}-{self._number}.npy"
        self._number += 1
        path = self._folder / name
        with path.open("wb") as keys_file, path.open("r+b") as values_file:
            np.lib.format.write_array_header_1_0(
                keys_file, {"descr": "<u8", "fortran_order": False, "shape": (2, total)}
            )
            values_file.seek(keys_file.tell() + 8 * total)
            for part in _parts(runs, total):
                keys_file.write(part.keys.astype("<u8").data)
                values_file.write(part.values.astype("<u8").data)
        fsync_file(path)
        return _mapped(self._folder, name)


def _parts(runs: Sequence[_Run], total: int) -> Iterable[_Run]:
    """The pairs of some runs in order, so many at a time as are well in memory: evenly spread keys make even parts."""
    count = -(-total // _MERGE_PAIRS)
    bounds = np.array([(part << 64) // count for part in range(1, count)], np.uint64)
    places = [[0, *np.searchsorted(run.keys, bounds).tolist(), len(run.keys)] for run in runs]
    for part in range(count):
        yield _merged(
            [
                _Run(run.keys[own[part] : own[part + 1]], run.values[own[part] : own[part + 1]])
                for run, own in zip(runs, places, strict=True)
            ]
        )


def _merged(runs: Sequence[_Run]) -> _Run:
    keys, values = (np.concatenate(parts) for parts in ([run.keys for run in runs], [run.values for run in runs]))
    order = np.argsort(keys, kind="stable")
    return _Run(keys[order], values[order])


def _mapped(folder: Path, name: str) -> _Run:
    pairs = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    if pairs.dtype != np.dtype("<u8") or pairs.ndim != 2 or len(pairs) != 2 or not pairs.shape[1]:
        raise ValueError(f"{folder / name} does not hold pairs of numbers")
    keys, values = np.asarray(pairs)
    return _Run(keys, values, name)
