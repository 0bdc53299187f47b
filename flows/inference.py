"""Using a model that is in the store: continuing prompts, answering them, scoring it again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from artifacts.record import InputReference, Record
from artifacts.store import Store
from common.errors import UserError
from models.engine import EngineName, check_engine
from models.machine import default_engine
from tasks.process import engine_process
from tasks.registry import STAGES
from tasks.stage import Kind
from tasks.work import Work

CHAT_TOKENS = 256
"""Tokens that an answer of a chat model may have in an evaluation that names no number."""


def model_behind(store: Store, record: Record) -> Record:
    """The model that a record is, or was made from. Raises UserError where there is none."""
    kind = STAGES[record.stage].output if record.stage in STAGES else None
    if kind == Kind.MODEL:
        return record
    found = _nearest(store, record, Kind.MODEL)
    if not found:
        raise UserError(f"'{record.name}' ({record.stage}) is no model and was made from none")
    return found[0]


def _nearest(store: Store, record: Record, kind: Kind) -> list[Record]:
    """The artifacts of a kind that a record was made from in the fewest steps, each once."""
    nearest = [store.read_record(reference.key) for reference in record.inputs.values()]
    while nearest:
        known = [made for made in nearest if made is not None and made.stage in STAGES]
        found = {made.key: made for made in known if STAGES[made.stage].output == kind}
        if found:
            return list(found.values())
        nearest = [store.read_record(reference.key) for made in known for reference in made.inputs.values()]
    return []


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file. Raises UserError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


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

    try:
        sampling = SamplingConfig.model_validate({name: value for name, value in settings.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    folder = store.fetch(model_behind(store, store.resolve(ref)))
    model = read_model(folder)
    tokenizer = tokenizer_of(folder, model.config)
    chat = chat_of(folder / "tokenizer") if as_chat else None
    if chat is not None:
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


def evaluate_ref(
    store: Store, ref: str, split: str, engine_name: EngineName | None = None, max_new_tokens: int | None = None
) -> list[Record]:
    """The records of a model's scores on the documents that it was made from, by the engine that suits the machine
    unless one is named.

    `max_new_tokens`: tokens after which an answer is cut off; None for as many as suit a sum, or a chat.
    """
    from models.chat import chat_of

    model = model_behind(store, store.resolve(ref))
    sources = _nearest(store, model, Kind.DOCUMENTS)
    if not sources:
        raise UserError(f"the documents that '{ref}' was made from are not in the store")
    engine = engine_name or default_engine()
    check_engine(engine)
    if max_new_tokens is None and chat_of(store.fetch(model) / "tokenizer") is not None:
        max_new_tokens = CHAT_TOKENS
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    config = STAGES["evaluate"].config.model_validate({"split": split, "engine": engine, **limit})
    works = [
        Work(
            name="evaluation",
            stage="evaluate",
            config=config.model_dump(mode="json"),
            inputs={
                "model": InputReference(digest=model.output, key=model.key),
                "documents": InputReference(digest=documents.output, key=documents.key),
            },
            store=store.url,
        )
        for documents in sources
    ]
    found = [store.find(work.key) for work in works]
    if all(found):
        return [record for record in found if record is not None]
    with engine_process() as process:
        return [
            record or process.do(work, lambda event: None).record for work, record in zip(works, found, strict=True)
        ]
