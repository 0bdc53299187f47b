"""Stage `tokens`: documents as shards of token ids, with the mask of what counts in the loss."""

import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import Field

from artifacts.identity import check_file_name
from common.config import FrozenModel
from common.errors import StageInterrupted, UserError
from common.files import canonical_json
from models.tokenizer import Tokenizer, begin_with_eos, tokenizer_files
from models.training.events import Note
from tasks.encoding.card import write_card
from tasks.encoding.choice import WORTH_IT_BYTES, Choice, choose, sampled_texts, the_reference
from tasks.encoding.encoders import Reference
from tasks.encoding.finished import FinishedUnits
from tasks.encoding.pool import WORTH_A_PROCESS_BYTES, encode_in_processes
from tasks.encoding.ray_pool import encode_over_ray
from tasks.encoding.units import EncodedUnit, Encoders, Job, LossOn, Unit, encode_unit
from tasks.encoding.worker import Order
from tasks.encoding.writer import TokenShard
from tasks.stage import Context, Kind, Metrics, Stage

Results = Generator[tuple[Unit, EncodedUnit], None, None]
NOTES_AT_MOST = 20
_REPORT_SECONDS = 10.0


class Config(FrozenModel):
    """How documents become tokens."""

    loss_on: LossOn = "text"
    """Whether every token is trained on, or only those of the column `target` and the <eos> after it."""
    bos: bool = False
    """Whether <bos> stands before each document. It is never trained on. Without it, <eos> takes its place before a
    prompt: it is what stands before most documents."""
    eos: bool = True
    """Whether <eos> stands after each document. It is trained on."""
    shard_tokens: int = Field(default=1 << 25, gt=0)
    """Tokens after which a shard is full; documents are never divided."""


class _Done:
    """Units that are done, by key. Their lengths are added up as they come: those of all units of a large corpus would
    take gigabytes."""

    def __init__(self) -> None:
        self.units: dict[str, EncodedUnit] = {}
        self.lengths: defaultdict[str, Counter[int]] = defaultdict(Counter)
        """How many documents of a split have a length in tokens."""

    def add(self, unit: Unit, encoded: EncodedUnit) -> None:
        self.lengths[unit.split].update(dict(encoded.lengths))
        self.units[unit.key] = encoded.model_copy(update={"lengths": ()})


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `<split>-<n>.safetensors` (see models.training.shards), `tokens.json` and the tokenizer in `tokenizer/`.

    Each shard of documents is encoded on its own and kept in the scratch, so that a stage which was killed goes on
    after the last one. Raises UserError for documents that the tokenizer cannot encode, that have no target where the
    loss is on targets, and for none at all.
    """
    started = time.monotonic()
    documents = _described(inputs["documents"])
    units = _units(documents)
    tokenizer = Tokenizer(inputs["tokenizer"])
    finished = FinishedUnits(context.scratch, context.local_scratch)
    done = _Done()
    for unit, encoded in finished.find(units):
        # All that is finished is hashed again, which takes a minute for some 20 GB.
        if context.should_stop():
            raise StageInterrupted("the tokens were stopped")
        done.add(unit, encoded)
    for name in finished.damaged:
        context.report(Note(f"the finished shard of documents {name} was damaged, and is done again"))
    left = [unit for unit in units if unit.key not in done.units]
    choice = _choice(config, inputs, left) if left else None
    job = Job(
        library=Reference.name if choice is None else choice.library,
        loss_on=config.loss_on,
        bos_id=tokenizer.bos_id if config.bos else None,
        eos_id=tokenizer.eos_id if config.eos else None,
        vocab_size=len(tokenizer),
        shard_tokens=config.shard_tokens,
    )
    order = Order(job=job, documents=inputs["documents"], tokenizer=inputs["tokenizer"], output=finished.folder)
    reused = len(done.units)
    with closing(_encoded(left, order, context)) as encoded_units:
        for unit, encoded in _reported(encoded_units, len(left), context):
            finished.keep(unit, encoded)
            done.add(unit, encoded)
    in_order = [(unit, done.units[unit.key]) for unit in units]
    shards = finished.put_together(in_order, context.output)
    copy_tokenizer(inputs["tokenizer"], context.output)
    if not config.bos:
        begin_with_eos(context.output / "tokenizer")
    tokens = _tokens_description(job, tokenizer, str(documents["source"]["name"]), in_order, done.lengths, shards)
    (context.output / "tokens.json").write_bytes(canonical_json(tokens))
    write_card(context.logs, documents, tokens, context.output, context.name)
    return _metrics(tokens, in_order, choice, reused, time.monotonic() - started)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Puts a tokenizer's files into `folder/tokenizer/`, so that an artifact can be used without the one before it."""
    (folder / "tokenizer").mkdir()
    for path in tokenizer_files(source):
        shutil.copyfile(path, folder / "tokenizer" / path.name)


