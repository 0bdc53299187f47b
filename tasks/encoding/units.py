"""One shard of documents turned into token shards: the unit of work, alone or beside others, here or elsewhere.

N tokens, D documents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.config import FrozenModel
from common.errors import StageInterrupted, UserError
from models.chat import Chat, Template
from tasks.encoding.conversations import COLUMNS, LossOn, encode_conversations
from tasks.encoding.encoders import (
    Candidate,
    Encoded,
    Encoder,
    EncoderFailed,
    Reference,
    first_difference,
    joined,
    shown,
    text_of,
)
from tasks.encoding.libraries import LIBRARIES
from tasks.encoding.writer import TokenShard, Writer

BATCH_BYTES = 1 << 20
"""Text that is encoded at once: the reference takes a hundred bytes of memory for each token of it."""
CHECKED_EVERY, CHECKED_AT_LEAST = 200, 4
"""One document of so many is also encoded by the reference, and so many at least of each shard."""


class Job(FrozenModel):
    """What all shards of a corpus are encoded with."""

    library: str
    """The library that encodes: `tokenizers` or one of the candidates."""
    loss_on: LossOn
    bos_id: int | None
    """The token before each document; None for none."""
    eos_id: int | None
    """The token after each document; None for none."""
    vocab_size: int
    shard_tokens: int
    """Tokens after which a token shard is full."""
    template: Template | None = None
    """The template of conversations; None where documents are texts."""
    max_tokens: int | None = None
    """Tokens of a conversation at most; None for any number."""

    @property
    def dtype(self) -> str:
        """The type of the ids in the shards."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


class Unit(FrozenModel):
    """A shard of documents."""

    split: str
    number: int
    """Its place among the shards of its split."""
    name: str
    """Its file name."""
    documents: int
    bytes: int
    """UTF-8 bytes of text."""

    @property
    def key(self) -> str:
        """Its name among the units of a corpus."""
        return f"{self.split}-{self.number:05d}"


class EncodedUnit(FrozenModel):
    """What a shard of documents became."""

    shards: tuple[TokenShard, ...]
    """Its token shards, in order."""
    documents: int
    bytes: int
    """UTF-8 bytes of text."""
    lengths: tuple[tuple[int, int], ...]
    """Each length of a document in tokens, rising, and how many documents have it."""
    library: str
    """The library that encoded it."""
    note: str | None = None
    """Why the chosen library's ids were not taken."""
    cut: int = 0
    """Conversations that were cut after an earlier answer."""
    dropped: int = 0
    """Conversations or preferences that were left out, because they do not fit."""


class Encoders(NamedTuple):
    """The libraries of a job, loaded."""

    reference: Reference
    candidate: Candidate | None
    chat: Chat | None = None
    """What renders conversations, where the job has a template."""
    why_none: str | None = None
    """Why there is no candidate where the job names one."""

    @staticmethod
    def load(job: Job, folder: Path, parallel: bool) -> "Encoders":
        """Loads the tokenizer in a folder; `parallel` is for threads on every core. The candidate is left out where
        it cannot be had, as on a machine that lacks it."""
        reference = Reference(folder, parallel)
        if job.template is not None:
            chat = Chat(reference.tokenizer, job.template, job.bos_id is not None, parallel)
            return Encoders(reference, None, chat)
        if job.library == reference.name:
            return Encoders(reference, None)
        try:
            return Encoders(reference, Candidate(lambda: LIBRARIES[job.library](folder, parallel), reference))
        except Exception as error:
            return Encoders(reference, None, why_none=text_of(error))


