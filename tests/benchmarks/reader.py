"""How fast batches are read from a memory map on one core, and how much memory that takes.

    python -m tests.benchmarks.reader

Speed is of token positions per second of processor time, which other work on the machine does not change much, and
of time on the clock in brackets: in batches one by one, and in blocks as the loop asks for them. Memory is the
anonymous one (RssAnon) of a process of its own that reads a sparse shard of the given size.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import canonical_json
from models.training.batches import Batches, Packing
from models.training.shards import write_shard
from tests.benchmarks.memory import anonymous_megabytes
from tests.models.training.folders import folder_source

_BLOCK_TOKENS = 1 << 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each measurement of speed")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 10_000], help="sizes of the sparse shards in MB")
    parser.add_argument("--folder", type=Path, help="where shards are made; a temporary folder unless given")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(*memory_of(arguments.memory_of))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        print(f"{'packing':<11}{'sequence':>9}{'batch':>7}{'batch by batch':>22}{'in blocks':>18}   Mtokens/s")
        for shape in SHAPES:
            single, blocks = speed(Path(name), shape, arguments.seconds)
            print(f"{shape.name:<11}{shape.length:>9}{shape.size:>7}{single:>22}{blocks:>18}")
        print(f"\n{'shard':>10}{'before':>10}{'opened':>10}{'500 batches':>13}   RssAnon, MB")
        for megabytes in arguments.sizes:
            shard = sparse_shard(Path(name) / f"{megabytes}.safetensors", megabytes * 1_000_000)
            command = [sys.executable, "-m", "tests.benchmarks.reader", "--memory-of", str(shard)]
            figures = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            before, opened, after = (float(figure) for figure in figures)
            print(f"{megabytes:>7} MB{before:>10.1f}{opened:>10.1f}{after:>13.1f}")


class Shape(NamedTuple):
    """What rows look like."""

    name: str
    packing: Packing
    length: int
    size: int
    """Rows of a batch."""
    documents: int
    """Mean length of the documents."""
    sources: int = 1
    masking: bool = False


SHAPES = (
    Shape("stream", "stream", 1024, 32, 10),
    Shape("stream", "stream", 13, 256, 10),
    Shape("documents", "documents", 13, 256, 10),
    Shape("masked", "stream", 1024, 32, 600, masking=True),
    Shape("4 sources", "stream", 1024, 32, 600, sources=4),
)


def speed(folder: Path, shape: Shape, seconds: float) -> tuple[str, str]:
    """Tokens per second batch by batch, and in blocks."""
    sources = [folder_source(_shards(folder, shape, number), weight=1 + number) for number in range(shape.sources)]
    batches = Batches(
        sources,
        seed=0,
        sequence_length=shape.length,
        packing=shape.packing,
        batch_size=shape.size,
        vocab_size=18,
        document_masking=shape.masking,
    )
    together = max(1, _BLOCK_TOKENS // (shape.length * shape.size)) * shape.size
    found = []
    for rows in (shape.size, together):
        batches.rows(0, rows)
        count, begin, processor = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < seconds:
            batches.rows(count * rows, rows)
            count += 1
        millions = count * rows * shape.length / 1e6
        busy, passed = time.process_time() - processor, time.perf_counter() - begin
        found.append(f"{millions / busy:.1f} ({millions / passed:.1f})")
    return found[0], found[1]


def _shards(folder: Path, shape: Shape, number: int) -> Path:
    shards = folder / f"{shape.name}-{shape.length}-{number}"
    numbers = np.random.default_rng(number)
    for shard in range(8):
        ends = np.cumsum(
            numbers.integers(shape.documents // 2 + 1, shape.documents * 3 // 2, 3_000_000 // shape.documents)
        )
        tokens = numbers.integers(0, 18, int(ends[-1])).astype(np.uint16)
        write_shard(shards / f"train-{shard:05d}.safetensors", tokens, ends)
    return shards


def sparse_shard(path: Path, size: int) -> Path:
    """A shard of about `size` bytes of zeros that take no place on the disk."""
    tokens = size // 2
    header = {
        "document_ends": {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]},
        "tokens": {"dtype": "U16", "shape": [tokens], "data_offsets": [8, 8 + 2 * tokens]},
    }
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + tokens.to_bytes(8, "little"))
        file.truncate(8 + len(text) + 8 + 2 * tokens)
    return path


def memory_of(shard: Path) -> tuple[float, float, float]:
    """Anonymous megabytes before a shard is opened, after, and after 500 batches."""
    before = anonymous_megabytes(os.getpid())
    source = folder_source(shard.parent, files=[shard])
    batches = Batches([source], seed=0, sequence_length=1024, packing="stream", batch_size=32)
    opened = anonymous_megabytes(os.getpid())
    for step in range(500):
        batches.batch(step)
    return before, opened, anonymous_megabytes(os.getpid())


if __name__ == "__main__":
    main()