def _described(folder: Path) -> dict[str, Any]:
    """What `documents.json` says. Raises UserError where it is no description of documents."""
    try:
        description = json.loads((folder / "documents.json").read_bytes())
        description["source"]["name"], description["read"]["documents"], description["dropped"]
        for split in description["splits"].values():
            for shard in split["shards"]:
                check_file_name(shard["name"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'documents.json'} describes no documents ({error!r}); make them again") from error
    return dict(description)


def _units(documents: Mapping[str, Any]) -> list[Unit]:
    """The shards of all splits, without those that hold nothing. Raises UserError where none is left."""
    units = [
        Unit(split=split, number=number, name=shard["name"], documents=shard["documents"], bytes=shard["bytes"])
        for split, described in sorted(documents["splits"].items())
        for number, shard in enumerate(described["shards"])
        if shard["documents"]
    ]
    if not units:
        raise UserError(f"the documents of {documents['source']['name']} are none: nothing passed its rules")
    return units


def _choice(config: Config, inputs: Mapping[str, Path], units: Sequence[Unit]) -> Choice:
    """The library that encodes what is left to do."""
    if config.loss_on == "target":
        return the_reference("the place of each token in its text is needed, to see where the target begins")
    if sum(unit.bytes for unit in units) < WORTH_IT_BYTES:
        return the_reference("little text is left to encode")
    return choose(inputs["tokenizer"], sampled_texts(inputs["documents"], units))


def _encoded(units: Sequence[Unit], order: Order, context: Context) -> Results:
    """The units as they are done: over Ray where the stage names a cluster, by processes where there is work for
    several, and else in this one."""
    if units and context.runtime.ray is not None:
        yield from encode_over_ray(units, order, context.runtime.ray, context.should_stop)
        return
    cores = context.runtime.processes or _cores()
    work = sum(unit.bytes for unit in units) // WORTH_A_PROCESS_BYTES
    processes = min(cores, len(units), 1 + work)
    if processes > 1:
        yield from encode_in_processes(units, order, processes, context.should_stop)
    elif units:
        encoders = Encoders.load(order.job, order.tokenizer, parallel=cores > 1)
        for unit in units:
            source = str(order.documents / unit.name)
            yield unit, encode_unit(unit, source, order.job, encoders, order.output, context.should_stop)


def _cores() -> int:
    """The cores that this process may use."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _reported(encoded_units: Results, count: int, context: Context) -> Results:
    """The same units, told about now and then."""
    began = said = time.monotonic()
    text_bytes = 0
    for number, (unit, encoded) in enumerate(encoded_units, 1):
        yield unit, encoded
        text_bytes += encoded.bytes
        if encoded.note is not None:
            context.report(Note(encoded.note))
        now = time.monotonic()
        if now - said >= _REPORT_SECONDS and number < count:
            said = now
            rate = text_bytes / (now - began) / 1e6
            context.report(Note(f"{number:,} of {count:,} shards of documents are encoded, {rate:,.1f} MB/s"))


def _tokens_description(
    job: Job,
    tokenizer: Tokenizer,
    source: str,
    units: Sequence[tuple[Unit, EncodedUnit]],
    lengths: Mapping[str, Mapping[int, int]],
    shards: Mapping[str, Sequence[TokenShard]],
) -> dict[str, Any]:
    """What `tokens.json` holds."""
    splits = {}
    for split, of_split in shards.items():
        encoded = [one for unit, one in units if unit.split == split]
        splits[split] = {
            "documents": sum(shard.documents for shard in of_split),
            "tokens": sum(shard.tokens for shard in of_split),
            "counted_tokens": sum(shard.counted_tokens for shard in of_split),
            "bytes": sum(one.bytes for one in encoded),
            "longest_document": max(lengths[split]),
            "lengths": sorted(lengths[split].items()),
            "shards": [
                shard.model_dump(include={"name", "tokens", "documents", "counted_tokens"}) for shard in of_split
            ],
        }
    return {
        "vocab_size": job.vocab_size,
        "pad_id": tokenizer.pad_id,
        "bos_id": job.bos_id,
        "eos_id": job.eos_id,
        "dtype": job.dtype,
        "source": source,
        "splits": splits,
    }


def _metrics(
    tokens: Mapping[str, Any],
    units: Sequence[tuple[Unit, EncodedUnit]],
    choice: Choice | None,
    reused: int,
    seconds: float,
) -> Metrics:
    splits = {
        split: {
            **{key: one[key] for key in ("documents", "tokens", "counted_tokens", "bytes", "longest_document")},
            "bytes_per_token": one["bytes"] / one["tokens"] if one["tokens"] else None,
            "shards": len(one["shards"]),
        }
        for split, one in tokens["splits"].items()
    }
    counted, documents = (sum(one[key] for one in splits.values()) for key in ("tokens", "documents"))
    return {
        "summary": f"{counted:,} tokens in {documents:,} documents",
        "tokens": counted,
        "documents": documents,
        "dtype": tokens["dtype"],
        "splits": splits,
        "encoder": None if choice is None else choice.model_dump(),
        "encoded_by": Counter(encoded.library for _, encoded in units),
        "seconds": seconds,
        "units": {"encoded": len(units) - reused, "found_finished": reused},
        "notes": _shortened([encoded.note for _, encoded in units if encoded.note is not None]),
    }


def _shortened(notes: Sequence[str]) -> list[str]:
    """The first notes, and how many more there are: a library that a cluster lacks has one for every shard."""
    if len(notes) <= NOTES_AT_MOST:
        return list(notes)
    return [*notes[:NOTES_AT_MOST], f"and {len(notes) - NOTES_AT_MOST:,} more such notes"]


STAGE = Stage(
    name="tokens",
    version=3,
    config=Config,
    inputs={"documents": Kind.DOCUMENTS, "tokenizer": Kind.TOKENIZER},
    output=Kind.TOKENS,
    run=run,
)
