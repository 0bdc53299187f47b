"""The one model of every architecture, over parameters named as in `models.jax_engine.parameters`.

Layers are alike, so their parameters are stacked and one block is scanned over them: the compiler sees a block once,
however many there are. The residual stream, norms, router and loss are fp32 whatever the products are computed in.

Suffixes: B rows, T positions, C capacity of a cache, U = C + T, D hidden_size, G key-value heads, K head_dim, L layers,
E experts, V vocab_size.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.jax_engine.attention import (
    Attention,
    LayerCache,
    Rotation,
    attention_behind,
    cached_attention,
    causal_attention,
    kind_for,
    rotation,
)
from models.jax_engine.layers import Dense, Embedding, Gated, Linear, Norm, dropped
from models.jax_engine.mixture import Mixture, Routing
from models.jax_engine.products import laid
from models.jax_engine.sharding import Sharding

Arrays = Mapping[str, jax.Array]


class Rows(NamedTuple):
    """Rows of tokens on the devices, padded to one length."""

    tokens_BT: jax.Array
    """int32."""
    documents_BT: jax.Array | None = None
    """int32; the document of each position, rising along a row; None where a row is one."""
    real_BT: jax.Array | None = None
    """fp32; 1 where a position takes part in the balance of experts, else 0; None for all."""


class Cache(NamedTuple):
    """Keys and values of every layer, (L, B, C, G, K), and the number of positions that each row has taken."""

    keys_LBCGK: jax.Array
    values_LBCGK: jax.Array
    lengths_B: jax.Array
    """int32."""


class Behind(NamedTuple):
    """Rows of tokens on the devices that stand behind those of a cache."""

    tokens_BT: jax.Array
    """int32."""
    positions_BT: jax.Array
    """int32."""
    mask_BTU: jax.Array
    """Boolean; what each may read of the cache and, behind it, of these."""


class Read(NamedTuple):
    """What reading rows gives."""

    x_BTD: jax.Array
    """What the head reads, in the dtype of the products."""
    routing: Routing | None
    """Summed over the layers, where there are mixtures."""
    cache: LayerCache | None
    """Keys and values of every layer, (L, B, T, G, K), where they were asked for."""


@dataclass(frozen=True)
class Computing:
    """How a model computes."""

    dtype: jnp.dtype
    """Of the products."""
    sharding: Sharding
    rematerialize: bool = False
    """Whether blocks are computed again in the backward pass."""

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        name: str = self.sharding.mesh.devices.flat[0].platform
        return name

    @property
    def has_cudnn(self) -> bool:
        """Whether cuDNN's fused attention runs here: on NVIDIA's GPUs from Ampere on."""
        capability = str(getattr(self.sharding.mesh.devices.flat[0], "compute_capability", ""))
        major, _, minor = capability.partition(".")
        return self.platform == "gpu" and major.isdecimal() and minor.isdecimal() and int(major) >= 8

    def compiled(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`jax.jit` of a function whose fp32 products are fp32 everywhere: TPUs and GPUs would round their factors.

        All of it is traced so, its gradients too: those of `jax.custom_vjp` are traced only once it has returned.
        """
        precision = "highest" if self.dtype == jnp.float32 else "default"

        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            with jax.default_matmul_precision(precision):
                return function(*args, **kwargs)

        return jax.jit(traced, **options)


class Ends(nnx.Module):
    """All but the blocks: embeddings, the last norm and the head."""

    def __init__(self, config: ModelConfig) -> None:
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = Norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size, config.hidden_size, bias=False)


