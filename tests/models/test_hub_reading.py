"""What a `config.json` of `transformers` is read as, and what of it is refused."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from common.errors import UserError
from common.files import canonical_json
from models.config import ModelConfig
from models.hub import hub_config
from models.hub_reading import model_config
from tests.models.tiny import VARIANTS, tiny

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 23,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 24,
}
MIXTRAL: dict[str, Any] = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {"gpt2": GPT2, "llama": LLAMA, "mixtral": MIXTRAL}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_description_comes_back(name: str) -> None:
    config = tiny(name)
    found = model_config(json.loads(json.dumps(hub_config(config, 1, 2, 0))), "config.json")
    assert found == config


@settings(deadline=None)
@given(
    st.sampled_from(sorted(VARIANTS)),
    st.floats(1e-8, 1e-3),
    st.floats(0, 0.9),
    st.sampled_from([100.0, 10_000.0, 5e5]),
    st.booleans(),
)
def test_what_may_differ_comes_back(name: str, norm_eps: float, dropout: float, theta: float, tied: bool) -> None:
    rotary = tiny(name).position_embedding == "rope"
    parts = {"rope_theta": theta} if rotary else {}
    config = tiny(name, **parts, norm_eps=norm_eps, dropout=dropout, tie_word_embeddings=tied)
    assert model_config(json.loads(json.dumps(hub_config(config, 1, 2, 0))), "config.json") == config


@pytest.mark.parametrize(("kind", "theirs"), [("gpt2", GPT2Config), ("llama", LlamaConfig), ("mixtral", MixtralConfig)])
def test_what_is_left_out_is_as_in_the_class(tmp_path: Path, kind: str, theirs: Any) -> None:
    sizes = {key: value for key, value in KINDS[kind].items() if key != "model_type"}
    if kind == "mixtral":
        sizes["num_attention_heads"] = 8  # the class has 8 key-value heads where nothing is said
    left_out = model_config({"model_type": kind, **sizes}, "config.json")
    theirs(**sizes).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_bytes())
    assert model_config(written, "config.json") == left_out


def test_both_styles_of_rotary_positions_are_read() -> None:
    for more in (
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
    ):
        assert model_config({**LLAMA, **more}, "config.json").rope_theta == 500.0
    assert model_config(LLAMA, "config.json").rope_theta == 10_000.0
    assert model_config(MIXTRAL | {"num_key_value_heads": None}, "config.json").rope_theta == 1_000_000.0


def test_an_activation_of_another_class_makes_a_custom_model() -> None:
    found = model_config({**GPT2, "activation_function": "silu"}, "config.json")
    assert (found.architecture, found.norm, found.mlp, found.hidden_act) == ("custom", "layer_norm", "dense", "silu")
    assert model_config({**GPT2, "activation_function": "gelu_pytorch_tanh"}, "config.json").architecture == "gpt2"
    assert model_config({**LLAMA, "hidden_act": "gelu_new"}, "config.json").architecture == "custom"


def test_the_class_of_cairn_writes_a_base_for_learned_positions_too() -> None:
    config = tiny("custom")
    described = {**hub_config(config, 1, 2, 0), "rope_theta": 10_000.0, "num_local_experts": None}
    assert model_config(described, "config.json") == config


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "qwen2"}, r"the model_type 'qwen2' cannot be read; it can be gpt2, llama, mixtral, cairn"),
    ("llama", {"model_type": None}, "the model_type None cannot be read"),
    ("llama", {"model_type": ["llama"]}, "cannot be read"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.rope_type is 'llama3'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.rope_type is 'yarn'"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters is .1., which is no JSON object"),
    ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "twice, as 10000.0 and as 500000.0"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and models can be read with 1 alone"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is .* read without it alone"),
    ("llama", {"hidden_act": "relu"}, "hidden_act 'relu' is not known; known are gelu_new, "),
    ("llama", {"hidden_act": {}}, "hidden_act {} is not known"),
    ("llama", {"hidden_size": None}, "hidden_size is missing; it is a number"),
    ("llama", {"hidden_size": "16"}, "hidden_size is '16'; it is a number"),
    ("llama", {"hidden_size": -16}, "hidden_size: "),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
    ("llama", {"rms_norm_eps": "small"}, "norm_eps"),
    ("llama", {"rms_norm_eps": float("inf")}, "norm_eps is inf, which is no finite number"),
    ("llama", {"tie_word_embeddings": 7}, "tie_word_embeddings"),
    ("mixtral", {"sliding_window": 8}, "sliding_window is 8, and models can be read without it alone"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False, and models can be read with True alone"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function 'gelu' is not known"),
    ("gpt2", {"resid_pdrop": 0.2}, "embd_pdrop 0.1, attn_pdrop 0.1, resid_pdrop 0.2: dropout is one here"),
    ("gpt2", {"n_embd": 18}, "not divisible"),
]


@pytest.mark.parametrize(("kind", "more", "message"), REFUSED)
def test_what_cannot_be_described_is_refused_by_name(kind: str, more: dict[str, Any], message: str) -> None:
    described = {**KINDS[kind], "num_key_value_heads": 4, **more}
    with pytest.raises(UserError, match=message) as error:
        model_config(described, "here/config.json")
    assert str(error.value).startswith("here/config.json: ")
    assert "\n" not in str(error.value)


def test_a_window_as_long_as_the_model_is_none() -> None:
    found = model_config({**MIXTRAL, "num_key_value_heads": 2, "sliding_window": 24}, "config.json")
    assert isinstance(found, ModelConfig)
    assert found.num_key_value_heads == 2


KEYS = sorted({*GPT2, *MIXTRAL, "rope_parameters", "rope_scaling", "rope_theta", "hidden_act", "n_inner", "norm"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.sampled_from(["gpt2", "llama", "mixtral", "cairn"]), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_any_description_is_read_or_refused(kind: str, more: dict[str, Any]) -> None:
    with contextlib.suppress(UserError):
        config = model_config({**KINDS.get(kind, MIXTRAL), **more, "model_type": kind}, "config.json")
        canonical_json(config.model_dump())
