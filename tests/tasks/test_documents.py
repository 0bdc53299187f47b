import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from artifacts.identity import describe_files
from common.errors import UserError
from flows.recipe import load_recipe
from tests.tasks.conftest import RunStage

SOURCE = {"kind": "arithmetic", "train": 200, "validation": 20, "test": 20}


def test_rows_are_written_by_split(run_stage: RunStage) -> None:
    folder, metrics = run_stage("documents", {"source": SOURCE})
    described = json.loads((folder / "documents.json").read_bytes())
    assert {split: counts["documents"] for split, counts in described["splits"].items()} == {
        "train": 200,
        "validation": 20,
        "test": 20,
    }
    table = pq.read_table(folder / "train-00000.parquet")
    assert table.column_names == ["text", "prompt", "target"]
    assert table.num_rows == 200
    size = sum(len(text.encode()) for text in table["text"].to_pylist())
    shard = {"name": "train-00000.parquet", "documents": 200, "bytes": size}
    assert described["splits"]["train"] == {"documents": 200, "bytes": size, "shards": [shard]}
    assert described["source"] == {"name": "arithmetic", "kind": "arithmetic"}
    assert metrics["splits"]["train"] == {"documents": 200, "bytes": size, "shards": 1}


def test_the_same_config_gives_the_same_bytes(run_stage: RunStage) -> None:
    folders = [run_stage("documents", {"source": SOURCE})[0] for _ in range(2)]
    assert describe_files(folders[0]) == describe_files(folders[1])


def test_a_recipe_whose_files_are_missing_or_have_changed_is_known_as_such_when_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "description: Documents alone.\n"
        f"stages: {{books: {{stage: documents, source: {{kind: files, path: {tmp_path}/books.jsonl}}}}}}\n"
    )
    with pytest.raises(UserError, match=r"recipe\.yaml: stages\.books: there is no file or folder .*books\.jsonl"):
        load_recipe(str(tmp_path / "recipe.yaml"))
    digests = set()
    for text in ("one", "two"):
        (tmp_path / "books.jsonl").write_text(json.dumps({"text": text}) + "\n")
        (entry,) = load_recipe(str(tmp_path / "recipe.yaml")).stages
        digests.add(entry.config.model_dump()["source"]["digest"])
    assert len(digests - {None}) == 2
