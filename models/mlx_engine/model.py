"""The one MLX module of every architecture: parameters named and shaped as `models.weights.parameters` says.

B rows, T positions, D hidden_size, V vocab_size.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from models import weights
from models.config import ModelConfig
from models.engine import Precision
from models.mlx_engine.attention import Attention, Cache, LayerCache, Places
from models.mlx_engine.layers import Dense, Embedding, Gated, Linear, Norm, dropped, split_keys
from models.mlx_engine.mixture import Mixture, Routing

Parameters = dict[str, mx.array]
"""The parameters, or as many arrays of their shapes, by name."""


class Read(NamedTuple):
    """What reading rows gives."""

    x_BTD: mx.array
    """What the head reads, in `compute`'s dtype."""
    routings: list[Routing]
    """What each router did with the real positions."""
    between: list[mx.array]
    """The residual stream after each block."""


class Block(nn.Module):
    """One layer: attention, then an MLP, each read through a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, compute: mx.Dtype) -> None:
        super().__init__()
        self.rate, self.compute = config.dropout, compute
        self.input_norm = Norm(config)
        self.attention = Attention(config)
        self.post_attention_norm = Norm(config)
        kinds: dict[str, Callable[[ModelConfig], nn.Module]] = {"dense": Dense, "gated": Gated, "mixture": Mixture}
        self.mlp = kinds[config.mlp](config)

    def __call__(
        self,
        x_BTD: mx.array,
        places: Places,
        real_BT: mx.array | None = None,
        keys_B2: mx.array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[mx.array, Routing | None, LayerCache | None]:
        """The residual stream after the block, what its router did, and its cache."""
        weights_key, mixed_key, mlp_key = split_keys(keys_B2, 3)
        mixed_BTD, cache = self.attention(self.input_norm(x_BTD).astype(self.compute), places, cache, weights_key)
        x_BTD = x_BTD + dropped(mixed_BTD, self.rate, mixed_key)
        read_BTD = self.post_attention_norm(x_BTD).astype(self.compute)
        routing = None
        if isinstance(self.mlp, Mixture):
            done_BTD, routing = self.mlp(read_BTD, real_BT)
        else:
            done_BTD = self.mlp(read_BTD)
        return x_BTD + dropped(done_BTD, self.rate, mlp_key), routing, cache


class Transformer(nn.Module):
    """A decoder-only transformer; weights are fp32, `compute` is the dtype of its products.

    The residual stream, norms, router and loss stay in fp32 whatever `compute` is.
    """

    def __init__(self, config: ModelConfig, compute: mx.Dtype, rematerialize: bool = False) -> None:
        super().__init__()
        self.config, self.compute, self.rematerialize = config, compute, rematerialize
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = [Block(config, compute) for _ in range(config.num_hidden_layers)]
        self.norm = Norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_VD(self) -> mx.array:
        """The output head's matrix."""
        head: mx.array = self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return head

    def logits(self, x: mx.array) -> mx.array:
        """Logits (…, V) in `compute`'s dtype of what `read` gave."""
        found: mx.array = self.embed_tokens.as_linear(x) if self.config.tie_word_embeddings else self.lm_head(x)
        return found

    def read(
        self, tokens_BT: mx.array, places: Places, real_BT: mx.array | None = None, keys_B2: mx.array | None = None
    ) -> Read:
        """Reads whole rows. keys_B2: a random key for each row, where there is to be dropout."""
        keys = split_keys(keys_B2, len(self.layers) + 1)
        x_BTD = dropped(self._embedded(tokens_BT, places), self.config.dropout, keys[-1])
        routings: list[Routing] = []
        between: list[mx.array] = []
        for block, block_keys in zip(self.layers, keys, strict=False):
            call = nn.utils.checkpoint(block) if self.rematerialize else block
            x_BTD, routing, _ = call(x_BTD, places, real_BT, block_keys)
            between.append(x_BTD)
            if routing is not None:
                routings.append(routing)
        return Read(self.norm(x_BTD).astype(self.compute), routings, between)

    def read_cached(self, tokens_BT: mx.array, places: Places, cache: Cache) -> tuple[mx.array, list[LayerCache]]:
        """The same with a cache, whose layers are given back with the new positions in them."""
        x_BTD = self._embedded(tokens_BT, places)
        layers: list[LayerCache] = []
        for block, layer in zip(self.layers, cache.layers, strict=True):
            x_BTD, _, filled = block(x_BTD, places, cache=layer)
            assert filled is not None
            layers.append(filled)
        return self.norm(x_BTD).astype(self.compute), layers

    def _embedded(self, tokens_BT: mx.array, places: Places) -> mx.array:
        x_BTD: mx.array = self.embed_tokens(tokens_BT).astype(mx.float32)
        if self.config.position_embedding == "learned":
            positions_BT = places.positions_BT
            here = mx.arange(tokens_BT.shape[1]) if positions_BT is None else positions_BT
            x_BTD = x_BTD + self.embed_positions(here).astype(mx.float32)
        return x_BTD


def compute_dtype(precision: Precision) -> mx.Dtype:
    """The dtype of matrix products; weights stay fp32."""
    return {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}[precision]


def parameters_of(model: Transformer) -> Parameters:
    """The parameters by name."""
    return dict(tree_flatten(model.parameters()))


def replace_parameters(model: Transformer, parameters: Parameters) -> None:
    """Gives a model other parameters."""
    model.update(tree_unflatten(list(parameters.items())))


def gathered(config: ModelConfig, pieces: Iterable[weights.Piece]) -> Parameters:
    """Parameters from canonical weights; ValueError names what is missing, unexpected or misshapen."""
    found = weights.gather(pieces, weights.canonical_shapes(config))
    arrays = {
        parameter.name: mx.array(weights.from_canonical(parameter, found.__getitem__))
        for parameter in weights.parameters(config)
    }
    mx.eval(list(arrays.values()))
    return arrays


def load_weights(model: Transformer, pieces: Iterable[weights.Piece]) -> None:
    """Fills a model from canonical weights; ValueError names what is missing, unexpected or misshapen."""
    replace_parameters(model, gathered(model.config, pieces))
