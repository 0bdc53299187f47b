import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts.identity import describe_files
from common.errors import UserError
from models.chat import Template, chat_of, write_chat
from models.config import ModelConfig
from models.engine import inference_engine
from models.generation import generate
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer, write_tokenizer
from models.weights import initial_weights, whole_pieces
from tasks.checkpoint import ModelFolder, write_model
from tasks.vocabulary.config import ROLES, Characters
from tasks.vocabulary.written import characters_tokenizer
from tests.tasks.conftest import RunStage
from tests.tasks.vocabulary.texts import english, write_documents

ARITHMETIC = Characters(kind="characters", characters="0123456789+-*/=")
SHAPE = {
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
GPT2 = {
    "architecture": "custom",
    "norm": "layer_norm",
    "norm_eps": 1e-4,
    "position_embedding": "learned",
    "mlp": "dense",
    "hidden_act": "gelu_new",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}
LLAMA = {**GPT2, "norm": "rms_norm", "position_embedding": "rope", "rope_theta": 500.0, "mlp": "gated"}
MIXTRAL = {**LLAMA, "attention_bias": False, "mlp": "mixture", "num_local_experts": 4, "num_experts_per_tok": 2}
# Put together part by part, and yet what a class of transformers has.
EQUAL: dict[str, tuple[str, dict[str, object]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-silu-tied": ("gpt2", {**GPT2, "hidden_act": "silu", "tie_word_embeddings": True}),
    "llama": ("llama", {**LLAMA, "num_key_value_heads": 2, "head_dim": 6}),
    "llama-plain": ("llama", {**LLAMA, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral-tied": ("mixtral", {**MIXTRAL, "tie_word_embeddings": True, "mlp_bias": False}),
}


def random_weights(config: ModelConfig) -> dict[str, NDArray[np.float32]]:
    """The weights of `model_folder`: biases and norms are as random as matrices."""
    random = np.random.default_rng(7)
    return {
        name: array + random.normal(0, 0.2, array.shape).astype(np.float32) if array.ndim == 1 else array
        for name, array in sorted(initial_weights(config, 3).items())
    }


WIDE: dict[str, object] = {"architecture": "llama", "hidden_size": 64, "intermediate_size": 64}
"""Wide enough for weights of few bits."""


def model_folder(
    folder: Path, architecture: dict[str, object], tokenizer: Path | None = None
) -> tuple[Path, ModelConfig]:
    """A model that knows nothing, with a tokenizer: that of arithmetic, or the one in a folder."""
    folder.mkdir()
    if tokenizer is None:
        (folder / "tokenizer").mkdir()
        write_tokenizer(folder / "tokenizer", characters_tokenizer(ARITHMETIC), ROLES)
    else:
        shutil.copytree(tokenizer, folder / "tokenizer")
    vocab_size = len(Tokenizer(folder / "tokenizer"))
    config = ModelConfig.model_validate({"vocab_size": vocab_size, **SHAPE, **architecture})
    write_model(folder, ModelFolder(config, dict(random_weights(config)), None, None, ()))
    return folder, config


@pytest.mark.parametrize(
    ("native", "parts"),
    [
        *((str(parts["architecture"]), parts) for parts in ARCHITECTURES.values()),
        *EQUAL.values(),
    ],
    ids=[*ARCHITECTURES, *(f"equal-{name}" for name in EQUAL)],
)
def test_transformers_opens_it_and_agrees(
    run_stage: RunStage, tmp_path: Path, native: str, parts: dict[str, object]
) -> None:
    source, config = model_folder(tmp_path / "model", parts)
    folder, _ = run_stage("publish", {"title": "A model"}, model=source)
    assert json.loads((folder / "config.json").read_bytes())["model_type"] == native
    assert not list(folder.glob("*.py"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("12+34=", add_special_tokens=False)]])
    with torch.no_grad():
        theirs_BTV = model(ids).logits.numpy()
    np.testing.assert_allclose(ours.logits(ids.numpy().astype(np.int32)), theirs_BTV, atol=1e-5, rtol=0)
    generated = model.generate(ids, max_new_tokens=6)[0, ids.shape[1] :].tolist()
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=6)
    expected = generate(ours, [ids[0].tolist()], sampling, stop_ids=[tokenizer.eos_token_id])[0]
    assert generated == expected


PROMPT = "“odd” 'quoted' \\ 👍\nab"


@pytest.mark.parametrize(
    ("architecture", "vocabulary"),
    [
        ("gpt2", {"kind": "bytes"}),
        ("llama", {"kind": "sentencepiece_unigram", "vocab_size": 400}),
        ("mixtral", {"kind": "bpe", "vocab_size": 400, "special_tokens": ["<|user|>"]}),
        ("llama", {"kind": "byte_bpe", "vocab_size": 400}),
    ],
)
@pytest.mark.usefixtures("empty_hub")
def test_the_code_on_the_card_runs(
    run_stage: RunStage,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    vocabulary: dict[str, Any],
) -> None:
    documents = write_documents(tmp_path / "documents", [english(60)])
    made, _ = run_stage("tokenizer", {"vocabulary": vocabulary}, documents=documents)
    shape = {**ARCHITECTURES[architecture], "max_position_embeddings": 64}
    source, config = model_folder(tmp_path / "model", shape, made)
    measured = {"measure": "perplexity", "split": "test", "tokens": 9, "window": 8, "stride": 4, "bits_per_byte": 2.0}
    measured |= {"data": {"owner/texts": "0123456789abcdef", "made": None}, "bos": "<bos>"}
    samples = [{"prompt": PROMPT, "continuation": ""}]
    results = {**measured, "token_perplexity": 2.0, "word_perplexity": None, "samples": samples}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results))
    folder, _ = run_stage("publish", {"title": "A model"}, model=source, evaluation=tmp_path / "evaluation")
    assert {path.name for path in made.iterdir()} < {path.name for path in folder.iterdir()}
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    script = tmp_path / "snippet.py"
    script.write_text(code.replace('"path/to/this/folder"', repr(str(folder))))
    ran = runpy.run_path(str(script))
    tokenizer = Tokenizer(made)
    assert ran["ids"] == [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    engine = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=16)
    answer = generate(engine, [ran["ids"]], sampling, stop_ids=[tokenizer.eos_id])[0]
    shown = ran["tokenizer"].decode([*ran["ids"], *answer])
    assert capsys.readouterr().out == shown + "\n"
    assert tokenizer.decode(ran["ids"]) == PROMPT