def encode_unit(
    unit: Unit,
    source: Any,
    job: Job,
    encoders: Encoders,
    folder: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> EncodedUnit:
    """Encodes the Parquet file of a unit (its path, or a pyarrow buffer of its bytes) into token shards in `folder`.

    Documents from all over the file are also encoded by the reference; where one differs, or the library fails, the
    reference encodes them all. Raises UserError for documents that do not fit, OSError, StageInterrupted.
    """
    note = encoders.why_none
    if encoders.candidate is not None:
        try:
            return _encode_with(encoders.candidate, unit, source, job, encoders, folder, should_stop)
        except (UserError, StageInterrupted, OSError):
            raise
        except Exception as error:
            note = text_of(error)
    encoded = _encode_with(encoders.reference, unit, source, job, encoders, folder, should_stop)
    if note is None:
        return encoded
    return encoded.model_copy(update={"note": f"{unit.name} was encoded by tokenizers, not {job.library}: {note}"})


class _Batch(NamedTuple):
    """Documents of a unit as the tokens that are written."""

    ids_N: NDArray[Any]
    lengths_D: NDArray[np.int64]
    counted_N: NDArray[np.bool_] | None
    """Which tokens are trained on; None where all are."""
    bytes: int
    """UTF-8 bytes of their text."""
    cut: int = 0
    dropped: int = 0


def _encode_with(
    encoder: Encoder,
    unit: Unit,
    source: Any,
    job: Job,
    encoders: Encoders,
    folder: Path,
    should_stop: Callable[[], bool],
) -> EncodedUnit:
    together = 2 if job.loss_on == "pairs" else 1
    writer = Writer(folder, lambda number: f"{unit.key}-{number:03d}.safetensors", job.shard_tokens, together)
    lengths: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    text_bytes = cut = dropped = 0
    for first_row, columns in read_documents(source, unit, ["text", *COLUMNS[job.loss_on]], BATCH_BYTES):
        if should_stop():
            raise StageInterrupted("the tokens were stopped")
        if encoders.chat is not None:
            batch = _conversations(unit, first_row, columns, job, encoders.chat)
        else:
            batch = _texts(encoder, unit, first_row, columns, job, encoders.reference)
        writer.add(batch.ids_N, batch.lengths_D, batch.counted_N)
        lengths.append(batch.lengths_D)
        text_bytes += batch.bytes
        cut += batch.cut
        dropped += batch.dropped
    writer.close()
    found, counts = np.unique(np.concatenate(lengths), return_counts=True)
    return EncodedUnit(
        shards=tuple(writer.shards),
        documents=int(counts.sum()),
        bytes=text_bytes,
        lengths=tuple(zip(found.tolist(), counts.tolist(), strict=True)),
        library=encoder.name,
        cut=cut,
        dropped=dropped,
    )


def _texts(
    encoder: Encoder, unit: Unit, first_row: int, columns: Mapping[str, Any], job: Job, reference: Reference
) -> _Batch:
    texts = columns["text"]
    if job.loss_on == "target":
        encoded, uncounted_D = _with_targets(reference, texts, columns["target"])
    else:
        encoded, uncounted_D = encoder.encode(texts), np.zeros(len(texts), np.int64)
    if encoder is not reference:
        stride = max(1, min(CHECKED_EVERY, unit.documents // CHECKED_AT_LEAST))
        _check(encoded, texts, reference, range((unit.number - first_row) % stride, len(texts), stride))
    _check_ids(encoded, unit, first_row, job)
    ids_N, lengths_D = _surrounded(encoded, job)
    uncounted_D = uncounted_D + (job.bos_id is not None)
    counted_N = None
    if job.loss_on == "target" or job.bos_id is not None:
        runs = np.column_stack([uncounted_D, lengths_D - uncounted_D]).reshape(-1)
        counted_N = np.repeat(np.tile(np.array([False, True]), len(lengths_D)), runs)
    return _Batch(ids_N, lengths_D, counted_N, _text_bytes(texts))


def _conversations(unit: Unit, first_row: int, columns: Mapping[str, Any], job: Job, chat: Chat) -> _Batch:
    texts = columns["text"]
    found = encode_conversations(columns, chat, job.loss_on, job.max_tokens, f"documents {unit.name}", first_row)
    lengths_D = np.diff(found.encoded.ends_D, prepend=0)
    kept_bytes = _text_bytes(texts.take(np.array(found.kept, np.int64)))
    dropped = len(texts) - len(found.kept)
    return _Batch(found.encoded.ids_N.astype(job.dtype), lengths_D, found.counted_N, kept_bytes, found.cut, dropped)


def read_documents(
    source: Any, unit: Unit, columns: Sequence[str], batch_bytes: int
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The documents of a unit in batches of about `batch_bytes` of text: the number of the first row, and each column
    as a pyarrow array of valid strings. Raises UserError for a file that is no such thing."""
    # Imported here because it takes a third of a second, and planning needs only the configs.
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = min(max(1, batch_bytes * unit.documents // max(1, unit.bytes)), 1 << 16)
    first = 0
    try:
        file = pq.ParquetFile(pa.BufferReader(source) if isinstance(source, pa.Buffer) else source)
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise UserError(f"documents {unit.name} have no column '{missing[0]}', which the tokens are made from")
        for batch in file.iter_batches(rows, columns=list(columns), use_threads=False):
            found = {column: batch.column(column) for column in columns}
            for column, values in found.items():
                if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
                    raise UserError(f"documents {unit.name}: the column '{column}' holds {values.type}, not text")
                if values.null_count:
                    raise UserError(f"documents {unit.name}: the column '{column}' has rows without a value")
                # What reads the buffers as they are must not meet offsets or bytes that are none.
                values.validate(full=True)
            yield first, found
            first += len(batch)
    except pa.ArrowException as error:
        raise UserError(f"documents {unit.name} cannot be read ({text_of(error)}); make them again") from error


def _text_bytes(texts: Any) -> int:
    import pyarrow.compute as pc

    return int(pc.sum(pc.binary_length(texts)).as_py() or 0)


def _check(encoded: Encoded, texts: Any, reference: Reference, rows: range) -> None:
    """Compares some documents with the reference; raises EncoderFailed at the first that differs."""
    import pyarrow as pa

    if not rows:
        return
    sampled = pa.array([texts[row].as_py() for row in rows], pa.large_string())
    starts_D = np.concatenate([[0], encoded.ends_D])
    parts = [encoded.ids_N[starts_D[row] : starts_D[row + 1]] for row in rows]
    ends_D = np.cumsum([len(part) for part in parts], dtype=np.int64)
    different = first_difference(Encoded(np.concatenate(parts), ends_D), reference.encode(sampled))
    if different is not None:
        raise EncoderFailed(f"the ids of {shown(sampled[different].as_py())} differ")


def _check_ids(encoded: Encoded, unit: Unit, first_row: int, job: Job) -> None:
    if encoded.ids_N.size and int(encoded.ids_N.max()) >= job.vocab_size:
        place = int(encoded.ids_N.argmax())
        row = first_row + int(np.searchsorted(encoded.ends_D, place, side="right"))
        raise UserError(
            f"documents {unit.name}, row {row}: the tokenizer gives the id {int(encoded.ids_N[place])}, beyond its "
            f"vocabulary of {job.vocab_size:,}; mend or replace the tokenizer"
        )


def _with_targets(reference: Reference, texts: Any, targets: Any) -> tuple[Encoded, NDArray[np.int64]]:
    """The ids of documents, and how many of each come before its target. Raises UserError for one without."""
    prompts, wanted = [], targets.to_pylist()
    for text, target in zip(texts.to_pylist(), wanted, strict=True):
        if not target or not text.endswith(target) or text == target:
            raise UserError(f"document {shown(text)} does not end with its target {shown(target)} after a prompt")
        prompts.append(text[: -len(target)])
    parts = reference.parts(prompts, wanted)
    before_D = np.array([len(prompt) for prompt, _ in parts], np.int64)
    return joined([prompt + target for prompt, target in parts]), before_D


def _surrounded(encoded: Encoded, job: Job) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The ids with <bos> before and <eos> after each document, in the shards' type, and the lengths with them."""
    before, after = int(job.bos_id is not None), int(job.eos_id is not None)
    lengths_D = np.diff(encoded.ends_D, prepend=0) + before + after
    ends_D = np.cumsum(lengths_D)
    ids_N = np.empty(int(ends_D[-1]) if ends_D.size else 0, job.dtype)
    of_text_N = np.ones(ids_N.size, bool)
    if job.bos_id is not None:
        ids_N[ends_D - lengths_D] = job.bos_id
        of_text_N[ends_D - lengths_D] = False
    if job.eos_id is not None:
        ids_N[ends_D - 1] = job.eos_id
        of_text_N[ends_D - 1] = False
    ids_N[of_text_N] = encoded.ids_N
    return ids_N, lengths_D
