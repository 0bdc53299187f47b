"""Canonical arrays from the host, stacked and laid over the devices."""

from collections.abc import Iterable, Mapping

import jax

from models import weights
from models.config import ModelConfig
from models.jax_engine.parameters import stacked, stacks
from models.jax_engine.sharding import Sharding
from models.weights import Array, Parameter, Piece


class Holder:
    """The parameters as they are now: a training step replaces them, and inference looks here at each call."""

    def __init__(self) -> None:
        self.parameters: dict[str, jax.Array] = {}


def placed(
    sharding: Sharding, name: str, parameters: list[Parameter], canonical: Mapping[str, Array], prefix: str = ""
) -> jax.Array:
    """One stacked parameter, or its moment of that prefix, on the devices."""
    array = stacked(name, parameters, canonical, prefix)
    return sharding.put(array, sharding.of_parameter(name, array.ndim))


def load(config: ModelConfig, sharding: Sharding, pieces: Iterable[Piece]) -> dict[str, jax.Array]:
    """All parameters out of canonical weights; ValueError names what is missing, unexpected or misshapen."""
    found = weights.gather(pieces, weights.canonical_shapes(config))
    return {name: placed(sharding, name, parameters, found) for name, parameters in stacks(config).items()}