@pytest.mark.parametrize(
    ("architecture", "template"), [("llama", "plain"), ("gpt2", "chatml"), ("mixtral", "chatml"), ("gpt2", "plain")]
)
def test_a_chat_model_answers_in_transformers_as_it_does_here(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str], architecture: str, template: Template
) -> None:
    made, _ = run_stage("tokenizer", {"vocabulary": {"kind": "bytes"}})
    write_chat(made, template, bos=template == "plain")
    shape = {**ARCHITECTURES[architecture], "max_position_embeddings": 256}
    source, config = model_folder(tmp_path / "model", shape, made)
    question = "What is 554 + 456? “odd” \\ 'quoted'"
    samples = [{"prompt": question, "prediction": "?", "target": "1010", "correct": False}]
    marks = {"n": 7, "well_formed": 0.5, "right": 0.25, "final_number": 0.125}
    whole = {"n": 9, "exact_match": 0.0, "standard_error": 0.0, "interval": [0.0, 0.25]}
    groups = {"phrasing": [{"group": f"a|b_{number}", **whole} for number in range(21)]}
    results = {"split": "test", **whole, "by_answer_length": [], "groups": groups, "marks": marks, "samples": samples}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results))
    folder, _ = run_stage("publish", {"title": "A model"}, model=source, evaluation=tmp_path / "evaluation")
    chat = chat_of(made)
    assert chat is not None
    stops = json.loads((folder / "generation_config.json").read_bytes())["eos_token_id"]
    # What closes a text ends generation too.
    eos = Tokenizer(made).backend.token_to_id("<eos>")
    assert stops == (eos if template == "plain" else [chat.closing_id, eos])
    card = (folder / "README.md").read_text()
    assert "| 50.00% | 25.00% | 12.50% |" in card
    assert "| all | 9 | 0.00% ± 0.00% | 0.00% to 25.00% |" in card
    assert "By phrasing, the 20 worst of 21:" in card
    assert r"| a\|b\_19 | 9 |" in card
    assert "b\\_20" not in card
    assert "A special token that is written out in a message is taken for the token" in card
    script = tmp_path / "snippet.py"
    code = card.partition("```python\n")[2].partition("```")[0]
    script.write_text(code.replace('"path/to/this/folder"', repr(str(folder))))
    ran = runpy.run_path(str(script))
    prompt = chat.prompt_ids([{"role": "user", "content": question}])
    assert ran["asked"]["input_ids"].tolist() == [prompt]
    engine = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=128)
    answer = generate(engine, [prompt], sampling, chat.tokenizer.stop_ids)[0]
    assert ran["answer"].tolist() == answer
    assert capsys.readouterr().out == chat.answer(answer) + "\n"


def test_the_card_says_what_was_measured_and_where_it_came_from(run_stage: RunStage, tmp_path: Path) -> None:
    source, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    documents, _ = run_stage(
        "documents", {"source": {"kind": "arithmetic", "train": 50, "validation": 10, "test": 30, "maximum": 20}}
    )
    evaluation, measured = run_stage("evaluate", {"max_new_tokens": 4}, model=source, documents=documents)
    folder, metrics = run_stage(
        "publish", {"title": "Adds: two", "description": "Adds."}, model=source, evaluation=evaluation
    )
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\n')
    assert "# Adds: two\n\nAdds.\n" in card
    assert f"| all | 30 | {measured['exact_match']:.2%} ± {measured['standard_error']:.2%} |" in card
    longest = measured["groups"]["digits"][-1]
    assert 0 < longest["n"] < 30
    assert f"| 2 | {longest['n']} | {longest['exact_match']:.2%} ±" in card.partition("| digits |")[2]
    # All problems are sums, which is no group of them.
    assert "| operator |" not in card
    assert "- documents `0123456789ab`" in card
    assert metrics["exact_match"] == measured["exact_match"]
    assert json.loads((folder / "generation_config.json").read_bytes())["eos_token_id"] == 2


def test_the_same_inputs_give_the_same_bytes(run_stage: RunStage, tmp_path: Path) -> None:
    source, _ = model_folder(tmp_path / "model", ARCHITECTURES["llama"])
    folders = [run_stage("publish", {"title": "A model"}, model=source)[0] for _ in range(2)]
    assert describe_files(folders[0]) == describe_files(folders[1])


def test_a_model_with_too_few_rows_for_its_tokenizer_is_refused(run_stage: RunStage, tmp_path: Path) -> None:
    source, _ = model_folder(tmp_path / "model", {"architecture": "gpt2", "vocab_size": 17})
    with pytest.raises(UserError, match=r"model.vocab_size is 17, but the tokenizer has 18 tokens"):
        run_stage("publish", {"title": "A model"}, model=source)
    assert len(Tokenizer(source / "tokenizer")) == 18
