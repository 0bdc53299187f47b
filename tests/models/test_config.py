import pytest
from pydantic import ValidationError

from models.config import ModelConfig
from tests.models.tiny import tiny

SIZE: dict[str, object] = {
    "vocab_size": 18,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
}


def test_an_architecture_brings_the_defaults_of_its_class() -> None:
    gpt2 = ModelConfig.model_validate({**SIZE, "architecture": "gpt2"})
    assert (gpt2.norm, gpt2.mlp, gpt2.tie_word_embeddings, gpt2.norm_eps) == ("layer_norm", "dense", True, 1e-5)
    llama = ModelConfig.model_validate({**SIZE, "architecture": "llama"})
    assert (llama.rope_theta, llama.norm_eps, llama.tie_word_embeddings) == (10_000.0, 1e-6, False)
    mixtral = tiny("mixtral")
    assert (mixtral.rope_theta, mixtral.router_aux_loss_coef) == (1_000_000.0, 0.3)


def test_heads_and_their_width_follow_from_the_rest() -> None:
    config = ModelConfig.model_validate({**SIZE, "architecture": "llama"})
    assert (config.num_key_value_heads, config.head_dim, config.query_size, config.key_value_size) == (4, 6, 24, 24)
    assert tiny("llama").query_size == 24
    assert tiny("llama").key_value_size == 12


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "custom"])
def test_a_config_survives_its_own_json(name: str) -> None:
    config = tiny(name)
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2", "norm": "rms_norm"}, "use architecture: custom"),
        ({"architecture": "llama", "num_key_value_heads": 3}, "does not divide"),
        ({"architecture": "gpt2", "num_key_value_heads": 2}, "as many key-value heads"),
        ({"architecture": "gpt2", "rope_theta": 1e4}, "positions are learned"),
        ({"architecture": "llama", "head_dim": 5}, "even head_dim"),
        ({"architecture": "llama", "hidden_size": 25}, "not divisible"),
        ({"architecture": "mixtral"}, "num_local_experts"),
        ({"architecture": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "exceeds"),
        ({"architecture": "llama", "num_local_experts": 2}, "belong to a mixture"),
        ({"architecture": "llama", "n_layer": 2}, "n_layer"),
        ({"architecture": "custom"}, "norm"),
        ({"architecture": "llama", "vocab_size": 0}, "vocab_size"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({**SIZE, **changes})
