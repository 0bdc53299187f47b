"""Tokenizers as every stage uses them: one `tokenizer.json`, read by the `tokenizers` library, and the roles of its
special tokens in `tokenizer_config.json`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from common.errors import UserError

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG)
SENTENCEPIECE_FILE = "tokenizer.model"
CHAT_SETTING = "cairn_template"
"""The key of `tokenizer_config.json` that names the chat template."""
ADD_BOS_SETTING = "add_bos_token"
"""The key of `tokenizer_config.json` that says that a text is to have <bos> before it, as `transformers` calls it."""
TEXT_EOS = "text_eos"
"""Beside a template whose closing token is another: what closes a text."""
ENCODED_AT_ONCE = 1 << 18
"""Characters that are encoded at once where only the ids are kept."""


class Roles(NamedTuple):
    """What the special tokens that Cairn itself uses are called in one tokenizer; one token may have several roles."""

    bos: str
    """Stands before a document, where anything does."""
    eos: str
    """Closes a document."""
    pad: str
    """Fills up a batch."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in a folder: `tokenizer.model` only where SentencePiece made it."""
    optional = folder / SENTENCEPIECE_FILE
    return [*(folder / name for name in TOKENIZER_FILES), *([optional] if optional.is_file() else [])]


def read_roles(config: Mapping[str, Any]) -> Roles | None:
    """The roles that a `tokenizer_config.json` names: without bos or pad, eos takes their place; None without eos."""

    def named(role: str) -> str | None:
        value = config.get(f"{role}_token")
        content = value.get("content") if isinstance(value, dict) else value
        return content if isinstance(content, str) else None

    eos = named("eos")
    return None if eos is None else Roles(named("bos") or eos, eos, named("pad") or eos)


def text_roles(config: Mapping[str, Any]) -> Roles | None:
    """The roles around a text, of which eos is another than around a conversation where the template closes it so."""
    setting = config.get(CHAT_SETTING)
    eos = setting.get(TEXT_EOS) if isinstance(setting, dict) else None
    return read_roles(config if eos is None else {**config, "eos_token": eos})


def write_tokenizer(folder: Path, backend: Backend, roles: Roles, chat_template: Any = None) -> None:
    """Writes `tokenizer.json` and a `tokenizer_config.json` that `transformers` opens with the same ids.

    No token is added. Nothing stands before or after a text by itself: whoever wants <bos> there puts it there.
    Raises UserError for a role whose token the tokenizer has not.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    known = backend.get_added_tokens_decoder().values()
    special = {token.content for token in known if token.special}
    for role, token in roles._asdict().items():
        if backend.token_to_id(token) is None:
            raise UserError(f"the tokenizer has no token {token!r}, which its settings name as its {role} token")
        if token not in special:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    settings = {
        # Reads the file as it stands; classes for one architecture build their own from parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": token for role, token in roles._asdict().items()},
        **({} if chat_template is None else {"chat_template": chat_template}),
    }
    backend.save(str(folder / TOKENIZER_FILE))
    write_settings(folder / TOKENIZER_CONFIG, settings)


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes a `tokenizer_config.json`."""
    path.write_bytes((json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())


def read_settings(path: Path) -> dict[str, Any]:
    """What a `tokenizer_config.json` says. Raises UserError where it is none."""
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable tokenizer ({error}); make it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no readable tokenizer (it is no JSON object); make it again")
    return settings


def adds_bos(folder: Path) -> bool:
    """Whether texts had <bos> before them, by the tokenizer itself, where a model from elsewhere was made; for whoever
    encodes a text to score it, since `Tokenizer.encode` never adds a token.

    Raises UserError where the folder holds no readable tokenizer.
    """
    return read_settings(folder / TOKENIZER_CONFIG).get(ADD_BOS_SETTING) is True


def begin_with_eos(folder: Path) -> None:
    """Gives the role of bos to eos in a folder's tokenizer: what a model reads before a text, if the text of its
    documents has nothing before it but the token that closed the one before.

    Raises UserError where the folder holds no readable tokenizer.
    """
    path = folder / TOKENIZER_CONFIG
    settings = read_settings(path)
    write_settings(path, {**settings, "bos_token": settings.get("eos_token")})


def read_backend(path: Path) -> Backend:
    """A `tokenizer.json`. Raises UserError where it is not one."""
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is no readable tokenizer ({error}); make it again") from error


def in_parts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in parts whose encodings fit into memory: until its ids are taken, a token has a hundred bytes or so."""
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= ENCODED_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


class Tokenizer:
    """A tokenizer read from a folder, which refuses what it cannot represent.

    Special tokens written out in a text are ordinary text to it, and none is added.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError where the folder holds no readable tokenizer."""
        self.backend = read_backend(folder / TOKENIZER_FILE)
        self.backend.encode_special_tokens = True
        path = folder / TOKENIZER_CONFIG
        settings = read_settings(path)
        roles, of_texts = read_roles(settings), text_roles(settings)
        if roles is None or of_texts is None:
            raise UserError(f"{path} names no eos_token; every tokenizer needs one")
        self.bos_id, self.eos_id, self.pad_id = (self._id(token, path) for token in roles)
        self.text_eos_id = self._id(of_texts.eos, path)
        """What closes a text: another token than eos where a chat template has one of its own."""
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, self.text_eos_id)))
        """Where generation ends."""
        self._size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def special_aware(self) -> Backend:
        """The same tokenizer as `transformers` uses it: special tokens that are written out in a text count as such."""
        backend = Backend.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def _id(self, token: str, path: Path) -> int:
        found: int | None = self.backend.token_to_id(token)
        if found is None:
            raise UserError(f"{path} names {token!r}, which the tokenizer has not; make it again")
        return found

    def __len__(self) -> int:
        """One more than the largest id: the rows that a model needs."""
        return self._size

    def encode_batch(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """The tokens of each text, in many threads, with the characters that each stands for.

        Raises UserError for what the tokenizer cannot represent, naming the character.
        """
        try:
            return self.backend.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception, and TypeError for half of a surrogate pair
            raise UserError(self._unknown(texts) or f"the tokenizer failed: {error}") from error

    def encode(self, text: str) -> list[int]:
        """The ids of one text. Raises UserError for what the tokenizer cannot represent, naming the character."""
        return list(self.encode_batch([text])[0].ids)

    def encode_parts(self, prompts: Sequence[str], targets: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """The ids of each prompt and of the target behind it, as they are in the text that both make together.

        Raises UserError where no token begins with the target, and as `encode_batch`.
        """
        texts = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
        found = []
        for prompt, text, encoding in zip(prompts, texts, self.encode_batch(texts), strict=True):
            first = encoding.char_to_token(len(prompt)) if prompt != text else len(encoding)
            if first is None or (prompt != text and encoding.offsets[first][0] != len(prompt)):
                raise UserError(f"in {text[:60]!r} no token begins with the target, behind {prompt[-60:]!r}")
            found.append((encoding.ids[:first], encoding.ids[first:]))
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that some ids add behind others: a space that opens it is kept, where `decode` alone drops the one
        that SentencePiece puts before every text."""
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    def _unknown(self, texts: Sequence[str]) -> str | None:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return f"the text {text[:60]!r} is no Unicode: {text[error.start]!r} is half of a surrogate pair"
        known = self.backend.get_vocab()
        for text in texts:
            for character in text:
                if character not in known:
                    letters = "".join(sorted(token for token in known if len(token) == 1))
                    return (
                        f"the tokenizer does not know the character {character!r} in {text[:60]!r}; it has: {letters}"
                    )
        return None
