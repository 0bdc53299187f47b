"""The inference side of the JAX engine.

What is compiled depends on shapes alone, so rows, lengths and capacities are padded to a few sizes.
Suffixes: B rows, T positions, C capacity of a cache, U = C + T, R parts that rows are divided into, M targets that
count in each of them, D hidden_size, V vocab_size.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from models.config import ModelConfig
from models.continuations import Continuations, continuations
from models.engine import Batch, EngineName, Scored
from models.jax_engine.batching import bucket, check_batch, check_tokens, doubled, length_bucket, multiple, stacked
from models.jax_engine.distributed import described
from models.jax_engine.head import part_count, target_log_probabilities, target_scores
from models.jax_engine.model import Arrays, Behind, Cache, Computing, Rows, Transformer
from models.jax_engine.placement import Holder


class HeldCache(NamedTuple):
    """A cache on the devices, and what the host knows of it."""

    cache: Cache
    rows: int
    """Rows that are there; the cache's others are padding."""
    capacity: int
    """Positions that were asked for; the cache may have more."""
    longest: int
    """The most positions that a row has taken."""
    lengths_B: NDArray[np.int64]


class Reading:
    """The compiled functions of one model and mesh."""

    def __init__(self, config: ModelConfig, computing: Computing) -> None:
        self._config, self._sharding = config, computing.sharding
        self._model = Transformer(config, computing)
        whole, rows = self._sharding.of(), self._sharding.of("rows")
        keys = self._sharding.of("layers", "rows", "whole", "groups", "whole")
        cache = Cache(*cast(Any, (keys, keys, rows)))  # shardings in the places of arrays
        self.logits = computing.compiled(self._all_logits, out_shardings=whole)
        self.targets = computing.compiled(self._target_log_probabilities, out_shardings=whole)
        self.prefill = computing.compiled(self._read_prompts, static_argnames="capacity", out_shardings=(cache, whole))
        self.decode = computing.compiled(self._append, donate_argnums=1, out_shardings=(cache, whole))
        # Apart, for each takes shapes that are independent of the other's.
        self.behind = computing.compiled(self._model.read_behind, out_shardings=rows)
        self.scores = computing.compiled(self._target_scores, out_shardings=whole)
        self.select = jax.jit(_selected, out_shardings=cache)

    def _all_logits(self, parameters: Arrays, tokens_BT: jax.Array) -> jax.Array:
        return self._model.logits(parameters, self._model.read(parameters, Rows(tokens_BT)).x_BTD)

    def _target_log_probabilities(self, parameters: Arrays, rows: Rows, targets_BT: jax.Array) -> jax.Array:
        model = self._model
        x_BTD, (count, length) = model.read(parameters, rows).x_BTD, targets_BT.shape
        logits = count // self._sharding.row_parts * length * self._config.vocab_size
        parts = part_count(model.computing.platform, logits // self._sharding.mesh.shape["tensor"], length)
        return target_log_probabilities(x_BTD, model.head_VD(parameters), targets_BT, parts)

    def _target_scores(
        self, parameters: Arrays, x_BTD: jax.Array, rows_RM: jax.Array, places_RM: jax.Array, targets_RM: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        model, length = self._model, places_RM.shape[1]
        x_RMD = self._sharding.constrained(x_BTD[rows_RM, places_RM], "rows", "whole", "whole")
        logits = length * self._config.vocab_size
        parts = part_count(model.computing.platform, logits // self._sharding.mesh.shape["tensor"], length)
        return target_scores(x_RMD, model.head_VD(parameters), targets_RM, parts)

    def _read_prompts(
        self, parameters: Arrays, tokens_BT: jax.Array, lengths_B: jax.Array, *, capacity: int
    ) -> tuple[Cache, jax.Array]:
        read = self._model.read(parameters, Rows(tokens_BT), keep_cache=True)
        assert read.cache is not None
        room = ((0, 0), (0, 0), (0, capacity - tokens_BT.shape[1]), (0, 0), (0, 0))
        keys, values = (jnp.pad(array, room) for array in read.cache)
        last_B1D = jnp.take_along_axis(read.x_BTD, (lengths_B - 1)[:, None, None], axis=1)
        return Cache(keys, values, lengths_B), self._model.logits(parameters, last_B1D[:, 0])

    def _append(self, parameters: Arrays, cache: Cache, tokens_B: jax.Array) -> tuple[Cache, jax.Array]:
        grown, x_B1D = self._model.decode(parameters, cache, tokens_B)
        return grown, self._model.logits(parameters, x_B1D[:, 0])


@functools.lru_cache(maxsize=16)
def reading(config: ModelConfig, computing: Computing) -> Reading:
    """The compiled functions, which engines of the same kind share."""
    return Reading(config, computing)


class JaxInference:
    """`models.engine.InferenceEngine` over parameters as they are at each call."""

    name: EngineName = "jax"

    def __init__(self, config: ModelConfig, computing: Computing, held: Holder) -> None:
        self.config, self._held = config, held
        self._sharding = computing.sharding
        self._compiled = reading(config, computing)
        self.device = described(self._sharding.mesh)

    def logits(self, tokens_BT: NDArray[np.int32]) -> NDArray[np.float32]:
        check_tokens(tokens_BT, self.config)
        rows, length = tokens_BT.shape
        found = self._compiled.logits(self._held.parameters, self._padded(tokens_BT, self._rows(bucket(rows))))
        return _on_host(found)[:rows, :length]

    def log_probabilities(self, batch: Batch) -> NDArray[np.float32]:
        every_BT = np.ones(batch.tokens_BT.shape, np.bool_)
        check_batch(batch, self.config, every_BT)
        rows, length = batch.tokens_BT.shape
        whole = batch._replace(loss_mask_BT=every_BT)
        host = stacked([whole], self._rows(bucket(rows)), self._length(length))
        lying = self._sharding.of("rows", "whole")
        tokens_BT, targets_BT = (self._sharding.put(array[0], lying) for array in (host.tokens_ABT, host.targets_ABT))
        documents_BT = None
        if host.documents_ABT is not None:
            documents_BT = self._sharding.put(host.documents_ABT[0], lying)
        return _on_host(self._compiled.targets(self._held.parameters, Rows(tokens_BT, documents_BT), targets_BT))[
            :rows, :length
        ]

    def prefill(
        self, tokens_BT: NDArray[np.int32], lengths_B: NDArray[np.int32], capacity: int
    ) -> tuple[HeldCache, NDArray[np.float32]]:
        """As the contract says. ValueError for prompts that are empty, or longer than the capacity or the model."""
        check_tokens(tokens_BT, self.config)
        rows, length = tokens_BT.shape
        if rows and not 0 < int(lengths_B.min()) <= int(lengths_B.max()) <= length <= capacity:
            raise ValueError(
                f"prompts of {lengths_B.min()} to {lengths_B.max()} tokens in {length} of {capacity} places"
            )
        all_rows = self._rows(doubled(rows))
        lengths = np.ones(all_rows, np.int32)
        lengths[:rows] = lengths_B
        tokens = self._padded(tokens_BT, all_rows)
        room = max(tokens.shape[1], self._length(capacity))
        on_devices = self._sharding.put(lengths, self._sharding.of("rows"))
        cache, logits_BV = self._compiled.prefill(self._held.parameters, tokens, on_devices, capacity=room)
        held = HeldCache(cache, rows, capacity, int(lengths_B.max(initial=0)), lengths_B.astype(np.int64))
        return held, _on_host(logits_BV)[:rows]

    def decode(self, cache: HeldCache, tokens_B: NDArray[np.int32]) -> tuple[HeldCache, NDArray[np.float32]]:
        """As the contract says. ValueError where the cache is full."""
        if cache.longest >= cache.capacity:
            raise ValueError(f"the cache is full: {cache.capacity} positions are taken")
        check_tokens(tokens_B[:, None], self.config)
        padded_B = np.zeros(len(cache.cache.lengths_B), np.int32)
        padded_B[: cache.rows] = tokens_B
        on_devices = self._sharding.put(padded_B, self._sharding.of("rows"))
        grown, logits_BV = self._compiled.decode(self._held.parameters, cache.cache, on_devices)
        held = cache._replace(cache=grown, longest=cache.longest + 1, lengths_B=cache.lengths_B + 1)
        return held, _on_host(logits_BV)[: cache.rows]

    def continuations(self, cache: HeldCache, batch: Batch) -> Scored:
        """As the contract says."""
        found = continuations(batch, cache.lengths_B, self.config)
        parameters, count = self._held.parameters, len(found.targets_M)
        x_BTD = self._compiled.behind(parameters, cache.cache, self._behind(cache, found))
        wanted_3M = np.zeros((3, self._rows(bucket(count))), np.int32)
        wanted_3M[:, :count] = found.rows_M, found.places_M, found.targets_M
        wanted_3RM = wanted_3M.reshape(3, self._sharding.row_parts, -1)
        wanted = (self._sharding.put(array_RM, self._sharding.of("rows", "whole")) for array_RM in wanted_3RM)
        scores = self._compiled.scores(parameters, x_BTD, *wanted)
        log_probabilities_M, greedy_M = (np.array(score).reshape(-1)[:count] for score in scores)
        return found.scored(log_probabilities_M, greedy_M)

    def select(self, cache: HeldCache, rows: NDArray[np.int64]) -> HeldCache:
        """As the contract says; the rows that remain are padded to a power of two."""
        padded_B = np.zeros(self._rows(doubled(len(rows))), np.int32)
        padded_B[: len(rows)] = rows
        chosen = self._compiled.select(cache.cache, self._sharding.put(padded_B, self._sharding.of()))
        lengths_B = cache.lengths_B[rows]
        return HeldCache(chosen, len(rows), cache.capacity, int(lengths_B.max(initial=0)), lengths_B)

    def _rows(self, rows: int) -> int:
        return multiple(rows, self._sharding.row_parts)

    def _length(self, length: int) -> int:
        return length_bucket(length, self.config.max_position_embeddings)

    def _behind(self, cache: HeldCache, found: Continuations) -> Behind:
        """Continuations on the devices, in as many rows as the cache has there."""
        (rows, length), capacity = found.tokens_BS.shape, cache.cache.keys_LBCGK.shape[2]
        missing = ((0, len(cache.cache.lengths_B) - rows), (0, self._length(length) - length))
        tokens_BT, positions_BT = (np.pad(array, missing) for array in (found.tokens_BS, found.positions_BS))
        padded = found._replace(documents_BS=np.pad(found.documents_BS, missing, constant_values=-1))
        mask_BTU = padded.mask_BSU(np.pad(cache.lengths_B, missing[0], constant_values=1), capacity)
        lying = self._sharding.of("rows")
        return Behind(*(self._sharding.put(array, lying) for array in (tokens_BT, positions_BT, mask_BTU)))

    def _padded(self, tokens_BT: NDArray[np.int32], rows: int) -> jax.Array:
        padded = np.zeros((rows, self._length(tokens_BT.shape[1])), np.int32)
        padded[: tokens_BT.shape[0], : tokens_BT.shape[1]] = tokens_BT
        return self._sharding.put(padded, self._sharding.of("rows", "whole"))


def _selected(cache: Cache, rows_B: jax.Array) -> Cache:
    return Cache(cache.keys_LBCGK[:, rows_B], cache.values_LBCGK[:, rows_B], cache.lengths_B[rows_B])


def _on_host(array: jax.Array) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.array(array)
    return found
