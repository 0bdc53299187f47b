"""What a training stage reads: batches of its tokens, and the rows that it is validated on."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.files import canonical_json, sha256_bytes, sha256_file
from models.config import ModelConfig
from models.tokenizer import TOKENIZER_FILE
from models.training.batches import Batches, Source
from models.training.config import Portion, TrainingConfig, ValidationConfig
from models.tuning import Tuning
from tasks.blend import TokensInput

_ROWS_AT_ONCE = 256


class TrainingData(NamedTuple):
    """What a run reads."""

    batches: Batches
    validation: Batches | None
    measured_on: str | None
    """Identity of the validation rows; None where there are none, and where the loss on them is no cross-entropy."""
    validated: list[str]
    """The sources that have a validation loss of their own: where there are several."""
    notes: list[str]
    """What is said of them."""


@contextmanager
def training_data(
    config: TrainingConfig, model: ModelConfig, tokens: Sequence[TokensInput], pad_id: int, tuning: Tuning
) -> Iterator[TrainingData]:
    """What a run reads; its shards are fetched no longer after the block.

    Raises UserError where splits are missing or too small, and where the budgets do not last.
    """
    for one in tokens:
        if "train" not in one.splits:
            raise UserError(f"the tokens '{one.name}' have no train split")
    with ExitStack() as stack:
        batches = stack.enter_context(_batches(config, model, [one.splits["train"] for one in tokens], pad_id))
        batches.require(config.steps)
        if config.validation is None:
            yield TrainingData(batches, None, None, [], [])
            return
        sources, notes = _validation_sources(tokens)
        validation = stack.enter_context(_batches(config, model, sources, pad_id))
        validated = [source.name for source in sources] if len(sources) > 1 else []
        measured_on = None
        if tuning.preference is None:
            tokenizer = tokens[0].folder / "tokenizer" / TOKENIZER_FILE
            measured_on = _identity(validation, [source.portion for source in sources], config.validation, tokenizer)
        yield TrainingData(batches, validation, measured_on, validated, notes)


def check_pairs(training: TrainingConfig, tokens: Sequence[TokensInput], tuning: Tuning) -> None:
    """Raises UserError where pairs of documents are not for preference tuning, or preference tuning has none."""
    prefers = tuning.preference is not None
    for one in tokens:
        if prefers and not one.pairs:
            raise UserError(
                f"the tokens '{one.name}' are no pairs of answers: make them with loss_on: pairs, of documents with "
                f"conversations: preferences"
            )
        if one.pairs and not prefers:
            raise UserError(f"the tokens '{one.name}' are pairs of answers, of which the stage dpo alone learns")
    if training.packing == "pairs" and not prefers:
        raise UserError("training.packing: pairs is for the stage dpo alone; leave it out")


def _batches(config: TrainingConfig, model: ModelConfig, sources: Sequence[Source], pad_id: int) -> Batches:
    return Batches(
        sources,
        seed=config.seed,
        sequence_length=config.sequence_length,
        packing=config.packing,
        batch_size=config.batch_size,
        document_masking=config.document_masking,
        pad_id=pad_id,
        vocab_size=model.vocab_size,
        shuffled=sources[0].split == "train",
    )


def _identity(validation: Batches, portions: Sequence[Portion], config: ValidationConfig, tokenizer: Path) -> str:
    """Identity of the validation rows: all that stands in those that are taken, and each source's share of the loss.

    The rows are read for it once, as every validation reads them.
    """
    total = sum(Fraction(str(portion.weight)) for portion in portions)
    sources = []
    for number, (source, portion) in enumerate(zip(validation.sources, portions, strict=True)):
        rows = source.rows if config.rows is None else min(config.rows, source.rows)
        share = Fraction(str(portion.weight)) / total
        sources.append([str(share), rows, _rows_digest(validation, number, rows)])
    return sha256_bytes(canonical_json([validation.sequence_length, sha256_file(tokenizer), sorted(sources)]))


def _rows_digest(batches: Batches, source: int, rows: int) -> str:
    """Digest of the first rows of a source: tokens, targets, which of them count, and documents."""
    digest = hashlib.sha256()
    for first in range(0, rows, _ROWS_AT_ONCE):
        for array in batches.source_rows(source, first, min(_ROWS_AT_ONCE, rows - first)):
            digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def _validation_sources(tokens: Sequence[TokensInput]) -> tuple[list[Source], list[str]]:
    """What is validated on, without budgets, and notes of what cannot be.

    A source of a blend may be too small to give some of it away; what is measured is then said to be of the others.
    """
    found = [
        replace(one.splits["validation"], portion=Portion(weight=one.portion.weight))
        for one in tokens
        if "validation" in one.splits
    ]
    if not found:
        raise UserError(
            "the tokens have no validation split: make one of the documents, or set training.validation: null"
        )
    missing = [one.name for one in tokens if "validation" not in one.splits]
    return found, [f"'{name}' has no validation split: validation losses are of the other tokens" for name in missing]
