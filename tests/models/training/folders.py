"""Plain folders of shards as sources, for tests and benchmarks: what an artifact's description says is counted here."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from models.training.batches import Batches
from models.training.config import Portion
from models.training.shards import ShardCounts, open_shard, write_shard
from models.training.sources import Source


def folder_source(folder: Path, name: str = "tokens", files: Iterable[Path] = (), **portion: Any) -> Source:
    """The shards of a folder, or `files` in it, in the order of their names; `portion` is how much is drawn of them."""
    counts: list[ShardCounts] = []
    lengths: Counter[int] = Counter()
    for path in sorted(files or folder.glob("*.safetensors")):
        file = open_shard(path)
        counts.append(ShardCounts(path.name, file.token_count, file.document_count))
        found, number = np.unique(np.diff(file.map().document_ends_D, prepend=np.uint64(0)), return_counts=True)
        lengths.update(dict(zip(found.tolist(), number.tolist(), strict=True)))
    return Source(name, "train", counts, sorted(lengths.items()), folder.joinpath, Portion(**portion))


@contextmanager
def shards(*token_counts: int, document: int = 5, masked: bool = False, start: int = 0) -> Iterator[Path]:
    """A folder of shards whose tokens are all different, in documents of one length but for the last of each."""
    with tempfile.TemporaryDirectory() as name:
        for number, count in enumerate(token_counts):
            ends = [*range(document, count, document), count] if count else []
            tokens = np.arange(start, start + count).astype(np.uint16)
            mask = tokens % 3 == 0 if masked else None
            write_shard(Path(name) / f"train-{number:05d}.safetensors", tokens, ends, mask)
            start += count
        yield Path(name)


def batches(*sources: Source, length: int = 4, size: int = 3, seed: int = 0, **options: Any) -> Batches:
    """Small batches in groups of two shards."""
    settings: dict[str, Any] = {"packing": "stream", "shard_group": 2, **options}
    return Batches(sources, seed=seed, sequence_length=length, batch_size=size, **settings)
