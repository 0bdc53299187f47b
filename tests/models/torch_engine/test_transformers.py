"""The PyTorch engine against the `transformers` class of each architecture, in both directions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models import weights
from models.config import ModelConfig
from models.engine import Batch, training_engine
from models.generation import generate
from models.optimizer import OptimizerConfig
from models.sampling import SamplingConfig
from models.torch_engine.train import TorchTraining
from tests.models.tiny import Arrays, batch, pieces, tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NAMES = ["gpt2", "llama", "mixtral"]
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
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def saved(model: Any, folder: Path) -> Arrays:
    """The model's canonical weights, as its class writes them."""
    model.save_pretrained(folder)
    return weights.read_arrays(folder / "model.safetensors")


def engine_of(config: ModelConfig, arrays: Arrays) -> TorchTraining:
    engine = training_engine("torch", config, OptimizerConfig(learning_rate=0.01), "float32")
    assert isinstance(engine, TorchTraining)
    engine.restore("weights", pieces(arrays))
    return engine


def their_logits(model: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    with torch.no_grad():
        extra = {"output_router_logits": False} if model.config.model_type == "mixtral" else {}
        found: NDArray[np.float32] = model(torch.tensor(tokens).long(), **extra).logits.numpy()
    return found


VARIANTS: list[tuple[str, dict[str, object]]] = [
    ("gpt2", {}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rope_theta": 500.0}),
    ("mixtral", {}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_logits_are_those_of_the_class(name: str, changes: dict[str, object], tmp_path: Path) -> None:
    config = tiny(name, **changes)
    model = twin(config)
    engine = engine_of(config, saved(model, tmp_path))
    tokens = batch(rows=5, length=20).tokens_BT
    np.testing.assert_allclose(engine.inference().logits(tokens), their_logits(model, tokens), atol=1e-5)


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_exported_weights_open_in_the_class(name: str, changes: dict[str, object], tmp_path: Path) -> None:
    config = tiny(name, **changes)
    model = twin(config)
    model.config.save_pretrained(tmp_path)
    engine = engine_of(config, dict(weights.initial_weights(config, 8)))
    engine.step([batch()], 1.0, 0)
    arrays = weights.assemble(engine.export("weights"), weights.canonical_shapes(config))
    weights.write_arrays(tmp_path / "model.safetensors", arrays, {"format": "pt"})
    opened, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    tokens = batch(rows=5, length=20).tokens_BT
    np.testing.assert_allclose(engine.inference().logits(tokens), their_logits(opened.eval(), tokens), atol=1e-5)


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


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_losses_and_gradients_are_those_of_the_class(
    name: str, changes: dict[str, object], padded: bool, tmp_path: Path
) -> None:
    config, rows = tiny(name, **changes), batch(padded=padded)
    model = twin(config)
    engine = engine_of(config, saved(model, tmp_path / "weights"))
    ours: Arrays = weights.gather(engine.gradients([rows], 0), weights.canonical_shapes(config))
    loss, theirs = their_gradients(model, rows, tmp_path / "gradients")
    found, count = engine.loss(rows)
    assert found / count == pytest.approx(loss, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        np.testing.assert_allclose(ours[key], gradient, atol=2e-5, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_generation_is_that_of_the_class(name: str, penalty: float, tmp_path: Path) -> None:
    config = tiny(name)
    model = twin(config)
    engine = engine_of(config, saved(model, tmp_path))
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
