"""Stage `pretrain`: a base model trained from fresh weights."""

from collections.abc import Mapping
from pathlib import Path

from models.config import ModelConfig
from models.training.loop import Start
from models.weights import initial_weights
from tasks.stage import Context, Metrics
from tasks.training import TrainingStageConfig, check_positions, run_training, training_stage


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


STAGE = training_stage("pretrain", 5, Config, run, model_of)
