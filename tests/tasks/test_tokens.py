import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from artifacts.identity import describe_files
from common.errors import UserError
from models.training.shards import open_shard
from tests.tasks.conftest import RunStage

SOURCE = {"kind": "arithmetic", "train": 300, "validation": 20, "test": 20}
ROWS = [("12+30=", "42"), ("1+1=", "2"), ("999+1=", "1000")]


@pytest.fixture
def tokenizer(run_stage: RunStage) -> Path:
    return run_stage("tokenizer", {"kind": "characters"})[0]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    columns = {
        "prompt": [prompt for prompt, _ in ROWS],
        "target": [target for _, target in ROWS],
        "text": [f"<bos>{prompt}{target}<eos>" for prompt, target in ROWS],
    }
    pq.write_table(pa.table(columns), folder / "train-00000.parquet")
    return folder


def test_only_targets_and_the_closing_token_count(run_stage: RunStage, tokenizer: Path, documents: Path) -> None:
    folder, metrics = run_stage("tokens", {"loss_on": "target"}, documents=documents, tokenizer=tokenizer)
    shard = open_shard(folder / "train-00000.safetensors").map()
    assert shard.tokens_N.dtype == np.uint16
    assert shard.loss_mask_N is not None
    expected_tokens, expected_mask = [], []
    characters = ["<pad>", "<bos>", "<eos>", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "+", "-", "*", "/", "="]
    for prompt, target in ROWS:
        expected_tokens += [1, *(characters.index(character) for character in prompt + target), 2]
        expected_mask += [0] * (1 + len(prompt)) + [1] * (len(target) + 1)
    assert shard.tokens_N.tolist() == expected_tokens
    assert shard.loss_mask_N.astype(int).tolist() == expected_mask
    assert shard.document_ends_D.tolist() == [10, 17, 29]
    assert metrics["splits"]["train"]["counted_tokens"] == sum(expected_mask)
    assert json.loads((folder / "tokens.json").read_bytes())["splits"] == metrics["splits"]


def test_everything_counts_where_the_loss_is_on_the_text(run_stage: RunStage, tokenizer: Path, documents: Path) -> None:
    folder, metrics = run_stage("tokens", {}, documents=documents, tokenizer=tokenizer)
    assert open_shard(folder / "train-00000.safetensors").map().loss_mask_N is None
    assert metrics["splits"]["train"]["counted_tokens"] == metrics["splits"]["train"]["tokens"] == 29


def test_shards_hold_whole_documents_and_together_everything(run_stage: RunStage, tokenizer: Path) -> None:
    documents, _ = run_stage("documents", {"source": SOURCE})
    whole, _ = run_stage("tokens", {"loss_on": "target"}, documents=documents, tokenizer=tokenizer)
    parts, metrics = run_stage(
        "tokens", {"loss_on": "target", "shard_tokens": 500}, documents=documents, tokenizer=tokenizer
    )
    shards = [open_shard(path).map() for path in sorted(parts.glob("train-*.safetensors"))]
    assert len(shards) == metrics["splits"]["train"]["shards"] > 3
    one = open_shard(whole / "train-00000.safetensors").map()
    for name in ("tokens_N", "loss_mask_N"):
        assert np.concatenate([getattr(shard, name) for shard in shards]).tolist() == getattr(one, name).tolist()
    for shard in shards:
        assert len(shard.tokens_N) <= 500
        assert shard.document_ends_D[-1] == len(shard.tokens_N)
        assert shard.tokens_N[0] == 1
        assert shard.tokens_N[-1] == 2


def test_the_same_documents_give_the_same_bytes(run_stage: RunStage, tokenizer: Path, documents: Path) -> None:
    folders = [run_stage("tokens", {}, documents=documents, tokenizer=tokenizer)[0] for _ in range(2)]
    assert describe_files(folders[0]) == describe_files(folders[1])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["<bos>1+1=2<eos>"]}, "no column 'target'"),
        ({"text": ["<bos>1+1=2<eos>"], "target": ["3"]}, "does not end with its target"),
        ({"text": ["<bos>1+1=2<eos>"], "target": [""]}, "does not end with its target"),
        ({"text": ["<bos>1+x=2<eos>"], "target": ["2"]}, "does not know the character 'x'"),
    ],
)
def test_documents_that_do_not_fit_are_refused(
    run_stage: RunStage, tokenizer: Path, tmp_path: Path, columns: dict[str, list[str]], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "train-00000.parquet")
    with pytest.raises(UserError, match=message):
        run_stage("tokens", {"loss_on": "target"}, documents=tmp_path, tokenizer=tokenizer)
