"""BPE that `tokenizers` trains: over bytes, or over characters with byte fallback.

The same text gives the same tokens, however many threads count its words.

N characters of a text, C characters that there are.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE as Model

from common.errors import UserError
from tasks.vocabulary.config import BPE, BYTE_TOKENS, ByteBPE, Trained
from tasks.vocabulary.sample import Sample
from tasks.vocabulary.sentencepiece_conversion import SPACE, llama_decoder, llama_normalizer
from tasks.vocabulary.written import add_specials, byte_characters

WORDS_WITH_DIGITS_APART = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is divided before bytes are joined: the pattern of Qwen2's tokenizer, which fast libraries know."""
BYTE_TOKEN = "<0x[0-9A-F]{2}>"
CHARACTERS = 0x110000


def byte_bpe_tokenizer(config: ByteBPE, sample: Sample) -> Tokenizer:
    """Byte-level BPE. Digits that may be joined are divided as GPT-2 does it.

    Raises UserError where the text does not give as many tokens as asked for.
    """
    if config.digits == "split":
        words: Any = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(WORDS_WITH_DIGITS_APART), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary, merges = _trained(config, sample.pieces(), [_without(config.specials), words], byte_characters(), [])
    backend = Tokenizer(Model(vocabulary, merges))
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    add_specials(backend, config.specials)
    return backend


def bpe_tokenizer(config: BPE, sample: Sample) -> Tokenizer:
    """BPE over characters with byte fallback, in the form of Llama's `tokenizer.json`.

    Raises UserError where the text does not give as many tokens as asked for, or has more characters than that.
    """
    characters, rare = alphabet(sample.pieces(), config.character_coverage)
    if config.reserved + len(characters) > config.vocab_size:
        raise UserError(
            f"vocabulary.vocab_size: {config.vocab_size} has no room for the {len(characters)} characters of the text "
            f"beside {config.reserved} special tokens and bytes; ask for more, or lower character_coverage"
        )
    cuts = [_without(config.specials, rare), pre_tokenizers.Split(words(config), "isolated")]
    vocabulary, merges = _trained(config, sample.pieces(), cuts, characters, BYTE_TOKENS, llama_normalizer())
    backend = Tokenizer(Model(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    # Nothing divides the text into words here: no tokens of different words can be joined, for no such pair of
    # characters was ever seen together, and this is the form that other programs know.
    backend.normalizer = llama_normalizer()
    backend.decoder = llama_decoder()
    add_specials(backend, config.specials)
    return backend


def words(config: BPE) -> tokenizers.Regex:
    """Words such that two neighbouring characters alone say whether a word ends between them."""
    digits = r"\p{N}" if config.digits == "split" else rf"{SPACE}*\p{{N}}+"
    letters, others = rf"{SPACE}*[\p{{L}}\p{{M}}]+", rf"{SPACE}*[^{SPACE}\s\p{{L}}\p{{M}}\p{{N}}]+"
    return tokenizers.Regex(rf"{letters}|{digits}|{others}|\s+|{SPACE}+")


def _without(specials: Sequence[str], characters: Sequence[str] = ()) -> Any:
    """Divides a text at special tokens, the names of bytes, and some characters, and leaves them out, so that no token
    is learnt that is or has one of them."""
    apart = [*map(re.escape, specials), BYTE_TOKEN]
    if characters:
        apart.append(f"[{''.join(map(re.escape, characters))}]")
    return pre_tokenizers.Split(tokenizers.Regex("|".join(apart)), "removed")


def alphabet(pieces: Iterable[str], coverage: float) -> tuple[list[str], list[str]]:
    """▁ and the most frequent characters of a text that make up a share of it, and the others. Spaces are ▁."""
    counts_C = np.zeros(CHARACTERS, np.int64)
    for batch in _joined(pieces):
        codes_N = np.frombuffer(batch.replace(" ", SPACE).encode("utf-32-le"), np.uint32)
        counts_C += np.bincount(codes_N, minlength=CHARACTERS)
    order_C = np.argsort(-counts_C, kind="stable")
    order_C = order_C[counts_C[order_C] > 0]
    share_C = np.cumsum(counts_C[order_C]) / max(1, counts_C.sum())
    kept = int(np.searchsorted(share_C, coverage)) + 1
    characters = [chr(code) for code in order_C.tolist()]
    # It stands before every text, whether or not there is a space in it.
    return [*dict.fromkeys([SPACE, *characters[:kept]])], [c for c in characters[kept:] if c != SPACE]


def _joined(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces put together to megabytes."""
    waiting: list[str] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= 1 << 22:
            yield "".join(waiting)
            waiting, size = [], 0
    yield "".join(waiting)


def _trained(
    config: Trained,
    pieces: Iterable[str],
    divided: Sequence[Any],
    characters: Sequence[str],
    bytes_apart: Sequence[str],
    normalizer: Any = None,
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of special tokens, bytes that are no characters of it, characters, and what is merged from them."""
    backend = Tokenizer(Model())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([*divided])
    first = [*config.specials, *bytes_apart]
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(first),
        initial_alphabet=[*characters],
        limit_alphabet=len(characters),
        show_progress=False,
    )
    backend.train_from_iterator(pieces, trainer)
    model = json.loads(backend.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if len(first) + len(learnt) < config.vocab_size:
        raise UserError(
            f"vocabulary.vocab_size: the text gives {len(first) + len(learnt):,} tokens and not {config.vocab_size:,}; "
            "ask for fewer, or give more documents"
        )
    both = set(first) & set(learnt)
    if both:
        raise UserError(f"vocabulary.special_tokens: {min(both)!r} is a token of the text too; call it something else")
    return {token: index for index, token in enumerate([*first, *learnt])}, [(a, b) for a, b in model["merges"]]
