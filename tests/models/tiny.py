"""Tiny models and batches that the tests of every engine share."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import weights
from models.config import ModelConfig
from models.engine import Batch
from models.weights import Piece

Arrays = dict[str, NDArray[Any]]

VOCABULARY = 23
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
}
COMPOSITIONS: dict[str, dict[str, object]] = {
    "gpt2": {"architecture": "gpt2"},
    "llama": {"architecture": "llama", "num_key_value_heads": 2, "head_dim": 6},
    "mixtral": {
        "architecture": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.3,
    },
    "custom": {
        "architecture": "custom",
        "norm": "rms_norm",
        "norm_eps": 1e-5,
        "position_embedding": "learned",
        "mlp": "dense",
        "hidden_act": "gelu_new",
        "attention_bias": False,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
}

VARIANTS: dict[str, dict[str, object]] = {
    **COMPOSITIONS,
    "llama-tied": {
        "architecture": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 500.0,
    },
    "mtlm2": {**COMPOSITIONS["custom"], "norm_eps": 1e-6, "attention_bias": True},
}
"""The compositions, and others that engines are held to each other with."""


def tiny(composition: str, **changes: object) -> ModelConfig:
    """A model of a few thousand parameters."""
    return ModelConfig.model_validate({**_SIZE, **VARIANTS[composition], **changes})


def random_weights(config: ModelConfig, seed: int) -> Arrays:
    """Initial weights with every norm and bias drawn too, so that none of them can be left out unseen."""
    random = np.random.default_rng(seed)
    arrays: Arrays = dict(weights.initial_weights(config, seed))
    for name, array in arrays.items():
        if array.ndim == 1:
            arrays[name] = array + np.float32(0.2) * random.standard_normal(array.shape, np.float32)
    return arrays


def batch(rows: int = 6, length: int = 9, seed: int = 0, *, padded: bool = True, vocabulary: int = VOCABULARY) -> Batch:
    """Random rows; where padded, each counts a stretch of its own and ends somewhere."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
    mask = np.ones((rows, length), np.bool_)
    if padded:
        places = np.arange(length)
        starts, ends = random.integers(0, 3, (rows, 1)), random.integers(4, length + 1, (rows, 1))
        mask = (places >= starts) & (places < ends)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask)


def cut(whole: Batch, parts: int) -> list[Batch]:
    """A batch as several micro-batches."""
    return [whole.part(rows) for rows in np.array_split(np.arange(len(whole.tokens_BT)), parts)]


def pieces(arrays: Arrays) -> list[Piece]:
    """Whole arrays as pieces."""
    return [Piece(name, (), array) for name, array in arrays.items()]
