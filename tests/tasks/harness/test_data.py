import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, HfFileSystem

from common.errors import UserError
from tasks.harness.catalogue import definition, task_path
from tasks.harness.data import check_unchanged, data_sets, identities, offline_first

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_rows(folder: Path, rows: int = 3) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "default").mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": [f"row {number}" for number in range(rows)]})
    pq.write_table(table, folder / "default" / "test-00000-of-00001.parquet")


def write_lines(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"text": "one"}\n{"text": "two"}\n')


def load(data: dict[str, str], cache: Path, *arguments: Any, **options: Any) -> Any:
    """What `datasets` loads within the block."""
    import datasets

    with offline_first(data, cache):
        return datasets.load_dataset(*arguments, **options)


def named(**described: Any) -> dict[str, str | None]:
    return data_sets(described, Path())


def test_what_a_definition_names() -> None:
    assert named(dataset_path="allenai/ai2_arc") == {"allenai/ai2_arc": None}
    assert named(dataset_path="orange_sum") == {"orange_sum": None}
    assert named(dataset_path="a/b", dataset_kwargs={"revision": "refs/convert/parquet"}) == {
        "a/b": "refs/convert/parquet"
    }
    for one in ("x.json", ["x.json"], {"test": "/home/x.json"}):
        assert named(dataset_path="json", dataset_kwargs={"data_files": one}) == {}
    assert named(custom_dataset="utils.load", dataset_path="") == {}


def test_data_sets_that_files_are_of() -> None:
    def files(*files: str) -> dict[str, str | None]:
        return named(dataset_path="csv", dataset_kwargs={"data_files": {"train": list(files)}})

    assert files("hf://datasets/a/b/train.csv", "hf://datasets/c/d@v1/data/x.csv") == {"a/b": None, "c/d": "v1"}
    assert files("hf://datasets/a/b@refs/pr/5/x.csv") == {"a/b": "refs/pr/5"}
    assert files("zip://x.csv::https://huggingface.co/datasets/a/b/resolve/main/x.zip") == {"a/b": None}


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("arithmetic_2da", ["EleutherAI/arithmetic"]),
        ("squadv2", ["lighteval/squad_v2"]),
        ("scrolls_quality", ["tau/scrolls"]),
        ("ag_news", []),
    ],
)
def test_what_lm_evals_own_tasks_name(task: str, expected: list[str]) -> None:
    path = task_path(task)
    assert list(data_sets(definition(path), path.parent)) == expected


def test_a_module_is_read_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        "class Base:\n    DATASET_PATH = 'a/b'\nclass Task(Base):\n    pass\nclass Own(Base):\n    DATASET_PATH = f()\n"
        "class Loop(Loop):\n    pass\nraise SystemExit"
    )
    assert data_sets({"class": "task.Task"}, tmp_path) == {"a/b": None}
    for other in ("task.Own", "task.Loop", "task.Other", "other.Task", "Task"):
        assert data_sets({"class": other}, tmp_path) == {}


def test_a_local_copy_is_read_and_told_by_its_digest(empty_hub: Path, tmp_path: Path) -> None:
    write_rows(empty_hub / "some" / "rows")
    found = identities({"some/rows": None})
    loaded = load(found, tmp_path, "some/rows", "default", split="test", trust_remote_code=False, revision="main")
    assert loaded["text"] == ["row 0", "row 1", "row 2"]
    check_unchanged(found)
    write_rows(empty_hub / "some" / "rows", 4)
    assert identities({"some/rows": None}) != found
    with pytest.raises(UserError, match="data set 'some/rows' below CAIRN_HUB is not what it was"):
        check_unchanged(found)


def test_a_local_copy_is_not_what_a_commit_is(empty_hub: Path) -> None:
    check_unchanged({"some/rows": COMMIT})
    write_rows(empty_hub / "some" / "rows")
    with pytest.raises(UserError, match="data set 'some/rows' below CAIRN_HUB is not what it was"):
        check_unchanged({"some/rows": COMMIT})


@pytest.mark.parametrize(
    "file", ["hf://datasets/some/rows/data/x.jsonl", "hf://datasets/some/rows@main/data/../data/x.jsonl"]
)
def test_files_on_the_hub_are_read_from_the_local_copy(empty_hub: Path, tmp_path: Path, file: str) -> None:
    write_lines(empty_hub / "some" / "rows" / "data" / "x.jsonl")
    for files in ({"test": file}, {"test": [file]}):
        assert load({}, tmp_path, "json", data_files=files)["test"]["text"] == ["one", "two"]


