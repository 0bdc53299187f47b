"""Every engine against the `transformers` class of each architecture, in both directions."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models import weights
from models.config import ModelConfig
from models.engine import Batch, EngineName, TrainingEngine, training_engine
from models.generation import generate
from models.optimizer import OptimizerConfig
from models.sampling import SamplingConfig
from tests.models.agreement import largest_share, small, tell
from tests.models.test_engines import engine_name
from tests.models.tiny import VOCABULARY, Arrays, batch, pieces, random_weights, tiny

__all__ = ["engine_name"]  # the fixture

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.agreement
without_compiling = pytest.mark.parametrize("engine_name", ["torch", "mlx"], indirect=True)
"""JAX, which would compile for each of these, is held to the other engines by test_agreement.py."""
NAMES = ["gpt2", "llama", "mixtral", "llama-tied"]
SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def twin(config: ModelConfig) -> Any:
    """A random model of the matching class, with every bias and norm random too."""
    torch.manual_seed(0)
    if config.architecture == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab_size,
                n_embd=config.hidden_size,
                n_inner=config.intermediate_size,
                n_layer=config.num_hidden_layers,
                n_head=config.num_attention_heads,
                n_positions=config.max_position_embeddings,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    else:
        common = {name: getattr(config, name) for name in SAME_NAMES}
        common |= {"rms_norm_eps": config.norm_eps, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.architecture == "llama":
            bias = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **bias, rope_parameters=rope))
        else:
            experts = {"num_local_experts": config.num_local_experts, "num_experts_per_tok": config.num_experts_per_tok}
            balance = {"router_aux_loss_coef": config.router_aux_loss_coef, "output_router_logits": True}
            model = transformers.MixtralForCausalLM(
                transformers.MixtralConfig(**common, **experts, **balance, rope_parameters=rope, sliding_window=None)
            )
    spread = 0.8 / math.sqrt(config.hidden_size)  # wider models with as large weights are no test but ill-conditioned
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def saved(model: Any, folder: Path) -> Arrays:
    """The model's canonical weights, as its class writes them."""
    model.save_pretrained(folder)
    return weights.read_arrays(folder / "model.safetensors")


def engine_of(name: EngineName, config: ModelConfig, arrays: Arrays) -> TrainingEngine:
    engine = training_engine(name, config, OptimizerConfig(learning_rate=0.01), "float32")
    engine.restore("weights", pieces(arrays))
    return engine


def their_logits(model: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    with torch.no_grad():
        extra = {"output_router_logits": False} if model.config.model_type == "mixtral" else {}
        found: NDArray[np.float32] = model(torch.tensor(tokens).long(), **extra).logits.numpy()
    return found


def assert_logits_agree(engine: TrainingEngine, model: Any, tokens: NDArray[np.int32], bar: float) -> None:
    difference = float(abs(engine.inference().logits(tokens) - their_logits(model, tokens)).max())
    tell(engine.name, tokens.shape, difference)
    assert difference <= bar


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_class(engine_name: EngineName, name: str, tmp_path: Path) -> None:
    config = tiny(name)
    model = twin(config)
    engine = engine_of(engine_name, config, saved(model, tmp_path / "tiny"))
    assert_logits_agree(engine, model, batch(rows=5, length=20).tokens_BT, 2e-5)
    larger = small(name)
    model = twin(larger)
    engine = engine_of(engine_name, larger, saved(model, tmp_path / "small"))
    assert_logits_agree(engine, model, batch(rows=2, length=120, vocabulary=300).tokens_BT, 1e-4)


def test_logits_of_long_rows_are_those_of_the_class(engine_name: EngineName, tmp_path: Path) -> None:
    # Rotary frequencies that an engine has itself may be off by enough to be seen here.
    config = tiny("llama", head_dim=64, max_position_embeddings=2048)
    model = twin(config)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, 2048), dtype=np.int32)
    assert_logits_agree(engine_of(engine_name, config, saved(model, tmp_path)), model, tokens, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_exported_weights_open_in_the_class(engine_name: EngineName, name: str, tmp_path: Path) -> None:
    config = tiny(name)
    model = twin(config)
    model.config.save_pretrained(tmp_path)
    engine = engine_of(engine_name, config, random_weights(config, 8))
    arrays = weights.assemble(engine.export("weights"), weights.canonical_shapes(config))
    weights.write_arrays(tmp_path / "model.safetensors", arrays, {"format": "pt"})
    opened, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_logits_agree(engine, opened.eval(), batch(rows=5, length=20).tokens_BT, 2e-5)


def their_gradients(model: Any, rows: Batch, folder: Path) -> tuple[float, Arrays]:
    """Loss without its balance part, and gradients by canonical name, of the class itself."""
    mask = torch.tensor(rows.loss_mask_BT)
    # Real positions are those up to a row's last target.
    real = np.logical_or.accumulate(rows.loss_mask_BT[:, ::-1], axis=1)[:, ::-1].astype(np.int64)
    out = model(torch.tensor(rows.tokens_BT).long(), attention_mask=torch.tensor(real))
    loss = torch.nn.functional.cross_entropy(out.logits[mask], torch.tensor(rows.targets_BT).long()[mask])
    total = loss
    if model.config.model_type == "mixtral":
        total = loss + model.config.router_aux_loss_coef * out.aux_loss
    total.backward()
    # The class writes its gradients under canonical names if they stand where its weights stood.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return float(loss.detach()), saved(model, folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [False, True])
@without_compiling
def test_losses_and_gradients_are_those_of_the_class(
    engine_name: EngineName, name: str, padded: bool, tmp_path: Path
) -> None:
    config, rows = tiny(name), batch(padded=padded)
    model = twin(config)
    engine = engine_of(engine_name, config, saved(model, tmp_path / "weights"))
    ours: Arrays = weights.gather(engine.gradients([rows], 0), weights.canonical_shapes(config))
    loss, theirs = their_gradients(model, rows, tmp_path / "gradients")
    found, count = engine.loss(rows)
    assert found / count == pytest.approx(loss, rel=1e-5)
    share, where = largest_share(theirs, ours)
    tell(engine_name, "gradients", share)
    assert share <= 1, where


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("penalty", [1.0, 1.7])
@without_compiling
def test_greedy_generation_is_that_of_the_class(
    engine_name: EngineName, name: str, penalty: float, tmp_path: Path
) -> None:
    config = tiny(name)
    model = twin(config)
    engine = engine_of(engine_name, config, saved(model, tmp_path))
    prompts = [[5, 3, 8, 1], [9], [2, 2, 7, 11, 4, 6], [14, 0, 21]]
    ours = generate(
        engine.inference(), prompts, SamplingConfig(max_new_tokens=12, repetition_penalty=penalty), {7}, batch_size=3
    )
    for prompt, answer in zip(prompts, ours, strict=True):
        settings = transformers.GenerationConfig(
            max_new_tokens=12, do_sample=False, repetition_penalty=penalty, eos_token_id=7, pad_token_id=0
        )
        tokens = torch.tensor([prompt])
        row = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)[0].tolist()
        new = row[len(prompt) :]
        assert answer == (new[: new.index(7) + 1] if 7 in new else new)
