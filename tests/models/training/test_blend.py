"""Blends: exact shares, the same whoever asks for which rows, and budgets that are kept to the row."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from math import lcm

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.training.blend import Blend, Mixture

QUICK = settings(max_examples=60, deadline=None)
weights = st.lists(st.integers(1, 20).map(Fraction), min_size=1, max_size=5)
sources = st.lists(
    st.tuples(st.integers(1, 12).map(Fraction), st.one_of(st.none(), st.integers(1, 50))), min_size=1, max_size=5
)


def one_by_one(weights: Sequence[Fraction], limits: Sequence[int | None], rows: int) -> Iterator[tuple[int, int]]:
    """The reference: the source of each row and its own index, by going through a cycle of all sources that are left,
    in which each has its places evenly spread, and beginning a new one when a source is used up."""
    drawn = [0] * len(weights)
    cycle: list[int] = []
    for _ in range(rows):
        if not cycle:
            left = [source for source, limit in enumerate(limits) if drawn[source] != limit]
            if not left:
                return
            total = sum(weights[source] for source in left)
            scale = lcm(*((weights[source] / total).denominator for source in left))
            counts = {source: int(weights[source] / total * scale) for source in left}
            places = [
                (Fraction(2 * k + 1, 2 * counts[source]), source) for source in left for k in range(counts[source])
            ]
            cycle = [source for _, source in sorted(places)]
        source = cycle.pop(0)
        yield source, drawn[source]
        drawn[source] += 1
        if drawn[source] == limits[source]:
            cycle = []


@QUICK
@given(weights=weights, first=st.integers(0, 10**9))
def test_shares_are_exact_over_every_cycle(weights: list[Fraction], first: int) -> None:
    mixture = Mixture(weights)
    counts = dict.fromkeys(range(len(weights)), 0)
    for draw in mixture.split(first, mixture.cycle):
        counts[draw.source] += draw.rows
    assert [Fraction(counts[number], mixture.cycle) for number in counts] == [w / sum(weights) for w in weights]


def test_a_long_cycle_is_rounded() -> None:
    mixture = Mixture([Fraction(1, 3_000_017), Fraction(1), Fraction(2)])
    assert mixture.cycle == 65536
    assert mixture.counts[0] == 1
    assert mixture.counts[2] == pytest.approx(2 / 3 * 65536, abs=2)


@QUICK
@given(sources=sources, cuts=st.sets(st.integers(1, 299), max_size=5))
def test_rows_come_from_where_they_come_one_by_one(sources: list[tuple[Fraction, int | None]], cuts: set[int]) -> None:
    weights, limits = [weight for weight, _ in sources], [limit for _, limit in sources]
    expected = list(one_by_one(weights, limits, 300))
    blend = Blend(weights, limits)
    endless = any(limit is None for limit in limits)
    assert blend.total == (None if endless else sum(limit for limit in limits if limit is not None))
    rows = min(300, blend.total or 300)
    assert len(expected) == rows
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    found: dict[int, tuple[int, int]] = {}
    # Whichever parts of the run are asked for, in whichever order.
    for first, end in reversed(list(pairwise(edges))):
        for draw in blend.split(first, end - first):
            places = np.arange(end - first)[draw.places]
            assert len(places) == draw.rows
            found |= {first + int(place): (draw.source, draw.first + k) for k, place in enumerate(places)}
        drawn = [sum(source == number for source, _ in expected[:end]) for number in range(len(sources))]
        assert blend.drawn(end) == drawn
    assert [found[row] for row in range(rows)] == expected
    for number, most in enumerate(limits):
        last = blend.used_up[number]
        if last is not None and last <= rows:
            assert most is not None
            assert expected[last - 1] == (number, most - 1)
        elif most is not None:
            assert sum(source == number for source, _ in expected) < most
    if not endless:
        with pytest.raises(IndexError):
            list(blend.split(rows - 1, 2))
        with pytest.raises(IndexError):
            blend.drawn(rows + 1)


def test_a_row_far_along_is_found_at_once() -> None:
    blend = Blend([Fraction(1), Fraction(3)], [10**12, None])
    (draw,) = blend.split(4 * 10**12 + 5, 7)
    assert draw.source == 1
    assert draw.rows == 7
    assert sum(blend.drawn(4 * 10**12 + 5)) == 4 * 10**12 + 5
    assert blend.drawn(10**15)[0] == 10**12


def test_others_share_the_place_of_a_source_that_is_used_up_by_their_weights() -> None:
    blend = Blend([Fraction(2), Fraction(1), Fraction(1, 2)], [100, None, None])
    before, after = blend.drawn(175), blend.drawn(175 + 3000)
    assert before == [100, 50, 25]
    assert [late - early for late, early in zip(after, before, strict=True)] == [0, 2000, 1000]
