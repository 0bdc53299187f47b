"""The PyTorch engine: CUDA, Apple's GPU and CPU, on one device or on several with a process each."""

from collections.abc import Iterable

import torch

from models.config import ModelConfig
from models.engine import Layout, Precision
from models.optimizer import OptimizerConfig
from models.torch_engine.device import compute_dtype, default_device, described
from models.torch_engine.inference import TorchInference
from models.torch_engine.model import Transformer
from models.torch_engine.train import TorchTraining, load_weights
from models.tuning import WHOLE, Tuning
from models.weights import Piece


def training_engine(
    model: ModelConfig, optimizer: OptimizerConfig, precision: Precision, layout: Layout, tuning: Tuning = WHOLE
) -> TorchTraining:
    """An engine ready to train once its weights are restored. Raises UserError for a layout that does not fit."""
    return TorchTraining(model, optimizer, precision, layout, tuning)


def inference_engine(model: ModelConfig, precision: Precision, weights: Iterable[Piece]) -> TorchInference:
    """An engine that only reads. Raises ValueError where the weights are not the model's."""
    device = default_device()
    with torch.device(device):
        module = Transformer(model, compute_dtype(precision, device))
    load_weights(module, weights)
    module.requires_grad_(False)
    return TorchInference(lambda: module, model, device, described(device))
