"""Adapters of this engine's stacked matrices, as `models.lora` defines them.

Those of a stack are stacked alike: `lora_A:layers.attention.q_proj.weight` is (layers, rank, in). Every device has all
of them. Suffixes: L layers, R rank, O out, I in.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.jax_engine.parameters import stacks
from models.jax_engine.sharding import Sharding
from models.lora import LORA_A, LORA_B, adapted_parameters
from models.tuning import LoraConfig
from models.weights import Array, Piece

Arrays = Mapping[str, jax.Array]


def adapted(config: ModelConfig, lora: LoraConfig) -> dict[str, list[str]]:
    """This engine's parameters that have adapters, each with those of `models.weights` that it stands for, by layer."""
    wanted = {parameter.name for parameter in adapted_parameters(config, lora)}
    return {
        name: [parameter.name for parameter in parameters]
        for name, parameters in stacks(config).items()
        if parameters[0].name in wanted
    }


def placed(
    config: ModelConfig, lora: LoraConfig, sharding: Sharding, found: Mapping[str, Array], prefix: str = ""
) -> dict[str, jax.Array]:
    """The stacked adapters, or their moments of that prefix, on the devices."""
    return {
        kind + name: sharding.put(np.stack([found[prefix + kind + one] for one in ones]), sharding.of())
        for name, ones in adapted(config, lora).items()
        for kind in (LORA_A, LORA_B)
    }


def unstacked(
    config: ModelConfig, lora: LoraConfig, sharding: Sharding, adapters: Arrays, prefix: str = ""
) -> Iterator[Piece]:
    """The stacked adapters, or their moments or gradients, one by one under the names that every engine has."""
    for name, ones in adapted(config, lora).items():
        for kind in (LORA_A, LORA_B):
            host = sharding.on_host(adapters[kind + name])
            yield from (Piece(prefix + kind + one, (), array) for one, array in zip(ones, host, strict=True))


def effective(lora: LoraConfig, base: Arrays, adapters: Arrays) -> dict[str, jax.Array]:
    """W + s·B·A for each of the base matrices."""
    return {
        name: w_LOI + lora.scale * _product(adapters[LORA_B + name], adapters[LORA_A + name])
        for name, w_LOI in base.items()
    }


def gradients(lora: LoraConfig, adapters: Arrays, of_matrices: Arrays) -> dict[str, jax.Array]:
    """The adapters' gradients, which follow from those of W + s·B·A."""
    found: dict[str, jax.Array] = {}
    for name, dw_LOI in of_matrices.items():
        a_LRI, b_LOR = adapters[LORA_A + name], adapters[LORA_B + name]
        found[LORA_A + name] = lora.scale * _product(b_LOR.mT, dw_LOI)
        found[LORA_B + name] = lora.scale * _product(dw_LOI, a_LRI.mT)
    return found


def _product(one: jax.Array, other: jax.Array) -> jax.Array:
    # fp32 everywhere, whatever the model's products are computed in.
    return jnp.matmul(one, other, precision="highest")
