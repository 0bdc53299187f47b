"""Tokenizers as every stage uses them: one `tokenizer.json`, read by the `tokenizers` library."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import WordLevel

from common.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SENTENCEPIECE_FILE = "tokenizer.model"
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in a folder: `tokenizer.model` only where SentencePiece made it."""
    optional = folder / SENTENCEPIECE_FILE
    return [*(folder / name for name in TOKENIZER_FILES), *([optional] if optional.is_file() else [])]


def write_characters_tokenizer(folder: Path, characters: str) -> None:
    """Writes a tokenizer of `<pad> <bos> <eos>` and one token for each character, in that order."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS.values(), *characters])}
    backend = Backend(WordLevel(vocabulary))
    backend.add_special_tokens(list(SPECIAL_TOKENS.values()))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    write_tokenizer(folder, backend, {})


def write_tokenizer(folder: Path, backend: Backend, settings: dict[str, Any]) -> None:
    """Writes `tokenizer.json` and a `tokenizer_config.json` that `transformers` opens with the same ids."""
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **SPECIAL_TOKENS,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


class Tokenizer:
    """A tokenizer read from a folder, which refuses what it cannot represent."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where the folder holds no readable tokenizer."""
        path = folder / "tokenizer.json"
        try:
            self.backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path} is no readable tokenizer ({error}); make it again") from error
        self.pad_id = self._special("pad_token")
        self.bos_id = self._special("bos_token")
        self.eos_id = self._special("eos_token")

    def _special(self, name: str) -> int:
        token = SPECIAL_TOKENS[name]
        found: int | None = self.backend.token_to_id(token)
        if found is None:
            raise UserError(f"the tokenizer has no {token}; every Cairn tokenizer needs one")
        return found

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size())

    def encode_batch(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Encodes texts as they stand; special tokens written out in a text become their ids.

        Raises UserError naming a character that the tokenizer does not know.
        """
        try:
            return self.backend.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise UserError(self._unknown(texts) or f"the tokenizer failed: {error}") from error

    def encode(self, text: str) -> list[int]:
        """The ids of one text. Raises UserError naming a character that the tokenizer does not know."""
        return list(self.encode_batch([text])[0].ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def _unknown(self, texts: Sequence[str]) -> str | None:
        known = self.backend.get_vocab()
        for text in texts:
            rest = text
            for token in SPECIAL_TOKENS.values():
                rest = rest.replace(token, "")
            for character in rest:
                if character not in known:
                    letters = "".join(sorted(token for token in known if len(token) == 1))
                    return f"the tokenizer does not know the character {character!r} in {text!r}; it has: {letters}"
        return None