def test_files_inside_an_archive_are_read_from_the_local_copy(
    empty_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `datasets` takes an archive's address for one on the network wherever it is.
    for settings in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{settings}.HF_HUB_OFFLINE", False)
    write_lines(tmp_path / "x.jsonl")
    (empty_hub / "some" / "rows").mkdir(parents=True)
    with zipfile.ZipFile(empty_hub / "some" / "rows" / "part.zip", "w") as archive:
        archive.write(tmp_path / "x.jsonl", "part/x.jsonl")
    url = "zip://part/x.jsonl::https://huggingface.co/datasets/some/rows/resolve/main/part.zip"
    assert load({}, tmp_path, "json", data_files={"train": url})["train"]["text"] == ["one", "two"]


def test_files_that_lead_out_of_the_folder_are_refused(empty_hub: Path, tmp_path: Path) -> None:
    write_lines(empty_hub / "some" / "other" / "x.jsonl")
    (empty_hub / "some" / "rows").mkdir()
    for file, message in {
        "hf://datasets/some/rows/../other/x.jsonl": "leads out of the data set 'some/rows'",
        f"hf://datasets/some/rows/{empty_hub}/some/other/x.jsonl": "leads out of the data set 'some/rows'",
        "hf://datasets/../some/other/x.jsonl": "is no id of a dataset",
    }.items():
        with pytest.raises(UserError, match=message):
            load({}, tmp_path, "json", data_files=file)


def test_what_is_not_here_is_asked_for_at_its_commit(
    empty_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network answers; what would have been asked is seen."""
    asked: list[tuple[str, str]] = []

    def resolve(self: HfFileSystem, path: str, revision: str | None = None) -> Any:
        asked.append((path, str(revision)))
        raise ConnectionError("no network")

    monkeypatch.setattr(HfFileSystem, "resolve_path", resolve)
    with pytest.raises(UserError, match=r"dataset 'some/rows' was not found: not below CAIRN_HUB=.*no network"):
        load({"some/rows": COMMIT}, tmp_path, "json", data_files="hf://datasets/some/rows/data/x.jsonl")
    assert f"datasets/some/rows@{COMMIT}/data/x.jsonl" in asked[0][0]


def test_a_commit_is_that_of_the_revision_that_a_task_asks_for(
    empty_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(self: HfApi, repo_id: str, *, revision: str | None) -> Any:
        if revision is None:
            raise TypeError("a defect")
        return SimpleNamespace(sha=f"{repo_id} at {revision}")

    monkeypatch.setattr(HfApi, "dataset_info", info)
    assert identities({"some/rows": "refs/convert/parquet"}) == {"some/rows": "some/rows at refs/convert/parquet"}
    with pytest.raises(TypeError, match="a defect"):
        identities({"some/rows": None})


def test_what_is_nowhere_is_told(empty_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dataset 'some/rows' was not found: not below CAIRN_HUB="):
        identities({"some/rows": None})
    for asked in (
        {"path": "some/rows"},
        {"path": "json", "data_files": "hf://datasets/some/rows/x.jsonl"},
        {"path": "json", "data_files": "zip://x::https://huggingface.co/datasets/some/rows/resolve/main/x.zip"},
    ):
        with pytest.raises(UserError, match=r"dataset 'some/rows' was not found: not below CAIRN_HUB=.* answered: "):
            load({}, tmp_path, **asked)
    with pytest.raises(UserError, match=r"data set '/nowhere/x.csv' cannot be read: .*/nowhere/x.csv"):
        load({}, tmp_path, "csv", data_files={"train": "/nowhere/x.csv"})


def test_what_code_asks_the_network_for_by_itself_is_told(tmp_path: Path) -> None:
    import httpx

    message = "^what lm-eval's code asks for cannot be had: .* missing an 'http"
    with pytest.raises(UserError, match=message), offline_first({}, tmp_path):
        httpx.get("nowhere")


def test_what_a_local_copy_has_not_is_told(empty_hub: Path, tmp_path: Path) -> None:
    write_rows(empty_hub / "some" / "rows")
    for more in ({"name": "other"}, {"split": "train"}, {"data_files": "other.parquet"}):
        with pytest.raises(UserError, match=f"data set 'some/rows' cannot be read from {empty_hub}/some/rows: "):
            load({}, tmp_path, "some/rows", **more)
    (empty_hub / "some" / "rows" / "x.jsonl").write_text('{"text": "one"\n')
    with pytest.raises(UserError, match=r"data set 'some/rows' cannot be read from .*: JSON parse error"):
        load({}, tmp_path, "json", data_files="hf://datasets/some/rows/x.jsonl")


@pytest.mark.parametrize("kind", [TypeError, AttributeError, ValueError, KeyError])
def test_a_defect_keeps_its_traceback(empty_hub: Path, tmp_path: Path, kind: type[Exception]) -> None:
    import datasets

    write_rows(empty_hub / "some" / "rows")

    def process(row: Any) -> Any:
        raise kind("in the task's own code")

    with pytest.raises(kind, match="own code"), offline_first({}, tmp_path):
        datasets.load_dataset("some/rows", split="test").map(process)


def test_what_leads_out_of_the_folder_is_no_id(empty_hub: Path) -> None:
    with pytest.raises(UserError, match="is no id of a dataset"):
        identities({"../rows": None})


def test_modules_that_keep_their_own_name_of_it_are_served_too(empty_hub: Path, tmp_path: Path) -> None:
    """Some of lm-eval's say `from datasets import load_dataset`, and are imported once."""
    from datasets import load_dataset

    write_rows(empty_hub / "some" / "rows")
    for number in range(2):
        with offline_first({}, tmp_path / str(number)) as asked:
            assert len(load_dataset("some/rows", split="test")) == 3
        assert asked == ["some/rows"]
        assert list((tmp_path / str(number)).rglob("*.arrow"))


def test_afterwards_everything_is_as_it_was(empty_hub: Path, tmp_path: Path) -> None:
    import datasets

    before = datasets.load.load_dataset_builder
    with pytest.raises(RuntimeError, match="in between"), offline_first({}, tmp_path):
        raise RuntimeError("in between")
    assert datasets.load.load_dataset_builder is before
