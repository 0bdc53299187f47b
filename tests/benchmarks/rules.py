"""How fast the rules look at documents on one core, and how fast the index of duplicates takes them.

    CAIRN_HUB=DIR python -m tests.benchmarks.rules

The documents are those of `local/openstax-textbooks` and `local/standard-ebooks` in turn, whole (15 kB on average) and
cut to 3 kB as of web pages. Megabytes are of UTF-8 text. Speed is of processor time, which other work on the machine
changes less than time on the clock; the best of several turns over the same batches is told. `together` is length,
symbols, one expression and the hashes for exact duplicates on the same batches; each alone pays for what they share.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.corpus.benchmarks import known_benchmarks
from tasks.corpus.contamination import Contamination, ContaminationConfig
from tasks.corpus.duplicates import DuplicateIndex, DuplicatesConfig, fingerprints
from tasks.corpus.minhash import NearConfig, Signatures, bands_and_rows
from tasks.corpus.quality import C4, Symbols
from tasks.corpus.repetition import Repetition
from tasks.corpus.rules import Column, Length, Regex
from tasks.corpus.text import Texts
from tests.benchmarks.memory import anonymous_megabytes

CORPORA = ("local/openstax-textbooks", "local/standard-ebooks")
BATCH_BYTES = 1 << 20
EXPRESSION = Regex(pattern=r"(?i)all rights reserved|click here")
LENGTH = Length(min_characters=200, min_words=50, max_words=100_000)
SCORE = Column(column="score", minimum=0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=4.0, help="text that each rule looks at in a turn")
    parser.add_argument("--turns", type=int, default=5, help="how often; the best one counts")
    parser.add_argument("--index", type=int, default=300_000, help="documents that the index of duplicates is given")
    parser.add_argument("--folder", type=Path, help="where the index is made; a temporary folder unless given")
    arguments = parser.parse_args()
    documents = read(Path(os.environ["CAIRN_HUB"]))
    cut = [text[begin : begin + 3000] for text in documents for begin in range(0, len(text), 3000)]
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores\n")
    print(f"{'MB/s of a core':<22}{'3 kB':>8}{'whole':>8}")
    samples = [batches(texts, arguments.megabytes * 1e6) for texts in (cut, documents)]
    for name, function in functions().items():
        speeds = [speed(function, sample, arguments.turns) for sample in samples]
        print(f"{name:<22}" + "".join(f"{one:>8.0f}" for one in speeds))
    print(f"\n{'index of duplicates':<22}{'µs a document':>15}{'more RssAnon, MB':>18}{'disk, MB':>10}")
    for kind in ("exact", "near"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            print(f"{kind:<22}" + "{:>15.1f}{:>18.0f}{:>10.0f}".format(*index(Path(name), kind, arguments.index)))


def read(hub: Path) -> list[str]:
    """The documents of the corpora, in turn."""
    columns = [
        pq.read_table(hub / corpus / "default/train-00000-of-00001.parquet", columns=["text"])["text"].to_pylist()
        for corpus in CORPORA
    ]
    return [text for pair in zip(*columns, strict=False) for text in pair]


def batches(texts: Iterable[str], size: float) -> list[pa.Table]:
    """About `size` bytes of documents in tables of about BATCH_BYTES."""
    tables, taken, held = [], [], 0
    scores = np.random.default_rng(0)
    for text in texts:
        taken.append(text)
        held += len(text.encode())
        if held >= min(BATCH_BYTES, size):
            tables.append(pa.table({"text": taken, "score": scores.random(len(taken))}))
            size -= held
            taken, held = [], 0
        if size <= 0:
            break
    return tables


def functions() -> dict[str, Callable[[Texts], object]]:
    """What is measured."""
    exact, near = DuplicatesConfig(), DuplicatesConfig(exact=False, near=NearConfig())
    contamination = Contamination(ContaminationConfig(benchmarks=tuple(known_benchmarks())))

    def together(texts: Texts) -> None:
        for rule in (LENGTH, SCORE, Symbols(), EXPRESSION):
            rule.passes(texts)
        fingerprints(texts, exact)

    return {
        "length": LENGTH.passes,
        "column": SCORE.passes,
        "symbols": Symbols().passes,
        "c4": C4().passes,
        "regex": EXPRESSION.passes,
        "repetition": Repetition().passes,
        "contamination": contamination.matches,
        "exact duplicates": lambda texts: fingerprints(texts, exact),
        "near duplicates": lambda texts: fingerprints(texts, near),
        "together": together,
    }


def speed(function: Callable[[Texts], object], tables: Sequence[pa.Table], turns: int) -> float:
    """Megabytes of text a second of processor time."""
    best = float("inf")
    for _ in range(turns):
        begin = time.process_time()
        for table in tables:
            function(Texts(table))
        best = min(best, time.process_time() - begin)
    return float(sum(int(Texts(table).bytes_D.sum()) for table in tables) / best / 1e6)


def index(folder: Path, kind: str, documents: int, together: int = 1000) -> tuple[float, float, float]:
    """Microseconds of processor time for a document, most anonymous memory beyond what was there, megabytes on disk.

    The documents are random, some are equal or share a band, and they are committed every 10,000.
    """
    near = NearConfig()
    opened = DuplicateIndex(folder, DuplicatesConfig(exact=kind == "exact", near=near if kind == "near" else None))
    bands, _ = bands_and_rows(near.threshold, near.permutations)
    numbers = np.random.default_rng(0)
    busy, memory, before = 0.0, 0.0, anonymous_megabytes(os.getpid())
    for done in range(0, documents, together):
        texts = Texts.of([""] * together)
        signed = Signatures(
            np.ones(together, np.bool_),
            numbers.integers(0, 1 << 16, (together, near.permutations), np.uint16),
            numbers.integers(0, 1 << 64, (together, bands), np.uint64),
        )
        signed.band_DB[::10, 0] = done % 7000
        prints = fingerprints(texts, DuplicatesConfig())._replace(
            digest_D2=numbers.integers(0, 1 << 64, (together, 2), np.uint64), near=signed
        )
        prints.digest_D2[::10] = done % 7000
        begin = time.process_time()
        opened.novel(prints, np.ones(together, np.bool_))
        if done % 10_000 == 0:
            opened.commit(b"")
            memory = max(memory, anonymous_megabytes(os.getpid()) - before)
        busy += time.process_time() - begin
    opened.close()
    size = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    folder.mkdir()
    return busy / documents * 1e6, memory, size / 1e6


if __name__ == "__main__":
    main()
