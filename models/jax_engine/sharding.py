"""Where arrays lie: a mesh of devices with the axes `data`, `fsdp` and `tensor`, and the rules from what a dimension
means to the mesh axes that it is divided over.

Rows of a batch are divided over `data` and `fsdp`; weights, their gradients and moments over `fsdp` along the residual
width and over `tensor` along heads, inner width and vocabulary. A layer's weights are gathered over `fsdp` only while
it computes. The compiler (GSPMD) adds the communication: axes are `Auto`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from common.errors import UserError
from models.config import ModelConfig
from models.engine import Layout

Axis = Literal["rows", "layers", "width", "heads", "groups", "inner", "vocabulary", "whole"]
"""What a dimension means. `groups` are the key-value heads; `whole` is never divided."""

RULES: Mapping[Axis, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "layers": (),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "groups": ("tensor",),
    "inner": ("tensor",),
    "vocabulary": ("tensor",),
    "whole": (),
}

_PARAMETER_AXES: Mapping[str, tuple[Axis, ...]] = {
    "embed_tokens.weight": ("vocabulary", "width"),
    "embed_positions.weight": ("whole", "width"),
    "lm_head.weight": ("vocabulary", "width"),
    "attention.q_proj.weight": ("heads", "width"),
    "attention.k_proj.weight": ("groups", "width"),
    "attention.v_proj.weight": ("groups", "width"),
    "attention.o_proj.weight": ("width", "heads"),
    "attention.q_proj.bias": ("heads",),
    "attention.k_proj.bias": ("groups",),
    "attention.v_proj.bias": ("groups",),
    "mlp.gate_proj.weight": ("inner", "width"),
    "mlp.up_proj.weight": ("inner", "width"),
    "mlp.down_proj.weight": ("width", "inner"),
    "mlp.gate_proj.bias": ("inner",),
    "mlp.up_proj.bias": ("inner",),
    "mlp.router.weight": ("whole", "width"),
    "mlp.experts.gate_proj": ("whole", "inner", "width"),
    "mlp.experts.up_proj": ("whole", "inner", "width"),
    "mlp.experts.down_proj": ("whole", "width", "inner"),
}
"""Of one layer's parameters; those that are not named are small vectors, which every device has whole."""


def parameter_axes(name: str, dimensions: int) -> tuple[Axis, ...]:
    """What the dimensions of a parameter mean, by its name among stacked ones or among those of one layer."""
    stacked: tuple[Axis, ...] = ("layers",) if name.startswith("layers.") else ()
    whole: Axis = "whole"
    vector = (whole,) * (dimensions - len(stacked))
    return stacked + _PARAMETER_AXES.get(name.removeprefix("layers."), vector)


@dataclass(frozen=True)
class Sharding:
    """A mesh, and arrays on it."""

    mesh: Mesh

    @property
    def row_parts(self) -> int:
        """Parts that the rows of a batch are divided into: their number has to be a multiple of it."""
        parts: int = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return parts

    def spec(self, axes: Sequence[Axis], *, gathered: bool = False) -> PartitionSpec:
        """The mesh axes of each dimension; `gathered` leaves out those that divide weights for storage alone."""
        rules = [tuple(name for name in RULES[axis] if self.mesh.shape[name] > 1) for axis in axes]
        if gathered:
            rules = [tuple(name for name in rule if name != "fsdp") for rule in rules]
        return PartitionSpec(*(rule or None for rule in rules))

    def of(self, *axes: Axis) -> NamedSharding:
        """How an array lies whose dimensions mean this; trailing ones that are not named are whole."""
        return NamedSharding(self.mesh, self.spec(axes))

    def of_parameter(self, name: str, dimensions: int) -> NamedSharding:
        """How a stacked parameter, its gradient and its moments lie."""
        return self.of(*parameter_axes(name, dimensions))

    def constrained(self, x: jax.Array, *axes: Axis) -> jax.Array:
        """The same array, told to the compiler to lie so."""
        return x if self.mesh.size == 1 else _lying(x, self.of(*axes))

    def of_gathered(self, name: str, dimensions: int) -> NamedSharding | None:
        """How a layer's weight lies while it is computed with: whole along `fsdp`, still divided along `tensor`; None
        where that is how it is stored."""
        if self.mesh.shape["fsdp"] == 1:
            return None
        return NamedSharding(self.mesh, self.spec(parameter_axes(name, dimensions), gathered=True))

    def put(self, array: NDArray[np.generic], sharding: NamedSharding) -> jax.Array:
        """A host array that every process has whole, laid over the devices of all."""
        if sharding.is_fully_addressable:
            there: jax.Array = jax.device_put(array, sharding)
            return there
        return jax.make_array_from_callback(array.shape, sharding, lambda region: array[region])

    def on_host(self, array: jax.Array) -> NDArray[np.generic]:
        """A copy that later updates do not touch; collective where there are several processes."""
        if not array.is_fully_addressable and not array.is_fully_replicated:
            array = _replicating(self.mesh)(array)
        return np.array(array)


def sharding_of(layout: Layout, model: ModelConfig, devices: Sequence[jax.Device]) -> Sharding:
    """The mesh of a layout over some devices.

    Raises UserError where the layout needs other devices than there are, or does not divide the model.
    """
    weights_parts = layout.fsdp * layout.tensor
    data = layout.data or max(1, len(devices) // weights_parts)
    needed = data * weights_parts
    several = len({device.process_index for device in devices}) > 1
    if needed > len(devices) or (needed < len(devices) and (layout.data is None or several)):
        raise UserError(
            f"the layout (data {layout.data or 'of what is left'}, fsdp {layout.fsdp}, tensor {layout.tensor}) does "
            f"not fit {len(devices)} devices: change it so that the product is {len(devices)}"
        )
    _check_divides(layout, model)
    places = np.array(devices[:needed], dtype=object).reshape(data, layout.fsdp, layout.tensor)
    return Sharding(Mesh(places, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3))


@functools.lru_cache(maxsize=16)
def _replicating(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Makes an array whole on every device; one function for a mesh, so that it is compiled once for each shape."""
    found: Callable[[jax.Array], jax.Array] = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return found


def _lying(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    found: jax.Array = jax.lax.with_sharding_constraint(x, sharding)
    return found


def _check_divides(layout: Layout, model: ModelConfig) -> None:
    divided = {"hidden_size": (model.hidden_size, "fsdp", layout.fsdp)}
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        divided[name] = (getattr(model, name), "tensor", layout.tensor)
    for name, (size, axis, parts) in divided.items():
        if size % parts:
            raise UserError(f"layout.{axis} {parts} does not divide the model's {name} {size}: change one of them")
