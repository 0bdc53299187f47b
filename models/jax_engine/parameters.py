"""From the parameters of `models.weights`, one for each layer, to this engine's, of which the layers' are stacked.

`layers.3.attention.q_proj.weight` is row 3 of `layers.attention.q_proj.weight`.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from models import weights
from models.config import ModelConfig
from models.weights import Array, Parameter, Piece

Stacks = dict[str, list[Parameter]]
"""The parameters of `models.weights` that each of this engine's stands for, by layer; one where it is no layer's."""


def stacks(config: ModelConfig) -> Stacks:
    """This engine's parameters in their order."""
    found: Stacks = {}
    for parameter in weights.parameters(config):
        first, _, rest = parameter.name.partition(".")
        name = f"layers.{rest.partition('.')[2]}" if first == "layers" else parameter.name
        found.setdefault(name, []).append(parameter)
    return found


def is_stacked(name: str) -> bool:
    """Whether a parameter has a first dimension of layers."""
    return name.startswith("layers.")


def stacked_shape(name: str, parameters: list[Parameter]) -> tuple[int, ...]:
    """The shape of one of this engine's parameters."""
    return (len(parameters), *parameters[0].shape) if is_stacked(name) else parameters[0].shape


def stacked(name: str, parameters: list[Parameter], canonical: Mapping[str, Array], prefix: str = "") -> Array:
    """One of this engine's parameters, or its moment of that prefix, out of whole canonical arrays; fp32."""
    read: Callable[[str], Array] = canonical.__getitem__
    if not is_stacked(name):
        return np.asarray(weights.from_canonical(parameters[0], read, prefix), np.float32)
    found: NDArray[np.float32] = np.empty(stacked_shape(name, parameters), np.float32)
    for layer, parameter in enumerate(parameters):
        found[layer] = weights.from_canonical(parameter, read, prefix)
    return found


def unstacked(name: str, parameters: list[Parameter], array: Array, prefix: str = "") -> Iterator[Piece]:
    """The canonical pieces of one of this engine's parameters, or of its moment; views of `array`."""
    for layer, parameter in enumerate(parameters):
        yield from weights.to_canonical(parameter, array[layer] if is_stacked(name) else array, prefix)
