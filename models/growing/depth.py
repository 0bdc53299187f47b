"""Growing a model in depth: which old layer each new one comes from, and in which state.

- `stack` repeats the whole (0123 → 01230123): "Stacking Your Transformers" (Du et al., arXiv 2405.15319) and MTLM1. Of
  a last copy that is not whole the upper layers are there, as in gradual stacking, so that the last layer stays last.
- `interleave` repeats each layer in place (0123 → 00112233); with fewer copies than layers, they are spread evenly.
- `middle` repeats the block in the middle, between the layers that read the embedding and those that lead to the head:
  MIDAS (Saunshi et al., arXiv 2409.19044), whose step repeats the middle block once. Where an even number of blocks
  has no middle one, the layers in the exact middle are taken (Kapl et al., arXiv 2512.08819).
- `overlap` joins two copies that have lost m layers each at the seam (01234567 → 012345 234567): SOLAR's depth
  up-scaling (Kim et al., arXiv 2312.15166), whose m is a quarter of the layers.
- `zero` is `interleave` with silent copies: their attention output and MLP down projections are zero, so they add
  nothing and the function is what it was. A copy stands behind its layer, where the residual stream is most like what
  it was trained to read; LLaMA Pro (Wu et al., arXiv 2401.02415) has identity blocks interleaved like that, and lost
  with all of them on top.
- `random` has fresh layers where `zero` has silent ones, so that the two differ in nothing else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np

from common.errors import UserError
from models.config import ModelConfig
from models.growing.growth import WEIGHT, Kind, prefix_of
from models.weights import Array, Parameter, Piece, from_canonical, initial_parameter, parameters, to_canonical

Method = Literal["stack", "interleave", "middle", "overlap", "zero", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
_SILENCED = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias", "experts.down_proj")


class Layer(NamedTuple):
    """A new layer."""

    neighbour: int
    """The old layer that it copies, or behind which it stands."""
    state: Literal["copy", "silent", "fresh"] = "copy"
    """A copy, a copy that adds nothing to the residual stream, or none at all."""

    @property
    def source(self) -> int | None:
        """The old layer that it copies; None for a fresh one."""
        return None if self.state == "fresh" else self.neighbour


def grown_layers(layers: int, factor: float) -> int:
    """So many times as many layers. Raises UserError where that is no whole number."""
    product = layers * Fraction(str(factor))
    if product.denominator != 1:
        raise UserError(
            f"factor {factor:g} of {layers} layers is {float(product):g}, no whole number of layers; "
            f"choose another factor or give num_hidden_layers"
        )
    return int(product)


def layer_map(method: Method, layers: int, target: int, block: int | None = None) -> tuple[Layer, ...]:
    """The `target` layers of the grown model, from the first to the last.

    `block`: how many layers `middle` repeats; None for all that are added, if so many have a layer before and behind
    them, else the most that do and that divide what is added.

    Raises UserError where the method cannot make so many layers.
    """
    if target <= layers:
        raise UserError(f"the model has {layers} layers already; a grown one has more, not {target}")
    if method == "stack":
        rest = target % layers
        return tuple(Layer(old) for old in [*range(layers)] * (target // layers) + [*range(layers - rest, layers)])
    if method == "middle":
        return tuple(Layer(old) for old in _middle(layers, target - layers, block))
    if method == "overlap":
        return tuple(Layer(old) for old in _overlap(layers, target))
    added: dict[Method, Literal["copy", "silent", "fresh"]]
    added = {"interleave": "copy", "zero": "silent", "random": "fresh"}
    return tuple(Layer(old, added[method] if again else "copy") for old, again in _spread(layers, target - layers))


def _middle(layers: int, added: int, block: int | None) -> list[int]:
    most = layers - 2
    if most < 1:
        raise UserError(f"middle keeps a layer before and behind what it repeats: 3 layers at least, not {layers}")
    if block is None:
        block = max(size for size in range(1, most + 1) if added % size == 0)
    if block > most:
        raise UserError(f"block {block} leaves no layer before and behind it: {layers} layers have a block of {most}")
    if added % block:
        raise UserError(f"middle adds {added} layers, which blocks of {block} do not make up; choose another block")
    start = (layers - block) // 2
    repeated = [*range(start, start + block)] * (added // block)
    return [*range(start + block), *repeated, *range(start + block, layers)]


def _overlap(layers: int, target: int) -> list[int]:
    if target % 2:
        raise UserError(f"overlap makes two parts of as many layers each: an even number of layers, not {target}")
    if target >= 2 * layers:
        raise UserError(f"overlap drops layers of two copies of {layers}: fewer than {2 * layers}, not {target}")
    part = target // 2
    return [*range(part), *range(layers - part, layers)]


def _spread(layers: int, added: int) -> Iterator[tuple[int, bool]]:
    """Each layer and, evenly spread, again for those that are added, with whether it is one of these."""
    for layer in range(layers):
        yield layer, False
        for _ in range((layer + 1) * added // layers - layer * added // layers):
            yield layer, True


@dataclass(frozen=True)
class Deeper:
    """A model that grows in depth; see `models.growing.growth.Growth`.

    Of a copy, moments are those of its source. A silent copy has no gradient but in the projections that are zero, and
    is on another way than its source was: it has no momentum, and its source's second moments, for its gradients will
    be as large. A fresh layer has no momentum, and as its second moments the mean over those of the layer that it
    stands behind; second moments of zero would, with a count of many updates, let the first ones be several times too
    large.
    """

    model: ModelConfig
    """The old model."""
    layers: tuple[Layer, ...]
    """The new layers."""
    seed: int = 0
    """Of the fresh layers."""

    @cached_property
    def grown(self) -> ModelConfig:
        """The model that comes out."""
        return ModelConfig.model_validate({**self.model.model_dump(), "num_hidden_layers": len(self.layers)})

    @cached_property
    def _old(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in parameters(self.model)}

    def pieces(self, parameter: Parameter, kind: Kind, old: Mapping[str, Array]) -> Iterator[Piece]:
        """The parameter or its moment out of the old arrays."""
        layer, source = self._source(parameter)
        prefix = prefix_of(kind)
        if layer.state == "fresh":
            yield from to_canonical(parameter, self._fresh(parameter, kind, source, old), prefix)
            return
        of_silent = parameter.name.endswith(_SILENCED) if kind == WEIGHT else kind != "exp_avg_sq"
        zero = layer.state == "silent" and of_silent
        for place, origin in zip(parameter.placements, source.placements, strict=True):
            array = old[prefix + origin.name]
            yield Piece(prefix + place.name, (), np.zeros_like(array) if zero else array)

    def _fresh(self, parameter: Parameter, kind: Kind, below: Parameter, old: Mapping[str, Array]) -> Array:
        if kind == WEIGHT:
            # The base, and the fresh layers of a growth before, may have been drawn with the same seed.
            named = replace(parameter, name=f"grown to {len(self.layers)}.{parameter.name}")
            return initial_parameter(self.grown, named, self.seed)
        mean = from_canonical(below, old.__getitem__, prefix_of(kind)).mean() if kind == "exp_avg_sq" else 0.0
        return np.full(parameter.shape, mean, np.float32)

    def _source(self, parameter: Parameter) -> tuple[Layer, Parameter]:
        """The new layer that a parameter belongs to, and the old parameter that it copies or stands behind."""
        stem, _, rest = parameter.name.partition(".")
        if stem != "layers":
            return Layer(0), self._old[parameter.name]
        number, _, name = rest.partition(".")
        layer = self.layers[int(number)]
        return layer, self._old[f"layers.{layer.neighbour}.{name}"]
