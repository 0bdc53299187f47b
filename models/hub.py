"""A model in the words of `transformers`: of the class that it is, or of one that is published beside the weights.

The latter is `published/`: two files that go into the folder as they are, so that it opens where Cairn is not
installed. They are data here. Nothing imports them, since they import PyTorch and `transformers`, which stay out of
everything but engines and tests; the folder is no package and the import contracts do not see it. Their tests open
published folders in a process without Cairn.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from models.config import ModelConfig
from models.weights import Array, assemble, canonical_shapes, from_canonical, parameters, to_canonical

Native = Literal["gpt2", "llama", "mixtral"]

_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}
CODE = tuple(Path(__file__).parent / "published" / f"{part}_cairn.py" for part in ("configuration", "modeling"))
"""What `transformers` runs for a model of no class of its own."""


def native_class(config: ModelConfig) -> Native | None:
    """The `transformers` class that has exactly this composition, whatever the config calls it; None if none has."""
    parts = (config.norm, config.position_embedding, config.mlp)
    if parts == ("layer_norm", "learned", "dense"):
        whole = config.num_key_value_heads == config.num_attention_heads and config.query_size == config.hidden_size
        return "gpt2" if whole and config.attention_bias and config.mlp_bias else None
    # LlamaConfig refuses widths that its heads do not divide, whatever head_dim is.
    if parts == ("rms_norm", "rope", "gated") and config.hidden_size % config.num_attention_heads == 0:
        return "llama"
    if parts == ("rms_norm", "rope", "mixture") and not config.attention_bias:
        return "mixtral"
    return None


def hub_config(config: ModelConfig, bos_id: int, eos_id: int, pad_id: int) -> dict[str, Any]:
    """The `config.json` of a published folder; of a composition that no class has, it names the classes of `CODE`."""
    native = native_class(config)
    common = {
        "architectures": [_CLASSES[native] if native else "CairnForCausalLM"],
        "model_type": native or "cairn",
        "vocab_size": config.vocab_size,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "dtype": "float32",
        "use_cache": True,
    }
    if native is None:
        return common | _cairn(config)
    return common | (_gpt2(config) if native == "gpt2" else _llama(config, native))


def published_names(config: ModelConfig) -> ModelConfig:
    """The same model as one whose canonical names are those of the published class."""
    # GPT-2 alone has names of its own, and matrices the other way round.
    if native_class(config) != "gpt2" or config.architecture == "gpt2":
        return config
    # A copy is not checked again: the activation, which gpt2 fixes in recipes, is free in its class.
    return config.model_copy(update={"architecture": "gpt2"})


def hub_weights(config: ModelConfig, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Canonical weights under the names that the published class has for them."""
    return _renamed(config, published_names(config), weights)


def from_hub_weights(config: ModelConfig, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Canonical weights out of what the published class has: the way back from `hub_weights`."""
    return _renamed(published_names(config), config, weights)


def _renamed(one: ModelConfig, other: ModelConfig, weights: Mapping[str, Array]) -> dict[str, Array]:
    """The weights of one description of a model under the names of another."""
    if one == other:
        return dict(weights)
    pieces = [
        piece
        for known, named in zip(parameters(one), parameters(other), strict=True)
        for piece in to_canonical(named, from_canonical(known, weights.__getitem__))
    ]
    return assemble(pieces, canonical_shapes(other))


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": config.max_position_embeddings,
        "n_ctx": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "activation_function": config.hidden_act,
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
    }


def _llama(config: ModelConfig, native: Native) -> dict[str, Any]:
    found = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        # Readers before transformers 5 know the first, later ones the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_dropout": config.dropout,
    }
    if native == "llama":
        return found | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return found | {
        "num_local_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }


def _cairn(config: ModelConfig) -> dict[str, Any]:
    """The composition part by part, under the names of `published/configuration_cairn.py`."""
    left_out = {"architecture", "vocab_size", "initializer_range", "tie_word_embeddings", "router_aux_loss_coef"}
    return config.model_dump(exclude=left_out, exclude_none=True) | {
        "auto_map": {
            "AutoConfig": "configuration_cairn.CairnConfig",
            "AutoModelForCausalLM": "modeling_cairn.CairnForCausalLM",
        },
    }
