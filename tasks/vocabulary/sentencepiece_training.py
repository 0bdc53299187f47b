"""Vocabularies that the SentencePiece library trains: BPE and Unigram (Kudo, 2018), with byte fallback.

Nothing of a text is normalized away, and the same text gives the same tokens on any machine.
"""

import io
import re
from collections.abc import Iterator
from typing import Any

from common.errors import UserError
from tasks.vocabulary.config import ROLES, UNKNOWN, SentencePiece
from tasks.vocabulary.sample import Sample
from tasks.vocabulary.sentencepiece_conversion import NORMAL, Converted, convert, read_model

THREADS = 16
"""SentencePiece's default. Unigram adds up what its threads have found, so that their number shows in the tokens."""
SCORE_STEPS = 64
"""Scores of Unigram are rounded to this part of one. Then sums of them are exact, in the 32 bits that SentencePiece
adds up in as in the 64 of `tokenizers`, and both divide a text alike where two ways of doing so are worth the same,
such as those of `###` into `#` and `##`."""
RESERVED = "▅"
"""SentencePiece leaves out a sentence with this character when it trains."""


def train(config: SentencePiece, sample: Sample) -> tuple[bytes, Converted]:
    """A `tokenizer.model` and the same tokenizer in the words of `tokenizers`.

    Raises UserError where the text gives fewer tokens than asked for, or has more characters than that, and where
    SentencePiece is not installed.
    """
    model = read_model(_trained(config, sample.pieces()), "the trained vocabulary")
    if config.kind == "sentencepiece_unigram":
        for piece in model.pieces:
            if piece.type == NORMAL:
                piece.score = round(piece.score * SCORE_STEPS) / SCORE_STEPS
    return model.SerializeToString(deterministic=True), convert(model, "the trained vocabulary")


def _trained(config: SentencePiece, pieces: Iterator[str]) -> bytes:
    try:
        from sentencepiece import SentencePieceTrainer
    except ImportError as error:
        raise UserError(f"vocabulary.kind: {config.kind} needs SentencePiece: pip install 'cairn[data]'") from error
    written = io.BytesIO()
    sentences = _Sentences(pieces)
    settings: dict[str, Any] = {
        "sentence_iterator": sentences,
        "model_writer": written,
        "model_type": config.kind.removeprefix("sentencepiece_"),
        "vocab_size": config.vocab_size,
        "character_coverage": config.character_coverage,
        "byte_fallback": True,
        "split_digits": config.digits == "split",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        # The longest piece of a sample in bytes; longer sentences would be left out.
        "max_sentence_length": 1 << 20,
        "num_threads": THREADS,
        "minloglevel": 2,
        "control_symbols": list(config.special_tokens),
        "unk_piece": UNKNOWN,
        "unk_id": len(ROLES),
    }
    for number, role in enumerate(("pad", "bos", "eos")):
        settings |= {f"{role}_id": number, f"{role}_piece": getattr(ROLES, role)}
    try:
        SentencePieceTrainer.train(**settings)
    except RuntimeError as error:
        # What the iterator raises comes back as another error.
        if sentences.error is not None:
            raise sentences.error from None
        raise UserError(_explained(config, str(error))) from error
    return written.getvalue()


class _Sentences:
    """Takes a sample for SentencePiece, and keeps what reading it raises."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces).replace(RESERVED, " ")
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise


def _explained(config: SentencePiece, message: str) -> str:
    """SentencePiece's message in the words of a recipe."""
    where = f"vocabulary.vocab_size: {config.vocab_size:,}"
    too_many = re.search(r"set it to a value <= (\d+)", message)
    if too_many:
        most = int(too_many[1])
        return f"{where} tokens are more than the text gives; ask for {most:,} or fewer, or give more documents"
    too_few = re.search(r"smaller than required_chars. \d+ vs (\d+)", message)
    if too_few:
        return (
            f"{where} has no room for the characters of the text beside special tokens and bytes; ask for more than "
            f"{int(too_few[1]):,}, or lower character_coverage"
        )
    return f"SentencePiece cannot learn {where.partition(': ')[2]} tokens from the text: {' '.join(message.split())}"
