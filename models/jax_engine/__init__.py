"""The JAX engine: TPU, GPU and CPU."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.engine import Layout, Precision
from models.jax_engine import distributed
from models.jax_engine.inference import JaxInference
from models.jax_engine.model import Computing
from models.jax_engine.placement import Holder, load
from models.jax_engine.sharding import sharding_of
from models.jax_engine.train import JaxTraining
from models.optimizer import OptimizerConfig
from models.tuning import WHOLE, Tuning
from models.weights import Piece


def training_engine(
    model: ModelConfig, optimizer: OptimizerConfig, precision: Precision, layout: Layout, tuning: Tuning = WHOLE
) -> JaxTraining:
    """An engine ready to train once its weights are restored.

    Raises UserError where the layout fits neither the devices nor the model.
    """
    return JaxTraining(model, optimizer, _computing(model, precision, layout), tuning)


def inference_engine(model: ModelConfig, precision: Precision, weights: Iterable[Piece]) -> JaxInference:
    """An engine that only reads. Raises ValueError where the weights are not the model's."""
    computing, held = _computing(model, precision, Layout()), Holder()
    held.parameters = load(model, computing.sharding, weights)
    return JaxInference(model, computing, held)


def _computing(model: ModelConfig, precision: Precision, layout: Layout) -> Computing:
    distributed.join()
    dtype = jnp.dtype(jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
    return Computing(dtype, sharding_of(layout, model, jax.devices()), layout.rematerialize)
