"""A mixture of gated experts (Mixtral; Jiang et al., 2024) and its load-balancing loss (Fedus et al., 2021).

Suffixes: B rows, T positions, D hidden_size, E experts, X chosen experts, I intermediate_size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.jax_engine.layers import Linear, activated, lying, parameter
from models.jax_engine.products import laid


class Routing(NamedTuple):
    """What a router did with the positions that are there."""

    counts_E: jax.Array
    """fp32; assignments to each expert."""
    probabilities_E: jax.Array
    """fp32; sum over the positions of each expert's probability, with its gradient."""


class Experts(nnx.Module):
    """The experts' stacked matrices."""

    def __init__(self, config: ModelConfig, experts: int) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = parameter(experts, inner, width)
        self.up_proj = parameter(experts, inner, width)
        self.down_proj = parameter(experts, width, inner)


class Mixture(nnx.Module):
    """Each position goes through its most probable experts, weighted by their renormalised probabilities."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.num_local_experts is not None  # for the type checker: ModelConfig refuses a mixture without
        assert config.num_experts_per_tok is not None
        self.config, self.chosen = config, config.num_experts_per_tok
        self.router = Linear(config.num_local_experts, config.hidden_size, bias=False)
        self.experts = Experts(config, config.num_local_experts)

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array | None) -> tuple[jax.Array, Routing]:
        """The mixed outputs, and the routing of the positions that are real (all where `real_BT` is None)."""
        # The router is always fp32: its choices are discrete, and bf16 flips them (Fedus et al., 2021).
        probabilities_BTE = jax.nn.softmax(self.router(x_BTD.astype(jnp.float32)), axis=-1)
        weights_BTX, experts_BTX = most_probable(probabilities_BTE, self.chosen)
        weights_BTX = weights_BTX / weights_BTX.sum(-1, keepdims=True)
        chosen_BTXE = jax.nn.one_hot(experts_BTX, probabilities_BTE.shape[-1], dtype=jnp.float32)
        weights_BTE = (chosen_BTXE * weights_BTX[..., None]).sum(-2)
        counts_BTE = chosen_BTXE.sum(-2)
        if real_BT is not None:
            counts_BTE = counts_BTE * real_BT[..., None]
            probabilities_BTE = probabilities_BTE * real_BT[..., None]
        routing = Routing(counts_BTE.sum((0, 1)), probabilities_BTE.sum((0, 1)))
        return self._through_experts(x_BTD, weights_BTE.astype(x_BTD.dtype)), routing

    def _through_experts(self, x_BTD: jax.Array, weights_BTE: jax.Array) -> jax.Array:
        """Every position through every expert, times the weight that it has there: no shape depends on the routing."""
        gate_BTEI = _product("btd,eid->btei", x_BTD, self.experts.gate_proj)
        up_BTEI = _product("btd,eid->btei", x_BTD, self.experts.up_proj)
        inner_BTEI = activated(self.config, gate_BTEI) * up_BTEI
        return _product("btei,edi->btd", inner_BTEI * weights_BTE[..., None], self.experts.down_proj)


def _product(dimensions: str, x: jax.Array, stack: nnx.Param[jax.Array]) -> jax.Array:
    """With the experts' matrices in the dtype of x, of which the backward pass keeps none but the stored ones."""

    def of(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum(dimensions, x, laid(weight, x.dtype, lying(stack)))

    found: jax.Array = jax.checkpoint(of, prevent_cse=False)(x, stack[...])
    return found


def most_probable(probabilities_BTE: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest probabilities, falling, and the experts that they belong to: (B, T, X) each.

    Of equals, the first; PyTorch's topk promises nothing about them.
    """
    return jax.lax.top_k(probabilities_BTE, count)


def balance_loss(routing: Routing, counts_E: jax.Array, positions: jax.Array) -> jax.Array:
    """This micro-batch's part of the load-balancing loss over all layers and all micro-batches, a 0-d fp32 array.

    The loss is E · Σ_e (share of assignments to e) · (mean probability of e), over the layers together, as in
    `transformers`. `counts_E` and `positions` are totals over layers and micro-batches, so parts add up to it.
    """
    # No product of matrices, whose factors some devices round.
    return counts_E.shape[0] * (counts_E / positions * (routing.probabilities_E / positions)).sum()
