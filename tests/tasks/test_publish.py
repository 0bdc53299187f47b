import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts.identity import describe_files
from common.errors import UserError
from models.config import ModelConfig
from models.engine import inference_engine
from models.generation import generate
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer, write_characters_tokenizer
from models.weights import initial_weights, whole_pieces
from tasks.checkpoint import ModelFolder, write_model
from tasks.tokenizer import ARITHMETIC_CHARACTERS
from tests.tasks.conftest import RunStage

SHAPE = {
    "vocab_size": 18,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    # Wide enough apart that the likeliest token is never a tie.
    "initializer_range": 0.3,
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "gpt2": {"architecture": "gpt2"},
    "gpt2-untied": {"architecture": "gpt2", "tie_word_embeddings": False},
    "llama": {"architecture": "llama", "num_key_value_heads": 2},
    "llama-tied-biased": {
        "architecture": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 6,
    },
    "mixtral": {"architecture": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
}


def model_folder(folder: Path, architecture: dict[str, object]) -> tuple[Path, ModelConfig]:
    config = ModelConfig.model_validate({**SHAPE, **architecture})
    folder.mkdir()
    write_model(folder, ModelFolder(config, dict(initial_weights(config, 3)), None, None))
    (folder / "tokenizer").mkdir()
    write_characters_tokenizer(folder / "tokenizer", ARITHMETIC_CHARACTERS)
    return folder, config


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_opens_it_and_agrees(run_stage: RunStage, tmp_path: Path, name: str) -> None:
    source, config = model_folder(tmp_path / "model", ARCHITECTURES[name])
    folder, _ = run_stage("publish", {"title": "A model"}, model=source)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = inference_engine("torch", config, "float32", whole_pieces(initial_weights(config, 3)))
    ids = tokenizer("<bos>12+34=", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs_BTV = model(ids).logits.numpy()
    np.testing.assert_allclose(ours.logits(ids.numpy().astype(np.int32)), theirs_BTV, atol=1e-5, rtol=0)
    generated = model.generate(ids, max_new_tokens=6)[0, ids.shape[1] :].tolist()
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=6)
    expected = generate(ours, [ids[0].tolist()], sampling, stop_ids=[tokenizer.eos_token_id])[0]
    assert generated == expected


def test_the_card_says_what_was_measured_and_where_it_came_from(run_stage: RunStage, tmp_path: Path) -> None:
    source, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    documents, _ = run_stage(
        "documents", {"source": {"kind": "arithmetic", "train": 50, "validation": 10, "test": 30, "maximum": 99}}
    )
    evaluation, measured = run_stage("evaluate", {"max_new_tokens": 4}, model=source, documents=documents)
    folder, metrics = run_stage(
        "publish", {"title": "Adds: two", "description": "Adds."}, model=source, evaluation=evaluation
    )
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\n')
    assert "# Adds: two\n\nAdds.\n" in card
    assert f"| all | 30 | {measured['exact_match']:.2%} |" in card
    assert "- documents `0123456789ab`" in card
    assert metrics["exact_match"] == measured["exact_match"]
    assert json.loads((folder / "generation_config.json").read_bytes())["eos_token_id"] == 2


def test_the_same_inputs_give_the_same_bytes(run_stage: RunStage, tmp_path: Path) -> None:
    source, _ = model_folder(tmp_path / "model", ARCHITECTURES["llama"])
    folders = [run_stage("publish", {"title": "A model"}, model=source)[0] for _ in range(2)]
    assert describe_files(folders[0]) == describe_files(folders[1])


def test_a_composition_without_a_class_is_refused(run_stage: RunStage, tmp_path: Path) -> None:
    composition = {
        "architecture": "custom",
        "norm": "rms_norm",
        "norm_eps": 1e-6,
        "position_embedding": "learned",
        "mlp": "dense",
        "hidden_act": "gelu_new",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    }
    source, _ = model_folder(tmp_path / "model", composition)
    with pytest.raises(UserError, match="no transformers class has this model's composition"):
        run_stage("publish", {"title": "A model"}, model=source)


def test_a_model_with_too_few_rows_for_its_tokenizer_is_refused(run_stage: RunStage, tmp_path: Path) -> None:
    source, _ = model_folder(tmp_path / "model", {"architecture": "gpt2", "vocab_size": 17})
    with pytest.raises(UserError, match=r"model.vocab_size is 17, but the tokenizer has 18 tokens"):
        run_stage("publish", {"title": "A model"}, model=source)
    assert len(Tokenizer(source / "tokenizer")) == 18
