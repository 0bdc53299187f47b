"""How fast documents become token shards, beside `datasets.map`, and what memory that takes.

    CAIRN_HUB=… python -m tests.benchmarks.tokens --megabytes 1000
    CAIRN_HUB=… python -m tests.benchmarks.tokens --memory 50 500 2000

The two local corpora of the hub, repeated until there are so many megabytes of text, in shards of documents of 32 MiB
as the stage `documents` leaves them, and a byte-level BPE of 8,192 tokens that the stage `tokenizer` learns from them.
Both sides read the same Parquet files, write every id to the disk, and hash what they have written: `datasets.map`
with `batched=True`, one process per core and `encode_batch_fast`, into its Arrow files; the stage into safetensors
shards, with its proof, checks, data card and picture. In the end all ids are compared. The processes of each side
start with nothing in memory; the files are in the page cache for both.
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from artifacts.identity import content_digest, describe_files
from common.files import canonical_json, sha256_file
from models.training.shards import open_shard
from tasks.hub import local_copy
from tasks.stage import Context, Runtime, Stage
from tests.benchmarks.memory import watched_peak

CORPORA = ("local/openstax-textbooks", "local/standard-ebooks")
SHARD_BYTES, ROW_GROUP_BYTES = 32 << 20, 4 << 20
VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="text to encode on both sides")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--memory", type=int, nargs="*", help="only measure the stage's memory with so many megabytes")
    parser.add_argument("--folder", type=Path, help="where the documents are kept for the next time")
    parser.add_argument("--side", choices=["stage", "datasets"], help=argparse.SUPPRESS)
    parser.add_argument("--documents", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = arguments.folder or Path(name)
        place.mkdir(parents=True, exist_ok=True)
        if arguments.side is not None:
            side = stage_side if arguments.side == "stage" else datasets_side
            print(json.dumps(side(place, arguments.documents, arguments.processes)))
        elif arguments.memory:
            memory(place, arguments.memory, arguments.processes)
        else:
            compare(place, arguments.megabytes, arguments.processes)


def compare(place: Path, megabytes: int, processes: int) -> None:
    """Both sides on the same documents."""
    documents = make_documents(place, megabytes)
    size = json.loads((documents / "documents.json").read_bytes())["read"]["bytes"]
    print(f"{size / 1e6:,.0f} MB of text in {len(list(documents.glob('*.parquet')))} shards, {processes} processes")
    found = {}
    for side in ("datasets", "stage"):
        found[side] = one = measured(place, side, documents, processes)
        print(
            f"{side:>9}: {one['seconds']:7.1f} s, {size / 1e6 / one['seconds']:6.1f} MB/s of text, "
            f"{one['cpu_seconds']:.1f} s of processor time, peak {one['peak']:,.0f} MB; {one['what']}"
        )
    print(f"{found['datasets']['seconds'] / found['stage']['seconds']:.1f} times as fast")
    same = found["datasets"]["ids"] == found["stage"]["ids"]
    print(f"{found['stage']['tokens']:,} ids, {'identical' if same else 'DIFFERENT'}")


def memory(place: Path, sizes: list[int], processes: int) -> None:
    """The stage's peak of anonymous memory, its processes included."""
    for megabytes in sizes:
        one = measured(place, "stage", make_documents(place, megabytes), processes)
        print(f"{megabytes:>6} MB of text: peak {one['peak']:,.1f} MB anonymous, {one['seconds']:.1f} s")


def measured(place: Path, side: str, documents: Path, processes: int) -> dict[str, Any]:
    """Runs one side in a process of its own, and watches it."""
    command = [sys.executable, "-m", "tests.benchmarks.tokens", "--side", side]
    options = ["--folder", place, "--documents", documents, "--processes", processes]
    environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [*command, *map(str, options)], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    peak = watched_peak(process)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{side} failed: {output}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {**result, "peak": peak}


def corpus() -> Iterator[str]:
    """The texts of both corpora."""
    import pyarrow.parquet as pq

    for name in CORPORA:
        folder = local_copy("dataset", name)
        if folder is None:
            raise SystemExit("set CAIRN_HUB to the folder that has the corpora")
        for path in sorted(folder.glob("default/train-*.parquet")):
            yield from pq.read_table(path, columns=["text"])["text"].to_pylist()


