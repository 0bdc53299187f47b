"""The plain parts of a block: projections, norms and MLPs without experts.

N packed positions, D hidden_size, I intermediate_size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelConfig


class Linear(nn.Module):
    """y = x · weightᵀ + bias in the dtype of x; `weight` (out, in), uninitialised."""

    def __init__(self, rows: int, columns: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """LayerNorm with bias, or RMSNorm (Zhang and Sennrich, 2019), over the last dimension."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.norm == "layer_norm" else None

    def forward(self, x_ND: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x_ND, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x_ND, self.weight.shape, self.weight, self.bias, self.eps)


def activated(config: ModelConfig, x: Tensor) -> Tensor:
    """The config's activation: SiLU, or GELU in its tanh form (Hendrycks and Gimpel, 2016)."""
    return F.silu(x) if config.hidden_act == "silu" else F.gelu(x, approximate="tanh")


class Dense(nn.Module):
    """Two projections with an activation between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.up_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        hidden_ND: Tensor = self.down_proj(activated(self.config, self.up_proj(x_ND)))
        return hidden_ND


class Gated(nn.Module):
    """Three projections, one of which gates another: SwiGLU (Shazeer, 2020) where the activation is SiLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        gated_NI = activated(self.config, self.gate_proj(x_ND)) * self.up_proj(x_ND)
        hidden_ND: Tensor = self.down_proj(gated_NI)
        return hidden_ND
