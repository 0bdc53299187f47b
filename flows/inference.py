"""Using a model: continuing prompts, answering them, scoring it again. One in a folder or on the hub is taken into the
store first."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from artifacts.record import InputReference, Record
from artifacts.store import Store
from common.errors import UserError
from models.engine import EngineName, check_engine
from models.machine import default_engine
from tasks import pretrained
from tasks.checkpoint import ADAPTER, WEIGHTS
from tasks.corpus.conversations import MESSAGES
from tasks.evaluate import CHAT_TOKENS
from tasks.process import engine_process
from tasks.produce import produce
from tasks.questions import no_split, unaskable
from tasks.registry import STAGES
from tasks.stage import Kind
from tasks.work import Work

logger = logging.getLogger("cairn.flows")


def model_behind(store: Store, record: Record) -> Record:
    """The model that a record is, or was made from. Raises UserError where there is none."""
    kind = STAGES[record.stage].output if record.stage in STAGES else None
    if kind == Kind.MODEL:
        return record
    found = _nearest(store, [record], Kind.MODEL)
    if not found:
        raise UserError(f"'{record.name}' ({record.stage}) is no model and was made from none")
    return found[0]


def model_record(store: Store, ref: str) -> Record:
    """The model that a name or a key in the store stands for or was made from, or else the one in a folder, or of an id
    on the hub, which is taken into the store unless it is there already.

    Raises UserError where there is none, and for one that cannot be read.
    """
    if ref in store.names() or not pretrained.is_model_source(ref):
        return model_behind(store, store.resolve(ref))
    work = Work(
        name=Path(ref).expanduser().resolve().name or ref,
        stage=pretrained.STAGE.name,
        config=pretrained.resolved(pretrained.Config(source=ref)).model_dump(mode="json"),
        inputs={},
        store=store.url,
    )
    return produce(store, work, lambda event: None).record


def _nearest(store: Store, records: Sequence[Record], kind: Kind) -> list[Record]:
    """The artifacts of a kind that records were made from in the fewest steps, each once."""
    nearest = [store.read_record(reference.key) for record in records for reference in record.inputs.values()]
    while nearest:
        known = [made for made in nearest if made is not None and made.stage in STAGES]
        found = {made.key: made for made in known if STAGES[made.stage].output == kind}
        if found:
            return list(found.values())
        nearest = [store.read_record(reference.key) for made in known for reference in made.inputs.values()]
    return []


def read_prompts(path: Path, as_chat: bool = False) -> list[str]:
    """The lines of a text file. Raises UserError where it cannot be read, and for an empty line of what a user says to
    a chat model."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if as_chat and not line.strip():
            raise UserError(f"{path}, line {number} is empty: a chat model has nothing to answer; leave the line out")
    return lines


