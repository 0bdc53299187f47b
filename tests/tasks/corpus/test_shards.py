"""Shards of documents, however they come and whatever happens meanwhile."""

import errno
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.identity import describe_files
from tasks.corpus import shards
from tasks.corpus.shards import Shards
from tasks.corpus.sizes import ROW_BYTES


def at_once(function: Any, *arguments: Any) -> "Future[None]":
    future: Future[None] = Future()
    future.set_result(function(*arguments))
    return future


def table(texts: list[str]) -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.string()), "size": pa.array([len(text) for text in texts], pa.int32())})


def expected(texts: list[str], limit: int) -> list[list[str]]:
    """The shards, document by document."""
    found: list[list[str]] = []
    size = 0
    for text in texts:
        if not found or size + len(text.encode()) + ROW_BYTES > limit:
            found.append([])
            size = 0
        found[-1].append(text)
        size += len(text.encode()) + ROW_BYTES
    return found


def read(folder: Path, split: str) -> list[list[str]]:
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    assert [path.name for path in paths] == [f"{split}-{number:05d}.parquet" for number in range(len(paths))]
    return [pq.read_table(path)["text"].to_pylist() for path in paths]


def make(folder: Path, name: str) -> Path:
    place = folder / name
    place.mkdir()
    return place


PARTS = st.lists(st.tuples(st.sampled_from(["train", "test"]), st.lists(st.text(max_size=12), max_size=6)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(parts=PARTS, limit=st.integers(1, 120), data=st.data())
def test_shards_are_the_same_however_documents_come_and_where_it_goes_on(
    parts: list[tuple[str, list[str]]], limit: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    output = make(folder, "output")
    whole = Shards(make(folder, "whole"), limit, at_once)
    for split, texts in parts:
        whole.append(split, table(texts))
    described = whole.publish(output)
    for split in ("train", "test"):
        texts = [text for own, part in parts for text in part if own == split]
        found = expected(texts, limit)
        assert read(output, split) == found
        if found:
            assert [shard["documents"] for shard in described[split]["shards"]] == [len(shard) for shard in found]
            assert described[split]["documents"] == len(texts)
            assert described[split]["bytes"] == sum(len(text.encode()) for text in texts)
            assert sum(shard["bytes"] for shard in described[split]["shards"]) == described[split]["bytes"]
        else:
            assert split not in described
    # Document by document, saved now and then, and taken up again from what was saved last.
    place = make(folder, "parts")
    current, state, done = Shards(place, limit, at_once), None, 0
    steps = [(split, text) for split, texts in parts for text in texts]
    for _ in range(data.draw(st.integers(0, 3))):
        save, stop = sorted(data.draw(st.tuples(*[st.integers(done, len(steps))] * 2)))
        for number in range(done, stop):
            if number == save:
                state = current.state()
                current.forget(state)
                done = number
            current.append(steps[number][0], table([steps[number][1]]))
        current = Shards(place, limit, at_once)
        if state is None:
            done = 0
            for path in place.iterdir():
                path.unlink()
        else:
            current.restore(state)
    for split, text in steps[done:]:
        current.append(split, table([text]))
    again = make(folder, "again")
    assert current.publish(again) == described
    assert describe_files(again) == describe_files(output)


def test_what_is_newer_than_the_state_is_removed_and_what_is_missing_is_noticed(tmp_path: Path) -> None:
    first = Shards(tmp_path, 45, at_once)
    first.append("train", table(["x" * 8, "y" * 8, "z"]))
    state = first.state()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["segment-1.arrow", "train-00000.parquet"]
    first.append("train", table(["more " * 3]))
    first.state()
    Shards(tmp_path, 45, at_once).restore(state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["segment-1.arrow", "train-00000.parquet"]
    for name in ("segment-1.arrow", "train-00000.parquet"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises((ValueError, OSError)):
            Shards(tmp_path, 45, at_once).restore(state)
        (tmp_path / name).write_bytes(data[:-1])
        with pytest.raises((ValueError, OSError)):
            Shards(tmp_path, 45, at_once).restore(state)
        (tmp_path / name).write_bytes(data)
    Shards(tmp_path, 45, at_once).restore(state)


def test_row_groups_hold_little_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 100)
    texts = [f"{number:03d} " * (number % 40) for number in range(200)]
    made = Shards(make(tmp_path, "parts"), 1 << 20, at_once)
    made.append("train", table(texts))
    made.publish(tmp_path)
    file = pq.ParquetFile(tmp_path / "train-00000.parquet")
    groups = [file.read_row_group(group)["text"].to_pylist() for group in range(file.num_row_groups)]
    assert groups == expected(texts, 100)


def test_other_columns_and_empty_texts_fill_row_groups_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 10 * ROW_BYTES)
    made = Shards(make(tmp_path, "parts"), 100 * (ROW_BYTES + 40), at_once)
    made.append("train", table([""] * 200))
    made.append("test", pa.table({"text": [""] * 200, "meta": ["m" * 40] * 200}))
    described = made.publish(tmp_path)
    assert pq.ParquetFile(tmp_path / "train-00000.parquet").num_row_groups == 20
    assert [shard["documents"] for shard in described["test"]["shards"]] == [100, 100]
    assert described["test"]["bytes"] == 0


def test_what_goes_wrong_while_a_shard_is_written_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 5)

    def full(self: Any, table: pa.Table, row_group_size: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with ThreadPoolExecutor(1) as pool:
        made = Shards(tmp_path, 45, pool.submit)
        with pytest.raises(OSError, match="no space left"):
            made.append("train", table(["x" * 8, "y" * 8, "z" * 8]))
        made.close()


def test_shards_that_are_given_up_leave_what_was_saved(tmp_path: Path) -> None:
    first = Shards(tmp_path, 45, at_once)
    first.append("train", table(["x" * 8, "y" * 8]))
    state = first.state()
    first.append("train", table(["lost"]))
    first.close()
    again = Shards(tmp_path, 45, at_once)
    again.restore(state)
    again.append("train", table(["z"]))
    output = make(tmp_path, "output")
    again.publish(output)
    assert read(output, "train") == [["x" * 8], ["y" * 8, "z"]]
