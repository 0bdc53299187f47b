"""Which row of a source comes when: keyed permutations computed on the fly, in two levels.

Everything is a function of its arguments alone, so that there is nothing to keep between two steps or two hosts.
N positions or rows.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_ROUNDS = 8


def permute(positions_N: Indices, size: int, key: str) -> Indices:
    """Where a permutation of range(`size`), chosen by `key`, takes each of `positions_N` (each within that range).

    A Feistel network over the pairs (left, right) with left < ceil(sqrt(size)), whose halves are added to modulo
    their sizes (Black and Rogaway, 2002); the few results past the end go through it again until they are inside.
    """
    if size < 2:
        return positions_N.copy()
    lefts = math.isqrt(size - 1) + 1
    rights = -(-size // lefts)
    keys = np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * _ROUNDS), "<u8")
    found_N = _feistel(positions_N.astype(np.uint64), lefts, rights, keys)
    while (outside := np.flatnonzero(found_N >= size)).size:
        found_N[outside] = _feistel(found_N[outside], lefts, rights, keys)
    return found_N.astype(np.int64)


def _feistel(values_N: NDArray[np.uint64], lefts: int, rights: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left_N, right_N = np.divmod(values_N, np.uint64(rights))
    sizes = (np.uint64(lefts), np.uint64(rights))
    halves = [left_N, right_N]
    for number, key in enumerate(keys):
        changed = number % 2
        half_N = halves[changed]
        half_N += _below(halves[1 - changed], key, sizes[changed])
        half_N -= (half_N >= sizes[changed]) * sizes[changed]
    left_N, right_N = halves
    left_N *= np.uint64(rights)
    left_N += right_N
    return left_N


def _below(values_N: NDArray[np.uint64], key: np.uint64, size: np.uint64) -> NDArray[np.uint64]:
    """A keyed hash of each value, below `size`: the finisher of splitmix64, its upper half scaled (Lemire, 2019)."""
    hashed_N = values_N + key
    hashed_N ^= hashed_N >> np.uint64(30)
    hashed_N *= np.uint64(0xBF58476D1CE4E5B9)
    hashed_N ^= hashed_N >> np.uint64(27)
    hashed_N *= np.uint64(0x94D049BB133111EB)
    hashed_N >>= np.uint64(32)
    hashed_N *= size
    hashed_N >>= np.uint64(32)
    return hashed_N


class _Epoch(NamedTuple):
    """The order of the shards in one epoch."""

    shards: Indices
    ends: Indices
    """Rows up to and with each shard, in that order."""


class RowOrder:
    """The order of one source's rows, new in each epoch: the shards are permuted and taken in groups, and the rows of
    a group are permuted among themselves, so that only one group's shards are needed at a time."""

    def __init__(self, row_counts: Sequence[int], key: str, group: int, shuffled: bool) -> None:
        """`row_counts`: rows of each shard, at least one in all; `group`: shards whose rows are shuffled together."""
        self.total = sum(row_counts)
        self._counts = np.array(row_counts, np.int64)
        self._key = key
        self._group = group
        self._shuffled = shuffled
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = np.arange(self._counts.size, dtype=np.int64)
        if self._shuffled:
            shards = permute(shards, shards.size, f"{self._key}:{epoch}")
        return _Epoch(shards, np.cumsum(self._counts[shards]))

    def locate(self, first: int, count: int) -> tuple[Indices, Indices]:
        """The shard and the row in it for `count` indices from `first` on; indices past one epoch are in the next."""
        shards_N = np.empty(count, np.int64)
        rows_N = np.empty(count, np.int64)
        done = 0
        while done < count:
            number, position = divmod(first + done, self.total)
            epoch = self._epoch(number)
            group, members, start, end = self._group_of(epoch, position)
            stop = min(end, position + count - done)
            inside_N = np.arange(position - start, stop - start, dtype=np.int64)
            if self._shuffled:
                inside_N = permute(inside_N, end - start, f"{self._key}:{number}:{group}")
            ends = epoch.ends[members] - start
            member_N = np.searchsorted(ends, inside_N, "right")
            part = slice(done, done + stop - position)
            shards = epoch.shards[members]
            shards_N[part] = shards[member_N]
            rows_N[part] = inside_N - (ends - self._counts[shards])[member_N]
            done = part.stop
        return shards_N, rows_N

    def following(self, index: int) -> list[int]:
        """The shards of the group that comes after an index's own, once that is half gone through; else none."""
        number, position = divmod(index, self.total)
        epoch = self._epoch(number)
        _, members, start, end = self._group_of(epoch, position)
        if 2 * position < start + end:
            return []
        shards = epoch.shards[members.stop :]
        if not shards.size:
            shards = self._epoch(number + 1).shards
        return [int(shard) for shard in shards[: self._group] if self._counts[shard]]

    def _group_of(self, epoch: _Epoch, position: int) -> tuple[int, slice, int, int]:
        """The number of a row's group in an epoch, where its shards are, its first row and the one past it."""
        group = int(np.searchsorted(epoch.ends, position, "right")) // self._group
        members = slice(group * self._group, (group + 1) * self._group)
        start = int(epoch.ends[members.start - 1]) if members.start else 0
        return group, members, start, int(epoch.ends[members][-1])
