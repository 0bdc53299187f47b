"""Stage `refine`: pretraining that starts from a model artifact."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from common.errors import UserError
from models.config import ModelConfig
from models.training.loop import Start
from tasks.blend import tokens_inputs, vocabulary_of
from tasks.checkpoint import read_model
from tasks.stage import Context, Metrics
from tasks.training import TrainingStageConfig, check_positions, run_training, training_stage, usable_moments


class Config(TrainingStageConfig):
    """How a model is trained on."""

    optimizer_state: Literal["copy", "reset"] = "copy"
    """Whether the optimizer goes on with the moments that come with the model or starts anew."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes a model artifact like `pretrain`'s. Moments of another optimizer are left behind, and it is said.

    Raises UserError for tokens of another tokenizer than the model's, or with tokens that it has not.
    """
    added = vocabulary_of(tokens_inputs(inputs, config.blend, context), inputs["model"]).added
    if added:
        raise UserError(
            f"the tokenizer has {len(added)} tokens that the model was trained without: train it with sft, which gives "
            f"them rows"
        )
    model = read_model(inputs["model"], with_optimizer=config.optimizer_state == "copy", merge=False)
    start = Start(model.merged().weights, usable_moments(model, config.training.optimizer, context), validated=True)
    return run_training(config, model.config, start, inputs, context, model.history)


def model_of(config: Config, inputs: Mapping[str, ModelConfig]) -> ModelConfig:
    """The model that goes in. Raises UserError for rows that are longer than its positions."""
    check_positions(config.training, inputs["model"])
    return inputs["model"]


STAGE = training_stage("refine", 5, Config, run, model_of)
