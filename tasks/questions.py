"""The problems of documents, as a model is asked them: prompts and targets, or conversations."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError, suggestion
from common.files import canonical_json, sha256_bytes
from models.chat import Message
from tasks.corpus.conversations import CHOSEN, MESSAGES, REJECTED, parsed
from tasks.corpus.sources import SPLITS
from tasks.exact_match import BY_DEFAULT, READ

ID_DIGITS = 16


class Questions(NamedTuple):
    """What a model is asked."""

    prompts: list[str]
    """As people read them: of a conversation, what is said before the last answer, a line each."""
    targets: list[str]
    """What it has to answer."""
    conversations: list[list[Message]] | None
    """Whole conversations, of which each target is the last answer; None where prompts are texts to go on with."""
    columns: dict[str, list[Any]]
    """The columns of the documents that exact match is told by."""


def problem_id(prompt: str, target: str) -> str:
    """What a problem is called, the same for every model: the first digits of the SHA-256 of prompt and target."""
    return sha256_bytes(canonical_json([prompt, target]))[:ID_DIGITS]


def read_questions(documents: Path, split: str, by: Sequence[str] | None = ()) -> Questions:
    """The problems of a split: conversations where it has messages. Raises UserError where there are none, and for a
    column that they are told by and have not."""
    import pyarrow.parquet as pq

    prompts: list[str] = []
    targets: list[str] = []
    conversations: list[list[Message]] = []
    kept: dict[str, list[Any]] = {}
    for path in sorted(documents.glob(f"{split}-*.parquet")):
        file = pq.ParquetFile(path)
        columns = file.schema_arrow.names
        problem = unaskable(columns)
        if problem is not None:
            raise UserError(f"the documents {problem}")
        wanted = _wanted(by, columns)
        table = file.read(list({MESSAGES, "prompt", "target", *wanted} & {*columns}))
        for name in wanted:
            kept.setdefault(name, []).extend(table[name].to_pylist())
        if MESSAGES in columns:
            for row, text in enumerate(table[MESSAGES].to_pylist()):
                conversations.append(_conversation(text, f"{path.name}, row {row}"))
            continue
        prompts += table["prompt"].to_pylist()
        targets += table["target"].to_pylist()
    if conversations:
        prompts = ["\n".join(message["content"] for message in messages[:-1]) for messages in conversations]
        targets = [messages[-1]["content"] for messages in conversations]
    if not prompts:
        raise UserError(f"the documents {no_split(split, (path.name for path in documents.iterdir()))}")
    return Questions(prompts, targets, conversations or None, kept)


def _wanted(by: Sequence[str] | None, columns: Collection[str]) -> list[str]:
    """The columns that exact match is told by, of those that the documents have."""
    for name in by or ():
        if name not in columns and name not in READ:
            raise UserError(f"by: the documents have no column '{name}'{suggestion(name, {*READ, *columns})}")
    return [name for name in (BY_DEFAULT if by is None else by) if name in columns]


def unaskable(columns: Collection[str]) -> str | None:
    """Why documents with such columns cannot be asked, to be said of them; None where they can."""
    if {MESSAGES, CHOSEN, REJECTED} <= set(columns):
        return "are preferences, of which neither answer is one to be met; exact match needs conversations or problems"
    if MESSAGES in columns:
        return None
    missing = [name for name in ("prompt", "target") if name not in columns]
    return f"have no column '{missing[0]}'; exact match needs prompts and targets" if missing else None


def no_split(split: str, files: Iterable[str]) -> str:
    """That documents with such files lack a split, to be said of them, and which others they have."""
    splits = {name.partition("-")[0] for name in files} - {split}
    others = " and ".join(one for one in SPLITS if one in splits)
    return f"have no {split} split to evaluate" + (f"; they have {others}" if others else "")


def _conversation(text: str, place: str) -> list[Message]:
    """The messages in a cell. Raises UserError where they are no conversation that ends with an answer."""
    try:
        return parsed(text)
    except UserError as error:
        raise UserError(f"the documents hold no conversation in {place} ({error}); make them again") from error
