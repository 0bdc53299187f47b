"""Stage `pretrain`: a base model trained from fresh weights."""

from collections.abc import Mapping
from pathlib import Path

from models.config import ModelConfig
from models.training.loop import Start
from models.weights import initial_weights
from tasks.stage import Context, Kind, Metrics, Stage
from tasks.training import TrainingStageConfig, check_positions, run_training


class Config(TrainingStageConfig):
    """A new model and how it is trained."""

    model: ModelConfig
    """The model."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes a model artifact: config.json, model.safetensors, optimizer.safetensors and the tokenizer."""
    start = Start(initial_weights(config.model, config.training.seed))
    return run_training(config, config.model, start, inputs, context)


def model_of(config: Config, inputs: Mapping[str, ModelConfig]) -> ModelConfig:
    """The model of the config. Raises UserError for rows that are longer than its positions."""
    check_positions(config.training, config.model)
    return config.model


STAGE = Stage(
    name="pretrain",
    version=4,
    config=Config,
    inputs={"tokens": Kind.TOKENS},
    many={"tokens": "blend"},
    lazy={"tokens": ".safetensors"},
    output=Kind.MODEL,
    run=run,
    trains=True,
    model_of=model_of,
)
