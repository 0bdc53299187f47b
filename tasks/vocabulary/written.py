"""Vocabularies that are written down: characters, bytes."""

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel

from tasks.vocabulary.config import Bytes, Characters


def characters_tokenizer(config: Characters) -> Tokenizer:
    """<pad> <bos> <eos>, the characters, and then what other special tokens there are."""
    roles = len(config.specials) - len(config.special_tokens)
    tokens = [*config.specials[:roles], *config.characters, *config.special_tokens]
    backend = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    add_specials(backend, config.specials)
    return backend


def bytes_tokenizer(config: Bytes) -> Tokenizer:
    """The special tokens, and then the 256 bytes in order."""
    tokens = [*config.specials, *byte_characters()]
    backend = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    add_specials(backend, config.specials)
    return backend


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (openai/gpt-2, encoder.py)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def add_specials(backend: Tokenizer, tokens: tuple[str, ...]) -> None:
    """Makes tokens of the vocabulary special: they are found in no text, and left out when ids are decoded."""
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
