"""Stage `tokenizer`: a `tokenizer.json` that `transformers` opens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from common.config import FrozenModel
from models.tokenizer import Tokenizer, write_characters_tokenizer
from tasks.stage import Context, Kind, Metrics, Stage

ARITHMETIC_CHARACTERS = "0123456789+-*/="


class Config(FrozenModel):
    """Which tokenizer is made."""

    kind: Literal["characters"]
    """`characters`: <pad> <bos> <eos> 0-2, digits 3-12, + - * / 13-16, = 17."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    write_characters_tokenizer(context.output, ARITHMETIC_CHARACTERS)
    size = len(Tokenizer(context.output))
    return {"summary": f"{size:,} tokens in the vocabulary", "vocab_size": size}


STAGE = Stage(name="tokenizer", version=1, config=Config, output=Kind.TOKENIZER, run=run)
