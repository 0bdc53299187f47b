"""Inference with matrices of few bits, by `mlx.nn.quantize`.

N positions, X experts of a position, A = N · X, D hidden_size.
"""

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map

from common.errors import UserError
from models.engine import Bits
from models.mlx_engine.layers import Linear
from models.mlx_engine.mixture import Experts
from models.mlx_engine.model import Transformer

_GROUPS = (64, 32)
"""Weights that share a scale and an offset; the first that divides a matrix's width is taken."""
_STACKS = ("gate_proj", "up_proj", "down_proj")


class QuantizedExperts(Experts):
    """A mixture's experts with stacks of few bits."""

    def __init__(self, experts: Experts, group_size: int, bits: int) -> None:
        nn.Module.__init__(self)
        self.config, self.group_size, self.bits = experts.config, group_size, bits
        for name in _STACKS:
            self[name], self[f"{name}_scales"], self[f"{name}_biases"] = mx.quantize(experts[name], group_size, bits)

    def __call__(self, x_ND: mx.array, experts_NX: mx.array, weights_NX: mx.array) -> mx.array:
        return self.through_chosen(x_ND, experts_NX, weights_NX)

    def product(self, name: str, x_A1: mx.array, experts_A: mx.array) -> mx.array:
        return mx.gather_qmm(
            x_A1,
            self[name],
            scales=self[f"{name}_scales"],
            biases=self[f"{name}_biases"],
            rhs_indices=experts_A,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            sorted_indices=True,
        )


def quantized(model: Transformer, bits: Bits) -> Transformer:
    """The model with its projections, embeddings, experts and head as integers of so many bits, in place.

    Norms, biases, learned positions, routers, and matrices whose width no group divides stay as they are. Raises
    UserError where that leaves nothing to quantise.
    """
    found: list[str] = []

    def cast(module: nn.Module) -> None:
        # Scales and offsets are in the dtype of what they are made from, which has to be that of the products.
        module.update(tree_map(lambda array: array.astype(model.compute), module.parameters()))

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not isinstance(module, (Linear, nn.Embedding)) or path.endswith(("embed_positions", "router")):
            return False
        group_size = _group_size(module.weight)
        if group_size is None:
            return False
        cast(module)
        found.append(path)
        return {"group_size": group_size, "bits": bits}

    nn.quantize(model, class_predicate=choose)
    for block in model.layers:
        if model.config.mlp == "mixture":
            group_size = _group_size(block.mlp.experts.gate_proj, block.mlp.experts.down_proj)
            if group_size is not None:
                cast(block.mlp.experts)
                found.append("experts")
                block.mlp.experts = QuantizedExperts(block.mlp.experts, group_size, bits)
    if not found:
        raise UserError(
            f"the model has no matrix whose width is a multiple of {min(_GROUPS)}, as weights of {bits} bits need it; "
            "use bits: null"
        )
    mx.eval(model.parameters())
    return model


def _group_size(*matrices: mx.array) -> int | None:
    """The group that divides the widths of all the matrices, if one does."""
    return next((size for size in _GROUPS if all(matrix.shape[-1] % size == 0 for matrix in matrices)), None)
