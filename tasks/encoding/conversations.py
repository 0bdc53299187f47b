"""Conversations of a shard of documents as token ids, with the mask of what the assistant says.

N tokens, D documents.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from models.chat import Chat, Exchange, Message, Template, write_chat
from models.tokenizer import begin_with_eos
from tasks.corpus.conversations import CHOSEN, MESSAGES, REJECTED, parsed
from tasks.encoding.encoders import Encoded, joined

LossOn = Literal["text", "target", "assistant", "pairs"]
"""What counts in the loss: all of a text; the target that it ends with; what an assistant says in a conversation; its
last answer, in the two conversations of a preference."""
COLUMNS: Mapping[LossOn, tuple[str, ...]] = {
    "text": (),
    "target": ("target",),
    "assistant": (MESSAGES,),
    "pairs": (MESSAGES, CHOSEN, REJECTED),
}
"""The columns of documents that are read beside the text."""


class Conversations(NamedTuple):
    """The conversations of some documents that fit."""

    encoded: Encoded
    counted_N: NDArray[np.bool_]
    kept: list[int]
    """The documents that they are from, by their places."""
    cut: int
    """How many of them were cut after an earlier answer."""


def check_documents(documents: Mapping[str, Any], template: Template | None, loss_on: LossOn) -> None:
    """Raises UserError where what `documents.json` says does not fit the config of the tokens."""
    name, holds = documents["source"]["name"], documents.get("conversations")
    if holds is None and template is not None:
        raise UserError(
            f"template: the documents of {name} are texts; leave it out, or read them with the key conversations"
        )
    if holds is not None and template is None:
        wanted = "pairs" if holds == "preferences" else "assistant"
        raise UserError(
            f"the documents of {name} are conversations: give the tokens a template, plain or chatml, and "
            f"loss_on: {wanted}"
        )
    if holds == "preferences" and loss_on != "pairs":
        raise UserError(f"loss_on: the documents of {name} are preferences; make it pairs")
    if holds == "messages" and loss_on == "pairs":
        raise UserError(f"loss_on: the documents of {name} are no preferences; make it assistant")


def give_template(tokenizer: Path, template: Template, bos: bool) -> None:
    """Gives the tokenizer in a folder a template. Raises UserError for one that cannot have it."""
    if not bos:
        begin_with_eos(tokenizer)
    write_chat(tokenizer, template, bos)


def encode_conversations(
    columns: Mapping[str, Any], chat: Chat, loss_on: LossOn, max_tokens: int | None, place: str, first_row: int
) -> Conversations:
    """The conversations in columns of documents, those of `COLUMNS`: of each preference two, the chosen one first.

    What is longer than `max_tokens` is cut after the last answer that fits; where none does, or it is one of a
    preference, the document is left out. Raises UserError for bad columns, naming the row of `place`.
    """
    pairs = loss_on == "pairs"
    rows = zip(*(columns[name].to_pylist() for name in COLUMNS[loss_on]), strict=True)
    messages = [one for row, values in enumerate(rows, first_row) for one in _read(values, f"{place}, row {row}")]
    found = [_cut(exchanges, max_tokens) for exchanges in chat.exchanges(messages)]
    kept: list[int] = []
    chosen: list[Sequence[Exchange]] = []
    cut = 0
    size = 2 if pairs else 1
    for document in range(len(found) // size):
        those = found[document * size : (document + 1) * size]
        if all(exchanges and not (pairs and short) for exchanges, short in those):
            kept.append(document)
            cut += those[0][1]
            chosen += [exchanges for exchanges, _ in those]
    counted = [_counted(exchanges, pairs) for exchanges in chosen]
    encoded = joined([[token for one in exchanges for token in one.ids] for exchanges in chosen])
    return Conversations(encoded, np.concatenate([np.zeros(0, bool), *counted]), kept, cut)


def _read(values: tuple[str, ...], place: str) -> list[list[Message]]:
    """The conversations of a document: one, or the two of a preference."""
    try:
        if len(values) == 1:
            return [parsed(values[0])]
        prompt = parsed(values[0], last="user")
        return [[*prompt, Message(role="assistant", content=answer)] for answer in values[1:]]
    except UserError as error:
        raise UserError(f"{place}: {error}; make the documents again") from error


def _cut(exchanges: Sequence[Exchange], max_tokens: int | None) -> tuple[Sequence[Exchange], bool]:
    """The exchanges that fit, and whether those are not all."""
    if max_tokens is None:
        return exchanges, False
    ends = np.cumsum([len(one.ids) for one in exchanges])
    fitting = int(np.searchsorted(ends, max_tokens, side="right"))
    return exchanges[:fitting], fitting < len(exchanges)


def _counted(exchanges: Sequence[Exchange], last_alone: bool) -> NDArray[np.bool_]:
    masks = [np.array(one.counted, bool) for one in exchanges]
    if last_alone:
        for mask in masks[:-1]:
            mask[:] = False
    return np.concatenate(masks)
