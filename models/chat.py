"""Conversations as tokens: rendered here alone, for training, evaluation and inference, and in the same way by
`transformers`, for which the template is written into `tokenizer_config.json`.

A conversation is a list of messages: one of the system or none, then one of the user and one of the assistant in turn.
White space around a content is left out, so that an answer never begins with what a tokenizer would join to the marker
before it. A special token that is written out in a content is ordinary text here. `apply_chat_template` takes it for
the token: there alone its ids are others.
"""

import copy
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import tokenizers
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend

from common.errors import UserError
from models.tokenizer import (
    CHAT_SETTING,
    TEXT_EOS,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    Tokenizer,
    read_backend,
    read_settings,
    text_roles,
    write_settings,
)

Template = Literal["plain", "chatml"]
Role = Literal["system", "user", "assistant"]
START, END = "<|im_start|>", "<|im_end|>"
"""What opens and closes a message in ChatML."""

_NAMES: Mapping[Role, str] = {"system": "System", "user": "User", "assistant": "Assistant"}
_JINJA: Mapping[Template, str] = {
    "plain": (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] | trim + eos_token }}"
        "{% elif message['role'] == 'system' %}{{ 'System: ' + message['content'] | trim + '\\n' }}"
        "{% else %}{{ 'User: ' + message['content'] | trim + '\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}


class Message(TypedDict):
    """What one side says."""

    role: Role
    content: str


class Part(NamedTuple):
    """A piece of a rendered conversation."""

    text: str
    special: bool = False
    """Whether it is a special token."""
    counted: bool = False
    """Whether it is trained on: what the assistant says and the token that closes it."""


class Exchange(NamedTuple):
    """What the user says and what the assistant answers, with what the system says before the first, as tokens."""

    ids: list[int]
    counted: list[bool]
    """Whether each token is trained on."""


