"""Stage `refine`: pretraining that starts from a model artifact."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from models.config import ModelConfig
from models.training.events import Note
from models.training.loop import Start
from tasks.checkpoint import read_model
from tasks.stage import Context, Kind, Metrics, Stage
from tasks.training import TrainingStageConfig, check_positions, run_training


class Config(TrainingStageConfig):
    """How a model is trained on."""

    optimizer_state: Literal["copy", "reset"] = "copy"
    """Whether the optimizer goes on with the moments that come with the model or starts anew."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes a model artifact like `pretrain`'s. Moments of another optimizer are left behind, and it is said."""
    model = read_model(inputs["model"], with_optimizer=config.optimizer_state == "copy")
    moments = model.optimizer
    if moments is not None and model.trained_with and model.trained_with.name != config.training.optimizer.name:
        moments = None
        context.report(
            Note(
                f"the model was trained with {model.trained_with.name}: its moments are of no use to "
                f"{config.training.optimizer.name}, which starts anew"
            )
        )
    return run_training(
        config, model.config, Start(model.weights, moments, validated=True), inputs, context, model.history
    )


def model_of(config: Config, inputs: Mapping[str, ModelConfig]) -> ModelConfig:
    """The model that goes in. Raises UserError for rows that are longer than its positions."""
    check_positions(config.training, inputs["model"])
    return inputs["model"]


STAGE = Stage(
    name="refine",
    version=4,
    config=Config,
    inputs={"model": Kind.MODEL, "tokens": Kind.TOKENS},
    many={"tokens": "blend"},
    lazy={"tokens": ".safetensors"},
    output=Kind.MODEL,
    run=run,
    trains=True,
    model_of=model_of,
)
