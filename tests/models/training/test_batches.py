"""Shards and batches: every row exactly once in an epoch, and the same row whenever and however it is asked for."""

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from models.training.batches import Batches, Packing, Source
from models.training.order import Mixture, RowOrder, permute
from models.training.shards import find_shards, open_shard, write_shard

QUICK = settings(max_examples=40, deadline=None)
sizes = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 0)


@contextmanager
def shards(*token_counts: int, document: int = 5, masked: bool = False, start: int = 0) -> Iterator[Path]:
    """A folder of shards whose tokens are all different."""
    with tempfile.TemporaryDirectory() as name:
        for number, count in enumerate(token_counts):
            ends = [*range(document, count, document), count] if count else []
            tokens = np.arange(start, start + count).astype(np.uint16)
            mask = tokens % 3 == 0 if masked else None
            write_shard(Path(name) / f"train-{number:05d}.safetensors", tokens, ends, mask)
            start += count
        yield Path(name)


def batches(*sources: Source, length: int = 4, size: int = 3, packing: Packing = "stream", seed: int = 0) -> Batches:
    return Batches(sources, seed=seed, sequence_length=length, packing=packing, batch_size=size, shard_group=2)


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
@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=5), first=st.integers(0, 10**9))
def test_shares_are_exact_over_every_cycle(weights: list[int], first: int) -> None:
    mixture = Mixture([Fraction(weight) for weight in weights])
    counts = dict.fromkeys(range(len(weights)), 0)
    for source, _, _, amount in mixture.split(first, mixture.cycle):
        counts[source] += amount
    total = sum(weights)
    assert [Fraction(counts[number], mixture.cycle) for number in counts] == [Fraction(w, total) for w in weights]


@QUICK
@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=5), first=st.integers(0, 100), count=st.integers(1, 60)
)
def test_a_source_is_asked_for_one_index_after_the_other(weights: list[int], first: int, count: int) -> None:
    mixture = Mixture([Fraction(weight) for weight in weights])
    before = {source: amount for source, _, _, amount in mixture.split(0, first)} if first else {}
    for source, places, index, amount in mixture.split(first, count):
        assert index == before.get(source, 0)
        assert len(np.arange(count)[places]) == amount


def test_a_long_cycle_is_rounded() -> None:
    mixture = Mixture([Fraction(1, 3_000_017), Fraction(1), Fraction(2)])
    assert mixture.cycle == 65536
    assert mixture.counts[0] == 1
    assert mixture.counts[2] == pytest.approx(2 / 3 * 65536, abs=2)


