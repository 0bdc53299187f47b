"""Stage `dpo`: a model that is tuned to write the chosen answers rather than the rejected ones.

Direct preference optimization (Rafailov et al., arXiv 2305.18290); the reference is the model that comes in.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from models.training.loop import Start
from models.tuning import PreferenceConfig, Tuning
from tasks.blend import tokens_inputs
from tasks.sft import TuningStageConfig, model_of, prepared
from tasks.stage import Context, Metrics
from tasks.training import run_training, training_stage


class Config(TuningStageConfig):
    """How a model is tuned on pairs of answers."""

    beta: float = Field(default=PreferenceConfig().beta, gt=0)
    """How dear it is to leave the model that comes in: the larger, the closer to it the tuned one stays."""

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        if self.training.packing != "pairs":
            raise ValueError("dpo learns from pairs of rows: set training.packing: pairs")
        return self


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes a model artifact like `sft`'s. Raises UserError for tokens that are no pairs, or of another tokenizer than
    the model's."""
    tuned = prepared(config, inputs["model"], tokens_inputs(inputs, config.blend, context), context)
    tuning = Tuning(lora=config.lora, preference=PreferenceConfig(beta=config.beta))
    # Before the first step nothing is to be measured: every margin is 0, and the loss log 2.
    start = Start(tuned.model.weights, tuned.model.optimizer)
    trained = run_training(config, tuned.model.config, start, inputs, context, tuned.model.history, tuning)
    return {**trained, **tuned.metrics}


STAGE = training_stage("dpo", 1, Config, run, model_of)
