"""Growing a model in width by whole factors, with the function that it computes unchanged.

After Net2Net (Chen et al., arXiv 1511.05641), bert2BERT (Chen et al., arXiv 2110.07143) and HyperCloning (Samragh et
al., arXiv 2409.12903). Every value that the model computes stands there `factor` times over, as blocks one after the
other; what computes it is copied, and what reads it is divided among the copies:

- The residual stream: embeddings, norms and everything that writes to the stream have `factor` copies of their rows.
  The mean square (RMSNorm) or mean and variance (LayerNorm) of the copies are those of one, so norms, eps included,
  give what they gave. Matrices that read the stream are divided among their columns. A tied head would read every
  logit `factor` times: the final norm is divided in its place, which nothing else reads.
- Heads: query heads are copied together with their key and value heads, so groups, head_dim and rotary positions stay;
  the output projection is divided.
- The MLP's inner width: copied rows of gate and up projection, divided columns of the down projection; of each expert
  the same. Biases are added once and so are copied with their rows.

A division in equal parts leaves the copies with equal gradients, and so equal for ever. Parts that are drawn at random,
not negative and of sum one, keep the function as exactly and break that symmetry. They are drawn for each element:
with one part for a whole unit the copies' gradients would be proportional, and AdamW, which is free of scale, takes
such for equal.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from common.errors import UserError
from models.config import ModelConfig
from models.growing.growth import WEIGHT, Kind, prefix_of
from models.weights import Array, Parameter, Piece, from_canonical, parameters, random_stream, to_canonical

Axis = Literal["hidden_size", "intermediate_size", "num_attention_heads"]
AXES: tuple[Axis, ...] = ("hidden_size", "intermediate_size", "num_attention_heads")
Split = Literal["random", "even"]

_ROWS: dict[str, Axis] = {
    "q_proj": "num_attention_heads",
    "k_proj": "num_attention_heads",
    "v_proj": "num_attention_heads",
    "o_proj": "hidden_size",
    "gate_proj": "intermediate_size",
    "up_proj": "intermediate_size",
    "down_proj": "hidden_size",
}
_COLUMNS: dict[str, Axis] = {
    "q_proj": "hidden_size",
    "k_proj": "hidden_size",
    "v_proj": "hidden_size",
    "o_proj": "num_attention_heads",
    "gate_proj": "hidden_size",
    "up_proj": "hidden_size",
    "down_proj": "intermediate_size",
    "router": "hidden_size",
    "lm_head": "hidden_size",
}


@dataclass(frozen=True)
class Wider:
    """A model that grows in width; see `models.growing.growth.Growth`.

    A value of which there are `factor` copies that are read in equal parts gets 1/factor of the gradient in each. So
    what is copied has moments of 1/factor (second: 1/factor²) of the old, and what is divided has the old moments, for
    it reads what was read before and writes what was written. Random parts make that true on average.
    """

    model: ModelConfig
    """The old model."""
    factor: int
    """How many times as wide."""
    axes: tuple[Axis, ...] = AXES
    """What grows; key and value heads grow with the query heads."""
    split: Split = "random"
    """The parts that copies are read in."""
    seed: int = 0
    """Of the random parts."""

    @cached_property
    def grown(self) -> ModelConfig:
        """The model that comes out. Raises UserError where the architecture cannot be so."""
        changes: dict[str, int] = {axis: getattr(self.model, axis) * self.factor for axis in self.axes}
        if "num_attention_heads" in changes:
            changes["num_key_value_heads"] = self.model.num_key_value_heads * self.factor
        try:
            return ModelConfig.model_validate({**self.model.model_dump(), **changes})
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UserError(f"{' and '.join(self.axes)} alone cannot grow: {reason}") from error

    @cached_property
    def _old(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in parameters(self.model)}

    def pieces(self, parameter: Parameter, kind: Kind, old: Mapping[str, Array]) -> Iterator[Piece]:
        """The parameter or its moment out of the old arrays."""
        prefix = prefix_of(kind)
        array = from_canonical(self._old[parameter.name], old.__getitem__, prefix).astype(np.float32, copy=False)
        copies, parts = self._factors(parameter)
        tiled = np.tile(array, (*copies[:-1], copies[-1] * parts))
        if kind != WEIGHT:
            tiled = tiled / np.float32(math.prod(copies) ** (2 if kind == "exp_avg_sq" else 1))
        elif parts > 1:
            tiled = self._divided(tiled, parts, parameter.name)
        yield from to_canonical(parameter, tiled, prefix)

    def _factors(self, parameter: Parameter) -> tuple[tuple[int, ...], int]:
        """How many copies there are along each axis, and how many parts the last one is divided into."""
        *_, part = (word for word in parameter.name.split(".") if word not in ("weight", "bias"))
        ones = (1,) * len(parameter.shape)
        if parameter.name.startswith("norm.") and self.model.tie_word_embeddings:
            return ones, self._factor("hidden_size")
        if part.startswith("embed_") or part.endswith("norm"):
            return (*ones[:-1], self._factor("hidden_size")), 1
        rows = self._factor(_ROWS.get(part))
        if len(ones) == 1:
            return (rows,), 1
        return (*ones[:-2], rows, 1), self._factor(_COLUMNS[part])

    def _factor(self, axis: Axis | None) -> int:
        return self.factor if axis in self.axes else 1

    def _divided(self, tiled: NDArray[np.float32], parts: int, name: str) -> NDArray[np.float32]:
        """Copies along the last axis as parts whose sum is one of them."""
        if self.split == "even":
            return tiled / np.float32(parts)
        copies = tiled.reshape(*tiled.shape[:-1], parts, -1)
        shares = random_stream(f"{self.seed}:split:{name}").standard_exponential(copies.shape, np.float32)
        shares /= shares.sum(-2, keepdims=True)
        divided = copies * shares
        # What rounding leaves of the sum goes to the last part.
        divided[..., -1, :] = copies[..., -1, :] - divided[..., :-1, :].sum(-2)
        return divided.reshape(tiled.shape)
