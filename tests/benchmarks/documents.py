"""How fast documents are made from real text, and how much memory that takes.

    CAIRN_HUB=DIR python -m tests.benchmarks.documents

The input is the two local corpora of CAIRN_HUB, repeated; each repetition has some letters permuted, which leaves what
rules count as it is and makes every document another one. Speed is of bytes of text on the clock, from Parquet (and
from JSON Lines where it says so) to finished shards, one process with as many threads as cores, everything from the
import of the libraries to the last fsync in it. Memory is the anonymous one (RssAnon) of the process and its children,
its highest value out of 200 a second.
"""

import argparse
import itertools
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.hub import hub_folder
from tests.benchmarks.memory import watched_peak

CORPORA = ("local/openstax-textbooks", "local/standard-ebooks")
LETTERS = "cgjklmpqrsuxyz"
"""Those that are in none of the words that rules look for, such as `the` and `with`."""
LENGTH: dict[str, Any] = {"rule": "length", "min_characters": 200, "max_characters": 1_000_000}
COLUMN: dict[str, Any] = {"rule": "column", "column": "score", "minimum": 2}
REGEX: dict[str, Any] = {"rule": "regex", "pattern": "(?i)lorem ipsum"}
SYMBOLS: dict[str, Any] = {"rule": "symbols"}
REPETITION: dict[str, Any] = {"rule": "repetition"}
EXACT: dict[str, Any] = {"duplicates": {}}


class Figures(NamedTuple):
    """What a run of the stage took."""

    seconds: float
    """From the start of the process to its end."""
    processor: float
    """Seconds of processor time, which other work on the machine does not change much."""
    megabytes: float
    """Of text that was read."""
    kept: float
    """Share of the documents that was kept."""
    memory: float
    """The most anonymous memory, in MB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where input and output are made; a temporary folder unless given")
    parser.add_argument("--sizes", type=int, nargs="*", default=[50, 500, 2000], help="MB of text to take memory at")
    parser.add_argument("--speeds", nargs="*", default=list(speeds()), help="which speeds to measure")
    parser.add_argument("--run", nargs=2, metavar=("CONFIG", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_stage(json.loads(arguments.run[0]), Path(arguments.run[1]))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        place = Path(name)
        print(f"{'speed of':<34}{'MB of text':>12}{'kept':>8}{'seconds':>9}{'MB/s':>8}{'CPU s':>8}{'RssAnon MB':>12}")
        for label in arguments.speeds:
            megabytes, ending, config = speeds()[label]
            show(label, measured(config, source(place, megabytes, ending), place))
        for megabytes in arguments.sizes:
            config = {"rules": [LENGTH, COLUMN, REGEX], "split": {"validation": 0.01}, **EXACT}
            show(f"memory at {megabytes} MB", measured(config, source(place, megabytes, "parquet"), place))


def show(label: str, figures: Figures) -> None:
    """Prints a line of the table."""
    speed = figures.megabytes / figures.seconds
    print(
        f"{label:<34}{figures.megabytes:>12,.1f}{figures.kept:>8.1%}{figures.seconds:>9.1f}{speed:>8.1f}"
        f"{figures.processor:>8.1f}{figures.memory:>12,.0f}",
        flush=True,
    )


def speeds() -> dict[str, tuple[int, str, dict[str, Any]]]:
    """What is measured: MB of text, the input's ending, and the config of the stage without its source."""
    rules = [LENGTH, COLUMN, SYMBOLS, REGEX]
    return {
        "nothing": (500, "parquet", {}),
        "nothing, JSON Lines": (500, "jsonl", {}),
        "exact duplicates": (500, "parquet", EXACT),
        "rules, exact duplicates": (500, "parquet", {"rules": rules, **EXACT}),
        "repetition rules too": (100, "parquet", {"rules": [*rules, REPETITION], **EXACT}),
        "near duplicates": (100, "parquet", {"duplicates": {"near": {}}}),
    }


def source(place: Path, megabytes: int, ending: str) -> dict[str, Any]:
    """Files with so much text, made where they are not there yet."""
    folder = place / f"{megabytes}-{ending}"
    if not folder.exists():
        folder.mkdir()
        size = 0
        for number, table in enumerate(varied()):
            left = megabytes * 1_000_000 - size
            sizes = [len(text.encode()) for text in table["text"].to_pylist()]
            rows = next((row for row in range(len(sizes)) if sum(sizes[: row + 1]) > left), len(sizes))
            size += sum(sizes[:rows])
            write(table.slice(0, rows), folder / f"{number:04d}.{ending}")
            if rows < len(sizes):
                break
    return {"kind": "files", "path": str(folder)}


def varied() -> Iterator[pa.Table]:
    """The corpora again and again, about 10 MB of both at a time, each time with other letters."""
    hub = hub_folder()
    if hub is None:
        raise SystemExit("CAIRN_HUB is not set: this benchmark reads the corpora there")
    files = [pq.ParquetFile(hub / corpus / "default" / "train-00000-of-00001.parquet") for corpus in CORPORA]
    for number in itertools.count():
        letters = list(LETTERS)
        random.Random(number).shuffle(letters)
        other = str.maketrans(LETTERS, "".join(letters))
        for group in range(min(file.num_row_groups for file in files)):
            texts = [
                text.translate(other)
                for file in files
                for text in file.read_row_group(group, ["text"])["text"].to_pylist()
            ]
            random.Random(group).shuffle(texts)
            yield pa.table({"text": texts, "score": [float(row % 50) / 10 for row in range(len(texts))]})


def write(table: pa.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        # Groups of some MB, as the hub has them.
        pq.write_table(table, path, compression="zstd", row_group_size=200)
        return
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())


def measured(config: dict[str, Any], source: dict[str, Any], place: Path) -> Figures:
    """Runs the stage in a process of its own."""
    output = place / "run"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "tests.benchmarks.documents", "--run"]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [*command, json.dumps({"source": source, **config}), str(output)], stdout=subprocess.PIPE, text=True
    )
    highest = watched_peak(process)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode:
        raise SystemExit(f"the stage ended with {process.returncode}")
    described = json.loads((output / "output" / "documents.json").read_bytes())
    kept = sum(split["documents"] for split in described["splits"].values())
    read = described["read"]
    return Figures(seconds, processor, read["bytes"] / 1e6, kept / read["documents"], highest)


def run_stage(config: dict[str, Any], folder: Path) -> None:
    """Runs the stage in this process, in a folder."""
    from tasks.documents import STAGE
    from tasks.stage import Context, Runtime

    (folder / "output").mkdir(parents=True)
    context = Context(
        name="documents",
        output=folder / "output",
        logs=folder,
        scratch=(fsspec.filesystem("file"), str(folder / "scratch")),
        local_scratch=folder / "scratch",
        runtime=Runtime(),
        report=lambda event: None,
    )
    STAGE.run(STAGE.config.model_validate(config), {}, context)


if __name__ == "__main__":
    main()
