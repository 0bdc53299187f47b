"""Shards are fetched when they are needed or shortly before, and no others."""

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from models.training.batches import Packing
from models.training.shards import ShardCounts, write_shard
from models.training.sources import Source
from tests.models.training.folders import batches, folder_source, shards


@dataclass
class Fetched:
    """A folder whose files are noted when they are asked for."""

    folder: Path
    names: list[str] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)
    broken: frozenset[str] = frozenset()
    held: threading.Event | None = None
    together: threading.Barrier | None = None

    def __call__(self, name: str) -> Path:
        self.names.append(name)
        self.threads.append(threading.current_thread().name)
        if self.together is not None:
            self.together.wait(30)
        if threading.current_thread() is not threading.main_thread() and self.held is not None:
            assert self.held.wait(30)
        if name in self.broken:
            raise UserError(f"{name} cannot be had")
        return self.folder / name


def noted(folder: Path, **options: object) -> tuple[Source, Fetched]:
    fetched = Fetched(folder, **options)  # type: ignore[arg-type]  # whatever a test asks for
    return replace(folder_source(folder), fetch=fetched), fetched


def name(number: int) -> str:
    return f"train-{number:05d}.safetensors"


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_nothing_is_fetched_before_a_row_needs_it(packing: Packing) -> None:
    with shards(*[41] * 6) as folder:
        source, fetched = noted(folder)
        with batches(source, packing=packing, shuffled=False) as found:
            found.require(10**9)
            assert found.sources[0].rows
            assert not fetched.names
            # Ten rows of a shard in a stream, nine documents.
            found.rows(0, 3)
            found.rows(5, 2)
            assert fetched.names == [name(0)]
            found.rows(0, 1)
            assert fetched.names == [name(0)]


def test_rows_of_whole_documents_need_every_shard_once() -> None:
    with shards(*[41] * 20) as folder:
        source, fetched = noted(folder)
        with batches(source, packing="whole", length=20) as found:
            assert fetched.names == [name(number) for number in range(20)]
            assert len(found._sources[0].shards._open) == 4
            # Four documents of five tokens, and the last one of one, to a row of 21.
            assert found.sources[0].rows == 20 * 2


def test_what_a_batch_needs_is_fetched_by_two_threads_at_once() -> None:
    with shards(*[41] * 6) as folder:
        source, fetched = noted(folder, together=threading.Barrier(2))
        with batches(source, shuffled=False) as found:
            expected = batches(folder_source(folder), shuffled=False).rows(0, 15)
            assert (found.rows(0, 15).tokens_BT == expected.tokens_BT).all()
        assert sorted(fetched.names) == [name(0), name(1)]


def test_the_next_group_is_fetched_while_the_one_before_it_is_read() -> None:
    with shards(*[41] * 6) as folder:
        source, fetched = noted(folder)
        with batches(source, shuffled=False, size=1) as found:
            for step in range(10):
                found.batch(step)
            # All that the background does in one thread is done when this is.
            found._background.submit(lambda: None).result()
            assert fetched.names == [name(0), name(2), name(3)]
            assert len(set(fetched.threads)) == 2
            for step in range(10, 40):
                found.batch(step)
            found._background.submit(lambda: None).result()
        assert sorted(fetched.names) == [name(number) for number in range(6)]
        assert fetched.threads.count("MainThread") == 2


def test_what_waits_in_the_background_is_fetched_at_once_when_it_is_needed() -> None:
    with shards(*[41] * 6) as folder:
        held = threading.Event()
        source, fetched = noted(folder, held=held)
        with batches(source, shuffled=False, size=1) as found:
            found.batch(9)
            # Shard 2 has begun and hangs; shard 3 waits behind it.
            found.batch(30)
            assert fetched.names[-1] == name(3)
            assert fetched.threads[-1] == "MainThread"
            held.set()
            assert found.batch(20).tokens_BT[0, 0] == 82


def test_no_further_shard_is_fetched_after_the_end() -> None:
    with shards(*[41] * 6) as folder:
        held = threading.Event()
        source, fetched = noted(folder, held=held)
        with batches(source, shuffled=False, size=1) as found:
            found.batch(9)
        held.set()
        found._background.shutdown(wait=True)
        assert name(3) not in fetched.names


def test_an_error_in_the_background_is_raised_when_the_shard_is_needed() -> None:
    with shards(*[41] * 6) as folder:
        source, fetched = noted(folder, broken=frozenset({name(2)}))
        with batches(source, shuffled=False, size=1) as found:
            for step in range(20):
                found.batch(step)
            found._background.submit(lambda: None).result()
            assert name(2) in fetched.names
            found.batch(30)
            with pytest.raises(UserError, match=r"train-00002\.safetensors cannot be had"):
                found.batch(20)


def test_few_shards_stay_open_however_many_there_are() -> None:
    with shards(*[41] * 20) as folder:
        source, fetched = noted(folder)
        with batches(source, shuffled=False) as found:
            expected = batches(folder_source(folder), shuffled=False, shard_group=50).rows(0, 400)
            assert (found.rows(0, 400).tokens_BT == expected.tokens_BT).all()
            assert len(found._sources[0].shards._open) == 4
        assert len(fetched.names) == 20


@pytest.mark.parametrize("wrong", [ShardCounts(name(0), 42, 9), ShardCounts(name(0), 41, 10)])
def test_a_shard_is_what_its_description_says(wrong: ShardCounts) -> None:
    with shards(41) as folder:
        source = replace(folder_source(folder), shards=[wrong])
        with pytest.raises(UserError, match=r"holds 41 tokens in 9 documents, but .* says .*; make the tokens again"):
            batches(source).rows(0, 1)


def test_ends_that_do_not_rise_are_found_where_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / name(0)
    write_shard(path, np.zeros(41, np.uint16), [5, 20, 41])
    source = folder_source(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace((20).to_bytes(8, "little"), (4).to_bytes(8, "little")))
    batches(source).rows(0, 3)
    for options in ({"packing": "documents"}, {"packing": "whole"}, {"document_masking": True}):
        with pytest.raises(UserError, match="document_ends do not rise"):
            batches(source, **options).rows(0, 3)
