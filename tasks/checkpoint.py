"""The folder of a model artifact: its description, weights, optimizer state, history and tokenizer.

Where adapters were trained, the weights are those beneath them, and `adapter/` holds them in PEFT's layout.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from common.errors import UserError
from common.files import canonical_json
from models.config import ModelConfig
from models.lora import merged
from models.optimizer import OptimizerConfig
from models.peft_layout import from_peft, peft_config, to_peft
from models.tokenizer import TOKENIZER_FILE, Tokenizer
from models.tuning import LoraConfig
from models.weights import Array, Piece, assemble, canonical_shapes, read_arrays, write_arrays
from tasks.history import History, read_history, write_history

CONFIG, WEIGHTS, OPTIMIZER = "config.json", "model.safetensors", "optimizer.safetensors"
ADAPTER = "adapter"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapters(NamedTuple):
    """Adapters of a model."""

    config: LoraConfig
    arrays: dict[str, Array]
    """By the names of `models.lora`."""


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
    adapters: Adapters | None = None
    """What was trained in place of the weights; None where they are the whole model."""

    def merged(self) -> "ModelFolder":
        """The same model with its adapters in the weights; without the moments, which are the adapters'."""
        if self.adapters is None:
            return self
        weights = merged(self.config, self.adapters.config, self.weights, self.adapters.arrays)
        return self._replace(weights=weights, optimizer=None, trained_with=None, adapters=None)


def read_model(folder: Path, with_optimizer: bool = False, *, merge: bool = True) -> ModelFolder:
    """Reads a model artifact, its adapters merged into the weights unless `merge` is False.

    Raises UserError where its description is not one.
    """
    try:
        description = json.loads((folder / CONFIG).read_bytes())
        config = ModelConfig.model_validate(description["model"])
        optimizer = description["optimizer"] and OptimizerConfig.model_validate(description["optimizer"])
        lora = LoraConfig.model_validate(description["lora"]) if "lora" in description else None
    except (OSError, ValueError, KeyError, ValidationError) as error:
        raise UserError(f"{folder / CONFIG} does not describe a model ({error})") from error
    path = folder / OPTIMIZER
    moments = read_arrays(path) if with_optimizer and path.exists() else None
    adapters = None if lora is None else _read_adapters(folder / ADAPTER / ADAPTER_WEIGHTS, config, lora)
    found = ModelFolder(config, read_arrays(folder / WEIGHTS), moments, optimizer, read_history(folder), adapters)
    return found.merged() if merge else found


def _read_adapters(path: Path, config: ModelConfig, lora: LoraConfig) -> Adapters:
    try:
        return Adapters(lora, from_peft(config, lora, read_arrays(path)))
    except ValueError as error:
        raise UserError(f"{path} holds other adapters than the model's ({error}); make it again") from error


def write_model(folder: Path, model: ModelFolder) -> None:
    """Writes a model artifact, the tokenizer apart."""
    optimizer = model.trained_with.model_dump(mode="json") if model.trained_with else None
    description = {"model": model.config.model_dump(mode="json"), "optimizer": optimizer}
    if model.adapters is not None:
        description["lora"] = model.adapters.config.model_dump(mode="json")
        write_adapters(folder / ADAPTER, model.config, model.adapters)
    (folder / CONFIG).write_bytes(canonical_json(description))
    write_history(folder, model.history)
    write_arrays(folder / WEIGHTS, model.weights)
    if model.optimizer is not None:
        write_arrays(folder / OPTIMIZER, model.optimizer)


def write_adapters(folder: Path, config: ModelConfig, adapters: Adapters, base_model: str | None = None) -> None:
    """Writes adapters as PEFT reads them, which is told where the model beneath them is to be had."""
    folder.mkdir()
    description = peft_config(config, adapters.config, base_model)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    arrays = to_peft(config, adapters.config, adapters.arrays)
    write_arrays(folder / ADAPTER_WEIGHTS, arrays, {"format": "pt"})


def whole(exported: Iterable[Piece], config: ModelConfig) -> dict[str, Array]:
    """Whole canonical arrays out of what an engine exports."""
    return assemble(exported, canonical_shapes(config))


def tokenizer_of(folder: Path, config: ModelConfig) -> Tokenizer:
    """A model artifact's tokenizer. Raises UserError where it has none, and where the model has fewer rows than it has
    tokens."""
    if not (folder / "tokenizer" / TOKENIZER_FILE).is_file():
        raise UserError(f"the model in {folder} has no tokenizer, and so reads no text; make it again")
    tokenizer = Tokenizer(folder / "tokenizer")
    check_vocabulary(len(tokenizer), config)
    return tokenizer


def check_vocabulary(tokens: int, config: ModelConfig) -> None:
    """Raises UserError where the model has fewer rows than the tokenizer has tokens."""
    if tokens > config.vocab_size:
        raise UserError(
            f"model.vocab_size is {config.vocab_size}, but the tokenizer has {tokens} tokens; set it to that or more"
        )
