"""The order of rows: permutations on the fly, every row once in an epoch, one group of shards at a time."""

import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.training.order import RowOrder, permute

QUICK = settings(max_examples=40, deadline=None)
sizes = st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(lambda counts: sum(counts) > 0)


@QUICK
@given(size=st.integers(1, 3000), key=st.text(max_size=4))
def test_a_permutation_takes_every_place_once(size: int, key: str) -> None:
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@QUICK
@given(size=st.integers(1, 2**62), data=st.data())
def test_a_permutation_of_any_size_stays_inside_it(size: int, data: st.DataObject) -> None:
    places = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=50)))
    found = permute(np.array(places, np.int64), size, "key")
    assert len(set(found.tolist())) == len(places)
    assert found.min() >= 0
    assert found.max() < size


def test_a_permutation_looks_random() -> None:
    size = 10_000
    for key in ("a", "b"):
        found = permute(np.arange(size), size, key)
        assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.03
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03
        counts, _ = np.histogram(found[: size // 10], 10)
        assert counts.min() > 60
    # Every order of three comes up, about as often as the others.
    orders = Counter(tuple(permute(np.arange(3), 3, str(key)).tolist()) for key in range(1200))
    assert len(orders) == 6
    assert min(orders.values()) > 130


@QUICK
@given(counts=sizes, group=st.integers(1, 4), shuffled=st.booleans(), epochs=st.integers(1, 3))
def test_an_epoch_has_every_row_once_and_a_group_at_a_time(
    counts: list[int], group: int, shuffled: bool, epochs: int
) -> None:
    order = RowOrder(counts, "key", group, shuffled)
    shards_N, rows_N = order.locate(0, epochs * order.total)
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    for epoch in range(epochs):
        part = slice(epoch * order.total, (epoch + 1) * order.total)
        pairs = list(zip(shards_N[part].tolist(), rows_N[part].tolist(), strict=True))
        assert len(pairs) == len(everything)
        assert set(pairs) == everything
        # A shard that has been left, with its group, does not come again.
        last = {shard: place for place, (shard, _) in enumerate(pairs)}
        for place in range(len(pairs)):
            needed = {shard for shard, end in last.items() if end >= place and (shard, 0) in pairs[: place + 1]}
            assert len(needed) <= group


@QUICK
@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=9), group=st.integers(1, 4), shuffled=st.booleans())
def test_what_follows_a_group_is_told_in_its_second_half(counts: list[int], group: int, shuffled: bool) -> None:
    order = RowOrder(counts, "key", group, shuffled)
    shards_N, _ = order.locate(0, 3 * order.total)
    # A group ends where as many shards as it has are gone through, or the epoch ends.
    groups: list[tuple[int, int, set[int]]] = []
    first = 0
    for index in range(len(shards_N)):
        seen = set(shards_N[first : index + 1].tolist())
        through = sum(counts[shard] for shard in seen) == index + 1 - first
        if (through and len(seen) == group) or (index + 1) % order.total == 0:
            groups.append((first, index, seen))
            first = index + 1
    for (first, last, _), (_, _, after) in itertools.pairwise(groups):
        for index in range(first, last + 1):
            told = 2 * (index - first) >= last + 1 - first
            assert set(order.following(index)) == (after if told else set())


def test_shards_without_rows_are_not_told_of() -> None:
    assert RowOrder([3, 0, 0, 2], "key", 2, False).following(2) == [3]
