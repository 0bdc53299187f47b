"""The inference side of the PyTorch engine.

B rows, T positions, C capacity of a cache, N packed positions, V vocab_size.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.config import ModelConfig
from models.continuations import continuations
from models.engine import Batch, EngineName, Scored
from models.torch_engine.attention import Cache, Group
from models.torch_engine.head import target_log_probabilities, target_scores
from models.torch_engine.model import Rows, Transformer
from models.torch_engine.packing import arranged, behind, check_tokens, contexts, on_device, whole


class TorchInference:
    """`models.engine.InferenceEngine` over a model's weights as they are at each call."""

    name: EngineName = "torch"

    def __init__(
        self, source: Callable[[], Transformer], config: ModelConfig, device: torch.device, described: str
    ) -> None:
        """`source` gives the model with its weights as they are then."""
        self._source, self._place = source, device
        self.config = config
        self.device = described

    @property
    def _model(self) -> Transformer:
        return self._source()

    @torch.inference_mode()
    def logits(self, tokens_BT: NDArray[np.int32]) -> NDArray[np.float32]:
        self._check(tokens_BT)
        return self._on_host(self._read(whole(tokens_BT, self._place), None).view(*tokens_BT.shape, -1))

    @torch.inference_mode()
    def log_probabilities(self, batch: Batch) -> NDArray[np.float32]:
        self._check(batch.tokens_BT)
        found = contexts(np.ones(batch.tokens_BT.shape, np.bool_), batch.documents_BT)
        rows, places_N = arranged(batch.tokens_BT, found, batch.documents_BT is not None, self._place)
        targets_N = on_device(batch.targets_BT.reshape(-1)[places_N].astype(np.int64), self._place)
        model = self._model.eval()
        chosen_N = target_log_probabilities(model.read(rows), model.head_VD, targets_N)
        chosen_BT = np.empty(batch.tokens_BT.shape, np.float32)
        chosen_BT.reshape(-1)[places_N] = self._on_host(chosen_N)
        return chosen_BT

    @torch.inference_mode()
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
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=self._model.compute, device=self._place) for _ in range(2))
        ends_B = np.arange(rows, dtype=np.int64) * length + lengths_B - 1
        packed = whole(tokens_BT, self._place)._replace(read_M=on_device(ends_B, self._place))
        host_lengths_B = lengths_B.astype(np.int64)
        cache = Cache(keys, values, None, host_lengths_B)
        logits_BV = self._on_host(self._read(packed, cache))
        return cache._replace(lengths_B=on_device(host_lengths_B, self._place)), logits_BV

    @torch.inference_mode()
    def decode(self, cache: Cache, tokens_B: NDArray[np.int32]) -> tuple[Cache, NDArray[np.float32]]:
        """As the contract says. ValueError where the cache is full."""
        assert cache.lengths_B is not None
        if cache.host_lengths_B.max(initial=0) >= cache.keys.shape[3]:
            raise ValueError(f"the cache is full: {cache.keys.shape[3]} positions are taken")
        self._check(tokens_B[:, None])
        group = Group((len(tokens_B), 1), len(tokens_B), None)
        rows = Rows(on_device(tokens_B, self._place), cache.lengths_B, (group,), None)
        logits_BV = self._read(rows, cache)
        grown = cache._replace(lengths_B=cache.lengths_B + 1, host_lengths_B=cache.host_lengths_B + 1)
        return grown, self._on_host(logits_BV)

    @torch.inference_mode()
    def continuations(self, cache: Cache, batch: Batch) -> Scored:
        """As the contract says."""
        found = continuations(batch, cache.host_lengths_B, self.config)
        mask_BSU = found.mask_BSU(cache.host_lengths_B, int(cache.host_lengths_B.max(initial=0)))
        masked = cache._replace(mask_B1TU=on_device(mask_BSU[:, None], self._place))
        targets_M = on_device(found.targets_M.astype(np.int64), self._place)
        model = self._model.eval()
        scores = target_scores(model.read(behind(found, self._place), masked), model.head_VD, targets_M)
        log_probabilities_M, greedy_M = (score.cpu().numpy() for score in scores)
        return found.scored(log_probabilities_M, greedy_M)

    @torch.inference_mode()
    def select(self, cache: Cache, rows: NDArray[np.int64]) -> Cache:
        assert cache.lengths_B is not None
        kept = on_device(rows, self._place)
        return Cache(
            cache.keys.index_select(1, kept),
            cache.values.index_select(1, kept),
            cache.lengths_B.index_select(0, kept),
            cache.host_lengths_B[rows],
        )

    def _check(self, tokens_BT: NDArray[np.int32]) -> None:
        check_tokens(tokens_BT, self.config.vocab_size, self.config.max_position_embeddings)

    def _read(self, rows: Rows, cache: Cache | None) -> Tensor:
        logits: Tensor = self._model.eval()(rows, cache)
        return logits

    def _on_host(self, tensor: Tensor) -> NDArray[np.float32]:
        array: NDArray[np.float32] = tensor.float().cpu().numpy()
        return array
