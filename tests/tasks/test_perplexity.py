import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import StageInterrupted, UserError
from models.engine import inference_engine
from models.tokenizer import Tokenizer
from models.weights import Array, whole_pieces
from tasks.checkpoint import ModelFolder, write_model
from tasks.perplexity import STAGE, WIKITEXT_2, Config, resolved
from tasks.reporting.significance import difference
from tasks.scores import Score
from tests.tasks.conftest import RunStage, context_in
from tests.tasks.corpus.fake_hub import COMMITS, FakeHub
from tests.tasks.test_publish import ARCHITECTURES, WIDE, model_folder, random_weights
from tests.tasks.test_sliding_windows import one_pass_per_token, token_losses

TEXTS = ["12+30=42", "1+1=2", "999+1=1000", "7*8=5612+30=42"]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    pq.write_table(pa.table({"text": TEXTS[:2]}), folder / "test-00000.parquet")
    pq.write_table(pa.table({"text": TEXTS[2:]}), folder / "test-00001.parquet")
    return folder


def test_a_window_as_long_as_the_text_gives_the_plain_loss(
    run_stage: RunStage, documents: Path, tmp_path: Path
) -> None:
    model, config = model_folder(tmp_path / "model", ARCHITECTURES["llama"])
    tokenizer = Tokenizer(model / "tokenizer")
    settings = {"prompts": ["1+", "2"], "sampling": {"max_new_tokens": 4}, "batch_size": 2}
    folder, metrics = run_stage("perplexity", settings, model=model, documents=documents)
    engine = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    losses: list[float] = []
    count = 0
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        losses.append(float(token_losses(engine, ids).sum()))
        count += len(ids) - 1
    total = sum(losses)
    assert metrics["tokens"] == count == sum(map(len, TEXTS)) == metrics["bytes"]
    assert metrics["words"] == len(TEXTS)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-6)
    assert metrics["token_perplexity"] == pytest.approx(math.exp(total / count))
    assert metrics["word_perplexity"] == pytest.approx(math.exp(total / len(TEXTS)))
    assert metrics["bits_per_byte"] == pytest.approx(total / count / math.log(2))
    assert [sample["prompt"] for sample in metrics["samples"]] == ["1+", "2"]
    results = json.loads((folder / "results.json").read_bytes())
    assert results["loss"] == metrics["loss"]
    assert results["bos"] == "<bos>"
    assert results["documents"] == len(TEXTS)
    scores = [Score.model_validate({k: v for k, v in row.items() if k != "near_chance"}) for row in results["scores"]]
    assert {score.metric: score.value for score in scores} == {
        name: results[name] for name in ("loss", "token_perplexity", "word_perplexity", "bits_per_byte")
    }
    assert all(score.n == len(TEXTS) and score.standard_error for score in scores)
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == TEXTS
    assert [row["loss"] * row["tokens"] for row in rows] == pytest.approx(losses, rel=1e-6)


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
    with pytest.raises(UserError, match="the model 'broken' says of the next token is not finite: look at the losses"):
        run_stage("perplexity", {}, {"model": "broken"}, model=model, documents=documents)


def test_a_model_without_a_tokenizer_is_refused(run_stage: RunStage, documents: Path, tmp_path: Path) -> None:
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    shutil.rmtree(model / "tokenizer")
    with pytest.raises(UserError, match=r"^the model in .* has no tokenizer, and so reads no text; make it again$"):
        run_stage("perplexity", {}, model=model, documents=documents)


def test_long_documents_and_empty_ones_are_measured_together(run_stage: RunStage, tmp_path: Path) -> None:
    model, config = model_folder(tmp_path / "model", ARCHITECTURES["llama"])
    tokenizer = Tokenizer(model / "tokenizer")
    texts = ["", "1+" * 40 + "1=41", "", "1+1=2", " "]
    folder = tmp_path / "documents"
    folder.mkdir()
    pq.write_table(pa.table({"text": texts[:-1]}), folder / "test-00000.parquet")
    found, metrics = run_stage("perplexity", {"window": 8, "stride": 3}, model=model, documents=folder)
    rows = pq.read_table(found / "samples.parquet").to_pylist()
    assert [row["tokens"] for row in rows] == [84, 5]
    assert metrics["documents"] == 2
    engine = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    for text, row in zip(texts[1:4:2], rows, strict=True):
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        assert row["loss"] == pytest.approx(one_pass_per_token(engine, ids, 8, 3).mean(), rel=1e-5)


def wikitext(hub: Path, rows: list[str]) -> None:
    folder = hub / WIKITEXT_2.id / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    files = [{"split": split, "path": f"wikitext-2-raw-v1/{split}-*"} for split in ("train", "validation", "test")]
    described = {"configs": [{"config_name": "wikitext-2-raw-v1", "data_files": files}]}
    (folder.parent / "README.md").write_text(f"---\n{json.dumps(described)}\n---\n")
    for split in ("train", "validation", "test"):
        path = folder / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.table({"text": rows if split == "test" else ["9=9"]}), path)


def read_instead(keys: dict[str, Any]) -> Config:
    """The config of a recipe's stage that names no documents."""
    config = STAGE.config.model_validate(STAGE.with_defaults({"engine": "torch", **keys}, ["model"]))
    assert isinstance(config, Config)
    return resolved(config)


