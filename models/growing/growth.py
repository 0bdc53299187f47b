"""What every way to grow a model has in common: grown weights, and the optimizer state that goes with them.

A growth says for each parameter of the grown model what it and its moments are made of. Weights follow from what
the method promises of the function; moments follow from them: where a grown parameter's gradient is c times the old
one's, its first moment is c times and its second c² times the old one, so that AdamW's next update is as large as it
would have been. Muon's momentum is a first moment (what comes of it is orthogonalised, so its scale is of no account).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, Protocol

import numpy as np

from models.config import ModelConfig
from models.optimizer import UPDATES, OptimizerConfig, moments_of
from models.weights import Array, Parameter, Piece, assemble, canonical_shapes, parameters

OptimizerPolicy = Literal["copy", "copy-momentum", "reset"]
Kind = str
"""WEIGHT for a parameter itself, or the prefix of one of its moments."""
WEIGHT: Kind = "weight"


class Growth(Protocol):
    """How one model grows into another."""

    @property
    def model(self) -> ModelConfig:
        """The old model."""
        ...

    @property
    def grown(self) -> ModelConfig:
        """The model that comes out."""
        ...

    def pieces(self, parameter: Parameter, kind: Kind, old: Mapping[str, Array]) -> Iterator[Piece]:
        """The parameter of the grown model, or its moment, out of the old model's canonical arrays or moments.

        Names carry the moment's prefix, as those of `old` do. An array that stays as it was is shared, not copied.
        """
        ...


def prefix_of(kind: Kind) -> str:
    """What stands before a canonical name where an array is of this kind."""
    return "" if kind == WEIGHT else f"{kind}:"


def grown_weights(growth: Growth, weights: Mapping[str, Array]) -> dict[str, Array]:
    """The grown model's canonical weights. Raises KeyError where the old model's are not whole."""
    found = (piece for parameter in parameters(growth.grown) for piece in growth.pieces(parameter, WEIGHT, weights))
    return _whole(found, growth.grown)


def grown_optimizer(growth: Growth, state: Mapping[str, Array], optimizer: OptimizerConfig) -> dict[str, Array]:
    """The grown model's optimizer state: grown moments, and the counts as they are.

    Raises KeyError where the old state is not of `optimizer` and of all the old model's parameters.
    """
    found = (
        piece
        for parameter in parameters(growth.grown)
        for kind in moments_of(optimizer, parameter.name)
        for piece in growth.pieces(parameter, kind, state)
    )
    return {name: array for name, array in state.items() if ":" not in name} | _whole(found, growth.grown)


def with_new_second_moments(state: Mapping[str, Array], optimizer: OptimizerConfig) -> dict[str, Array]:
    """The state with its momentum kept and AdamW's second moments begun anew.

    Both of AdamW's moments are corrected by one count, so the count cannot begin anew for one of them alone. The state
    is therefore that which a single update with the mean gradient m̂ = exp_avg / (1−β1^updates) as its gradient leaves:
    exp_avg (1−β1)·m̂, exp_avg_sq (1−β2)·m̂², updates 1. Muon's momentum has no correction and stays.
    """
    updates = int(state[UPDATES])
    if updates == 0:
        return dict(state)
    correction = 1 - optimizer.beta1**updates
    found = dict(state)
    for name, array in state.items():
        moment, _, parameter = name.partition(":")
        if moment == "exp_avg":
            mean = array.astype(np.float32, copy=False) / correction
            found[name] = (1 - optimizer.beta1) * mean
            found[f"exp_avg_sq:{parameter}"] = (1 - optimizer.beta2) * mean**2
    found[UPDATES] = np.array(1, np.int64)
    return found


def _whole(pieces: Iterable[Piece], config: ModelConfig) -> dict[str, Array]:
    """Whole arrays out of pieces; those that are whole already are shared."""
    shapes = canonical_shapes(config)
    arrays: dict[str, Array] = {}
    parts: list[Piece] = []
    for piece in pieces:
        if piece.array.shape == shapes[piece.name.rpartition(":")[2]]:
            arrays[piece.name] = piece.array
        else:
            parts.append(piece)
    return arrays | assemble(parts, shapes)
