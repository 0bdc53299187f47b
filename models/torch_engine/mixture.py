"""A mixture of gated experts (Mixtral; Jiang et al., 2024) and its load-balancing loss (Fedus et al., 2021).

N packed positions, P = N · num_experts_per_tok assignments of positions to experts, E experts, D hidden_size,
I intermediate_size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelConfig
from models.torch_engine.layers import Linear, activated


class Routing(NamedTuple):
    """What a router did with a batch."""

    counts_E: Tensor
    """fp32; assignments to each expert."""
    probabilities_E: Tensor
    """fp32; sum over the positions of each expert's probability, with its gradient."""
    positions: int


class Experts(nn.Module):
    """The experts' stacked matrices, uninitialised."""

    def __init__(self, config: ModelConfig, experts: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))


class Mixture(nn.Module):
    """Each position goes through its most probable experts, weighted by their renormalised probabilities."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_local_experts is not None  # for the type checker: ModelConfig refuses a mixture without
        assert config.num_experts_per_tok is not None
        self.config = config
        self.chosen = config.num_experts_per_tok
        self.router = Linear(config.num_local_experts, config.hidden_size, bias=False)
        self.experts = Experts(config, config.num_local_experts)
        self.routing: Routing | None = None
        """Of the last forward pass in training."""

    def forward(self, x_ND: Tensor) -> Tensor:
        # The router is always fp32: its choices are discrete, and bf16 flips them (Fedus et al., 2021).
        probabilities_NE = self.router(x_ND.float()).softmax(-1)
        weights_NC, experts_NC = probabilities_NE.topk(self.chosen, dim=-1)
        weights_NC = weights_NC / weights_NC.sum(-1, keepdim=True)
        choices_P = experts_NC.flatten()
        counts_E = F.one_hot(choices_P, probabilities_NE.shape[1]).sum(0)
        if self.training:
            self.routing = Routing(counts_E.float(), probabilities_NE.sum(0), x_ND.shape[0])
        order_P = choices_P.argsort(stable=True)
        sorted_PD = x_ND.index_select(0, order_P // self.chosen)
        done_PD = self._through_experts(sorted_PD, counts_E)
        back_NCD = done_PD.index_select(0, order_P.argsort()).view(-1, self.chosen, x_ND.shape[1])
        mixed_ND: Tensor = (back_NCD * weights_NC.to(x_ND.dtype).unsqueeze(-1)).sum(1)
        return mixed_ND

    def taken(self) -> Routing:
        """The routing of the last forward pass in training, which is handed over once so that its graph is freed."""
        routing, self.routing = self.routing, None
        assert routing is not None
        return routing

    def _through_experts(self, x_PD: Tensor, counts_E: Tensor) -> Tensor:
        stacks = (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
        gate, up, down = (stack.to(x_PD.dtype) for stack in stacks)
        if x_PD.is_cuda and x_PD.dtype == torch.bfloat16 and not (gate.shape[1] % 8 or gate.shape[2] % 8):
            # One kernel over all experts, with their sizes read on the device.
            ends = counts_E.cumsum(0).to(torch.int32)
            inner_PI = F.grouped_mm(x_PD, gate.transpose(1, 2), offs=ends)
            inner_PI = activated(self.config, inner_PI) * F.grouped_mm(x_PD, up.transpose(1, 2), offs=ends)
            return F.grouped_mm(inner_PI, down.transpose(1, 2), offs=ends)
        # Elsewhere the sizes are read by the host, which costs nothing on a CPU.
        done = []
        for expert, part in enumerate(torch.split(x_PD, counts_E.tolist())):
            inner_PI = activated(self.config, F.linear(part, gate[expert])) * F.linear(part, up[expert])
            done.append(F.linear(inner_PI, down[expert]))
        return torch.cat(done)


def balance_loss(routings: list[Routing], counts_E: Tensor, positions: int) -> Tensor:
    """This micro-batch's part of the load-balancing loss over all layers and all micro-batches, a 0-d fp32 tensor.

    The loss is E · Σ_e (share of assignments to e) · (mean probability of e), over the layers together, as in
    `transformers`. `counts_E` and `positions` are totals over layers and micro-batches, so parts add up to it.
    """
    probabilities_E = torch.stack([routing.probabilities_E for routing in routings]).sum(0)
    experts = counts_E.shape[0]
    return experts * torch.dot(counts_E / positions, probabilities_E / positions)