def write_texts(path: Path, prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Writes what a model wrote: to a `.jsonl` file with the prompts, an object each; to any other one a line each, in
    which \\n and \\r stand for line breaks.

    Raises UserError where the file cannot be written.
    """
    if path.suffix == ".jsonl":
        rows = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    else:
        lines = [text.replace("\n", r"\n").replace("\r", r"\r") for text in texts]
    try:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def continue_prompts(
    store: Store,
    ref: str,
    prompts: list[str],
    settings: dict[str, Any],
    engine_name: EngineName | None = None,
    as_chat: bool = False,
) -> list[str]:
    """What a model writes after each prompt, with the engine that suits the machine unless one is named.

    `as_chat`: each prompt is what a user says, and what is written the assistant's answer. Raises UserError for a
    character that its tokenizer does not know, and for a chat where it has no template.
    """
    from models.chat import chat_of
    from models.engine import inference_engine
    from models.generation import generate
    from models.sampling import SamplingConfig
    from models.weights import whole_pieces
    from tasks.checkpoint import read_model, tokenizer_of

    if as_chat and settings.get("max_new_tokens") is None:
        settings = {**settings, "max_new_tokens": CHAT_TOKENS}
    try:
        sampling = SamplingConfig.model_validate({name: value for name, value in settings.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    folder = store.fetch(model_record(store, ref))
    model = read_model(folder)
    tokenizer = tokenizer_of(folder, model.config)
    chat = chat_of(folder / "tokenizer") if as_chat else None
    if chat is not None:
        for number, prompt in enumerate(prompts, 1):
            if not prompt.strip():
                raise UserError(f"prompt {number} is empty: a chat model has nothing to answer; leave it out")
        encoded = [chat.prompt_ids([{"role": "user", "content": prompt}]) for prompt in prompts]
    elif as_chat:
        raise UserError(f"'{ref}' is no chat model: its tokenizer has no chat template; leave --chat out")
    else:
        encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    longest = model.config.max_position_embeddings
    for text, ids in zip(prompts, encoded, strict=True):
        if len(ids) > longest:
            raise UserError(f"the prompt {text[:40]!r} has {len(ids)} tokens; the model takes {longest}")
    engine = inference_engine(engine_name or default_engine(), model.config, "float32", whole_pieces(model.weights))
    answers = generate(engine, encoded, sampling, tokenizer.stop_ids)
    if chat is not None:
        return [chat.answer(answer) for answer in answers]
    return [tokenizer.decode_after(ids, answer) for ids, answer in zip(encoded, answers, strict=True)]


class _Asked(NamedTuple):
    """Documents that a model may be asked."""

    documents: Record
    template: Any = None
    """The one of an evaluation on them, which a model without a template of its own was asked with."""


def evaluate_ref(
    store: Store, ref: str, split: str, engine_name: EngineName | None = None, max_new_tokens: int | None = None
) -> list[Record]:
    """The records of a model's scores, by the engine that suits the machine unless one is named.

    It is asked the documents that evaluations in the store asked it, or else those that it was made from; where none of
    these can be asked, those of the model that it was made from, and so on. Which ones cannot be is logged. A model
    in a folder is asked what the one of the same weights in the store would be.

    `max_new_tokens`: tokens after which an answer is cut off; None for what the stage `evaluate` has. Raises UserError
    where there is nothing to ask.
    """
    from models.chat import chat_of

    model = model_record(store, ref)
    engine = engine_name or default_engine()
    check_engine(engine)
    settings = {"split": split, "engine": engine, "max_new_tokens": max_new_tokens}
    is_chat = chat_of(store.fetch(model) / "tokenizer") is not None
    problems: dict[str, str] = {}
    works: list[tuple[Work, Record | None]] = []
    for group in _documents(store, model, split):
        for documents, template in group:
            work = _evaluation(store, model, documents, {**settings, "template": None if is_chat else template})
            found = store.find(work.key)
            problem = None if found is not None else _problem(store, documents, split, is_chat or template is not None)
            if problem is None:
                works.append((work, found))
            else:
                problems[documents.output] = f"'{documents.name}' ({documents.key[:8]}) {problem}"
        if works:
            break
    if not works and not problems:
        raise UserError(f"the documents that '{ref}' was made from are not in the store")
    if not works:
        raise UserError(f"there is nothing to ask '{ref}': the documents {'; the documents '.join(problems.values())}")
    for problem in problems.values():
        logger.warning("left out: the documents %s", problem)
    if all(found is not None for _, found in works):
        return [found for _, found in works if found is not None]
    with engine_process() as process:
        return [found or process.do(work, lambda event: None).record for work, found in works]


def _documents(store: Store, model: Record, split: str) -> Iterator[list[_Asked]]:
    """The documents that a model may be asked, in groups of which the first that serves is taken: those that it was
    evaluated on, those that it was made from, and the same of the model that it was made from, and so on."""
    evaluations = sorted(
        (one for one in store.records() if one.stage == "evaluate" and one.config.get("split") == split),
        key=lambda one: one.started,
    )
    models = _of_the_same_weights(store, model)
    while models:
        outputs = {one.output for one in models}
        asked: dict[str, _Asked] = {}
        for evaluation in evaluations:
            if evaluation.inputs["model"].digest in outputs:
                documents = store.read_record(evaluation.inputs["documents"].key)
                if documents is not None:
                    asked.setdefault(documents.output, _Asked(documents, evaluation.config.get("template")))
        yield list(asked.values())
        yield [_Asked(documents) for documents in _nearest(store, models, Kind.DOCUMENTS)]
        models = _nearest(store, models, Kind.MODEL)


def _of_the_same_weights(store: Store, model: Record) -> list[Record]:
    """A model, with those in the store that are the same where it was taken in from elsewhere: it knows of no documents
    itself, and may have been published from here."""
    if model.stage != pretrained.STAGE.name:
        return [model]
    return [model] + [
        one
        for one in store.records()
        if one.key != model.key
        and one.files.get(WEIGHTS) == model.files[WEIGHTS]
        and one.stage in STAGES
        and STAGES[one.stage].output == Kind.MODEL
        and not any(name.startswith(f"{ADAPTER}/") for name in one.files)
    ]


def _evaluation(store: Store, model: Record, documents: Record, settings: dict[str, Any]) -> Work:
    return Work(
        name="evaluation",
        stage="evaluate",
        config=STAGES["evaluate"].config.model_validate(settings).model_dump(mode="json"),
        inputs={
            "model": InputReference(digest=model.output, key=model.key),
            "documents": InputReference(digest=documents.output, key=documents.key),
        },
        store=store.url,
    )


def _problem(store: Store, documents: Record, split: str, has_template: bool) -> str | None:
    """Why documents cannot be asked, to be said of them; None where they can. Of their files one is read."""
    import pyarrow.parquet as pq

    of_split = sorted(name for name in documents.files if name.startswith(f"{split}-"))
    if not of_split:
        return no_split(split, documents.files)
    columns = pq.read_schema(store.fetch(documents, of_split[:1]) / of_split[0]).names
    problem = unaskable(columns)
    if problem is None and MESSAGES in columns and not has_template:
        return "are conversations, and the model's tokenizer has no chat template"
    return problem