def checked(messages: object, last: Literal["user", "assistant"] = "assistant") -> list[Message]:
    """The messages of a conversation whose last one is of the role `last`.

    Raises UserError, in a line without the place, for what is no such conversation.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("a conversation is a list of messages, and this is none")
    found = [_message(number, message) for number, message in enumerate(messages, 1)]
    for number, message in enumerate(found, 1):
        role = message["role"]
        if role == "system" and number > 1:
            raise UserError(f"message {number} is of the system, which can only speak first")
        before = found[number - 2]["role"] if number > 1 else None
        if role == "assistant" and before != "user":
            raise UserError(f"message {number} is of the assistant, and no message of the user is before it")
        if role == "user" and before == "user":
            raise UserError(f"messages {number - 1} and {number} are both of the user")
    if found[-1]["role"] != last:
        if last == "assistant" and all(message["role"] != last for message in found):
            raise UserError("the assistant says nothing")
        raise UserError(f"the last message is of the {found[-1]['role']}, not of the {last}")
    return found


def _message(number: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(f"message {number} is no object with a role and a content")
    content = message.get("content")
    role = next((known for known in _NAMES if known == message.get("role")), None)
    if role is None:
        raise UserError(f"message {number} has the role {message.get('role')!r}, which is none of {', '.join(_NAMES)}")
    if not isinstance(content, str):
        raise UserError(f"message {number} has a content that is no text but {type(content).__name__}")
    if not content.strip():
        raise UserError(f"message {number}, of the {role}, is empty")
    return Message(role=role, content=content)


def write_chat(folder: Path, template: Template, bos: bool) -> None:
    """Gives the tokenizer in a folder a template, in place of any that it has, and the tokens that this needs.

    The token that closes an answer becomes its eos token, and what closes a text is kept beside the template where it
    is another. `bos`: whether its bos token stands before a conversation.
    Raises UserError where the folder holds no readable tokenizer, or one that cannot have the template.
    """
    settings = read_settings(folder / TOKENIZER_CONFIG)
    of_texts = text_roles(settings)
    text_eos = None if of_texts is None else of_texts.eos
    if template == "chatml":
        _add_tokens(folder / TOKENIZER_FILE)
    eos = END if template == "chatml" else text_eos
    setting = {"name": template, "bos": bos, **({} if text_eos in (None, eos) else {TEXT_EOS: text_eos})}
    begins = "{{ bos_token }}" if bos else ""
    added = {"eos_token": eos, CHAT_SETTING: setting, "chat_template": begins + _JINJA[template]}
    write_settings(folder / TOKENIZER_CONFIG, {**settings, **added})
    Chat(Tokenizer(folder), template, bos)


def _add_tokens(path: Path) -> None:
    """Adds what ChatML needs to a `tokenizer.json`; one that has it keeps its bytes."""
    backend = read_backend(path)
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [token for token in (START, END) if token not in special]
    if not missing:
        return
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{path} has ids that it leaves out, where {' and '.join(missing)} find no place; mend it")
    backend.save(str(path))


def chat_of(folder: Path) -> "Chat | None":
    """The chat template of the tokenizer in a folder; None where it has none that was made here.

    Raises UserError where the folder holds no readable tokenizer.
    """
    path = folder / TOKENIZER_CONFIG
    setting = read_settings(path).get(CHAT_SETTING)
    if setting is None:
        return None
    named = [setting.get(key) for key in ("name", "bos")] if isinstance(setting, dict) else []
    if named not in [[name, bos] for name in _JINJA for bos in (True, False)]:
        raise UserError(
            f"{path}: {CHAT_SETTING} is {json.dumps(setting)}, which names no template; make the tokenizer again"
        )
    return Chat(Tokenizer(folder), setting["name"], setting["bos"])


class Chat:
    """A tokenizer with a template.

    The ids of a prompt are what those of any conversation that goes on from it begin with.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, bos: bool, parallel: bool = True) -> None:
        """`bos`: whether <bos> stands before a conversation; `parallel`: whether many are encoded on every core.

        Raises UserError where the tokenizer lacks what the template needs, or would give other ids in `transformers`.
        """
        self.tokenizer = tokenizer
        self.template = template
        self._parallel = parallel
        backend = tokenizer.backend
        self._bos = str(backend.id_to_token(tokenizer.bos_id)) if bos else None
        self._closing = END if template == "chatml" else str(backend.id_to_token(tokenizer.eos_id))
        self.closing_id = self._id(self._closing)
        """The token that closes what the assistant says: generation stops there."""
        self._inner = _within_text(tokenizer)
        self._check()

    def rendered(self, messages: Sequence[Message], generation_prompt: bool = False) -> list[Part]:
        """A conversation in parts, whose texts together are what the Jinja template gives.

        `generation_prompt` appends what stands before an answer. The messages are not checked.
        """
        parts = [Part(self._bos, special=True)] if self._bos is not None else []
        for message in messages:
            parts += self._turn(message["role"], message["content"].strip())
        if generation_prompt:
            parts += self._turn("assistant", None)
        return parts

    def _turn(self, role: Role, content: str | None) -> Iterator[Part]:
        """A message; without a content, what stands before one."""
        counted = role == "assistant"
        if self.template == "chatml":
            yield Part(START, special=True)
            yield Part(f"{role}\n")
            if content is not None:
                yield Part(content, counted=counted)
                yield Part(END, special=True, counted=counted)
                yield Part("\n")
            return
        yield Part(f"{_NAMES[role]}:")
        if content is not None:
            # The space is the answer's: a tokenizer that has words begin with one would join it to the first.
            yield Part(f" {content}", counted=counted)
            yield Part(self._closing, special=True, counted=True) if counted else Part("\n")

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids from which an answer to the last message, one of the user, is generated.

        Raises UserError for messages out of order, and for what the tokenizer cannot represent.
        """
        parts = self.rendered(checked(messages, last="user"), generation_prompt=True)
        return self._encoded([parts], [True])[0].ids

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation, and whether each is trained on: those that the assistant has to say.

        Raises UserError for messages out of order, and for what the tokenizer cannot represent.
        """
        (exchanges,) = self.exchanges([checked(messages)])
        return [*chain(*(one.ids for one in exchanges))], [*chain(*(one.counted for one in exchanges))]

    def exchanges(self, conversations: Sequence[Sequence[Message]]) -> list[list[Exchange]]:
        """Conversations by their exchanges, whose ids in a row are those of the whole, and of the first ones those of
        a conversation that ends there. The messages are not checked.

        Raises UserError for what the tokenizer cannot represent.
        """
        parts: list[list[Part]] = []
        first: list[bool] = []
        counts: list[int] = []
        for messages in conversations:
            ends = [number for number, message in enumerate(messages, 1) if message["role"] == "assistant"]
            counts.append(len(ends))
            for start, end in zip([0, *ends], ends, strict=False):
                rendered = self.rendered(messages[start:end])
                parts.append(rendered if start == 0 or self._bos is None else rendered[1:])
                first.append(start == 0)
        found = iter(self._encoded(parts, first))
        return [[next(found) for _ in range(count)] for count in counts]

    def answer(self, ids: Sequence[int]) -> str:
        """What the assistant says in generated ids, as a message's content: up to the token that closes it."""
        ids = list(ids)
        said = ids[: ids.index(self.closing_id)] if self.closing_id in ids else ids
        return self.tokenizer.decode(said).strip()

    def _id(self, token: str) -> int:
        found: int | None = self.tokenizer.backend.token_to_id(token)
        if found is None:
            raise UserError(f"the template '{self.template}' needs the token {token!r}, which the tokenizer has not")
        return found

    def _encoded(self, rendered: Sequence[Sequence[Part]], first: Sequence[bool]) -> list[Exchange]:
        """The ids of each list of parts, and which of them count; `first` says which begin a text."""
        runs = [list(_runs(parts)) for parts in rendered]
        begins = [
            at_start and not place for of, at_start in zip(runs, first, strict=True) for place, _ in enumerate(of)
        ]
        texts = [(run, opens) for run, opens in zip(chain(*runs), begins, strict=True) if not run[0].special]
        encodings = self._encodings(texts)
        found = []
        for of in runs:
            ids: list[int] = []
            counted: list[bool] = []
            for run in of:
                if run[0].special:
                    ids.append(self._id(run[0].text))
                    counted.append(run[0].counted)
                else:
                    encoding = next(encodings)
                    ids += encoding.ids
                    counted += self._counted(run, encoding)
            found.append(Exchange(ids, counted))
        return found

    def _encodings(self, texts: Sequence[tuple[Sequence[Part], bool]]) -> Iterator[tokenizers.Encoding]:
        """The tokens of each text in parts; those that a conversation opens with may have others than behind a special
        token."""
        found = {}
        for opens, tokenizer in ((True, self.tokenizer), (False, self._inner)):
            batch = ["".join(part.text for part in run) for run, opening in texts if opening == opens]
            # The library takes a thread per core for a batch, and one for a single text.
            parts = [batch] if self._parallel else [[text] for text in batch]
            found[opens] = iter([encoding for part in parts for encoding in tokenizer.encode_batch(part)])
        return (next(found[opens]) for _, opens in texts)

    def _counted(self, run: Sequence[Part], encoding: tokenizers.Encoding) -> list[bool]:
        """Whether each token of a text counts. Raises UserError for a token that belongs to two of its parts."""
        counted: list[bool] = []
        place = 0
        for part in run:
            if part.counted:
                # The first token that goes beyond the place; a byte that the vocabulary lacks is in none.
                first = bisect_right(encoding.offsets, place, key=lambda offsets: offsets[1])
                if first < len(encoding) and encoding.offsets[first][0] < place:
                    before = "".join(one.text for one in run)[:place]
                    raise UserError(
                        f"the tokenizer joins the beginning of {part.text[:60]!r} to the {before[-20:]!r} before it, "
                        f"which the template '{self.template}' cannot have; take another one, or another tokenizer"
                    )
                counted += [False] * (first - len(counted))
            place += len(part.text)
        return counted + [bool(run[-1].counted)] * (len(encoding) - len(counted))

    def _check(self) -> None:
        """Encodes a conversation in the characters of the template itself as `transformers` would."""
        messages: list[Message] = [
            {"role": "user", "content": "see"},
            {"role": "assistant", "content": "a\nten"},
            {"role": "user", "content": "assistant\nsee"},
            {"role": "assistant", "content": "antenna"},
        ]
        try:
            ids, _ = self.conversation(messages)
            prompt = self.prompt_ids(messages[:3])
        except UserError as error:
            raise UserError(f"the tokenizer cannot have the template '{self.template}': {error}") from error
        text = "".join(part.text for part in self.rendered(messages))
        backend = self.tokenizer.backend
        backend.encode_special_tokens = False
        try:
            whole = backend.encode(text, add_special_tokens=False).ids
        finally:
            backend.encode_special_tokens = True
        if ids != whole or ids[: len(prompt)] != prompt:
            raise UserError(
                f"the tokenizer cannot have the template '{self.template}': it divides a text at special tokens in a "
                "way that gives other ids in transformers; take another template or tokenizer"
            )


def _runs(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """The parts, those together that make one text between two special tokens."""
    run: list[Part] = []
    for part in parts:
        if part.special and run:
            yield run
            run = []
        if part.special:
            yield [part]
        else:
            run.append(part)
    if run:
        yield run


def _within_text(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as it is behind a special token: one that puts a space before the first text alone puts none."""
    words = tokenizer.backend.pre_tokenizer
    if not isinstance(words, pre_tokenizers.Metaspace) or words.prepend_scheme != "first":
        return tokenizer
    # Of a copy, for what a tokenizer gives away of itself is still its own.
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.pre_tokenizer.prepend_scheme = "never"
    backend.encode_special_tokens = True
    inner = copy.copy(tokenizer)
    inner.backend = backend
    return inner
