import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from models.engine import Batch, InferenceEngine, inference_engine
from models.tokenizer import Tokenizer
from models.weights import Array, whole_pieces
from tasks.checkpoint import ModelFolder, write_model
from tasks.perplexity import negative_log_likelihood, windows
from tests.tasks.conftest import RunStage
from tests.tasks.test_publish import ARCHITECTURES, WIDE, model_folder, random_weights

TEXTS = ["12+30=42", "1+1=2", "999+1=1000", "7*8=5612+30=42"]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    pq.write_table(pa.table({"text": TEXTS[:2]}), folder / "test-00000.parquet")
    pq.write_table(pa.table({"text": TEXTS[2:]}), folder / "test-00001.parquet")
    return folder


@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 20))
def test_windows_score_every_token_once_with_its_context(length: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    tokens = list(range(length))
    scored: list[int] = []
    for part in windows(tokens, window, stride):
        assert len(part.tokens) <= window + 1
        assert part.tokens == tokens[part.tokens[0] : part.tokens[-1] + 1]
        new = part.tokens[len(part.tokens) - part.scored :]
        for token in new:
            assert token - part.tokens[0] >= min(token, window - stride + 1)
        scored += new
    assert scored == tokens[1:]


def reference(engine: InferenceEngine, tokens: Sequence[int], window: int, stride: int) -> float:
    """One forward pass for each token, in the window that the definition gives it."""
    total = 0.0
    for target in range(1, len(tokens)):
        end = window if target <= window else window + math.ceil((target - window) / stride) * stride
        begin = max(0, min(end, len(tokens) - 1) - window)
        logits = engine.logits(np.array([tokens[begin:target]], np.int32))[0, -1].astype(np.float64)
        total -= logits[tokens[target]] - np.logaddexp.reduce(logits)
    return total


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_it_equals_one_pass_per_token(tmp_path: Path, architecture: str) -> None:
    _, config = model_folder(tmp_path / "model", ARCHITECTURES[architecture])
    engine = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    tokens = np.random.default_rng(0).integers(0, 18, 41).tolist()
    longest = config.max_position_embeddings
    for window, stride in ((longest, longest), (longest, longest // 2), (5, 1), (7, 3)):
        found = negative_log_likelihood(engine, tokens, window, stride, batch_size=3)
        assert found == pytest.approx(reference(engine, tokens, window, stride), rel=1e-5)


def test_a_window_as_long_as_the_text_gives_the_plain_loss(
    run_stage: RunStage, documents: Path, tmp_path: Path
) -> None:
    model, config = model_folder(tmp_path / "model", ARCHITECTURES["llama"])
    tokenizer = Tokenizer(model / "tokenizer")
    settings = {"prompts": ["1+", "2"], "sampling": {"max_new_tokens": 4}, "batch_size": 2}
    folder, metrics = run_stage("perplexity", settings, model=model, documents=documents)
    engine = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    total, count = 0.0, 0
    for text in TEXTS:
        ids = np.array([[tokenizer.bos_id, *tokenizer.encode(text)]], np.int32)
        row = Batch(ids[:, :-1], ids[:, 1:], np.ones_like(ids[:, 1:], np.bool_))
        total -= float(engine.log_probabilities(row).sum(dtype=np.float64))
        count += ids.size - 1
    assert metrics["tokens"] == count == sum(map(len, TEXTS)) == metrics["bytes"]
    assert metrics["words"] == len(TEXTS)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-6)
    assert metrics["token_perplexity"] == pytest.approx(math.exp(total / count))
    assert metrics["word_perplexity"] == pytest.approx(math.exp(total / len(TEXTS)))
    assert metrics["bits_per_byte"] == pytest.approx(total / count / math.log(2))
    assert [sample["prompt"] for sample in metrics["samples"]] == ["1+", "2"]
    assert json.loads((folder / "results.json").read_bytes())["loss"] == metrics["loss"]


def test_few_bits_are_asked_for_and_said(run_stage: RunStage, documents: Path, tmp_path: Path) -> None:
    pytest.importorskip("models.mlx_engine")
    model, _ = model_folder(tmp_path / "model", WIDE)
    losses: dict[int | None, float] = {}
    for bits in (None, 4, 8):
        folder, metrics = run_stage("perplexity", {"engine": "mlx", "bits": bits}, model=model, documents=documents)
        assert metrics.get("bits") == json.loads((folder / "results.json").read_bytes()).get("bits") == bits
        losses[bits] = metrics["loss"]
    assert len(set(losses.values())) == 3
    assert all(loss == pytest.approx(losses[None], rel=0.05) for loss in losses.values())
    with pytest.raises(UserError, match="engine 'torch' does not read weights of 4 bits"):
        run_stage("perplexity", {"engine": "torch", "bits": 4}, model=model, documents=documents)
    narrow, _ = model_folder(tmp_path / "narrow", ARCHITECTURES["llama"])
    with pytest.raises(UserError, match="no matrix whose width is a multiple of 32"):
        run_stage("perplexity", {"engine": "mlx", "bits": 4}, model=narrow, documents=documents)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "train"}, "no train split"),
        ({"window": 4096}, "exceeds the model's"),
        ({"prompts": ["1" * 200]}, "the model takes"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    run_stage: RunStage, documents: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    with pytest.raises(UserError, match=message):
        run_stage("perplexity", settings, model=model, documents=documents)


def test_a_split_of_empty_texts_has_no_perplexity(run_stage: RunStage, tmp_path: Path) -> None:
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    folder = tmp_path / "empty"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["", ""]}), folder / "test-00000.parquet")
    with pytest.raises(UserError, match="no text"):
        run_stage("perplexity", {}, model=model, documents=folder)


def test_a_model_that_says_nothing_finite_has_no_perplexity(
    run_stage: RunStage, documents: Path, tmp_path: Path
) -> None:
    model, config = model_folder(tmp_path / "model", ARCHITECTURES["llama"])
    arrays: dict[str, Array] = dict(random_weights(config))
    arrays["model.norm.weight"] = np.full_like(arrays["model.norm.weight"], np.nan)
    write_model(model, ModelFolder(config, arrays, None, None, ()))
    with pytest.raises(UserError, match="not finite: look at the losses"):
        run_stage("perplexity", {}, model=model, documents=documents)


def test_the_model_card_says_what_was_measured(run_stage: RunStage, documents: Path, tmp_path: Path) -> None:
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    settings = {"prompts": ["1+"], "sampling": {"max_new_tokens": 4}}
    evaluation, metrics = run_stage("perplexity", settings, model=model, documents=documents)
    folder, published = run_stage("publish", {"title": "Card"}, model=model, evaluation=evaluation)
    card = (folder / "README.md").read_text()
    assert f"{metrics['word_perplexity']:,.1f}" in card
    assert "> **1+**" in card
    assert published["bits_per_byte"] == metrics["bits_per_byte"]
