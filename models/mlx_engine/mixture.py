"""A mixture of gated experts (Mixtral; Jiang et al., 2024) and its load-balancing loss (Fedus et al., 2021).

B rows, T positions, N = B · T, X experts of a position, A = N · X, E experts, D hidden_size, I intermediate_size.
"""

from typing import NamedTuple

import mlx.core as mx
from mlx import nn

from models.config import ModelConfig
from models.mlx_engine.device import on_cpu
from models.mlx_engine.layers import Linear, activated
from models.mlx_engine.products import product


class Routing(NamedTuple):
    """What a router did with the real positions of a batch."""

    counts_E: mx.array
    """fp32; assignments to each expert, without a gradient."""
    probabilities_E: mx.array
    """fp32; sum over the positions of each expert's probability, with its gradient."""


class Experts(nn.Module):
    """The experts' stacked matrices."""

    def __init__(self, config: ModelConfig, experts: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.config = config
        self.gate_proj = mx.zeros((experts, inner, width))
        self.up_proj = mx.zeros((experts, inner, width))
        self.down_proj = mx.zeros((experts, width, inner))

    def __call__(self, x_ND: mx.array, experts_NX: mx.array, weights_NX: mx.array) -> mx.array:
        """The weighted sum of what each position's experts make of it, (N, D)."""
        if on_cpu():
            return self.through_all(x_ND, experts_NX, weights_NX)
        return self.through_chosen(x_ND, experts_NX, weights_NX)

    def through_chosen(self, x_ND: mx.array, experts_NX: mx.array, weights_NX: mx.array) -> mx.array:
        """Every position through its experts alone, the positions of an expert side by side."""
        chosen = experts_NX.shape[1]
        experts_A = experts_NX.reshape(-1)
        order_A = mx.argsort(experts_A)
        sorted_A, x_A1D = experts_A[order_A], x_ND[order_A // chosen][:, None]
        gate_A1I, up_A1I = (self.product(name, x_A1D, sorted_A) for name in ("gate_proj", "up_proj"))
        done_AD = self.product("down_proj", activated(self.config, gate_A1I) * up_A1I, sorted_A)[:, 0]
        back_NXD = done_AD[mx.argsort(order_A)].reshape(-1, chosen, x_ND.shape[1])
        return (back_NXD * weights_NX.astype(x_ND.dtype)[..., None]).sum(1)

    def product(self, name: str, x_A1: mx.array, experts_A: mx.array) -> mx.array:
        """Each row times the named matrix of its expert; the experts are in order."""
        weights = self[name].astype(x_A1.dtype).swapaxes(-1, -2)
        return mx.gather_mm(x_A1, weights, rhs_indices=experts_A, sorted_indices=True)

    def through_all(self, x_ND: mx.array, experts_NX: mx.array, weights_NX: mx.array) -> mx.array:
        """Every position through every expert, those not chosen weighted by nothing.

        On a CPU, MLX multiplies gathered matrices one position at a time, which takes longer than all of this.
        """
        experts = self.gate_proj.shape[0]
        chosen_NXE = experts_NX[..., None] == mx.arange(experts)
        weights_EN = (chosen_NXE * weights_NX[..., None]).sum(1).T
        gate, up, down = (stack.astype(x_ND.dtype) for stack in (self.gate_proj, self.up_proj, self.down_proj))
        inner_ENI = activated(self.config, product(x_ND, gate.swapaxes(-1, -2))) * product(x_ND, up.swapaxes(-1, -2))
        done_END = product(inner_ENI, down.swapaxes(-1, -2))
        return (done_END * weights_EN.astype(x_ND.dtype)[..., None]).sum(0)


class Mixture(nn.Module):
    """Each position goes through its most probable experts, weighted by their renormalised probabilities."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_local_experts is not None  # for the type checker: ModelConfig refuses a mixture without
        assert config.num_experts_per_tok is not None
        self.chosen = config.num_experts_per_tok
        self.router = Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = Experts(config, config.num_local_experts)

    def __call__(self, x_BTD: mx.array, real_BT: mx.array | None) -> tuple[mx.array, Routing | None]:
        """What the block adds to the residual stream, and the routing of the real positions where they are given."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        # The router is always fp32: its choices are discrete, and bf16 flips them (Fedus et al., 2021).
        probabilities_NE = mx.softmax(self.router(x_ND.astype(mx.float32)), axis=-1)
        # Of equals, those of lower number.
        experts_NX = mx.stop_gradient(mx.argsort(-probabilities_NE, axis=-1)[:, : self.chosen])
        weights_NX = mx.take_along_axis(probabilities_NE, experts_NX, axis=-1)
        weights_NX = weights_NX / weights_NX.sum(-1, keepdims=True)
        mixed_BTD = self.experts(x_ND, experts_NX, weights_NX).reshape(x_BTD.shape)
        if real_BT is None:
            return mixed_BTD, None
        real_N1 = real_BT.reshape(-1, 1).astype(mx.float32)
        chosen_NXE = experts_NX[..., None] == mx.arange(probabilities_NE.shape[1])
        return mixed_BTD, Routing((chosen_NXE.sum(1) * real_N1).sum(0), (probabilities_NE * real_N1).sum(0))


def total(routings: list[Routing]) -> Routing:
    """The routings of several layers together."""
    return Routing(*(sum(part[1:], part[0]) for part in zip(*routings, strict=True)))


def balance_loss(probabilities_E: mx.array, counts_E: mx.array, positions: mx.array) -> mx.array:
    """This part's share of the load-balancing loss over all layers, micro-batches and processes, a 0-d fp32 array.

    The loss is E · Σ_e (share of assignments to e) · (mean probability of e), over the layers together, as in
    `transformers`. `counts_E` and `positions` are totals, so parts add up to it.
    """
    return counts_E.shape[0] * ((counts_E / positions) * (probabilities_E / positions)).sum()
