import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from models.engine import Bits, inference_engine
from models.generation import generate
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer
from models.weights import whole_pieces
from tasks.evaluate import summarise
from tests.tasks.conftest import RunStage
from tests.tasks.test_publish import ARCHITECTURES, WIDE, model_folder, random_weights


def test_every_row_of_the_split_is_scored_by_tokens(run_stage: RunStage, tmp_path: Path) -> None:
    model, config = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    source = {"kind": "arithmetic", "train": 20, "validation": 10, "test": 200}
    documents, _ = run_stage("documents", {"source": source})
    settings = {"max_new_tokens": 5, "batch_size": 64, "shown_samples": 3}
    folder, _ = run_stage("evaluate", settings, model=model, documents=documents)
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    prompts = [sample["prompt"] for sample in samples]
    assert prompts == pq.read_table(documents / "test-00000.parquet")["prompt"].to_pylist()
    # What the model says is taken as the truth now: then it is right wherever it ended without a special token before.
    truth = tmp_path / "truth"
    truth.mkdir()
    columns = {"prompt": prompts, "target": [sample["prediction"] for sample in samples]}
    pq.write_table(pa.table(columns), truth / "test-00000.parquet")
    _, measured = run_stage("evaluate", settings, model=model, documents=truth)
    engine = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    tokenizer = Tokenizer(model / "tokenizer")
    encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    answers = generate(engine, encoded, SamplingConfig(max_new_tokens=5), [tokenizer.eos_id])
    ended = [answer[-1] == tokenizer.eos_id and min(answer[:-1], default=3) > 2 for answer in answers]
    assert 0 < sum(ended) < 200
    assert measured["n"] == 200
    assert measured["exact_match"] == sum(ended) / 200
    assert len(measured["samples"]) == 3


def test_few_bits_are_asked_for_and_said(run_stage: RunStage, tmp_path: Path) -> None:
    pytest.importorskip("models.mlx_engine")
    model, config = model_folder(tmp_path / "model", WIDE)
    source = {"kind": "arithmetic", "train": 20, "validation": 10, "test": 50}
    documents, _ = run_stage("documents", {"source": source})
    tokenizer = Tokenizer(model / "tokenizer")
    predictions: dict[Bits | None, list[str]] = {}
    every: tuple[Bits | None, ...] = (None, 4, 8)
    for bits in every:
        settings = {"engine": "mlx", "bits": bits, "max_new_tokens": 5, "shown_samples": 50}
        folder, metrics = run_stage("evaluate", settings, model=model, documents=documents)
        written = json.loads((folder / "results.json").read_bytes())
        assert metrics.get("bits") == written.get("bits") == bits
        predictions[bits] = [sample["prediction"] for sample in metrics["samples"]]
        pieces = whole_pieces(random_weights(config))
        engine = inference_engine("mlx", config, "float32", pieces, bits=bits)
        encoded = [[tokenizer.bos_id, *tokenizer.encode(sample["prompt"])] for sample in metrics["samples"]]
        answers = generate(engine, encoded, SamplingConfig(max_new_tokens=5), [tokenizer.eos_id])
        expected = [tokenizer.decode_after(ids, answer) for ids, answer in zip(encoded, answers, strict=True)]
        assert predictions[bits] == expected
    assert predictions[4] != predictions[None]


def test_the_summary_by_length() -> None:
    summary = summarise(["1", "2", "10", "20"], [True, False, True, True])
    assert summary["exact_match"] == 0.75
    assert summary["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert summary["by_answer_length"] == [
        {"length": 1, "n": 2, "exact_match": 0.5},
        {"length": 2, "n": 2, "exact_match": 1.0},
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"text": ["1"]}, "no column"), (None, "no test split")],
)
def test_documents_without_problems_are_refused(
    run_stage: RunStage, tmp_path: Path, columns: dict[str, list[str]] | None, message: str
) -> None:
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    folder = tmp_path / "documents"
    folder.mkdir()
    if columns:
        pq.write_table(pa.table(columns), folder / "test-00000.parquet")
    with pytest.raises(UserError, match=message):
        run_stage("evaluate", {}, model=model, documents=folder)