@QUICK
@given(counts=sizes, length=st.integers(1, 7), seed=st.integers(0, 3))
def test_a_stream_has_every_window_once(counts: list[int], length: int, seed: int) -> None:
    with shards(*counts) as folder:
        expected, offset = set(), 0
        for count in counts:
            expected |= {offset + place for place in range(0, count - length, length)}
            offset += count
        if not expected:
            with pytest.raises(UserError, match="not enough tokens"):
                batches(Source(folder), length=length)
            return
        found = batches(Source(folder), length=length, seed=seed)
        assert found.epoch_rows == len(expected)
        batch = found.rows(0, found.epoch_rows)
        assert sorted(batch.tokens_BT[:, 0].tolist()) == sorted(expected)
        assert (batch.tokens_BT == batch.tokens_BT[:, :1] + np.arange(length)).all()
        assert (batch.targets_BT == batch.tokens_BT + 1).all()
        assert batch.loss_mask_BT.all()
        kept = sum((count - 1) // length * length + 1 for count in counts if count > length)
        assert found.summaries[0].dropped_tokens == sum(counts) - kept


@QUICK
@given(counts=sizes, document=st.integers(1, 9), length=st.integers(1, 7), masked=st.booleans())
def test_documents_are_one_to_a_row(counts: list[int], document: int, length: int, masked: bool) -> None:
    with shards(*counts, document=document, masked=masked, start=100) as folder:
        found = Batches([Source(folder)], seed=1, sequence_length=length, packing="documents", batch_size=2, pad_id=7)
        expected, cut, offset = set(), 0, 100
        for count in counts:
            for start in range(0, count, document):
                whole = list(range(offset + start, offset + min(count, start + document)))
                cut += len(whole) > length + 1
                row = whole[: length + 1]
                counted = tuple(not masked or token % 3 == 0 for token in row[1:])
                padding = length + 1 - len(row)
                expected.add((tuple(row) + (7,) * padding, counted + (False,) * padding))
            offset += count
        batch = found.rows(0, found.epoch_rows)
        rows = {
            ((*tokens.tolist(), targets.tolist()[-1]), tuple(mask.tolist()))
            for tokens, targets, mask in zip(*batch[:3], strict=True)
        }
        assert rows == expected
        assert found.epoch_rows == len(expected)
        assert found.summaries[0].cut_documents == cut


@QUICK
@given(
    packing=st.sampled_from(["stream", "documents"]),
    step=st.integers(0, 500),
    cuts=st.sets(st.integers(1, 8), max_size=4),
    weight=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_a_batch_depends_on_nothing_but_its_number(packing: Packing, step: int, cuts: set[int], weight: float) -> None:
    with shards(50, 70, 3, masked=True) as first, shards(40, 40, start=1000) as second:
        sources = Source(first), Source(second, weight)
        used = batches(*sources, packing=packing, size=9)
        used.batch(step // 2)
        used.rows(17, 5)
        batch = used.batch(step)
        fresh = batches(*sources, packing=packing, size=9).batch(step)
        edges = [0, *sorted(cuts), 9]
        parts = [used.rows(step * 9 + a, b - a) for a, b in itertools.pairwise(edges)]
        for ours, theirs, *partial in zip(batch[:3], fresh[:3], *(part[:3] for part in parts), strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours == theirs).all()
            assert (ours == np.concatenate(partial)).all()
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == np.int32
        assert batch.loss_mask_BT.dtype == np.bool_


def test_another_source_changes_neither_the_order_nor_the_rows_of_a_source() -> None:
    with shards(200, 100) as first, shards(300, start=1000) as second:
        alone = batches(Source(first)).rows(0, 120).tokens_BT[:, 0]
        mixed = batches(Source(second, 2.0), Source(first, 1.0)).rows(0, 360).tokens_BT[:, 0]
        assert (mixed[mixed < 1000] == alone).all()


def test_the_order_is_new_in_each_epoch_and_with_each_seed() -> None:
    with shards(200, 100) as folder:
        found = batches(Source(folder))
        rows = found.epoch_rows
        first, second = found.rows(0, rows).tokens_BT, found.rows(rows, rows).tokens_BT
        other = batches(Source(folder), seed=1).rows(0, rows).tokens_BT
        assert sorted(first[:, 0]) == sorted(second[:, 0]) == sorted(other[:, 0])
        assert (first != second).any()
        assert (first != other).any()
        stored = Batches(
            [Source(folder)], seed=0, sequence_length=4, packing="stream", batch_size=3, shuffled=False
        ).rows(0, rows)
        assert (np.diff(stored.tokens_BT[:, 0]) > 0).all()


def test_weights_of_documents_are_shares_of_their_tokens() -> None:
    with shards(400, document=2) as short, shards(400, document=8, start=1000) as long:
        found = batches(Source(short), Source(long), length=7, packing="documents")
        batch = found.rows(0, 500)
        tokens = batch.tokens_BT[batch.loss_mask_BT | (np.arange(7) == 0)]
        assert [summary.share for summary in found.summaries] == [0.8, 0.2]
        rows = batch.tokens_BT[:, 0] < 1000
        assert rows.sum() * 2 == (~rows).sum() * 8
        assert tokens.size


def test_a_token_outside_of_the_vocabulary_is_named() -> None:
    with shards(20) as folder:
        found = Batches([Source(folder)], seed=0, sequence_length=4, packing="stream", batch_size=4, vocab_size=10)
        with pytest.raises(UserError, match=r"holds the token 1\d, but there are only 10"):
            found.batch(0)


def test_wide_tokens_are_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", np.arange(70_000, 70_009).astype(np.uint32), [9])
    batch = batches(Source([tmp_path / "a.safetensors"])).rows(0, 2)
    assert sorted(batch.tokens_BT[:, 0].tolist()) == [70_000, 70_004]
    write_shard(tmp_path / "b.safetensors", np.full(9, 2**32 - 1, np.uint32), [9])
    with pytest.raises(UserError, match="holds the token 4294967295"):
        batches(Source([tmp_path / "b.safetensors"])).rows(0, 2)


def test_empty_documents_are_rows_in_which_nothing_counts(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", np.zeros(0, np.uint16), [0, 0])
    batch = batches(Source(tmp_path), packing="documents").rows(0, 2)
    assert not batch.loss_mask_BT.any()


@pytest.mark.parametrize(
    ("tokens", "ends", "mask", "message"),
    [
        (np.zeros(3, np.int64), [3], None, "uint16 or uint32"),
        (np.zeros(3, np.uint16), [2, 1, 3], None, "do not rise"),
        (np.zeros(3, np.uint16), [2], None, "do not end"),
        (np.zeros(3, np.uint16), [3], [1], "loss_mask has the shape"),
    ],
)
def test_a_wrong_shard_is_not_written(
    tmp_path: Path, tokens: np.ndarray, ends: list[int], mask: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.safetensors", tokens, ends, mask)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_shard_is_refused_or_read_within_its_bounds(data: st.DataObject) -> None:
    with shards(30, masked=True) as folder:
        path = find_shards(folder)[0]
        content = bytearray(path.read_bytes())
        kind = data.draw(st.sampled_from(["cut", "longer", "flip"]))
        if kind == "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        elif kind == "longer":
            content += b"x"
        else:
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            shard = open_shard(path).map()
            for packing in ("stream", "documents"):
                batches(Source(folder), packing=packing).rows(0, 20)
        except UserError as error:
            assert str(path) in str(error) or "not enough tokens" in str(error)  # noqa: PT017  # either is right
        else:
            assert kind == "flip"
            assert shard.tokens_N.size == 30


def test_a_header_of_nonsense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for header in (b"[" * 100_000, b"[]", b'{"tokens":5}', b'{"tokens":{"dtype":"U16","shape":[-1]}}', b"\xff"):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(UserError, match="is no intact token shard"):
            open_shard(path)
    path.write_bytes((1 << 62).to_bytes(8, "little"))
    with pytest.raises(UserError, match="longer than the file"):
        open_shard(path)
    with pytest.raises(UserError, match="is no intact token shard"):
        open_shard(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="holds no token shards"):
        find_shards(tmp_path / "nowhere")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_source_needs_a_weight(weight: float) -> None:
    with shards(20) as folder, pytest.raises(UserError, match="weights are finite and greater than 0"):
        batches(Source(folder, weight))
    with pytest.raises(UserError, match="nothing to train on"):
        batches()
