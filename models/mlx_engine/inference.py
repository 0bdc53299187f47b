"""The inference side of the MLX engine.

B rows, T positions, C capacity of a cache, V vocab_size, G key-value heads, K head_dim.
"""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from models.config import ModelConfig
from models.continuations import continuations
from models.engine import Batch, EngineName, Scored
from models.machine import peak_resident_memory
from models.mlx_engine.attention import Cache, LayerCache, Places, cached_places, places_behind, row_places
from models.mlx_engine.batches import check_batch, check_tokens, rows_of
from models.mlx_engine.device import on_cpu
from models.mlx_engine.head import parts_of, target_log_probabilities, target_scores
from models.mlx_engine.model import Transformer


class MlxInference:
    """`models.engine.InferenceEngine` over a model's weights as they are at each call."""

    name: EngineName = "mlx"

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self.config: ModelConfig = model.config
        self.device = described()

    def logits(self, tokens_BT: NDArray[np.int32]) -> NDArray[np.float32]:
        self._check(tokens_BT)
        read = self._model.read(mx.array(tokens_BT), row_places(None, None))
        return _on_host(self._model.logits(read.x_BTD))

    def log_probabilities(self, batch: Batch) -> NDArray[np.float32]:
        everything = batch._replace(loss_mask_BT=np.ones_like(batch.loss_mask_BT))
        check_batch(everything, self.config.vocab_size, self.config.max_position_embeddings)
        rows = rows_of(everything, 0, 1)
        documents_BT, positions_BT = (
            None if array is None else mx.array(array) for array in (rows.documents_RT, rows.positions_RT)
        )
        x_BTD = self._model.read(mx.array(rows.tokens_RT), row_places(documents_BT, positions_BT)).x_BTD
        x_MD, targets_M = x_BTD.reshape(-1, x_BTD.shape[-1]), rows.targets_RT.reshape(-1)
        found_M = np.empty(targets_M.shape, np.float32)
        for part in parts_of(len(targets_M), self.config.vocab_size):
            logits_CV = self._model.logits(x_MD[part])
            found_M[part] = _on_host(target_log_probabilities(logits_CV, mx.array(targets_M[part])))
        return found_M.reshape(rows.targets_RT.shape)

    def prefill(
        self, tokens_BT: NDArray[np.int32], lengths_B: NDArray[np.int32], capacity: int
    ) -> tuple[Cache, NDArray[np.float32]]:
        """As the contract says. ValueError for prompts that are empty, or longer than the capacity or the model."""
        config, (rows, length) = self.config, tokens_BT.shape
        self._check(tokens_BT)
        if rows and not 0 < int(lengths_B.min()) <= int(lengths_B.max()) <= length <= capacity:
            raise ValueError(
                f"prompts of {lengths_B.min()} to {lengths_B.max()} tokens in {length} of {capacity} places"
            )
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        empty = [
            LayerCache(*(mx.zeros(shape, self._model.compute) for _ in range(2)))
            for _ in range(config.num_hidden_layers)
        ]
        cache = Cache(empty, lengths_B.astype(np.int64))
        x_BTD, layers = self._model.read_cached(mx.array(tokens_BT), row_places(None, None), cache)
        ends_BD = x_BTD[mx.arange(rows), mx.array(lengths_B - 1)]
        return self._answered(cache._replace(layers=layers), ends_BD)

    def decode(self, cache: Cache, tokens_B: NDArray[np.int32]) -> tuple[Cache, NDArray[np.float32]]:
        """As the contract says. ValueError where the cache is full."""
        capacity = cache.layers[0].keys_BGCK.shape[2]
        if cache.lengths_B.max(initial=0) >= capacity:
            raise ValueError(f"the cache is full: {capacity} positions are taken")
        self._check(tokens_B[:, None])
        places: Places = cached_places(cache.lengths_B)
        x_B1D, layers = self._model.read_cached(mx.array(tokens_B)[:, None], places, cache)
        return self._answered(Cache(layers, cache.lengths_B + 1), x_B1D[:, 0])

    def continuations(self, cache: Cache, batch: Batch) -> Scored:
        """As the contract says."""
        found = continuations(batch, cache.lengths_B, self.config)
        places = places_behind(found.positions_BS, found.mask_BSU(cache.lengths_B, int(cache.lengths_B.max(initial=0))))
        x_BSD, _ = self._model.read_cached(mx.array(found.tokens_BS), places, cache)
        x_MD = x_BSD[mx.array(found.rows_M), mx.array(found.places_M)]
        log_probabilities_M, greedy_M = np.empty(len(x_MD), np.float32), np.empty(len(x_MD), np.bool_)
        for part in parts_of(len(x_MD), self.config.vocab_size):
            scores = target_scores(self._model.logits(x_MD[part]), mx.array(found.targets_M[part]))
            mx.eval(scores)  # together, from the same logits
            log_probabilities_M[part], greedy_M[part] = (np.array(score) for score in scores)
        return found.scored(log_probabilities_M, greedy_M)

    def select(self, cache: Cache, rows: NDArray[np.int64]) -> Cache:
        kept = mx.array(rows.astype(np.int32))
        layers = [LayerCache(*(part[kept] for part in layer)) for layer in cache.layers]
        return Cache(layers, cache.lengths_B[rows])

    def _answered(self, cache: Cache, x_BD: mx.array) -> tuple[Cache, NDArray[np.float32]]:
        logits_BV = self._model.logits(x_BD).astype(mx.float32)
        # Left for later, the writing of the caches would be a graph that grows with every token.
        mx.eval(logits_BV, cache.layers)
        return cache, _on_host(logits_BV)

    def _check(self, tokens_BT: NDArray[np.int32]) -> None:
        check_tokens(tokens_BT, self.config.vocab_size, self.config.max_position_embeddings)


def described() -> str:
    """The device in words for the record."""
    device = mx.default_device()
    if device == mx.Device(mx.cpu):
        return "cpu"
    kind = "metal" if mx.metal.is_available() else "cuda"
    return f"{kind}: {mx.device_info().get('device_name', 'unknown')}"


def peak_memory() -> int:
    """As the engine's contract says."""
    return peak_resident_memory() if on_cpu() else mx.get_peak_memory()


def _on_host(array: mx.array) -> NDArray[np.float32]:
    return np.array(array.astype(mx.float32))
