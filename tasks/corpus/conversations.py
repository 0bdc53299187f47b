"""Rows of instruction, chat and preference data sets as conversations, which are documents with more columns.

The text of a conversation has its contents, one after the other, and its column `messages` the messages of
`models.chat` as JSON. Of a preference, `messages` is the prompt, and `chosen` and `rejected` are two answers to it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import orjson

from common.errors import UserError
from common.files import canonical_json
from models.chat import Message, Role, checked
from tasks.corpus.sources import TEXT, ConversationFormat, Refusal

if TYPE_CHECKING:
    import pyarrow as pa

MESSAGES, CHOSEN, REJECTED = "messages", "chosen", "rejected"
Document = dict[str, str]
Row = Mapping[str, Any]

_SHAREGPT: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_TRANSCRIPT: Mapping[str, Role] = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(rf"(?:\A|\n\n)({'|'.join(_TRANSCRIPT)}):")
"""What begins a message in the transcripts of Anthropic/hh-rlhf."""


class RowFormat(NamedTuple):
    """How the rows of a data set hold their conversations."""

    document: Callable[[Row], Document]
    """The document of a row. Raises UserError, in a line without the place, where it holds no conversation."""
    columns: tuple[str, ...]
    """The columns that it is made from."""
    optional: tuple[str, ...] = ()
    """Columns that are read where they are there."""
    written: tuple[str, ...] = (TEXT, MESSAGES)
    """The columns of the document."""


def parsed(messages: str, last: Literal["user", "assistant"] = "assistant") -> list[Message]:
    """The messages in a document's column, the last of them of the role `last`.

    Raises UserError, in a line without the place, for what is none.
    """
    try:
        value = orjson.loads(messages)
    except orjson.JSONDecodeError as error:
        raise UserError(f"its messages are no JSON ({error})") from error
    return checked(value, last)


def conversation_columns(
    table: "pa.Table", format: RowFormat, refuse: Callable[[int, Refusal, str], None]
) -> "tuple[dict[str, pa.Array], list[int]]":
    """The columns of the documents that rows of a table become, and the rows that did. `refuse` is told of the others:
    their row, and what is wrong with it."""
    import pyarrow as pa

    columns = {name: table[name] for name in (*format.columns, *format.optional) if name in table.column_names}
    documents: list[Document] = []
    rows: list[int] = []
    for row in range(table.num_rows):
        try:
            documents.append(format.document({name: column[row].as_py() for name, column in columns.items()}))
            rows.append(row)
        except UserError as error:
            refuse(row, "no_conversation", str(error))
        except UnicodeDecodeError as error:
            refuse(row, "not_utf8", f"it is no valid UTF-8 ({error.reason} at byte {error.start})")
    return {name: pa.array([one[name] for one in documents], pa.string()) for name in format.written}, rows


def _document(messages: Sequence[Message]) -> Document:
    return {TEXT: "\n".join(message["content"] for message in messages), MESSAGES: _json(messages)}


def _json(messages: Sequence[Message]) -> str:
    return canonical_json(messages).decode()


def _instruction(row: Row, instruction: str, context: str, answer: str) -> Document:
    """An instruction, with what it is about behind a blank line where there is something."""
    said, about = _text(row, instruction), "" if row[context] is None else _text(row, context)
    asked = f"{said}\n\n{about}" if about.strip() else said
    return _question(asked, _text(row, answer))


def _question(asked: str, answered: str) -> Document:
    return _document(checked([{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]))


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"'{column}' is {'null' if value is None else f'no text but {type(value).__name__}'}")
    return value


def _sharegpt(row: Row) -> Document:
    return _document(_answered(_list(row, "conversations"), _SHAREGPT, "from", "value"))


def _messages(row: Row) -> Document:
    return _document(_answered(_list(row, MESSAGES), None, "role", "content"))


def _list(row: Row, column: str) -> list[Any]:
    value = row[column]
    if not isinstance(value, list):
        raise UserError(f"'{column}' is {'null' if value is None else f'no list but {type(value).__name__}'}")
    return value


def _answered(values: Sequence[Any], roles: Mapping[str, Role] | None, role: str, content: str) -> list[Message]:
    """The messages up to the last answer: nothing could be learnt from a question without one."""
    messages = [_renamed(value, roles, role, content) for value in values]
    if len(messages) > 1 and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "user":
        messages = messages[:-1]
    return checked(messages)


def _renamed(value: Any, roles: Mapping[str, Role] | None, role: str, content: str) -> Any:
    """A message under the names that it has here; what is none stays as it is."""
    if roles is None or not isinstance(value, Mapping):
        return value
    name = value.get(role)
    return {"role": roles.get(name, name) if isinstance(name, str) else name, "content": value.get(content)}


def _preference(row: Row) -> Document:
    """The prompt and the two answers to it.

    The answers are texts, or lists of messages of which the last is the answer and those before it are the prompt. Else
    the prompt is `prompt`, a text or a list of messages. Without it, texts are transcripts as in Anthropic/hh-rlhf.
    """
    (before, chosen), (other, rejected) = (_answer(row, column) for column in (CHOSEN, REJECTED))
    if before != other:
        raise UserError(f"'{CHOSEN}' and '{REJECTED}' do not answer the same prompt")
    prompt = checked(before or _prompt(row.get("prompt")), last="user")
    # They are checked as what they are: answers to this prompt.
    for answer in (chosen, rejected):
        checked([*prompt, {"role": "assistant", "content": answer}])
    if chosen.strip() == rejected.strip():
        raise UserError(f"'{CHOSEN}' and '{REJECTED}' are the same answer")
    contents = [*(message["content"] for message in prompt), chosen, rejected]
    return {TEXT: "\n".join(contents), MESSAGES: _json(prompt), CHOSEN: chosen, REJECTED: rejected}


def _prompt(value: Any) -> Any:
    if value is None:
        raise UserError(f"it has no prompt: neither is there a column 'prompt', nor is it part of '{CHOSEN}'")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _answer(row: Row, column: str) -> tuple[list[Message], str]:
    """What stands before an answer in its own column, if anything, and the answer."""
    value = row[column]
    if isinstance(value, str):
        if row.get("prompt") is not None:
            return [], value
        messages: Any = _transcript(value)
    else:
        messages = _list(row, column)
        if len(messages) == 1:
            # Alone, it is no conversation; with the prompt before it, it is looked at again.
            messages = [{"role": "user", "content": column}, *messages]
            return [], checked(messages)[-1]["content"]
    *before, last = checked(messages)
    return before, last["content"]


def _transcript(text: str) -> list[Message]:
    """The messages of a text in which each begins with its speaker. Raises UserError where none does at once."""
    _, *found = _SPEAKER.split(text)
    if not found or _SPEAKER.match(text) is None:
        raise UserError("it has no column 'prompt', and its answers are no transcripts that begin with 'Human:'")
    return [
        Message(role=_TRANSCRIPT[speaker], content=content.strip())
        for speaker, content in zip(found[::2], found[1::2], strict=True)
    ]


FORMATS: Mapping[ConversationFormat, RowFormat] = {
    "alpaca": RowFormat(
        lambda row: _instruction(row, "instruction", "input", "output"), ("instruction", "input", "output")
    ),
    "gsm8k": RowFormat(lambda row: _question(_text(row, "question"), _text(row, "answer")), ("question", "answer")),
    "dolly": RowFormat(
        lambda row: _instruction(row, "instruction", "context", "response"), ("instruction", "context", "response")
    ),
    "sharegpt": RowFormat(_sharegpt, ("conversations",)),
    "messages": RowFormat(_messages, (MESSAGES,)),
    "preferences": RowFormat(_preference, (CHOSEN, REJECTED), ("prompt",), (TEXT, MESSAGES, CHOSEN, REJECTED)),
}
