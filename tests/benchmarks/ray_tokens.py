"""Whether a Ray cluster makes the same tokens as one machine, and what it takes: a soak of two generated corpora.

    python -m tests.benchmarks.ray_tokens --documents 1000000

Each corpus goes through the stage `tokens` in the processes of this machine, and through a Ray cluster of two nodes on
this machine with small object stores, one of which is killed after some seconds. One corpus is of made-up words, which
gigatoken encodes; the other is arithmetic with the loss on its targets, which `tokenizers` encodes.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from artifacts.identity import content_digest, describe_files
from common.files import canonical_json
from tasks.documents import STAGE as DOCUMENTS
from tasks.tokens import STAGE as TOKENS
from tests.benchmarks.tokens import run_stage
from tests.tasks.encoding.corpora import byte_level, characters, texts, totals

STORE_BYTES = 200 << 20
SHARD_ROWS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=60_000, help="documents of each corpus")
    parser.add_argument("--kill-after", type=float, default=2, help="seconds until a node is killed; 0 for never")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        words = {"documents": made_up(place / "words", arguments.documents), "tokenizer": byte_level(place / "bpe")}
        sums = {"documents": problems(place, arguments.documents), "tokenizer": characters(place / "characters")}
        compare(place / "words-tokens", words, {}, arguments.kill_after)
        compare(place / "sums-tokens", sums, {"loss_on": "target", "bos": True}, arguments.kill_after)


def compare(place: Path, inputs: dict[str, Path], config: dict[str, Any], kill_after: float) -> None:
    """The stage on one machine and over Ray. Ends the program where the digests differ."""
    here = through("one machine", place / "here", inputs, config, processes=2)
    with cluster(kill_after) as address:
        there = through("Ray", place / "there", inputs, config, ray=address)
    print("the digests are the same" if here == there else "the digests DIFFER", flush=True)
    if here != there:
        sys.exit(1)


def through(how: str, folder: Path, inputs: dict[str, Path], config: dict[str, Any], **runtime: Any) -> str:
    """The digest of what the stage makes."""
    began = time.perf_counter()
    metrics = run_stage(TOKENS, config, inputs, folder, **runtime)
    seconds = time.perf_counter() - began
    size = sum(split["bytes"] for split in metrics["splits"].values())
    digest = content_digest(describe_files(folder / "output"))
    print(
        f"{how:>12}: {metrics['summary']}, {size / 1e6:,.0f} MB of text with {metrics['encoder']['library']} in "
        f"{seconds:.1f} s, {len(metrics['notes'])} notes, digest {digest[:16]}",
        flush=True,
    )
    return digest


@contextmanager
def cluster(kill_after: float) -> Iterator[str]:
    """The address of a cluster of a head and two nodes of one core each, one of which is killed."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    made: Any = Cluster(initialize_head=True, head_node_args=head)
    nodes = [made.add_node(num_cpus=1, object_store_memory=STORE_BYTES) for _ in range(2)]
    ended = threading.Event()

    def kill() -> None:
        if kill_after and not ended.wait(kill_after):
            made.remove_node(nodes[0], allow_graceful=False)
            print("a node was killed", flush=True)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield made.address
    finally:
        ended.set()
        killer.join()
        made.shutdown()


def problems(place: Path, count: int) -> Path:
    """Arithmetic, as the stage `documents` makes it."""
    source = {"kind": "arithmetic", "operands": 3, "train": count, "validation": 1000, "test": 1000}
    run_stage(DOCUMENTS, {"source": source, "shard_bytes": 1 << 20}, {}, place / "sums")
    return place / "sums" / "output"


def made_up(folder: Path, count: int) -> Path:
    """Documents of made-up words, in shards of some megabytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    shards = []
    for number, first in enumerate(range(0, count, SHARD_ROWS)):
        listed = texts(min(SHARD_ROWS, count - first), seed=number)
        name = f"train-{number:05d}.parquet"
        pq.write_table(pa.table({"text": listed}), folder / name, compression="zstd")
        shards.append({"name": name, "documents": len(listed), "bytes": sum(len(text.encode()) for text in listed)})
    described = {"train": {"shards": shards, **totals(shards)}}
    description = {"source": {"name": "words"}, "read": totals(shards), "splits": described, "dropped": []}
    (folder / "documents.json").write_bytes(canonical_json(description))
    return folder


if __name__ == "__main__":
    main()
