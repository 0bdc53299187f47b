"""Token shards as they fill up, against documents put into shards one by one."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.training.shards import open_shard
from tasks.encoding.writer import Writer

Document = tuple[list[int], int]


def filled(documents: list[Document], capacity: int) -> list[list[Document]]:
    """Documents by shard: a new one where the next document would exceed it."""
    shards: list[list[Document]] = []
    tokens = 0
    for ids, uncounted in documents:
        if not shards or (tokens and tokens + len(ids) > capacity):
            shards.append([])
            tokens = 0
        shards[-1].append((ids, uncounted))
        tokens += len(ids)
    return shards


DOCUMENTS = st.lists(
    st.lists(st.integers(0, 65_535), max_size=12).flatmap(
        lambda ids: st.tuples(st.just(ids), st.integers(0, len(ids)))
    ),
    max_size=30,
)


@given(batches=st.lists(DOCUMENTS, max_size=5), capacity=st.integers(1, 40), masked=st.booleans())
def test_shards_are_filled_one_after_the_other(batches: list[list[Document]], capacity: int, masked: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = Writer(folder, lambda number: f"{number}.safetensors", capacity, masked)
        for documents in batches:
            ids_N = np.array([token for ids, _ in documents for token in ids], np.uint16)
            lengths_D = np.array([len(ids) for ids, _ in documents], np.int64)
            writer.add(ids_N, lengths_D, np.array([uncounted for _, uncounted in documents], np.int64))
        writer.close()
        expected = filled([document for documents in batches for document in documents], capacity)
        assert [shard.name for shard in writer.shards] == [f"{number}.safetensors" for number in range(len(expected))]
        assert sorted(path.name for path in folder.iterdir()) == sorted(shard.name for shard in writer.shards)
        for shard, documents in zip(writer.shards, expected, strict=True):
            data = (folder / shard.name).read_bytes()
            assert (shard.size, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            read = open_shard(folder / shard.name).map()
            assert read.tokens_N.tolist() == [token for ids, _ in documents for token in ids]
            assert read.document_ends_D.tolist() == np.cumsum([len(ids) for ids, _ in documents]).tolist()
            mask = [int(place >= uncounted) for ids, uncounted in documents for place in range(len(ids))]
            assert (read.loss_mask_N is None) is not masked
            assert read.loss_mask_N is None or read.loss_mask_N.tolist() == mask
            assert (shard.documents, shard.tokens) == (len(documents), len(mask))
            assert shard.counted_tokens == sum(mask)
