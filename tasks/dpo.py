"""Stage `dpo`: a model that is tuned to write the chosen answers rather than the rejected ones.

Direct preference optimization (Rafailov et al., arXiv 2305.18290); the reference is the model that comes in.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from models.config import ModelConfig
from models.training.loop import Start
from models.tuning import PreferenceConfig, Tuning
from tasks.checkpoint import read_model
from tasks.stage import Context, Kind, Metrics, Stage
from tasks.training import TrainingStageConfig, check_positions, run_training


class Config(TrainingStageConfig):
    """How a model is tuned on pairs of answers."""

    beta: float = Field(default=PreferenceConfig().beta, gt=0)
    """How dear it is to leave the model that comes in: the larger, the closer to it the tuned one stays."""

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        if self.training.packing != "pairs":
            raise ValueError("dpo learns from pairs of rows: set training.packing: pairs")
        return self


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes a model artifact like `refine`'s; the optimizer starts anew. Raises UserError for tokens that are no
    pairs."""
    model = read_model(inputs["model"])
    tuning = Tuning(preference=PreferenceConfig(beta=config.beta))
    return run_training(config, model.config, Start(model.weights), inputs, context, model.history, tuning)


def model_of(config: Config, inputs: Mapping[str, ModelConfig]) -> ModelConfig:
    """The model that goes in. Raises UserError for rows that are longer than its positions."""
    check_positions(config.training, inputs["model"])
    return inputs["model"]


STAGE = Stage(
    name="dpo",
    version=1,
    config=Config,
    inputs={"model": Kind.MODEL, "tokens": Kind.TOKENS},
    many={"tokens": "blend"},
    lazy={"tokens": ".safetensors"},
    output=Kind.MODEL,
    run=run,
    trains=True,
    model_of=model_of,
)
