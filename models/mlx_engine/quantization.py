"""Inference with matrices of few bits, by `mlx.nn.quantize`."""

from typing import Literal

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map

from models.mlx_engine.layers import Linear
from models.mlx_engine.model import Transformer

Bits = Literal[2, 3, 4, 6, 8]
_GROUPS = (64, 32)
"""Weights that share a scale and an offset; the first that divides a matrix's width is taken."""


def quantized(model: Transformer, bits: Bits) -> Transformer:
    """The model with its projections, embeddings and head as integers of so many bits, in place.

    Norms, biases, learned positions, routers, experts' stacks and matrices whose width no group divides stay as they
    are. Raises ValueError where that leaves nothing to quantise.
    """
    model.update(tree_map(lambda array: array.astype(model.compute), model.parameters()))
    found: list[str] = []

    def choose(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not isinstance(module, (Linear, nn.Embedding)) or path.endswith(("embed_positions", "router")):
            return False
        group = next((size for size in _GROUPS if module.weight.shape[-1] % size == 0), None)
        if group is None:
            return False
        found.append(path)
        return {"group_size": group, "bits": bits}

    nn.quantize(model, class_predicate=choose)
    if not found:
        raise ValueError(f"no matrix has a width that is a multiple of {min(_GROUPS)}: there is nothing to quantise")
    mx.eval(model.parameters())
    return model
