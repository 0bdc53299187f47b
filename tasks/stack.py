"""Stage `stack`: a deeper model out of a trained one, its layers repeated with their optimizer moments."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from common.config import FrozenModel
from models.config import ModelConfig
from models.growth import Method, grow, grown_config, source_layers
from models.weights import parameter_count
from tasks.checkpoint import ModelFolder, read_model, write_model
from tasks.history import Grown
from tasks.stage import Context, Kind, Metrics, Stage
from tasks.tokens import copy_tokenizer


class Config(FrozenModel):
    """How a model grows."""

    method: Method = "stack"
    """`stack` repeats the whole block of layers (ABCABC), `interleave` each layer in place (AABBCC)."""
    factor: int = Field(default=2, ge=2)
    """How many times as many layers."""
    optimizer_state: Literal["copy", "reset"] = "copy"
    """Whether moments go along with their layers or start anew."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes a model artifact with `factor` times the layers."""
    model = read_model(inputs["model"], with_optimizer=config.optimizer_state == "copy")
    sources = source_layers(model.config.num_hidden_layers, config.factor, config.method)
    grown = ModelFolder(
        config=grown_config(model.config, sources),
        weights=grow(model.weights, sources),
        optimizer=None if model.optimizer is None else grow(model.optimizer, sources),
        trained_with=model.trained_with,
        history=(
            *model.history,
            Grown(
                operator=f"{config.method} × {config.factor}",
                parameters_before=parameter_count(model.config),
                parameters=parameter_count(grown_config(model.config, sources)),
                optimizer_state=config.optimizer_state if model.optimizer is not None else "reset",
            ),
        ),
    )
    write_model(context.output, grown)
    copy_tokenizer(inputs["model"] / "tokenizer", context.output)
    before, after = parameter_count(model.config), parameter_count(grown.config)
    return {
        "summary": f"{model.config.num_hidden_layers} → {len(sources)} layers, {before:,} → {after:,} parameters",
        "source_layers": sources,
        "parameters": {"before": before, "after": after},
    }


def grown_model(config: Config, inputs: Mapping[str, ModelConfig]) -> ModelConfig:
    """The description of the model that comes out."""
    model = inputs["model"]
    return grown_config(model, source_layers(model.num_hidden_layers, config.factor, config.method))


STAGE = Stage(
    name="stack",
    version=3,
    config=Config,
    inputs={"model": Kind.MODEL},
    output=Kind.MODEL,
    run=run,
    model_of=grown_model,
)
