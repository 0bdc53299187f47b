"""Batches: every row exactly once in an epoch, and the same row whenever and however it is asked for."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from models.training.batches import Packing
from models.training.shards import write_shard
from tests.models.training.folders import batches, folder_source, shards

QUICK = settings(max_examples=40, deadline=None)
sizes = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 0)


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
                batches(folder_source(folder), length=length)
            return
        found = batches(folder_source(folder), length=length, seed=seed)
        assert found.sources[0].rows == len(expected)
        batch = found.rows(0, len(expected))
        assert sorted(batch.tokens_BT[:, 0].tolist()) == sorted(expected)
        assert (batch.tokens_BT == batch.tokens_BT[:, :1] + np.arange(length)).all()
        assert (batch.targets_BT == batch.tokens_BT + 1).all()
        assert batch.loss_mask_BT.all()
        assert batch.documents_BT is None
        kept = sum((count - 1) // length * length + 1 for count in counts if count > length)
        assert found.sources[0].dropped_tokens == sum(counts) - kept


@QUICK
@given(counts=sizes, document=st.integers(1, 9), length=st.integers(1, 7), masked=st.booleans())
def test_documents_are_one_to_a_row(counts: list[int], document: int, length: int, masked: bool) -> None:
    with shards(*counts, document=document, masked=masked, start=100) as folder:
        # One document to a row is masked as it is.
        found = batches(
            folder_source(folder), seed=1, length=length, packing="documents", pad_id=7, document_masking=masked
        )
        expected, cut, dropped, offset = set(), 0, 0, 100
        for count in counts:
            for start in range(0, count, document):
                whole = list(range(offset + start, offset + min(count, start + document)))
                cut += len(whole) > length + 1
                row = whole[: length + 1]
                dropped += len(whole) - len(row)
                counted = tuple(not masked or token % 3 == 0 for token in row[1:])
                padding = length + 1 - len(row)
                expected.add((tuple(row) + (7,) * padding, counted + (False,) * padding))
            offset += count
        batch = found.rows(0, found.sources[0].rows)
        assert batch.documents_BT is None
        rows = {
            ((*tokens.tolist(), targets.tolist()[-1]), tuple(mask.tolist()))
            for tokens, targets, mask in zip(*batch[:3], strict=True)
        }
        assert rows == expected
        assert found.sources[0].rows == len(expected)
        assert found.sources[0].cut_documents == cut
        assert found.sources[0].dropped_tokens == dropped


@QUICK
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    document=st.integers(1, 9),
    length=st.integers(1, 7),
    seed=st.integers(0, 3),
    shuffled=st.booleans(),
)
def test_pairs_are_two_documents_that_follow_one_another(
    counts: list[int], document: int, length: int, seed: int, shuffled: bool
) -> None:
    """`counts`: pairs of each shard."""
    with shards(*(2 * count * document for count in counts), document=document, masked=True) as folder:
        options: dict[str, Any] = {"length": length, "size": 2, "seed": seed, "shuffled": shuffled}
        found = batches(folder_source(folder), packing="pairs", **options)
        single = batches(folder_source(folder), packing="documents", **options)
        total = 2 * sum(counts)
        assert found.sources[0] == single.sources[0]
        assert found.sources[0].rows == total
        stored = batches(folder_source(folder), packing="documents", length=length, shuffled=False).rows(0, total)
        epochs = [found.rows(epoch * total, total) for epoch in range(2)]
        for epoch in epochs:
            first = epoch.tokens_BT[:, 0] // document
            assert (first[::2] % 2 == 0).all()
            assert (first[1::2] == first[::2] + 1).all()
            back = np.argsort(first)
            for ours, theirs in zip(epoch[:3], stored[:3], strict=True):
                assert ours is not None
                assert (ours[back] == theirs).all()
        assert shuffled or (epochs[0].tokens_BT == stored.tokens_BT).all()
        assert found.fingerprint != single.fingerprint


def test_pairs_come_in_another_order_with_each_epoch_and_seed() -> None:
    with shards(80, 60, document=2) as folder:
        orders = [
            tuple(batches(folder_source(folder), packing="pairs", seed=seed).rows(first, 70).tokens_BT[::2, 0].tolist())
            for seed, first in ((0, 0), (0, 70), (1, 0))
        ]
        assert len(set(orders)) == 3


@QUICK
@given(
    weight=st.sampled_from([0.3, 1.0, 2.5]),
    budget=st.sampled_from([None, 33, 120]),
    epochs=st.sampled_from([None, 0.7, 1.5]),
    steps=st.integers(0, 40),
)
def test_a_blend_of_pairs_tears_none_apart(weight: float, budget: int | None, epochs: float | None, steps: int) -> None:
    with shards(60, 24, document=3) as first, shards(160, document=4, start=1000) as second:
        sources = folder_source(first, weight=weight, budget=budget, epochs=epochs), folder_source(second)
        found = batches(*sources, length=9, size=4, packing="pairs")
        begins = found.rows(0, steps * 4).tokens_BT[:, 0].astype(int)
        documents = np.where(begins < 1000, begins // 3, (begins - 1000) // 4 + 1000)
        assert (documents[::2] % 2 == 0).all()
        assert (documents[1::2] == documents[::2] + 1).all()
        for number, drawn in enumerate(found.drawn(steps)):
            mine = begins[(begins >= 1000) == bool(number)]
            assert drawn.rows == len(mine)
            assert drawn.tokens == len(mine) * (3, 4)[number]
        limits = [math.floor(limit) for limit in (budget and budget / 3, epochs and epochs * 28) if limit is not None]
        assert found.drawn(steps)[0].rows <= min([*(limit // 2 * 2 for limit in limits), 160])


def test_documents_that_are_no_pairs_are_refused() -> None:
    message = (
        r"^tokens has a shard of 3 documents, train-00001.safetensors, and packing 'pairs' takes them by two: "
        r"make the tokens with loss_on: pairs$"
    )
    with shards(20, 15) as folder, pytest.raises(UserError, match=message):
        batches(folder_source(folder), packing="pairs")
    with shards(20) as folder, pytest.raises(UserError, match=r"less than one pair, which has 10.0 tokens of its 20"):
        batches(folder_source(folder, budget=9), length=4, packing="pairs")


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=4),
    length=st.integers(1, 9),
    masked=st.booleans(),
)
def test_masked_rows_say_which_document_each_token_is_of(
    lengths: list[list[int]], length: int, masked: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    document_of: dict[int, int] = {}
    start = 0
    for number, documents in enumerate(lengths):
        ends = np.cumsum(documents, dtype=np.int64)
        count = int(ends[-1]) if ends.size else 0
        tokens = np.arange(start, start + count).astype(np.uint16)
        for document, end in enumerate(ends.tolist()):
            document_of |= {start + place: document for place in range(end - documents[document], end)}
        write_shard(folder / f"{number}.safetensors", tokens, ends, tokens % 3 == 0 if masked else None)
        start += count
    if not any(sum(documents) > length for documents in lengths):
        return
    plain, apart = (batches(folder_source(folder), length=length, document_masking=wanted) for wanted in (False, True))
    rows = 2 * apart.sources[0].rows + 1
    bare, batch = plain.rows(0, rows), apart.rows(0, rows)
    assert (batch.tokens_BT == bare.tokens_BT).all()
    assert (batch.targets_BT == bare.targets_BT).all()
    assert batch.documents_BT is not None
    assert batch.documents_BT.dtype == np.int32
    for row in range(rows):
        numbers = [document_of[token] for token in batch.tokens_BT[row].tolist()]
        assert batch.documents_BT[row].tolist() == [number - numbers[0] for number in numbers]
        for place, (number, target) in enumerate(zip(numbers, batch.targets_BT[row].tolist(), strict=True)):
            counted = document_of[target] == number and (not masked or target % 3 == 0)
            assert batch.loss_mask_BT[row, place] == counted
    # It is another run: a checkpoint of the one is none of the other.
    assert plain.fingerprint != apart.fingerprint


@QUICK
@given(
    packing=st.sampled_from(["stream", "documents", "pairs", "whole"]),
    step=st.integers(0, 500),
    cuts=st.sets(st.integers(1, 8), max_size=4),
    weight=st.sampled_from([0.3, 1.0, 2.5]),
    budget=st.sampled_from([None, 900, 3000]),
    masking=st.booleans(),
)
def test_a_batch_depends_on_nothing_but_its_number(
    packing: Packing, step: int, cuts: set[int], weight: float, budget: int | None, masking: bool
) -> None:
    with shards(50, 70, 10, masked=True) as first, shards(40, 40, start=1000) as second:
        sources = folder_source(first), folder_source(second, weight=weight, budget=budget)
        options: dict[str, Any] = {"packing": packing, "size": 9, "document_masking": masking}
        used = batches(*sources, **options)
        used.batch(step // 2)
        used.rows(17, 5)
        batch = used.batch(step)
        fresh = batches(*sources, **options).batch(step)
        edges = [0, *sorted(cuts), 9]
        parts = [used.rows(step * 9 + a, b - a) for a, b in itertools.pairwise(edges)]
        for ours, theirs, *partial in zip(batch, fresh, *parts, strict=True):
            if ours is None:
                assert theirs is None
                assert packing in ("documents", "pairs") or (packing == "stream" and not masking)
                continue
            assert theirs is not None
            assert ours.dtype == theirs.dtype
            assert (ours == theirs).all()
            assert (ours == np.concatenate([part for part in partial if part is not None])).all()
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == np.int32
        assert batch.loss_mask_BT.dtype == np.bool_


def test_another_source_changes_neither_the_order_nor_the_rows_of_a_source() -> None:
    with shards(200, 100) as first, shards(300, start=1000) as second:
        alone = batches(folder_source(first)).rows(0, 120).tokens_BT[:, 0]
        both = batches(folder_source(second, weight=2.0), folder_source(first))
        mixed = both.rows(0, 360).tokens_BT[:, 0]
        assert (mixed[mixed < 1000] == alone).all()
        assert (both.source_rows(1, 0, 120).tokens_BT[:, 0] == alone).all()
        limited = batches(folder_source(second, weight=2.0, budget=400), folder_source(first))
        mixed = limited.rows(0, 220).tokens_BT[:, 0]
        assert (mixed[mixed < 1000] == alone).all()


def test_the_order_is_new_in_each_epoch_and_with_each_seed() -> None:
    with shards(200, 100) as folder:
        source = folder_source(folder)
        found = batches(source)
        rows = found.sources[0].rows
        first, second = found.rows(0, rows).tokens_BT, found.rows(rows, rows).tokens_BT
        other = batches(source, seed=1).rows(0, rows).tokens_BT
        assert sorted(first[:, 0]) == sorted(second[:, 0]) == sorted(other[:, 0])
        assert (first != second).any()
        assert (first != other).any()
        stored = batches(source, shuffled=False).rows(0, rows)
        assert (np.diff(stored.tokens_BT[:, 0]) > 0).all()


@pytest.mark.parametrize("packing", ["stream", "documents", "whole"])
@pytest.mark.parametrize(("document", "weight"), [(2, 1), (8, 1), (3, 4), (6, 0.25)])
def test_weights_are_shares_of_tokens(document: int, weight: float, packing: Packing) -> None:
    with shards(480, document=document) as first, shards(480, document=4, start=1000) as second:
        sources = folder_source(first, "first"), folder_source(second, "second", weight=weight)
        found = batches(*sources, length=7, size=1, packing=packing)
        share = weight / (1 + weight)
        assert [source.share for source in found.sources] == pytest.approx([1 - share, share])
        # Whole cycles of each.
        drawn = found.drawn(3 * 4 * 5 * 8 * 11 * 19)
        assert drawn[1].tokens / sum(source.tokens for source in drawn) == pytest.approx(share, rel=1e-9)


@QUICK
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    steps=st.integers(0, 60),
    packing=st.sampled_from(["stream", "documents", "whole"]),
    data=st.data(),
)
def test_what_was_drawn_is_what_the_rows_held(
    lengths: list[int], steps: int, packing: Packing, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    cut = data.draw(st.integers(0, len(lengths)))
    for number, part in enumerate((lengths[:cut], lengths[cut:])):
        tokens = np.ones(sum(part), np.uint16)
        write_shard(folder / f"{number}.safetensors", tokens, np.cumsum(part, dtype=np.int64))
    with shards(90, document=4, start=1000) as second:
        sources = folder_source(folder), folder_source(second, weight=0.5)
        if packing == "stream" and not any(shard.tokens > 7 for shard in sources[0].shards):
            return
        if packing == "whole" and not sum(lengths):
            return
        found = batches(*sources, length=7, packing=packing)
        drawn = found.drawn(steps)
        batch = found.rows(0, steps * 3)
        for number, source in enumerate(drawn):
            mine = (batch.tokens_BT[:, 0] >= 1000) == bool(number)
            assert source.rows == mine.sum()
            assert source.epochs == source.rows / found.sources[number].rows
            real = batch.tokens_BT[mine] != 0, batch.loss_mask_BT[mine]
            if packing == "stream":
                assert source.tokens == real[1].sum() == mine.sum() * 7
            elif packing == "documents":
                # The first token of a row and each that is a target; an empty document has neither.
                assert source.tokens == real[0][:, 0].sum() + real[1].sum()
            else:
                assert source.tokens == real[0].sum() + (batch.targets_BT[mine, -1] != 0).sum()


def test_a_budget_is_kept_and_the_others_go_on() -> None:
    with shards(100) as first, shards(400, start=1000) as second:
        # 24 and 99 rows of 4 tokens.
        sources = folder_source(first, "first", budget=43, weight=3), folder_source(second, "second")
        found = batches(*sources, size=2)
        assert [source.tokens for source in found.drawn(200)] == [40, 1560]
        # Three of four rows are of the first, which has ten.
        assert [source.used_up_at for source in found.drawn(200)] == [7, None]
        assert [source.used_up_at for source in found.drawn(6)] == [None, None]
        assert (found.rows(13, 50).tokens_BT[:, 0] >= 1000).all()
        twice = batches(folder_source(first, "first", epochs=1.5, weight=3), sources[1], size=2)
        assert [source.rows for source in twice.drawn(200)] == [36, 364]
        assert twice.drawn(200)[0].epochs == 1.5
        for lower in ({"budget": 100, "epochs": 0.5}, {"budget": 48, "epochs": 4}):
            both = batches(folder_source(first, "first", **lower), sources[1], size=2)
            assert both.drawn(200)[0].rows == 12
        prints = {found.fingerprint, twice.fingerprint, batches(folder_source(first), sources[1], size=2).fingerprint}
        assert len(prints) == 3


def test_budgets_that_do_not_last_are_said_with_the_numbers() -> None:
    with shards(101) as first, shards(401, start=1000) as second:
        sources = folder_source(first, "books", budget=80), folder_source(second, "web", epochs=1)
        found = batches(*sources, size=32)
        found.require(3)
        with pytest.raises(
            UserError,
            match=r"^4 steps of 32 rows need 128 rows, but the budgets allow 120 \(books 20 of its 25, web 100 of its "
            r"100\): raise one of them, or lower training.steps to 3 or less$",
        ):
            found.require(4)
        with pytest.raises(IndexError):
            found.batch(3)
        with pytest.raises(UserError, match=r"raise one of them$"):
            batches(*sources, size=200).require(1)
        batches(sources[0], folder_source(second), size=200).require(10**9)


@pytest.mark.parametrize("portion", [{"budget": 3}, {"epochs": 0.01}])
def test_a_budget_of_less_than_a_row_is_refused(portion: dict[str, Any]) -> None:
    with shards(100) as folder, pytest.raises(UserError, match=r"budget of books is less than one row, .* 4\.0 tokens"):
        batches(folder_source(folder, "books", **portion))


def test_a_token_outside_of_the_vocabulary_is_named() -> None:
    with shards(20) as folder:
        found = batches(folder_source(folder, "books"), size=4, vocab_size=10)
        with pytest.raises(UserError, match=r"books holds the token 1\d, but there are only 10"):
            found.batch(0)


def test_wide_tokens_are_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", np.arange(70_000, 70_009).astype(np.uint32), [9])
    batch = batches(folder_source(tmp_path)).rows(0, 2)
    assert sorted(batch.tokens_BT[:, 0].tolist()) == [70_000, 70_004]
    write_shard(tmp_path / "a.safetensors", np.full(9, 2**32 - 1, np.uint32), [9])
    with pytest.raises(UserError, match="holds the token 4294967295"):
        batches(folder_source(tmp_path)).rows(0, 2)


def test_empty_documents_are_rows_in_which_nothing_counts(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", np.zeros(0, np.uint16), [0, 0])
    batch = batches(folder_source(tmp_path), packing="documents").rows(0, 2)
    assert not batch.loss_mask_BT.any()


def test_batches_need_a_source() -> None:
    with pytest.raises(UserError, match="nothing to train on"):
        batches()
