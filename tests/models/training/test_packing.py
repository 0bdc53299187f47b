"""Rows of whole documents: each document whole in one row, apart from its neighbours, and little padding."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from models.engine import Batch
from models.training.batches import Batches
from models.training.packing import packed
from models.training.shards import write_shard
from tests.models.training.folders import batches, folder_source

PAD = 60_000
lengths_of_shards = st.lists(st.lists(st.integers(0, 14), max_size=25), min_size=1, max_size=4).filter(
    lambda shards: any(map(sum, shards))
)


class Document(NamedTuple):
    """A document as it was written."""

    tokens: list[int]
    counts: list[bool]
    """Which of its tokens count as targets."""


def write(folder: Path, lengths: list[list[int]], masked: bool) -> list[Document]:
    """Shards of documents of some lengths whose tokens are all different; gives the documents."""
    written, start = [], 1
    for number, of_shard in enumerate(lengths):
        tokens = np.arange(start, start + sum(of_shard)).astype(np.uint16)
        mask = tokens % 3 != 0 if masked else np.ones_like(tokens, bool)
        ends = np.cumsum(of_shard, dtype=np.int64)
        write_shard(folder / f"{number}.safetensors", tokens, ends, mask if masked else None)
        for first, last in itertools.pairwise([0, *ends.tolist()]):
            written.append(Document(tokens[first:last].tolist(), mask[first:last].tolist()))
        start += sum(of_shard)
    return written


def read(batch: Batch, documents: list[Document]) -> list[list[int]]:
    """Which documents stand in each row, held against how they were written."""
    places = {token: (number, place) for number, one in enumerate(documents) for place, token in enumerate(one.tokens)}
    width = batch.tokens_BT.shape[1] + 1
    assert batch.documents_BT is not None
    rows = []
    for tokens, targets, counted, numbers in zip(*batch[:3], batch.documents_BT, strict=True):
        assert tokens[1:].tolist() == targets[:-1].tolist()
        row = [*tokens.tolist(), int(targets[-1])]
        real = list(itertools.takewhile(PAD.__ne__, row))
        assert row[len(real) :] == [PAD] * (width - len(real))
        groups = [number for number, _ in itertools.groupby(places[token][0] for token in real)]
        assert real == [token for number in groups for token in documents[number].tokens[:width]]
        # Padding is one document more.
        expected = [groups.index(places[token][0]) if token != PAD else len(groups) for token in row]
        assert numbers.tolist() == expected[:-1]
        for target, counts in zip(row[1:], counted, strict=True):
            number, place = places.get(target, (-1, 0))
            assert counts == (place > 0 and documents[number].counts[place])
        rows.append(groups)
    return rows


def whole(folder: Path, length: int, **options: Any) -> Batches:
    return batches(folder_source(folder), length=length, packing="whole", pad_id=PAD, **options)


@settings(max_examples=150, deadline=None)
@given(lengths=lengths_of_shards, length=st.integers(1, 17), masked=st.booleans(), seed=st.integers(0, 3))
def test_each_document_is_whole_in_one_row(
    lengths: list[list[int]], length: int, masked: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    documents = write(folder, lengths, masked)
    found = whole(folder, length, seed=seed)
    (summary,) = found.sources
    for epoch in range(2):
        rows = read(found.rows(epoch * summary.rows, summary.rows), documents)
        assert sorted(itertools.chain(*rows)) == [number for number, one in enumerate(documents) if one.tokens]
    sizes = [len(one.tokens) for one in documents]
    assert summary.rows == len(rows)
    assert summary.cut_documents == sum(size > length + 1 for size in sizes)
    assert summary.dropped_tokens == sum(max(0, size - length - 1) for size in sizes)
    assert summary.padding == pytest.approx(1 - (sum(sizes) - summary.dropped_tokens) / (len(rows) * (length + 1)))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60), width=st.integers(2, 40))
def test_no_row_has_room_for_what_stands_in_a_later_one(lengths: list[int], width: int) -> None:
    plan = packed(np.cumsum(lengths).astype(np.uint64), width)
    firsts = [0, *plan.ends_K.tolist()]
    rows = [plan.documents_D[first:end].tolist() for first, end in itertools.pairwise(firsts)]
    assert sorted(itertools.chain(*rows)) == [number for number, length in enumerate(lengths) if length]
    sizes = [sum(min(width, lengths[number]) for number in row) for row in rows]
    assert sizes == plan.tokens_K.tolist()
    assert max(sizes, default=0) <= width
    # No two rows could be one.
    assert all(one + other > width for one, other in itertools.combinations(sizes, 2))
    openers = [min(row, key=lambda number: (-min(width, lengths[number]), number)) for row in rows]
    assert openers == sorted(openers)


def test_rows_of_short_documents_are_full() -> None:
    # The lengths that conversations have: most are short, some are many times longer.
    lengths = np.random.default_rng(0).lognormal(4.3, 0.7, 20_000).astype(np.uint64) + np.uint64(5)
    for width, most in ((257, 0.005), (1025, 0.002), (2049, 0.002)):
        tokens_K = packed(np.cumsum(lengths), width).tokens_K
        assert 1 - tokens_K.mean() / width < most


def test_the_rows_are_in_a_new_order_with_each_seed_and_epoch(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    write(tmp_path, [numbers.integers(1, 14, 60).tolist() for _ in range(5)], masked=True)
    found = whole(tmp_path, 30)
    rows = found.sources[0].rows
    epochs = [found.rows(0, rows), found.rows(rows, rows), whole(tmp_path, 30, seed=1).rows(0, rows)]
    one, *others = (batch.tokens_BT.tolist() for batch in epochs)
    for other in others:
        assert sorted(other) == sorted(one)
        assert other != one
    assert found.fingerprint != whole(tmp_path, 30, seed=1).fingerprint
    assert found.fingerprint != batches(folder_source(tmp_path), length=30, packing="documents", pad_id=PAD).fingerprint


def test_rows_come_in_the_stored_order_of_what_opened_them(tmp_path: Path) -> None:
    documents = write(tmp_path, [[3, 9, 4, 8, 1, 10]], masked=False)
    # 10, 9 and 8 tokens open rows of 11, 4 opens another; 3 fits behind 8, and 1 where least is left.
    assert read(whole(tmp_path, 10, shuffled=False).rows(0, 4), documents) == [[1], [2], [0, 3], [4, 5]]


def test_nothing_but_empty_documents_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [[0, 0]], masked=False)
    with pytest.raises(UserError, match="not enough tokens for one row of 5: it has 0"):
        whole(tmp_path, 4)


def test_budgets_count_the_tokens_of_rows(tmp_path: Path) -> None:
    write(tmp_path, [[5] * 40], masked=False)
    # Four documents, 20 tokens, to a row of 23.
    found = batches(folder_source(tmp_path, budget=79), length=22, packing="whole")
    assert found.drawn(1)[0].tokens == 60
    with pytest.raises(UserError, match="6 rows, but the budgets allow 3"):
        found.require(2)
    assert batches(folder_source(tmp_path, epochs=0.5), length=22, packing="whole").drawn(1)[0].epochs == 0.3
