"""Which source each row of a run comes from: exact shares, evenly spread, until a source is used up.

Everything is a function of the global row index alone, as in `order`. N rows, C slots of a cycle.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from models.training.order import Indices

_CYCLE_LIMIT = 1 << 16


class Draw(NamedTuple):
    """Some of the rows that were asked for, all of one source and in its own order."""

    source: int
    """The source's number."""
    places: Indices | slice
    """Which of the rows that were asked for these are."""
    first: int
    """The first of the source's own row indices; the others follow it."""
    rows: int
    """How many they are."""


class Mixture:
    """A cycle in which every source has its exact share of the rows, evenly spread."""

    def __init__(self, weights: Sequence[Fraction], together: int = 1) -> None:
        """`weights`: positive shares of the rows, of any sum. A cycle longer than 65536 rows is rounded to that.
        `together`: so many rows of a source follow one another, and count as one in the cycle's length."""
        total = sum(weights)
        scale = math.lcm(*((weight / total).denominator for weight in weights))
        if scale <= _CYCLE_LIMIT:
            slots = [int(weight / total * scale) for weight in weights]
        else:
            slots = _apportion([weight / total for weight in weights], _CYCLE_LIMIT)
        self.counts = [count * together for count in slots]
        self.cycle = sum(self.counts)
        """Rows after which the pattern repeats."""
        source_C = np.repeat(np.arange(len(weights)), self.counts)
        rank_C = np.concatenate([np.arange(count) for count in self.counts])
        at_C = np.concatenate([(np.arange(count) + 0.5).repeat(together) / count for count in slots])
        slots_C = np.argsort(at_C, kind="stable")
        self._source_C, self._rank_C = source_C[slots_C], rank_C[slots_C]

    def split(self, first: int, count: int) -> Iterator[Draw]:
        """The sources of the `count` rows from `first` on, each once at most."""
        if len(self.counts) == 1:
            yield Draw(0, slice(0, count), first, count)
            return
        slots_N = (first + np.arange(count, dtype=np.int64)) % self.cycle
        sources_N = self._source_C[slots_N]
        for source in range(len(self.counts)):
            places = np.flatnonzero(sources_N == source)
            if places.size:
                cycle = (first + int(places[0])) // self.cycle
                index = cycle * self.counts[source] + int(self._rank_C[slots_N[places[0]]])
                yield Draw(source, places, index, places.size)

    def drawn(self, rows: int) -> list[int]:
        """How many of the first `rows` rows are of each source."""
        cycles, rest = divmod(rows, self.cycle)
        some = np.bincount(self._source_C[:rest], minlength=len(self.counts)).tolist()
        return [cycles * count + extra for count, extra in zip(self.counts, some, strict=True)]

    def rows_until(self, source: int, draws: int) -> int:
        """Rows up to and with the one that is the `draws`-th of a source."""
        cycles, rank = divmod(draws - 1, self.counts[source])
        return cycles * self.cycle + int(np.flatnonzero(self._source_C == source)[rank]) + 1


class _Phase(NamedTuple):
    """A stretch of rows that are mixed from the same sources."""

    first: int
    """Its first row."""
    before: list[int]
    """Rows of each source, of all of them, that come before."""
    sources: list[int]
    """The sources that it mixes."""
    mixture: Mixture


class Blend:
    """The sources of all rows of a run: mixed by weight until the first of them reaches its limit, then the others by
    theirs, and so on."""

    def __init__(self, weights: Sequence[Fraction], limits: Sequence[int | None], together: int = 1) -> None:
        """`weights`: shares of the rows, above 0; `limits`: rows of each at most, above 0, None for any number.
        `together`: so many rows at a time are of one source; every limit is a multiple of it."""
        self._phases: list[_Phase] = []
        self.total: int | None = 0
        """Rows that there are; None for any number."""
        self.used_up: list[int | None] = [None] * len(weights)
        """Rows up to and with the last one of each source; None where it has no limit, or is never at it."""
        before = [0] * len(weights)
        active = list(range(len(weights)))
        while active:
            phase = _Phase(self.total, list(before), active, Mixture([weights[source] for source in active], together))
            self._phases.append(phase)
            bounds = [
                phase.mixture.rows_until(place, limit - before[source])
                for place, source in enumerate(active)
                if (limit := limits[source]) is not None
            ]
            if not bounds:
                self.total = None
                return
            rows = min(bounds)
            for source, drawn in zip(active, phase.mixture.drawn(rows), strict=True):
                before[source] += drawn
            self.total += rows
            for source in [source for source in active if before[source] == limits[source]]:
                self.used_up[source] = self.total
            active = [source for source in active if self.used_up[source] is None]

    def split(self, first: int, count: int) -> Iterator[Draw]:
        """The sources of the `count` rows from `first` on. Raises IndexError past the last row."""
        for phase, begin, end in self._parts(first, first + count):
            offset = begin - first
            for draw in phase.mixture.split(begin - phase.first, end - begin):
                source = phase.sources[draw.source]
                places = draw.places
                if not isinstance(places, slice):
                    places = places + offset
                elif offset or end - begin < count:
                    places = slice(offset, offset + draw.rows)
                yield Draw(source, places, phase.before[source] + draw.first, draw.rows)

    def drawn(self, rows: int) -> list[int]:
        """How many of the first `rows` rows are of each source. Raises IndexError past the last row."""
        found = list(self._phases[0].before)
        for phase, begin, end in self._parts(0, rows):
            for source, drawn in zip(phase.sources, phase.mixture.drawn(end - begin), strict=True):
                found[source] += drawn
        return found

    def _parts(self, first: int, end: int) -> Iterator[tuple[_Phase, int, int]]:
        """Each phase that has some of the rows from `first` to `end`, with the first of these and the one past them."""
        if self.total is not None and end > self.total:
            raise IndexError(f"row {end} of a blend of {self.total} rows")
        if len(self._phases) == 1:
            yield self._phases[0], first, end
            return
        bounds = [*(phase.first for phase in self._phases), self.total if self.total is not None else end]
        for phase, (begin, past) in zip(self._phases, pairwise(bounds), strict=True):
            if max(first, begin) < min(end, past):
                yield phase, max(first, begin), min(end, past)


def _apportion(shares: Sequence[Fraction], slots: int) -> list[int]:
    """Whole numbers of `slots` by largest remainder, at least one for each share."""
    counts = [max(1, math.floor(share * slots)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index] * slots)
    for index in by_remainder[: max(0, slots - sum(counts))]:
        counts[index] += 1
    return counts
