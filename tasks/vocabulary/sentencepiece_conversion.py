"""SentencePiece's `tokenizer.model` as a tokenizer of the library `tokenizers` that gives the same ids.

The rules are those of SentencePiece 0.2 (src/bpe_model.cc, src/unigram_model.cc, src/normalizer.cc).
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from common.errors import UserError
from models.tokenizer import Roles

SPACE = "▁"
UNIGRAM_MODEL, BPE_MODEL = 1, 2
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


_GRAPHEMES = (
    "the normalizer of this SentencePiece model rewrites characters, such as ½; where it rewrites the first of several "
    "that make one, such as a digit with an accent or \\r\\n, the others are dropped, as transformers does it too"
)


class Converted(NamedTuple):
    """A SentencePiece model in other words."""

    backend: Tokenizer
    roles: Roles
    """Its special tokens; where it has no padding or nothing that stands before a text, what closes one does it."""
    notes: list[str]
    """Where ids may differ from SentencePiece's."""


def read_model(content: bytes, name: str) -> Any:
    """A SentencePiece ModelProto. Raises UserError for bytes that are none, and without the SentencePiece library."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(f"{name} needs the SentencePiece library ({error}): pip install 'cairn[data]'") from error
    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's own, whose module has no types
        raise UserError(f"{name} is no SentencePiece model ({error})") from error
    if not model.pieces:
        raise UserError(f"{name} is no SentencePiece model: it has no pieces")
    return model


def convert(model: Any, name: str) -> Converted:
    """The tokenizer that gives the ids of a SentencePiece model.

    Texts that are taken apart and put together come back as SentencePiece gives them back: with ▁ as a space, and with
    what its normalizer changed. Raises UserError for what cannot be said in the words of `tokenizers`.
    """
    _check(model, name)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    unknown = next(index for index, piece in enumerate(pieces) if piece[2] == UNKNOWN)
    bytes_too = any(kind == BYTE for _, _, kind in pieces)
    if model.trainer_spec.model_type == BPE_MODEL:
        vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces)}
        backend = Tokenizer(
            BPE(vocabulary, _merges(pieces), unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=bytes_too)
        )
    else:
        backend = Tokenizer(Unigram([(piece, score) for piece, score, _ in pieces], unknown, bytes_too))
        backend.pre_tokenizer = _never_whole(pieces)
    backend.normalizer = _normalizer(model.normalizer_spec)
    backend.decoder = llama_decoder(model.normalizer_spec.add_dummy_prefix)
    specials = [piece for piece, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    notes = [_GRAPHEMES] if model.normalizer_spec.precompiled_charsmap else []
    return Converted(backend, _roles(model, name), notes)


def llama_normalizer() -> Any:
    """▁ before a text and in the place of every space: what Llama's `tokenizer.json` has for SentencePiece's."""
    return normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


def llama_decoder(strip: bool = True) -> Any:
    """Spaces for ▁, characters for their bytes, and, with `strip`, no space before a text."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def _check(model: Any, name: str) -> None:
    if model.trainer_spec.model_type not in (UNIGRAM_MODEL, BPE_MODEL):
        raise UserError(f"{name} is a SentencePiece model of words or characters; only BPE and Unigram can be used")
    others = {piece.piece for piece in model.pieces if piece.type not in (NORMAL, UNKNOWN, CONTROL, BYTE)}
    if others:
        raise UserError(
            f"{name} has user-defined or unused pieces such as {min(others)!r}, which Cairn does not convert"
        )
    if model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        raise UserError(f"{name} puts spaces behind words or leaves them as they are, which Cairn does not convert")


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, those of the best scores first: SentencePiece joins the two neighbours
    whose common piece has the best score."""
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    ids = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for piece in sorted(scores, key=lambda piece: (-scores[piece], ids[piece])):
        halves = [(piece[:end], piece[end:]) for end in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in scores and right in scores]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _never_whole(pieces: list[tuple[str, float, int]]) -> Any:
    """Divides special tokens and names of bytes that stand in a text, which Unigram would take for the pieces of that
    name: between two characters that no piece has side by side, so that nothing else becomes of the text."""
    side_by_side = {two for piece, _, kind in pieces if kind == NORMAL for two in _pairs(piece)}
    endings = defaultdict(list)
    for piece, _, kind in pieces:
        if kind != NORMAL and len(piece) > 1:
            place = next((place for place, two in enumerate(_pairs(piece), 1) if two not in side_by_side), 1)
            endings[piece[:place]].append(re.escape(piece[place:]))
    patterns = [f"{re.escape(beginning)}(?={'|'.join(others)})" for beginning, others in endings.items()]
    return pre_tokenizers.Split(tokenizers.Regex("|".join(patterns)), "merged_with_previous")


def _pairs(text: str) -> Iterable[str]:
    return (text[place - 1 : place + 1] for place in range(1, len(text)))


def _normalizer(spec: Any) -> Any:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(tokenizers.Regex("^ +| +$"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _roles(model: Any, name: str) -> Roles:
    spec = model.trainer_spec
    special = {piece.piece for piece in model.pieces if piece.type == CONTROL}
    named = {"bos": spec.bos_piece, "eos": spec.eos_piece, "pad": spec.pad_piece}
    found = {role: token for role, token in named.items() if token in special}
    if "eos" not in found:
        raise UserError(f"{name} has no token that closes a text; every tokenizer needs one")
    return Roles(found.get("bos", found["eos"]), found["eos"], found.get("pad", found["eos"]))
