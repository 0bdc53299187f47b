"""Batches of a source's rows."""

import itertools
from collections.abc import Iterator

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from tasks.corpus import sources
from tasks.corpus.sources import Reading, Split, batches
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


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(max_size=30), max_size=30),
    st.lists(st.integers(0, 9), max_size=5),
    st.lists(st.integers(0, 9), max_size=5),
    st.integers(1, 200),
)
def test_batches_have_bounds_that_depend_on_the_rows_alone(
    rows: list[str], sizes: list[int], others: list[int], limit: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BATCH_BYTES", limit)
        found, again = (
            list(batches(((None, part) for part in cut(rows, tables)), Reading())) for tables in (sizes, others)
        )
    assert texts(batch.table for batch in found) == rows
    assert [texts([batch.table]) for batch in found] == [texts([batch.table]) for batch in again]
    for batch in found:
        assert batch.table["text"].num_chunks == 1
        weights = [len(text.encode()) + sources.ROW_BYTES for text in texts([batch.table])]
        assert sum(weights[:-1]) < limit
    # All but the last are full.
    for batch in found[:-1]:
        assert sum(len(text.encode()) + sources.ROW_BYTES for text in texts([batch.table])) >= limit


def test_a_batch_is_of_one_split() -> None:
    tables: list[tuple[Split | None, pa.Table]] = [("train", table("a")), ("train", table("b")), ("test", table("c"))]
    assert [(batch.split, texts([batch.table])) for batch in batches(tables, Reading())] == [
        ("train", ["a", "b"]),
        ("test", ["c"]),
    ]


def test_what_was_refused_comes_with_the_rows_around_it() -> None:
    told = Told(skip=True)

    def tables() -> Iterator[tuple[Split | None, pa.Table]]:
        told.refuse("malformed", "a line 1", "bad", 7)
        yield None, table("x" * sources.BATCH_BYTES)
        told.refuse("malformed", "a line 3", "bad", 5)
        told.refuse("no_text", "a line 4", "bad", 1)
        yield None, table("b")
        told.refuse("no_text", "a line 6", "bad", 1)

    first, second = batches(tables(), told)
    assert documents(first.refused) == {"malformed": 1}
    assert documents(second.refused) == {"malformed": 1, "no_text": 2}
    assert second.refused.counts["malformed"].bytes == 5
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
    (batch,) = batches([(None, floats), (None, integers)], Reading())
    assert batch.table["score"].to_pylist() == [1.5, 2.0]
    with pytest.raises(UserError, match="the source's columns do not fit those that it began with"):
        list(batches([(None, floats), (None, words)], Reading()))
