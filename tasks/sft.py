"""Stage `sft`: a model tuned on conversations (supervised fine-tuning), so that it answers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from common.errors import UserError
from models.chat import chat_of
from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.training.events import Note
from models.training.loop import Start
from models.tuning import LoraConfig, Tuning
from models.vocabulary import with_rows
from tasks.blend import TokensInput, tokenizer_folder, tokens_inputs, vocabulary_of
from tasks.checkpoint import ModelFolder, read_model
from tasks.stage import Context, Metrics
from tasks.training import TrainingStageConfig, check_positions, run_training, training_stage, usable_moments


class TuningStageConfig(TrainingStageConfig):
    """What every stage has that tunes a model on conversations."""

    vocab_size: int | None = Field(default=None, gt=0)
    """Rows of the embedding; null for those that come in. A template with tokens of its own needs a row for each:
    ChatML two. New rows begin as the mean of the others."""
    optimizer_state: Literal["copy", "reset"] = "reset"
    """Whether the optimizer goes on with the moments that come with the model or starts anew."""
    lora: LoraConfig | None = None
    """Adapters that are trained in place of the weights; null for the weights themselves."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lora is not None and self.optimizer_state == "copy":
            raise ValueError("lora trains adapters, which no moments come with: leave optimizer_state at reset")
        return self


class Config(TuningStageConfig):
    """How a model is tuned."""

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        if self.training.packing == "stream":
            raise ValueError(
                "sft learns from whole conversations, and packing 'stream' cuts rows through them: set "
                "training.packing to whole, or to documents for one to a row"
            )
        return self


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes a model artifact like `refine`'s, with the tokenizer and the chat template of the tokens.

    Texts may stand beside conversations, so that a model keeps what it could do before. Raises UserError for tokens of
    which none are conversations, or of another tokenizer than the model's.
    """
    tokens = tokens_inputs(inputs, config.blend, context)
    if all(one.template is None for one in tokens):
        raise UserError(
            f"the tokens '{tokens[0].name}' are texts: sft learns from conversations; set template in the stage that "
            f"makes them, or train on them with refine"
        )
    tuned = prepared(config, inputs["model"], tokens, context)
    tuning = Tuning(lora=config.lora)
    model, metrics = tuned.model, tuned.metrics
    start = Start(model.weights, model.optimizer, validated=True)
    return {**run_training(config, model.config, start, inputs, context, model.history, tuning), **metrics}


class Prepared(NamedTuple):
    """A model about to be tuned."""

    model: ModelFolder
    """With a row for every token, and the moments to begin with."""
    metrics: dict[str, Any]
    """What the record says of its vocabulary."""


def prepared(config: TuningStageConfig, folder: Path, tokens: Sequence[TokensInput], context: Context) -> Prepared:
    """The model in a folder as it is tuned on some tokens.

    Raises UserError where their tokenizer does not extend the model's or has more tokens than there are to be rows, and
    where no answer could ever be closed.
    """
    unmerged = read_model(folder, with_optimizer=config.optimizer_state == "copy", merge=False)
    model = unmerged.merged()
    for note in _too_long(tokens, config.training.sequence_length):
        context.report(Note(note))
    vocabulary = vocabulary_of(tokens, folder)
    rows = config.vocab_size or model.config.vocab_size
    needed = len(Tokenizer(tokenizer_folder(tokens)))
    if needed > rows:
        raise UserError(
            f"the tokens' tokenizer has {needed:,} tokens, with the template's {len(vocabulary.added)}, and the model "
            f"would have {rows:,} rows: set vocab_size to {needed} or more"
        )
    if vocabulary.added and config.lora is not None:
        chat = chat_of(tokenizer_folder(tokens))
        # As the mean of the other rows, its logit never exceeds the largest of theirs, whatever the adapters learn.
        if chat is not None and chat.closing_id in vocabulary.added:
            raise UserError(
                "lora: the token that closes an answer is new, and lora leaves its row, so that no answer would end: "
                "leave lora out, take template: plain, or give the tokenizer the template's tokens before pretraining "
                "(special_tokens)"
            )
        context.report(
            Note(f"the rows of the {len(vocabulary.added)} new tokens stay the mean of the others: lora leaves them")
        )
    moments = usable_moments(unmerged, config.training.optimizer, context)
    ready = model._replace(
        config=grown_config(model.config, config.vocab_size),
        weights=with_rows(model.weights, model.config, rows, vocabulary),
        optimizer=None if moments is None else with_rows(moments, model.config, rows, vocabulary),
    )
    return Prepared(
        ready, {"vocabulary": {"rows_before": model.config.vocab_size, "rows": rows, "added": len(vocabulary.added)}}
    )


def _too_long(tokens: Sequence[TokensInput], sequence_length: int) -> Iterator[str]:
    """Says of which tokens some conversations do not fit into a row."""
    room = sequence_length + 1
    for one in tokens:
        splits = [one.splits[split] for split in ("train", "validation") if split in one.splits]
        longer = sum(count for split in splits for length, count in split.lengths if length > room)
        if longer and one.template is not None:
            yield (
                f"{longer:,} conversations of '{one.name}' are longer than sequence_length {sequence_length} + 1, and "
                f"lose their ends in the middle of a message: set max_tokens: {room} in the stage that makes them"
            )


def grown_config(model: ModelConfig, vocab_size: int | None) -> ModelConfig:
    """A model with another number of rows. Raises UserError for fewer than it has."""
    if vocab_size is None:
        return model
    if vocab_size < model.vocab_size:
        raise UserError(f"vocab_size {vocab_size} is less than the model's {model.vocab_size}; rows are only added")
    return ModelConfig.model_validate({**model.model_dump(), "vocab_size": vocab_size})


def model_of(config: TuningStageConfig, inputs: Mapping[str, ModelConfig]) -> ModelConfig:
    """The model that comes out. Raises UserError for rows that are longer than its positions, and for a vocab_size
    below its own."""
    check_positions(config.training, inputs["model"])
    return grown_config(inputs["model"], config.vocab_size)


STAGE = training_stage("sft", 2, Config, run, model_of)
