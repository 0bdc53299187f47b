"""The optimizers of `models.optimizer` once more, in fp64 and one matrix at a time: what every engine is held to."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models import weights
from models.config import ModelConfig
from models.optimizer import NEWTON_SCHULZ, OptimizerConfig, is_decayed, takes_muon
from models.weights import Array

Matrix = NDArray[np.float64]


def orthogonalised(update: Matrix, steps: int) -> Matrix:
    if update.shape[0] > update.shape[1]:
        return orthogonalised(update.T, steps).T
    a, b, c = NEWTON_SCHULZ
    x = update / max(float(np.linalg.norm(update)), 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class ReferenceOptimizer:
    """Updates canonical weights from canonical gradients."""

    def __init__(self, model: ModelConfig, config: OptimizerConfig, initial: Mapping[str, Array]) -> None:
        self.model, self.config, self.updates = model, config, 0
        self.parameters = weights.parameters(model)
        self.values = self._read(initial)
        self.first = {name: np.zeros_like(value) for name, value in self.values.items()}
        self.second = {name: np.zeros_like(value) for name, value in self.values.items()}

    def _read(self, canonical: Mapping[str, Array]) -> dict[str, Matrix]:
        return {
            parameter.name: weights.from_canonical(parameter, canonical.__getitem__).astype(np.float64)
            for parameter in self.parameters
        }

    def step(self, canonical_gradients: Mapping[str, Array], scale: float) -> float:
        """One update; gives the gradients' norm."""
        gradients = self._read(canonical_gradients)
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
        shrink = 1.0 if self.config.clip is None else min(1.0, self.config.clip / (norm + 1e-6))
        self.updates += 1
        for name, gradient in gradients.items():
            change = self._muon if takes_muon(self.config, name) else self._adamw
            change(name, gradient * shrink, scale)
        return norm

    def _adamw(self, name: str, gradient: Matrix, scale: float) -> None:
        config, rate = self.config, self.config.learning_rate * scale
        first = self.first[name] = config.beta1 * self.first[name] + (1 - config.beta1) * gradient
        second = self.second[name] = config.beta2 * self.second[name] + (1 - config.beta2) * gradient**2
        decay = config.weight_decay if is_decayed(gradient.shape) else 0.0
        mean, square = first / (1 - config.beta1**self.updates), second / (1 - config.beta2**self.updates)
        self.values[name] = self.values[name] * (1 - rate * decay) - rate * mean / (np.sqrt(square) + config.eps)

    def _muon(self, name: str, gradient: Matrix, scale: float) -> None:
        config, rate = self.config, self.config.muon_learning_rate * scale
        buffer = self.first[name] = config.momentum * self.first[name] + (1 - config.momentum) * gradient
        update = (1 - config.momentum) * gradient + config.momentum * buffer
        stack = update if update.ndim == 3 else update[None]
        change = np.stack([orthogonalised(matrix, config.newton_schulz_steps) for matrix in stack])
        ratio = math.sqrt(max(1.0, stack.shape[1] / stack.shape[2]))
        self.values[name] = self.values[name] * (1 - rate * config.weight_decay) - rate * ratio * change.reshape(
            update.shape
        )

    def canonical(self) -> dict[str, Array]:
        found = [
            piece
            for parameter in self.parameters
            for piece in weights.to_canonical(parameter, self.values[parameter.name])
        ]
        return weights.gather(found, weights.canonical_shapes(self.model))
