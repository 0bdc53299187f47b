"""The folder of a model artifact: its description, weights, optimizer state, history and tokenizer."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from common.errors import UserError
from common.files import canonical_json
from models.config import ModelConfig
from models.optimizer import OptimizerConfig
from models.tokenizer import Tokenizer
from models.weights import Array, Piece, assemble, canonical_shapes, read_arrays, write_arrays
from tasks.history import History, read_history, write_history

CONFIG, WEIGHTS, OPTIMIZER = "config.json", "model.safetensors", "optimizer.safetensors"


class ModelFolder(NamedTuple):
    """What a model artifact holds."""

    config: ModelConfig
    weights: dict[str, Array]
    optimizer: dict[str, Array] | None
    """Moments and the count of updates, or nothing where the optimizer starts anew."""
    trained_with: OptimizerConfig | None
    """The optimizer that the moments are of."""
    history: History
    """What it has been through."""


def read_model(folder: Path, with_optimizer: bool = False) -> ModelFolder:
    """Reads a model artifact. Raises UserError where its description is not one."""
    try:
        description = json.loads((folder / CONFIG).read_bytes())
        config = ModelConfig.model_validate(description["model"])
        optimizer = description["optimizer"] and OptimizerConfig.model_validate(description["optimizer"])
    except (OSError, ValueError, KeyError, ValidationError) as error:
        raise UserError(f"{folder / CONFIG} does not describe a model ({error})") from error
    path = folder / OPTIMIZER
    moments = read_arrays(path) if with_optimizer and path.exists() else None
    return ModelFolder(config, read_arrays(folder / WEIGHTS), moments, optimizer, read_history(folder))


def write_model(folder: Path, model: ModelFolder) -> None:
    """Writes a model artifact, the tokenizer apart."""
    optimizer = model.trained_with.model_dump(mode="json") if model.trained_with else None
    description = {"model": model.config.model_dump(mode="json"), "optimizer": optimizer}
    (folder / CONFIG).write_bytes(canonical_json(description))
    write_history(folder, model.history)
    write_arrays(folder / WEIGHTS, model.weights)
    if model.optimizer is not None:
        write_arrays(folder / OPTIMIZER, model.optimizer)


def whole(exported: Iterable[Piece], config: ModelConfig) -> dict[str, Array]:
    """Whole canonical arrays out of what an engine exports."""
    return assemble(exported, canonical_shapes(config))


def tokenizer_of(folder: Path, config: ModelConfig) -> Tokenizer:
    """A model artifact's tokenizer. Raises UserError where the model has fewer rows than it has tokens."""
    tokenizer = Tokenizer(folder / "tokenizer")
    check_vocabulary(len(tokenizer), config)
    return tokenizer


def check_vocabulary(tokens: int, config: ModelConfig) -> None:
    """Raises UserError where the model has fewer rows than the tokenizer has tokens."""
    if tokens > config.vocab_size:
        raise UserError(
            f"model.vocab_size is {config.vocab_size}, but the tokenizer has {tokens} tokens; set it to that or more"
        )
