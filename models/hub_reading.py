"""The `config.json` of a model in the layout of `transformers`, read: the way back from `models.hub.hub_config`.

What a class of `transformers` does with a key is either described by ModelConfig or refused by the key's name. Keys
that the class does not know change nothing there, and nothing here. Code in the folder is never run.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from common.errors import UserError
from models.config import ModelConfig

_ACTIVATIONS = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "silu": "silu", "swish": "silu"}
_ROPE_KEYS = ("rope_type", "type", "rope_theta")
_REFUSED: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    "llama": {"partial_rotary_factor": 1},
    "mixtral": {"partial_rotary_factor": 1, "router_jitter_noise": 0},
    "cairn": {},
}
"""Keys that each class takes and ModelConfig does not describe, with the only value that can be read."""


@dataclass(frozen=True)
class _Description:
    """A `config.json`."""

    values: Mapping[str, Any]
    where: str
    """What it is called in errors."""

    def get(self, key: str, default: Any = None) -> Any:
        """What a key says; the default where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str) -> int:
        """A whole number that has to be there."""
        value = self.values.get(key)
        if type(value) is not int:
            raise UserError(f"{self.where}: {key} is {'missing' if value is None else repr(value)}; it is a number")
        return value

    def activation(self, key: str, default: str) -> str:
        """The activation of the MLP by the name that it has here."""
        named = self.get(key, default)
        if not isinstance(named, str) or named not in _ACTIVATIONS:
            raise UserError(f"{self.where}: {key} {named!r} is not known; known are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[named]

    def rope_theta(self, default: float) -> Any:
        """The base of plain rotary positions, in the key of transformers 4 or that of 5."""
        found = [] if self.get("rope_theta") is None else [self.get("rope_theta")]
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.get(key, {})
            if not isinstance(rope, dict):
                raise UserError(f"{self.where}: {key} is {rope!r}, which is no JSON object")
            kind = rope.get("rope_type", rope.get("type", "default"))
            odd = next((name for name, value in rope.items() if name not in _ROPE_KEYS and value is not None), None)
            if kind != "default":
                raise self.refusal(f"{key}.rope_type", kind, "default")
            if odd is not None:
                raise self.refusal(f"{key}.{odd}", rope[odd], None)
            if rope.get("rope_theta") is not None:
                found.append(rope["rope_theta"])
        if any(theta != found[0] for theta in found):
            raise UserError(f"{self.where}: rope_theta is there twice, as {' and as '.join(map(str, found))}")
        return found[0] if found else default

    def dropout(self, *keys: str, default: float) -> Any:
        """The one dropout of several places."""
        found = {key: self.get(key, default) for key in keys}
        if any(value != found[keys[0]] for value in found.values()):
            said = ", ".join(f"{key} {value}" for key, value in found.items())
            raise UserError(
                f"{self.where}: {said}: dropout is one here; make them equal, which matters in training alone"
            )
        return found[keys[0]]

    def refusal(self, key: str, value: Any, only: Any) -> UserError:
        """The error for a value that makes another function than any that is known here."""
        readable = "without it" if only is None else f"with {only!r}"
        return UserError(f"{self.where}: {key} is {value!r}, and models can be read {readable} alone")

    def check(self, kind: str) -> None:
        """Raises UserError for what changes the function and has no place in ModelConfig."""
        common = {"quantization_config": None, "is_encoder_decoder": False}
        for key, only in {**common, **_REFUSED[kind]}.items():
            value = self.get(key, only)
            if value != only:
                raise self.refusal(key, value, only)
        window = self.get("sliding_window")
        if window is not None and not (type(window) is int and window >= self.size("max_position_embeddings")):
            raise self.refusal("sliding_window", window, None)


def model_config(description: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a `config.json` describes, of the architecture that has its name wherever the activation is that
    one's own, else `custom`; `where` is what the file is called in errors.

    What the file leaves out is as in the class of `transformers`. Raises UserError, with the key, for another
    `model_type` than gpt2, llama, mixtral and cairn, and for all that ModelConfig cannot describe.
    """
    kind = description.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise UserError(f"{where}: the model_type {kind!r} cannot be read; it can be {', '.join(_READERS)}")
    read = _Description(description, where)
    read.check(kind)
    values = _READERS[kind](read)
    own = {"gpt2": "gelu_new", "llama": "silu", "mixtral": "silu"}.get(kind)
    architecture = kind if values.get("hidden_act") == own else "custom"
    try:
        config = ModelConfig.model_validate({"architecture": architecture, **values})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{where}: {key + ': ' if key else ''}{problem['msg']}") from error
    for key, value in config:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {key} is {value}, which is no finite number")
    return config


def _gpt2(read: _Description) -> dict[str, Any]:
    width = read.size("n_embd")
    return {
        "norm": "layer_norm",
        "position_embedding": "learned",
        "mlp": "dense",
        "attention_bias": True,
        "mlp_bias": True,
        "vocab_size": read.size("vocab_size"),
        "hidden_size": width,
        "intermediate_size": read.get("n_inner", 4 * width),
        "num_hidden_layers": read.size("n_layer"),
        "num_attention_heads": read.size("n_head"),
        "max_position_embeddings": read.size("n_positions"),
        "hidden_act": read.activation("activation_function", "gelu_new"),
        "norm_eps": read.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": read.get("tie_word_embeddings", True),
        "initializer_range": read.get("initializer_range", 0.02),
        "dropout": read.dropout("embd_pdrop", "attn_pdrop", "resid_pdrop", default=0.1),
    }


def _rotary(read: _Description, norm_eps: float, rope_theta: float) -> dict[str, Any]:
    """What Llama and Mixtral have in common, with what each takes where nothing is said."""
    return {
        "norm": "rms_norm",
        "position_embedding": "rope",
        "vocab_size": read.size("vocab_size"),
        "hidden_size": read.size("hidden_size"),
        "intermediate_size": read.size("intermediate_size"),
        "num_hidden_layers": read.size("num_hidden_layers"),
        "num_attention_heads": read.size("num_attention_heads"),
        "head_dim": read.get("head_dim"),
        "max_position_embeddings": read.size("max_position_embeddings"),
        "hidden_act": read.activation("hidden_act", "silu"),
        "norm_eps": read.get("rms_norm_eps", norm_eps),
        "rope_theta": read.rope_theta(rope_theta),
        "tie_word_embeddings": read.get("tie_word_embeddings", False),
        "initializer_range": read.get("initializer_range", 0.02),
        "dropout": read.dropout("attention_dropout", default=0.0),
    }


def _llama(read: _Description) -> dict[str, Any]:
    return _rotary(read, 1e-6, 10_000.0) | {
        "mlp": "gated",
        "num_key_value_heads": read.get("num_key_value_heads"),
        "attention_bias": read.get("attention_bias", False),
        "mlp_bias": read.get("mlp_bias", False),
    }


def _mixtral(read: _Description) -> dict[str, Any]:
    return _rotary(read, 1e-5, 1_000_000.0) | {
        "mlp": "mixture",
        # Null stands for as many as query heads; where nothing is said, the class has 8.
        "num_key_value_heads": read.values.get("num_key_value_heads", 8),
        "attention_bias": False,
        "mlp_bias": False,
        "num_local_experts": read.size("num_local_experts"),
        "num_experts_per_tok": read.size("num_experts_per_tok"),
        "router_aux_loss_coef": read.get("router_aux_loss_coef", 0.001),
    }


def _cairn(read: _Description) -> dict[str, Any]:
    """The keys of `published/configuration_cairn.py`, which are those of ModelConfig."""
    found = {name: read.get(name) for name in ModelConfig.model_fields if name != "architecture"}
    if found["position_embedding"] == "learned":
        # The class has a value for it, and writes that, whatever the positions are.
        del found["rope_theta"]
    return {name: value for name, value in found.items() if value is not None}


_READERS: Mapping[str, Callable[[_Description], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mixtral": _mixtral,
    "cairn": _cairn,
}
