"""Batches of a source's rows."""

import itertools
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from tasks.corpus import batching
from tasks.corpus.batching import Batch, Batcher
from tasks.corpus.sizes import ROW_BYTES
from tasks.corpus.sources import FileStart, Reading, Rows
from tests.tasks.corpus.conftest import Told, documents, texts


def table(*texts: str) -> pa.Table:
    return pa.table(
        {"text": pa.array(texts, pa.string()), "length": pa.array([len(text) for text in texts], pa.int64())}
    )


def cut(rows: list[str], sizes: list[int]) -> list[pa.Table]:
    """Rows as tables of some sizes, one after the other."""
    tables: list[pa.Table] = []
    left = rows
    for size in itertools.chain(sizes, itertools.repeat(3)):
        if not left:
            return tables
        tables.append(table(*left[:size]))
        left = left[size:]
    raise AssertionError


def batches(parts: Iterable[Rows | FileStart], reading: Reading | None = None) -> list[Batch]:
    return list(Batcher(reading or Reading()).batches(parts))


@settings(max_examples=200, deadline=None)
@given(
    files=st.lists(st.lists(st.text(max_size=30), max_size=12), max_size=6),
    sizes=st.lists(st.integers(0, 9), max_size=5),
    others=st.lists(st.integers(0, 9), max_size=5),
    limit=st.integers(1, 200),
    anchor=st.integers(1, 200),
)
def test_batches_have_bounds_that_depend_on_the_rows_alone(
    files: list[list[str]], sizes: list[int], others: list[int], limit: int, anchor: int
) -> None:
    def parts(sizes: list[int], first: int = 0) -> Iterator[Rows | FileStart]:
        for number, rows in enumerate(files[first:], first):
            yield FileStart(number)
            yield from map(Rows, cut(rows, sizes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "BATCH_BYTES", limit)
        patch.setattr(batching, "ANCHOR_BYTES", anchor)
        found, again = batches(parts(sizes)), batches(parts(others))
        described = [(texts([batch.table]), batch.file) for batch in found]
        assert described == [(texts([batch.table]), batch.file) for batch in again]
        # Whoever begins to read at a file that begins a batch sees the same batches.
        for number, batch in enumerate(found):
            if batch.file is not None:
                later = batches(parts(others, batch.file))
                assert [(texts([batch.table]), batch.file) for batch in later] == described[number:]
    assert texts(batch.table for batch in found) == [row for rows in files for row in rows]
    for number, batch in enumerate(found):
        assert batch.table["text"].num_chunks == 1
        weights = [len(text.encode()) + ROW_BYTES for text in texts([batch.table])]
        assert sum(weights[:-1]) < limit
        # All are full but the last, and those after which a file begins.
        if number + 1 < len(found):
            assert sum(weights) >= (limit if found[number + 1].file is None else min(limit, anchor))
    assert not found or found[0].file is not None


def test_a_batch_is_of_one_split() -> None:
    parts = [Rows(table("a"), "train"), Rows(table("b"), "train"), Rows(table("c"), "test")]
    assert [(batch.split, texts([batch.table])) for batch in batches(parts)] == [
        ("train", ["a", "b"]),
        ("test", ["c"]),
    ]


def test_what_was_refused_comes_with_the_rows_around_it() -> None:
    told = Told(skip=True)

    def parts() -> Iterator[Rows | FileStart]:
        told.refuse("malformed", "a line 1", "bad", 7)
        yield Rows(table("x" * batching.BATCH_BYTES))
        told.refuse("malformed", "a line 3", "bad", 5)
        told.refuse("no_text", "a line 4", "bad", 1)
        yield Rows(table("b"))
        told.refuse("no_text", "a line 6", "bad", 1)
        yield FileStart(1)
        yield Rows(table("c"))

    first, second, third = batches(parts(), told)
    assert documents(first.refused) == {"malformed": 1}
    assert documents(second.refused) == {"malformed": 1, "no_text": 2}
    assert second.refused.counts["malformed"].bytes == 5
    # What was dropped from a file is not counted again by whoever reads on from the next.
    assert third.file == 1
    assert not third.refused.counts
    # Each kind is told once, at its first place.
    assert [text.partition(":")[0] for text in told.said] == ["a line 1", "a line 4"]


def test_a_source_of_bad_rows_alone_is_a_batch_without_rows() -> None:
    told = Told(skip=True)
    told.refuse("malformed", "a line 1", "bad", 7)
    (batch,) = batches([], told)
    assert batch.table.num_rows == 0
    assert documents(batch.refused) == {"malformed": 1}


def test_columns_that_change_their_type_are_converted_or_refused() -> None:
    floats = pa.table({"text": ["a"], "score": pa.array([1.5], pa.float64())})
    integers = pa.table({"score": pa.array([2], pa.int32()), "text": ["b"], "more": ["c"]})
    words = pa.table({"text": ["a"], "score": ["high"]})
    (batch,) = batches([Rows(floats), Rows(integers)])
    assert batch.table["score"].to_pylist() == [1.5, 2.0]
    with pytest.raises(UserError, match=r"b\.parquet: the column 'score' is string, and it was double before"):
        batches([Rows(floats), Rows(words, place="b.parquet")])
    sevens = pa.table({"text": ["a"], "score": ["7"]})
    with pytest.raises(UserError, match=r"b\.parquet: the column 'score' is string, and it was int32 before"):
        batches([Rows(integers.select(["text", "score"])), Rows(sevens, place="b.parquet")])
    with pytest.raises(UserError, match=r"b\.parquet has no column 'score'"):
        batches([Rows(floats), Rows(sevens.select(["text"]), place="b.parquet")])
    halves = pa.table({"text": ["a"], "score": [0.5]})
    with pytest.raises(UserError, match=r"b\.parquet: the column 'score' is double, and it was int32 before"):
        batches([Rows(integers.select(["text", "score"])), Rows(halves, place="b.parquet")])
    nulls = pa.table({"text": ["b"], "score": pa.nulls(1)})
    (batch,) = batches([Rows(floats), Rows(nulls)])
    assert batch.table["score"].to_pylist() == [1.5, None]


def test_other_columns_fill_a_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES", 1000)
    rows = pa.table({"text": ["t"] * 20, "meta": ["m" * 400] * 20, "tags": [["u" * 40] * 2] * 20})
    assert [batch.table.num_rows for batch in batches([Rows(rows)])] == [3, 3, 3, 3, 3, 3, 2]
