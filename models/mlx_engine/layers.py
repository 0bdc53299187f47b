"""The plain parts of a block: projections, norms, MLPs without experts, dropout.

B rows, T positions, D hidden_size, I intermediate_size, S places of dropout.
"""

import mlx.core as mx
from mlx import nn

from models.config import ModelConfig
from models.mlx_engine.elementary import gelu_tanh, silu
from models.mlx_engine.products import added_product, product


class Linear(nn.Linear):
    """y = x · weightᵀ + bias in the dtype of x, whatever that of the weights."""

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.weight.astype(x.dtype).T
        return added_product(self.bias.astype(x.dtype), x, weight) if "bias" in self else product(x, weight)


class Embedding(nn.Embedding):
    """A table of vectors that can be the output head, too."""

    def as_linear(self, x: mx.array) -> mx.array:
        return product(x, self.weight.astype(x.dtype).T)


class Norm(nn.Module):
    """LayerNorm with bias, or RMSNorm (Zhang and Sennrich, 2019), over the last dimension; in and out in fp32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = mx.ones(config.hidden_size)
        if config.norm == "layer_norm":
            self.bias = mx.zeros(config.hidden_size)

    def __call__(self, x_BTD: mx.array) -> mx.array:
        if "bias" in self:
            return mx.fast.layer_norm(x_BTD, self.weight, self.bias, self.eps)
        return mx.fast.rms_norm(x_BTD, self.weight, self.eps)


def activated(config: ModelConfig, x: mx.array) -> mx.array:
    """The config's activation: SiLU, or GELU in its tanh form."""
    return silu(x) if config.hidden_act == "silu" else gelu_tanh(x)


class Dense(nn.Module):
    """Two projections with an activation between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def __call__(self, x_BTD: mx.array) -> mx.array:
        return self.down_proj(activated(self.config, self.up_proj(x_BTD)))


class Gated(nn.Module):
    """Three projections, one of which gates another: SwiGLU (Shazeer, 2020) where the activation is SiLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def __call__(self, x_BTD: mx.array) -> mx.array:
        return self.down_proj(activated(self.config, self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


def dropped(x: mx.array, rate: float, keys_B2: mx.array | None) -> mx.array:
    """x with elements set to zero at the rate, and the others grown to make up for it; as it is without keys.

    Every row has a key of its own, so that what is dropped in it does not depend on the rows beside it: however a
    batch is divided over processes, the same is dropped.
    """
    if keys_B2 is None or not rate:
        return x
    shape = x.shape[1:]
    kept = mx.vmap(lambda key: mx.random.bernoulli(1 - rate, shape, key))(keys_B2)
    return mx.where(kept, x * (1 / (1 - rate)), 0).astype(x.dtype)


def split_keys(keys_B2: mx.array | None, count: int) -> list[mx.array | None]:
    """So many keys for each row out of one."""
    if keys_B2 is None:
        return [None] * count
    # mx.checkpoint asks for a gradient by all that a block takes, and random bits have none.
    keys_BS2 = mx.vmap(lambda key: mx.random.split(key, count))(mx.stop_gradient(keys_B2))
    return [keys_BS2[:, number] for number in range(count)]