class Block(nnx.Module):
    """One layer: attention, then an MLP, each read through a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.input_norm = Norm(config)
        self.attention = Attention(config)
        self.post_attention_norm = Norm(config)
        kinds: dict[str, type[Dense | Gated | Mixture]] = {"dense": Dense, "gated": Gated, "mixture": Mixture}
        self.mlp = kinds[config.mlp](config)

    def after_attention(
        self, x_BTD: jax.Array, mixed_BTHK: jax.Array, real_BT: jax.Array | None, keys: Any
    ) -> tuple[jax.Array, Routing | None]:
        """The residual stream after the block, given what its heads have read; `keys` for dropout, or None."""
        rate, compute = self.config.dropout, mixed_BTHK.dtype
        attention_key, mlp_key = (None, None) if keys is None else keys
        x_BTD = x_BTD + dropped(self.attention.output(mixed_BTHK), rate, attention_key)
        inner_BTD = self.post_attention_norm(x_BTD).astype(compute)
        routing = None
        if isinstance(self.mlp, Mixture):
            out_BTD, routing = self.mlp(inner_BTD, real_BT)
        else:
            out_BTD = self.mlp(inner_BTD)
        return x_BTD + dropped(out_BTD, rate, mlp_key), routing


class Transformer:
    """A decoder-only transformer as functions of its parameters."""

    def __init__(self, config: ModelConfig, computing: Computing) -> None:
        self.config, self.computing = config, computing
        self._ends = self._graph(nnx.eval_shape(lambda: Ends(config)))
        self._block = self._graph(nnx.eval_shape(lambda: Block(config)))

    def read(self, parameters: Arrays, rows: Rows, key: jax.Array | None = None, *, keep_cache: bool = False) -> Read:
        """Reads whole rows, with dropout where a `key` is given."""
        config, computing = self.config, self.computing
        positions = positions_of(rows)
        ends, layers = self._bound_ends(parameters), _of_layers(parameters)
        x_BTD = self._embedded(ends, rows.tokens_BT, positions)
        keys_L: jax.Array | None = None
        if key is not None and config.dropout:
            first, rest = jax.random.split(key)
            x_BTD = dropped(x_BTD, config.dropout, first)
            keys_L = jax.random.split(rest, config.num_hidden_layers)
        turn = self._rotation(positions)

        def through(x_BTD: jax.Array, layer: tuple[Arrays, jax.Array | None]) -> tuple[jax.Array, Any]:
            return self._layer(x_BTD, *layer, rows, turn, keep_cache)

        body = jax.checkpoint(through, prevent_cse=False) if computing.rematerialize else through
        x_BTD, (routings, cache) = jax.lax.scan(body, x_BTD, (layers, keys_L))
        routing = None if routings is None else jax.tree.map(lambda of_layers: of_layers.sum(0), routings)
        return Read(ends.norm(x_BTD).astype(computing.dtype), routing, cache)

    def decode(self, parameters: Arrays, cache: Cache, tokens_B: jax.Array) -> tuple[Cache, jax.Array]:
        """Appends one token to each row; gives the grown cache and what the head reads, (B, 1, D)."""
        computing, rows = self.computing, jnp.arange(len(tokens_B))
        positions_B1 = cache.lengths_B[:, None]
        ends, layers = self._bound_ends(parameters), _of_layers(parameters)
        x_B1D = self._embedded(ends, tokens_B[:, None], positions_B1)
        turn = self._rotation(positions_B1)

        def through(
            carry: tuple[jax.Array, jax.Array, jax.Array], layer: tuple[Arrays, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
            # The whole cache is carried, so that one place in it is written and nothing is copied.
            (x_B1D, keys, values), (parameters, number) = carry, layer
            block = self._bound_block(parameters)
            q_B1HK, k_B1GK, v_B1GK = block.attention.heads(block.input_norm(x_B1D).astype(computing.dtype), turn)
            keys = keys.at[number, rows, cache.lengths_B].set(k_B1GK[:, 0])
            values = values.at[number, rows, cache.lengths_B].set(v_B1GK[:, 0])
            mixed = cached_attention(q_B1HK, LayerCache(keys[number], values[number]), cache.lengths_B + 1)
            x_B1D, _ = block.after_attention(x_B1D, mixed, None, None)
            return (x_B1D, keys, values), None

        numbers = jnp.arange(self.config.num_hidden_layers)
        carry = (x_B1D, cache.keys_LBCGK, cache.values_LBCGK)
        (x_B1D, keys, values), _ = jax.lax.scan(through, carry, (layers, numbers))
        return Cache(keys, values, cache.lengths_B + 1), ends.norm(x_B1D).astype(computing.dtype)

    def read_behind(self, parameters: Arrays, cache: Cache, rows: Behind) -> jax.Array:
        """What the head reads, (B, T, D), of rows behind a cache that stays as it is."""
        ends, turn = self._bound_ends(parameters), self._rotation(rows.positions_BT)
        x_BTD = self._embedded(ends, rows.tokens_BT, rows.positions_BT)

        def through(x_BTD: jax.Array, layer: tuple[Arrays, LayerCache]) -> tuple[jax.Array, None]:
            block = self._bound_block(layer[0])
            heads = block.attention.heads(block.input_norm(x_BTD).astype(self.computing.dtype), turn)
            mixed_BTHK = attention_behind(*heads, layer[1], rows.mask_BTU)
            return block.after_attention(x_BTD, mixed_BTHK, None, None)[0], None

        kept = LayerCache(cache.keys_LBCGK, cache.values_LBCGK)
        x_BTD, _ = jax.lax.scan(through, x_BTD, (_of_layers(parameters), kept))
        return ends.norm(x_BTD).astype(self.computing.dtype)

    def head_VD(self, parameters: Arrays) -> jax.Array:
        """The output head's matrix in the dtype of the products."""
        name = "embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        return self._gathered(name, parameters[name].astype(self.computing.dtype))

    def logits(self, parameters: Arrays, x: jax.Array) -> jax.Array:
        """Logits (..., V) in fp32 out of what the head reads."""
        return (x @ self.head_VD(parameters).T).astype(jnp.float32)

    def _layer(
        self,
        x_BTD: jax.Array,
        parameters: Arrays,
        key: jax.Array | None,
        rows: Rows,
        turn: Rotation | None,
        keep_cache: bool,
    ) -> tuple[jax.Array, tuple[Routing | None, LayerCache | None]]:
        config, sharding, dtype = self.config, self.computing.sharding, self.computing.dtype
        block = self._bound_block(parameters)
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        q_BTHK, k_BTGK, v_BTGK = block.attention.heads(block.input_norm(x_BTD).astype(dtype), turn)
        length, documents = x_BTD.shape[1], rows.documents_BT is not None
        rate = 0.0 if key is None else config.dropout
        machine = "cudnn" if self.computing.has_cudnn else self.computing.platform
        kind = kind_for(machine, dtype, config.head_dim, length, rate, documents)
        mixed_BTHK = causal_attention(
            q_BTHK, k_BTGK, v_BTGK, rows.documents_BT, kind=kind, sharding=sharding, dropout=rate, key=keys[0]
        )
        x_BTD, routing = block.after_attention(x_BTD, mixed_BTHK, rows.real_BT, None if key is None else keys[1:])
        cache = LayerCache(k_BTGK, v_BTGK) if keep_cache else None
        return sharding.constrained(x_BTD, "rows", "whole", "whole"), (routing, cache)

    def _embedded(self, ends: Ends, tokens_BT: jax.Array, positions: jax.Array) -> jax.Array:
        x_BTD = ends.embed_tokens(tokens_BT)
        if self.config.position_embedding == "learned":
            x_BTD = x_BTD + ends.embed_positions(positions)
        return self.computing.sharding.constrained(x_BTD, "rows", "whole", "whole")

    def _rotation(self, positions: jax.Array) -> Rotation | None:
        theta = self.config.rope_theta
        return None if theta is None else rotation(positions, self.config.head_dim, theta, self.computing.dtype)

    def _graph(self, module: nnx.Module) -> Any:
        """A module without its arrays, whose matrices know how they lie when it computes."""
        for path, weight in nnx.to_flat_state(nnx.state(module)):
            name = ".".join(map(str, path))
            weight.set_metadata(lying=self.computing.sharding.of_gathered(name, len(weight.shape)))
        return nnx.graphdef(module)

    def _bound_ends(self, parameters: Arrays) -> Ends:
        of_ends = {
            name: self._gathered(name, array) for name, array in parameters.items() if not name.startswith("layers.")
        }
        ends: Ends = nnx.merge(self._ends, _state(of_ends))
        return ends

    def _bound_block(self, parameters: Arrays) -> Block:
        block: Block = nnx.merge(self._block, _state(parameters))
        return block

    def _gathered(self, name: str, weight: jax.Array) -> jax.Array:
        return laid(weight, weight.dtype, self.computing.sharding.of_gathered(name, weight.ndim))


def positions_of(rows: Rows) -> jax.Array:
    """The place of each position in its row, (T,), or in its document, (B, T)."""
    places_T = jnp.arange(rows.tokens_BT.shape[1], dtype=jnp.int32)
    if rows.documents_BT is None:
        return places_T
    before_BT = jnp.pad(rows.documents_BT[:, :-1], ((0, 0), (1, 0)), constant_values=0)
    begins_BT = (rows.documents_BT != before_BT) | (places_T == 0)
    return places_T - jax.lax.cummax(jnp.where(begins_BT, places_T, 0), axis=1)


def _state(parameters: Arrays) -> Any:
    flat: dict[Any, Any] = {tuple(name.split(".")): array for name, array in parameters.items()}
    return nnx.from_flat_state(flat)


def _of_layers(parameters: Arrays) -> dict[str, jax.Array]:
    """The stacked parameters of the blocks, by their name in one."""
    return {name.removeprefix("layers."): array for name, array in parameters.items() if name.startswith("layers.")}
