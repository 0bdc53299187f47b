"""The MLX engine: Apple's GPUs, CUDA, and the CPU."""

import os
from collections.abc import Iterable

from models.config import ModelConfig
from models.engine import Bits, Layout, Precision
from models.mlx_engine.blas import cores, divide_products, preload
from models.optimizer import OptimizerConfig
from models.tuning import WHOLE, Tuning
from models.weights import Piece

preload()  # before the first import of mlx
# Products in fp32 are fp32: on CUDA and on Apple's M5, MLX would round their factors to ten bits.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from models.mlx_engine.inference import MlxInference  # noqa: E402
from models.mlx_engine.model import Transformer, compute_dtype, load_weights  # noqa: E402
from models.mlx_engine.processes import Processes  # noqa: E402
from models.mlx_engine.quantization import quantized  # noqa: E402
from models.mlx_engine.train import MlxTraining  # noqa: E402


def training_engine(
    model: ModelConfig, optimizer: OptimizerConfig, precision: Precision, layout: Layout, tuning: Tuning = WHOLE
) -> MlxTraining:
    """An engine ready to train once its weights are restored. Raises UserError where the layout does not fit."""
    return MlxTraining(model, optimizer, precision, layout, Processes.joined(layout), tuning=tuning)


def inference_engine(
    model: ModelConfig, precision: Precision, weights: Iterable[Piece], bits: Bits | None = None
) -> MlxInference:
    """An engine that only reads, its matrices in groups of integers of so many bits where that is asked for.

    Raises ValueError where the weights are not the model's, UserError where no matrix fits the bits.
    """
    module = Transformer(model, compute_dtype(precision))
    load_weights(module, weights)
    module.freeze()
    divide_products(cores())  # which an engine that trained before this one in the same process has stopped
    return MlxInference(module if bits is None else quantized(module, bits))
