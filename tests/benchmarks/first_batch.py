"""How long a training stage waits for its first batch, from a finished tokens artifact in a store.

    python -m tests.benchmarks.first_batch

Makes artifacts of some sizes in a store in a temporary folder, and measures the data side of a training stage's start:
the record is found, everything but the shards is fetched and hashed, the sources are described, and the first batch is
made, for which some shards are hashed and mapped. Before each measurement what was verified is forgotten, so that it
is a machine's first use; once more with that in place, as a second run on the machine. The files were written a moment
ago and lie in the system's cache, as those of a run that makes its tokens and trains on them.
"""

import argparse
import os
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import numpy as np

from artifacts.identity import stage_key
from artifacts.record import Record
from artifacts.store import Store
from common.files import canonical_json
from models.training.batches import Batches, Packing
from models.training.shards import write_shard
from tasks.blend import tokens_inputs
from tasks.pretrain import STAGE
from tasks.stage import Context, Runtime

_VOCABULARY, _DOCUMENT = 32_000, 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.4, 4.0], help="sizes of the artifacts in GB")
    parser.add_argument("--shard-megabytes", type=float, default=64.0, help="size of a shard's tokens")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each")
    parser.add_argument("--folder", type=Path, help="where the store is made; a temporary folder unless given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        os.environ["CAIRN_CACHE"] = str(Path(name) / "cache")
        store = Store.open(str(Path(name) / "store"))
        print(f"{'artifact':>10}{'shards':>8}  {'packing':<16}{'first use':>17}{'again':>20}   seconds")
        for size in arguments.sizes:
            record = make(store, size, int(arguments.shard_megabytes * 1e6 / 2))
            packings: list[tuple[Packing, bool]] = [("stream", False), ("stream", True), ("documents", False)]
            for packing, masking in packings:
                first, again = [], []
                for _ in range(arguments.repeats):
                    shutil.rmtree(Path(name) / "cache", ignore_errors=True)
                    first.append(first_batch(store, record, packing, masking))
                    again.append(first_batch(store, record, packing, masking))
                shards = sum(file.endswith(".safetensors") for file in record.files)
                label = f"{packing}{', masked' if masking else ''}"
                print(f"{size:>7} GB{shards:>8}  {label:<16}{_spread(first):>17}{_spread(again):>20}")


def _spread(seconds: list[float]) -> str:
    return f"{min(seconds):.3f} to {max(seconds):.3f}"


def first_batch(store: Store, found: Record, packing: Packing, masking: bool) -> float:
    """Seconds from the start of a stage to its first batch of 32 rows of 1,024."""
    begin = time.perf_counter()
    record = store.find(found.key)
    assert record is not None
    folder = store.fetch(record, [name for name in record.files if not name.endswith(STAGE.lazy["tokens"])])
    context = Context(
        name="base",
        output=folder,
        logs=folder,
        scratch=(fsspec.filesystem("file"), str(folder)),
        local_scratch=folder,
        runtime=Runtime(),
        report=lambda event: None,
        fetch=lambda _, name: store.fetch(record, [name]) / name,
    )
    (tokens,) = tokens_inputs({"tokens": folder}, (), context)
    with Batches(
        [tokens.splits["train"]],
        seed=0,
        sequence_length=1024,
        packing=packing,
        batch_size=32,
        document_masking=masking,
        vocab_size=_VOCABULARY,
    ) as batches:
        batches.batch(0)
        return time.perf_counter() - begin


def make(store: Store, gigabytes: float, shard_tokens: int) -> Record:
    """A finished tokens artifact of documents of about 600 tokens."""
    numbers = np.random.default_rng(0)
    shards, lengths = [], np.zeros(4 * _DOCUMENT, np.int64)
    config = {"gigabytes": gigabytes}
    key = stage_key("tokens", 1, config, {})
    with store.workspace(key) as folder:
        for number in range(max(1, round(gigabytes * 1e9 / 2 / shard_tokens))):
            documents_D = numbers.integers(2, 2 * _DOCUMENT, shard_tokens // _DOCUMENT)
            tokens = int(documents_D.sum())
            name = f"train-{number:05d}.safetensors"
            tokens_N = numbers.integers(0, _VOCABULARY, tokens, dtype=np.uint16)
            write_shard(folder / name, tokens_N, np.cumsum(documents_D))
            lengths += np.bincount(documents_D, minlength=lengths.size)
            shards.append({"name": name, "documents": len(documents_D), "tokens": tokens, "counted_tokens": tokens})
        counted = [[int(length), int(lengths[length])] for length in np.flatnonzero(lengths)]
        description = {"splits": {"train": {"lengths": counted, "shards": shards}}}
        (folder / "tokens.json").write_bytes(canonical_json(description))
        return store.commit(
            folder,
            key=key,
            stage="tokens",
            version=1,
            name="tokens",
            config=config,
            inputs={},
            started=datetime.now(UTC),
        )


if __name__ == "__main__":
    main()
