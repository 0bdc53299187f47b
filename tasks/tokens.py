"""Stage `tokens`: documents as shards of token ids, with the mask of what counts in the loss."""

import shutil
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from common.config import FrozenModel
from common.errors import StageInterrupted, UserError
from common.files import canonical_json
from models.tokenizer import TOKENIZER_FILES, Tokenizer
from models.training.shards import write_shard
from tasks.documents import shard_name
from tasks.stage import Context, Kind, Metrics, Stage

ROWS_AT_ONCE = 20_000


class Config(FrozenModel):
    """How documents become tokens."""

    loss_on: Literal["text", "target"] = "text"
    """Whether every token is trained on, or only those of the column `target` and the closing <eos>."""
    shard_tokens: int = Field(default=1 << 25, gt=0)
    """Tokens after which a shard is full; documents are never divided."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `<split>-<n>.safetensors` (see models.training.shards), `tokens.json` and the tokenizer in `tokenizer/`.

    Raises UserError for a character that the tokenizer does not know, and for documents without a target where
    the loss is on targets.
    """
    tokenizer = Tokenizer(inputs["tokenizer"])
    copy_tokenizer(inputs["tokenizer"], context.output)
    counts = {}
    for split in sorted({path.name.rpartition("-")[0] for path in inputs["documents"].glob("*.parquet")}):
        counts[split] = _write_split(config, tokenizer, split, inputs["documents"], context)
    description = {"vocab_size": len(tokenizer), "pad_id": tokenizer.pad_id, "splits": counts}
    (context.output / "tokens.json").write_bytes(canonical_json(description))
    tokens = sum(split["tokens"] for split in counts.values())
    return {"summary": f"{tokens:,} tokens", **description}


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Puts a tokenizer's files into `folder/tokenizer/`, so that an artifact can be used without the one before it."""
    (folder / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / "tokenizer" / name)


def _write_split(config: Config, tokenizer: Tokenizer, split: str, documents: Path, context: Context) -> dict[str, int]:
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    shard = _Shard(dtype, masked=config.loss_on == "target")
    totals = {"shards": 0, "documents": 0, "tokens": 0, "counted_tokens": 0, "longest_document": 0}

    def flush() -> None:
        path = context.output / shard_name(split, totals["shards"], "safetensors")
        write_shard(path, *shard.arrays())
        totals["shards"] += 1

    for columns in _batches(config, split, documents):
        if context.should_stop():
            raise StageInterrupted("the tokens were stopped")
        boundaries = _boundaries(config, columns)
        for encoding, boundary in zip(tokenizer.encode_batch(columns["text"]), boundaries, strict=True):
            first = encoding.char_to_token(boundary) if boundary else 0
            if first is None:
                raise UserError(f"no token starts where the target of {encoding.tokens} does")
            ids = encoding.ids
            if shard.tokens and shard.tokens + len(ids) > config.shard_tokens:
                flush()
                shard = _Shard(dtype, masked=config.loss_on == "target")
            shard.append(ids, first)
            totals["documents"] += 1
            totals["tokens"] += len(ids)
            totals["counted_tokens"] += len(ids) - first
            totals["longest_document"] = max(totals["longest_document"], len(ids))
    if shard.tokens:
        flush()
    return totals


def _batches(config: Config, split: str, documents: Path) -> Iterator[dict[str, list[str]]]:
    # Imported here because it takes a third of a second, and planning needs only the configs.
    import pyarrow.parquet as pq

    wanted = ["text", "target"] if config.loss_on == "target" else ["text"]
    for path in sorted(documents.glob(f"{split}-*.parquet")):
        file = pq.ParquetFile(path)
        missing = set(wanted) - set(file.schema_arrow.names)
        if missing:
            raise UserError(f"documents have no column {missing.pop()!r}, which loss_on: {config.loss_on} needs")
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=wanted):
            yield batch.to_pydict()


def _boundaries(config: Config, columns: Mapping[str, list[str]]) -> list[int]:
    """The character of each text at which the loss starts."""
    if config.loss_on == "text":
        return [0] * len(columns["text"])
    found = []
    for text, target in zip(columns["text"], columns["target"], strict=True):
        ending = target + "<eos>"
        if not target or not text.endswith(ending) or text == ending:
            raise UserError(f"document {text!r} does not end with its target {target!r} and <eos> after a prompt")
        found.append(len(text) - len(ending))
    return found


class _Shard:
    """Tokens gathered for one file."""

    def __init__(self, dtype: Any, masked: bool) -> None:
        self.dtype, self.masked = dtype, masked
        self.tokens = 0
        # Lists of Python's integers would take many times the memory.
        self._ids = array("I")
        self._ends = array("Q")
        self._starts = array("Q")

    def append(self, ids: list[int], first_counted: int) -> None:
        self._ids.extend(ids)
        self._starts.append(self.tokens + first_counted)
        self.tokens += len(ids)
        self._ends.append(self.tokens)

    def arrays(self) -> tuple[Any, ...]:
        ends = np.array(self._ends, np.uint64)
        if not self.masked:
            return np.array(self._ids, self.dtype), ends
        # +1 where counting starts and −1 after each document: the running sum is 1 on the counted tokens.
        edges = np.zeros(self.tokens + 1, np.int64)
        np.add.at(edges, np.array(self._starts, np.int64), 1)
        np.add.at(edges, np.array(self._ends, np.int64), -1)
        return np.array(self._ids, self.dtype), ends, np.cumsum(edges)[:-1].astype(bool)


STAGE = Stage(
    name="tokens",
    version=1,
    config=Config,
    inputs={"documents": Kind.DOCUMENTS, "tokenizer": Kind.TOKENIZER},
    output=Kind.TOKENS,
    run=run,
)
