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

import numpy as np

from common.files import canonical_json
from models.training.batches import Batches, Packing
from models.training.shards import write_shard
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
        shapes: list[tuple[Packing, int, int]] = [("stream", 1024, 32), ("stream", 13, 256), ("documents", 13, 256)]
        for packing, length, size in shapes:
            single, blocks = speed(Path(name), packing, length, size, arguments.seconds)
            print(f"{packing:<11}{length:>9}{size:>7}{single:>22}{blocks:>18}")
        print(f"\n{'shard':>10}{'before':>10}{'opened':>10}{'500 batches':>13}   RssAnon, MB")
        for megabytes in arguments.sizes:
            shard = sparse_shard(Path(name) / f"{megabytes}.safetensors", megabytes * 1_000_000)
            command = [sys.executable, "-m", "tests.benchmarks.reader", "--memory-of", str(shard)]
            figures = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            before, opened, after = (float(figure) for figure in figures)
            print(f"{megabytes:>7} MB{before:>10.1f}{opened:>10.1f}{after:>13.1f}")


def speed(folder: Path, packing: Packing, length: int, size: int, seconds: float) -> tuple[str, str]:
    """Tokens per second batch by batch, and in blocks."""
    shards = folder / f"{packing}-{length}"
    numbers = np.random.default_rng(0)
    for number in range(8):
        ends = np.cumsum(numbers.integers(6, 15, 300_000))
        tokens = numbers.integers(0, 18, int(ends[-1])).astype(np.uint16)
        write_shard(shards / f"train-{number:05d}.safetensors", tokens, ends)
    batches = Batches(
        [folder_source(shards)], seed=0, sequence_length=length, packing=packing, batch_size=size, vocab_size=18
    )
    together = max(1, _BLOCK_TOKENS // (length * size)) * size
    found = []
    for rows in (size, together):
        batches.rows(0, rows)
        count, begin, processor = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < seconds:
            batches.rows(count * rows, rows)
            count += 1
        millions = count * rows * length / 1e6
        busy, passed = time.process_time() - processor, time.perf_counter() - begin
        found.append(f"{millions / busy:.1f} ({millions / passed:.1f})")
    return found[0], found[1]


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
    before = anonymous_megabytes()
    source = folder_source(shard.parent, files=[shard])
    batches = Batches([source], seed=0, sequence_length=1024, packing="stream", batch_size=32)
    opened = anonymous_megabytes()
    for step in range(500):
        batches.batch(step)
    return before, opened, anonymous_megabytes()


def anonymous_megabytes() -> float:
    """RssAnon of this process."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1000
    raise RuntimeError("this system tells no RssAnon; the benchmark needs Linux")


if __name__ == "__main__":
    main()