def test_without_documents_wikitext_is_read_as_one_document(
    run_stage: RunStage, empty_hub: Path, tmp_path: Path
) -> None:
    wikitext(empty_hub, ["1+1=2", "", "12+30=42\n"])
    # The vocabulary of arithmetic has no line breaks.
    tokenizer, _ = run_stage("tokenizer", {"vocabulary": {"kind": "bytes"}})
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["llama"], tokenizer)
    config = read_instead({})
    assert config.data is not None
    assert config.data.digest is not None
    folder, metrics = run_stage("perplexity", config.model_dump(mode="json"), model=model)
    (row,) = pq.read_table(folder / "samples.parquet").to_pylist()
    assert row["prompt"] == "1+1=2\n\n12+30=42\n"
    assert metrics["data"] == {"Salesforce/wikitext": config.data.digest}
    assert metrics["split"] == "test"
    assert [(score["standard_error"], score["n"]) for score in metrics["scores"]] == [(None, 1)] * 4
    card = (run_stage("publish", {"title": "Card"}, model=model, evaluation=folder)[0] / "README.md").read_text()
    assert f"test split of `Salesforce/wikitext` ({config.data.digest[:12]}), 16 tokens" in card
    other = empty_hub / WIKITEXT_2.id / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"
    pq.write_table(pa.table({"text": ["1=1"]}), other)
    assert read_instead({}).data != config.data
    with pytest.raises(UserError, match="is not what its digest"):
        run_stage("perplexity", config.model_dump(mode="json"), model=model)


def test_a_single_long_document_has_errors_and_a_worse_model_is_found(
    run_stage: RunStage, empty_hub: Path, tmp_path: Path
) -> None:
    wikitext(empty_hub, [f"{first} + {second} = {first + second}\n" for first in range(40) for second in range(40)])
    tokenizer, _ = run_stage("tokenizer", {"vocabulary": {"kind": "bytes"}})
    model, config = model_folder(tmp_path / "model", ARCHITECTURES["llama"], tokenizer)
    arrays: dict[str, Array] = dict(random_weights(config))
    arrays["model.norm.weight"] = 3 * arrays["model.norm.weight"]
    worse = tmp_path / "worse"
    shutil.copytree(model, worse)
    write_model(worse, ModelFolder(config, arrays, None, None, ()))
    read = read_instead({}).model_dump(mode="json") | {"batch_size": 64}
    (better, metrics), (fallen, _) = (run_stage("perplexity", read, model=one) for one in (model, worse))
    assert (metrics["documents"], metrics["blocks"]) == (1, 5)
    assert all(score["standard_error"] and score["n"] == 5 for score in metrics["scores"])
    rows = pq.read_table(better / "samples.parquet").to_pylist()
    assert sum(row["loss"] * row["tokens"] for row in rows) == pytest.approx(metrics["loss"] * metrics["tokens"])
    score = next(Score.of(row) for row in metrics["scores"] if row["metric"] == "bits_per_byte")
    found = difference(fallen, better, score)
    assert found is not None
    assert found.is_fall()


def test_the_default_names_its_commit_and_is_not_looked_for_before_it_is_read(empty_hub: Path) -> None:
    assert read_instead({}).data == WIKITEXT_2
    with pytest.raises(UserError, match="dataset 'owner/texts' was not found"):
        read_instead({"data": {"kind": "hub", "id": "owner/texts"}})


def test_the_newest_commit_on_the_network_is_made_fast(tmp_path: Path) -> None:
    data = tmp_path / COMMITS[-1] / "owner" / "texts" / "train.parquet"
    data.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["1+1=2"]}), data)
    code = (
        "from tasks.perplexity import Config, HubSource, resolved\n"
        "print(resolved(Config(data=HubSource(kind='hub', id='owner/texts'))).data.revision)"
    )
    kept = {name: value for name, value in os.environ.items() if name != "CAIRN_HUB"}
    # In a process of its own: the libraries look for the hub's address once.
    with FakeHub(tmp_path).served() as network:
        environment = {**kept, "HF_ENDPOINT": network.url, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
    assert done.stdout.strip() == COMMITS[-1], done.stderr


def test_either_documents_or_a_data_set_is_read(run_stage: RunStage, documents: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"data": WIKITEXT_2}
    with pytest.raises(UserError, match="data: it is read where there are no documents; leave one of them out"):
        STAGE.with_defaults(keys, ["model", "documents"])
    assert "data" not in STAGE.with_defaults({}, ["model", "documents"])
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    for config, inputs in (({}, {}), ({"data": WIKITEXT_2.model_dump()}, {"documents": documents})):
        with pytest.raises(UserError, match="either on documents or on data"):
            run_stage("perplexity", config, model=model, **inputs)


def test_a_stop_ends_it_between_batches(documents: Path, tmp_path: Path) -> None:
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    asked = iter([False, True])
    context = replace(context_in(tmp_path / "run", "perplexity"), should_stop=lambda: next(asked))
    with pytest.raises(StageInterrupted):
        STAGE.run(Config(batch_size=1), {"model": model, "documents": documents}, context)
    assert next(asked, None) is None


def test_the_model_card_says_what_was_measured(run_stage: RunStage, documents: Path, tmp_path: Path) -> None:
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    settings = {"prompts": ["1+"], "sampling": {"max_new_tokens": 4}}
    evaluation, metrics = run_stage("perplexity", settings, model=model, documents=documents)
    folder, published = run_stage("publish", {"title": "Card"}, model=model, evaluation=evaluation)
    card = (folder / "README.md").read_text()
    assert f"{metrics['word_perplexity']:,.1f}" in card
    assert "> **1+**" in card
    assert published["bits_per_byte"] == metrics["bits_per_byte"]