def make_documents(place: Path, megabytes: int) -> Path:
    """A documents artifact of about so much text; one that is there already is used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = place / f"documents-{megabytes}"
    if (folder / "documents.json").exists():
        return folder
    folder.mkdir(exist_ok=True)
    texts = list(corpus())
    sizes = [len(text.encode()) for text in texts]
    shards: list[dict[str, Any]] = []
    waiting: list[str] = []
    held = written = 0

    def flush() -> None:
        name = f"train-{len(shards):05d}.parquet"
        table = pa.table({"text": pa.array(waiting, pa.string())})
        group = max(1, len(waiting) * ROW_GROUP_BYTES // held)
        pq.write_table(table, folder / name, compression="zstd", use_dictionary=False, row_group_size=group)
        shards.append({"name": name, "documents": len(waiting), "bytes": held})

    for row in itertools.cycle(range(len(texts))):
        if written + held >= megabytes * 1_000_000:
            break
        if waiting and held + sizes[row] > SHARD_BYTES:
            flush()
            written, held, waiting = written + held, 0, []
        waiting.append(texts[row])
        held += sizes[row]
    flush()
    counts = {key: sum(shard[key] for shard in shards) for key in ("documents", "bytes")}
    description = {
        "source": {"name": "+".join(CORPORA)},
        "read": counts,
        "splits": {"train": {**counts, "shards": shards}},
        "dropped": [],
    }
    (folder / "documents.json").write_bytes(canonical_json(description))
    return folder


def make_tokenizer(place: Path) -> Path:
    """The tokenizer that the stage `tokenizer` makes of a hundredth gigabyte; one that is there already is used."""
    from tasks.tokenizer import STAGE

    folder = place / "tokenizer"
    if not (folder / "output" / "tokenizer.json").exists():
        config = {"vocabulary": {"kind": "byte_bpe", "vocab_size": VOCABULARY}}
        run_stage(STAGE, config, {"documents": make_documents(place, 100)}, folder, processes=2)
    return folder / "output"


def run_stage(stage: Stage, config: dict[str, Any], inputs: dict[str, Path], folder: Path, **runtime: Any) -> Any:
    """A stage with nothing around it; what it makes is in `output`."""
    context = Context(
        name=stage.name,
        output=folder / "output",
        logs=folder / "logs",
        scratch=(fsspec.filesystem("file"), str(folder / "scratch")),
        local_scratch=folder / "scratch",
        runtime=Runtime(**runtime),
        report=lambda event: print(event, file=sys.stderr),
    )
    context.output.mkdir(parents=True)
    context.logs.mkdir()
    return stage.run(stage.config.model_validate(config), inputs, context)


def stage_side(place: Path, documents: Path, processes: int) -> dict[str, Any]:
    """The stage `tokens`, and the digests of its artifact as the store takes them."""
    from tasks.tokens import STAGE

    tokenizer = make_tokenizer(place)
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name) / "tokens"
        began, processor = time.perf_counter(), cpu_seconds()
        metrics = run_stage(STAGE, {}, {"documents": documents, "tokenizer": tokenizer}, folder, processes=processes)
        digest = content_digest(describe_files(folder / "output"))
        seconds, used = time.perf_counter() - began, cpu_seconds() - processor
        ids = hashlib.sha256()
        tokens = json.loads((folder / "output" / "tokens.json").read_bytes())
        for entry in tokens["splits"]["train"]["shards"]:
            ids.update(open_shard(folder / "output" / entry["name"]).map().tokens_N.astype("<u2").tobytes())
        encoder = metrics["encoder"]
        what = f"{encoder['library']} {encoder['version']}, refused {encoder['refused']}, digest {digest[:12]}"
        return {
            "seconds": seconds,
            "cpu_seconds": used,
            "ids": ids.hexdigest(),
            "tokens": metrics["tokens"],
            "what": what,
        }


def datasets_side(place: Path, documents: Path, processes: int) -> dict[str, Any]:
    """`datasets.map` with the same tokenizer, and the digests of the files that it writes."""
    import datasets
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(make_tokenizer(place) / "tokenizer.json"))
    backend.encode_special_tokens = True
    end = backend.token_to_id("<eos>")

    def encode(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        encodings = backend.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"input_ids": [[*encoding.ids, end] for encoding in encodings]}

    with tempfile.TemporaryDirectory(dir=place) as name:
        began, processor = time.perf_counter(), cpu_seconds()
        files = [str(path) for path in sorted(documents.glob("*.parquet"))]
        loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=name)
        features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("uint16"))})
        made = loaded.map(
            encode, batched=True, num_proc=processes, remove_columns=loaded.column_names, features=features
        )
        for written in made.cache_files:
            sha256_file(Path(written["filename"]))
        seconds, used = time.perf_counter() - began, cpu_seconds() - processor
        ids = hashlib.sha256()
        for chunk in made.data.column("input_ids").chunks:
            ids.update(np.asarray(chunk.flatten()).astype("<u2").tobytes())
        return {
            "seconds": seconds,
            "cpu_seconds": used,
            "ids": ids.hexdigest(),
            "what": f"datasets {datasets.__version__}",
        }


def cpu_seconds() -> float:
    """Processor time of this process and of those of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
