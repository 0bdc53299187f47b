"""Token shards as they fill up, against documents put into shards one by one."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.training.shards import open_shard
from tasks.encoding.writer import Writer

Document = list[tuple[int, bool]]
"""Ids, and whether each counts."""


def filled(groups: list[list[Document]], capacity: int) -> list[list[Document]]:
    """Documents by shard: a new one where the next group of them would exceed it."""
    shards: list[list[Document]] = []
    tokens = 0
    for group in groups:
        size = sum(len(document) for document in group)
        if not shards or (tokens and tokens + size > capacity):
            shards.append([])
            tokens = 0
        shards[-1] += group
        tokens += size
    return shards


DOCUMENTS = st.lists(st.tuples(st.integers(0, 65_535), st.booleans()), max_size=12)


@given(
    batches=st.integers(1, 3).flatmap(
        lambda together: st.lists(st.lists(st.lists(DOCUMENTS, min_size=together, max_size=together)), max_size=5)
    ),
    capacity=st.integers(1, 40),
    masked=st.booleans(),
)
def test_shards_are_filled_one_after_the_other(
    batches: list[list[list[Document]]], capacity: int, masked: bool
) -> None:
    together = next((len(group) for groups in batches for group in groups), 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = Writer(folder, lambda number: f"{number}.safetensors", capacity, together)
        for groups in batches:
            listed = [document for group in groups for document in group]
            ids_N = np.array([token for document in listed for token, _ in document], np.uint16)
            counted_N = np.array([counted for document in listed for _, counted in document], np.bool_)
            lengths_D = np.array([len(document) for document in listed], np.int64)
            writer.add(ids_N, lengths_D, counted_N if masked else None)
        writer.close()
        expected = filled([group for groups in batches for group in groups], capacity)
        assert [shard.name for shard in writer.shards] == [f"{number}.safetensors" for number in range(len(expected))]
        assert sorted(path.name for path in folder.iterdir()) == sorted(shard.name for shard in writer.shards)
        for shard, documents in zip(writer.shards, expected, strict=True):
            data = (folder / shard.name).read_bytes()
            assert (shard.size, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            read = open_shard(folder / shard.name).map()
            assert read.tokens_N.tolist() == [token for document in documents for token, _ in document]
            assert read.document_ends_D.tolist() == np.cumsum([len(document) for document in documents]).tolist()
            mask = [int(counted) for document in documents for _, counted in document]
            assert (read.loss_mask_N is None) is not masked
            assert read.loss_mask_N is None or read.loss_mask_N.tolist() == mask
            assert (shard.documents, shard.tokens) == (len(documents), len(mask))
            assert shard.counted_tokens == (sum(mask) if masked else len(mask))
