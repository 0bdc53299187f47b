from models.optimizer import OptimizerConfig, moments_of
from models.weights import canonical_shapes, optimizer_shapes
from tests.models.tiny import tiny

MUON = OptimizerConfig(name="muon", learning_rate=0.01)


def test_parameters_have_the_moments_of_their_optimizer() -> None:
    assert moments_of(MUON, "layers.attention.q_proj.weight") == ("momentum_buffer",)
    assert moments_of(MUON, "layers.attention.q_proj.bias") == ("exp_avg", "exp_avg_sq")
    assert moments_of(MUON, "layers.mlp.router.weight") == ("exp_avg", "exp_avg_sq")
    assert moments_of(MUON, "embed_tokens.weight") == ("exp_avg", "exp_avg_sq")


def test_a_state_has_a_moment_of_each_weight_s_shape_and_the_count() -> None:
    config = tiny("mixtral")
    shapes = optimizer_shapes(config, MUON)
    assert shapes.pop("updates") == ()
    assert shapes["momentum_buffer:model.layers.0.self_attn.q_proj.weight"] == (16, 16)
    weights = canonical_shapes(config)
    assert {name.partition(":")[2] for name in shapes} == weights.keys()
    assert all(shape == weights[name.partition(":")[2]] for name, shape in shapes.items())
