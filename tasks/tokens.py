"""Stage `tokens`: documents, texts or conversations, as shards of token ids, with the mask of what counts in the
loss."""

import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from artifacts.identity import check_file_name
from common.config import FrozenModel
from common.errors import StageInterrupted, UserError
from common.files import canonical_json
from models.chat import Template
from models.tokenizer import Tokenizer, begin_with_eos, tokenizer_files
from models.training.events import Note
from tasks.encoding.card import write_card
from tasks.encoding.choice import WORTH_IT_BYTES, Choice, choose, sampled_texts, the_reference
from tasks.encoding.conversations import LossOn, check_documents, give_template
from tasks.encoding.description import describe, measured
from tasks.encoding.encoders import Reference
from tasks.encoding.finished import FinishedUnits
from tasks.encoding.pool import WORTH_A_PROCESS_BYTES, encode_in_processes
from tasks.encoding.ray_pool import encode_over_ray
from tasks.encoding.units import EncodedUnit, Encoders, Job, Unit, encode_unit
from tasks.encoding.worker import Order
from tasks.stage import Context, Kind, Metrics, Stage

Results = Generator[tuple[Unit, EncodedUnit], None, None]
_REPORT_SECONDS = 10.0


class Config(FrozenModel):
    """How documents become tokens."""

    # Null stands in no key: texts are made into the tokens that they were before there were conversations.
    template: Template | None = Field(default=None, exclude_if=lambda template: template is None)
    """How conversations become text, which the tokenizer then says in `transformers` too: `plain`, with names before
    the messages and <eos> after each answer, or `chatml`, with <|im_start|> and <|im_end|> around each message, which
    are added where the tokenizer lacks them. Null for documents that are texts."""
    loss_on: LossOn = "text"
    """What is trained on. Of texts: `text`, every token, or `target`, those of the column `target` and the <eos> after
    it. Of conversations: `assistant`, every answer and the token that closes it. Of preferences: `pairs`, the answer
    and what closes it in each of two documents, the chosen and then the rejected one."""
    max_tokens: int | None = Field(default=None, gt=0, exclude_if=lambda tokens: tokens is None)
    """Tokens of a conversation at most: a longer one is cut after the last answer that fits, and left out where none
    does, as is a preference of which one answer is too long. One more than the sequence_length of the tuning, whose
    rows cut what is longer anywhere. Null for any number."""
    bos: bool = False
    """Whether <bos> stands before each document. It is never trained on. Without it, <eos> takes its place before a
    prompt that is a text: it is what stands before most documents."""
    eos: bool = True
    """Whether <eos> stands after each document. It is trained on. Conversations are always closed by their template."""
    shard_tokens: int = Field(default=1 << 25, gt=0)
    """Tokens after which a shard is full; documents are never divided."""

    @model_validator(mode="after")
    def _check_conversations(self) -> Self:
        of_conversations = self.loss_on in ("assistant", "pairs")
        if of_conversations and self.template is None:
            raise ValueError(f"loss_on {self.loss_on} is for conversations: give them a template, plain or chatml")
        if self.template is not None and not of_conversations:
            raise ValueError(f"loss_on {self.loss_on} is for texts: with a template, make it assistant or pairs")
        if self.template is None and self.max_tokens is not None:
            raise ValueError("max_tokens is for conversations, which a template makes text of; leave it out")
        if self.template is not None and not self.eos:
            raise ValueError("eos: the template closes every answer; leave it out")
        return self


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
    loss is on targets, that are no conversations where there is a template or are some where there is none, and for
    none at all.
    """
    started = time.monotonic()
    documents = _described(inputs["documents"])
    check_documents(documents, config.template, config.loss_on)
    units = _units(documents)
    encoded_by, tokenizer = _write_tokenizer(config, inputs["tokenizer"], context.output)
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
        template=config.template,
        max_tokens=config.max_tokens,
    )
    order = Order(job=job, documents=inputs["documents"], tokenizer=encoded_by, output=finished.folder)
    reused = len(done.units)
    with closing(_encoded(left, order, context)) as encoded_units:
        for unit, encoded in _reported(encoded_units, len(left), context):
            finished.keep(unit, encoded)
            done.add(unit, encoded)
    in_order = [(unit, done.units[unit.key]) for unit in units]
    _check_left(in_order, config)
    shards = finished.put_together(in_order, context.output)
    tokens = describe(job, tokenizer, str(documents["source"]["name"]), in_order, done.lengths, shards)
    (context.output / "tokens.json").write_bytes(canonical_json(tokens))
    write_card(context.logs, documents, tokens, context.output, context.name)
    return measured(tokens, in_order, choice, reused, time.monotonic() - started)


def _write_tokenizer(config: Config, source: Path, output: Path) -> tuple[Path, Tokenizer]:
    """Puts the tokenizer that goes with the tokens into the output; gives the one that encodes, with its folder."""
    copy_tokenizer(source, output)
    folder = output / "tokenizer"
    if config.template is not None:
        give_template(folder, config.template, config.bos)
        return folder, Tokenizer(folder)
    if not config.bos:
        begin_with_eos(folder)
    return source, Tokenizer(source)


def _check_left(units: Sequence[tuple[Unit, EncodedUnit]], config: Config) -> None:
    """Raises UserError for a split of which no conversation is left."""
    for split in dict.fromkeys(unit.split for unit, _ in units):
        of_split = [encoded for unit, encoded in units if unit.split == split]
        if not any(encoded.documents for encoded in of_split):
            dropped = sum(encoded.dropped for encoded in of_split)
            raise UserError(
                f"max_tokens {config.max_tokens}: none of the {dropped:,} conversations of the split {split} fits; "
                "raise it"
            )


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
    if config.loss_on != "text":
        return the_reference("the place of each token in its text is needed, to see where what is trained on begins")
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


STAGE = Stage(
    name="tokens",
    version=4,
    config=Config,
    inputs={"documents": Kind.DOCUMENTS, "tokenizer": Kind.TOKENIZER},
    output=Kind.TOKENS,
    run=run,
)
