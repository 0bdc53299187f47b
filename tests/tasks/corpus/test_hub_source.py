"""Data sets of the hub as a source: below CAIRN_HUB, and from a server that answers as the hub does."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from tasks.corpus.hub_source import HubSource
from tasks.corpus.sources import FileStart, Rows
from tests.tasks.corpus.conftest import Told, json_lines, parquet_bytes, texts, write
from tests.tasks.corpus.fake_hub import COMMITS, FakeHub

ROOT = Path(__file__).parents[3]


def source(hub_id: str, **keys: Any) -> HubSource:
    return HubSource.model_validate({"kind": "hub", "id": hub_id, **keys})


def parts(hub: HubSource, told: Told | None = None) -> list[Rows | FileStart]:
    return list(hub.open(told or Told()).parts)


def rows(hub: HubSource, told: Told | None = None) -> list[tuple[str | None, str]]:
    return [(part.split, text) for part in parts(hub, told) if isinstance(part, Rows) for text in texts([part.table])]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CAIRN_HUB with data sets of some formats."""
    folder = tmp_path / "hub"
    two = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*.parquet\n" for name in ("x", "y")
    )
    write(folder, "some/two/README.md", (two + "---\n").encode())
    for name in ("x", "y"):
        for number in range(2):
            columns = {"text": [f"{name}{number}a", f"{name}{number}b"], "score": [1, 2]}
            write(folder, f"some/two/{name}/{number}.parquet", parquet_bytes(columns))
    for split in ("train", "validation", "dev2"):
        write(folder, f"some/lines/data/{split}-0.jsonl.zst", json_lines([{"body": f"{split} text", "n": 1}]))
    write(folder, "some/lines/README.md", _splits("train", "validation", "dev2").encode())
    write(folder, "some/csv/train.csv", b"text,score\none,1\ntwo,2\n")
    wiki = {"text": ["", " = Title = \n", "A line .", ""]}
    write(folder, "some/wiki/test-0.parquet", parquet_bytes(wiki))
    monkeypatch.setenv("CAIRN_HUB", str(folder))
    return folder


def _splits(*names: str) -> str:
    files = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in names)
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"


def test_a_configuration_is_read_file_by_file(hub: Path) -> None:
    assert rows(source("some/two", config="y")) == [("train", text) for text in ("y0a", "y0b", "y1a", "y1b")]
    found = parts(source("some/two", config="y"))
    assert [part.number for part in found if isinstance(part, FileStart)] == [0, 1]


def test_splits_are_read_in_order_and_keep_their_names_where_they_have_the_usual_ones(hub: Path) -> None:
    wanted = source("some/lines", split=["validation", "dev2", "train"], column="body")
    assert rows(wanted) == [("validation", "validation text"), (None, "dev2 text"), ("train", "train text")]


def test_other_columns_come_along(hub: Path) -> None:
    (_, first, _, _) = parts(source("some/two", config="x"), Told("score"))
    assert isinstance(first, Rows)
    assert first.table.to_pylist() == [{"text": "x0a", "score": 1}, {"text": "x0b", "score": 2}]


def test_formats_that_are_not_read_here_are_streamed(hub: Path) -> None:
    (start, streamed) = parts(source("some/csv"), Told("score"))
    assert start == FileStart(0)
    assert isinstance(streamed, Rows)
    assert streamed.table.to_pylist() == [{"text": "one", "score": 1}, {"text": "two", "score": 2}]
    with pytest.raises(UserError, match="some/csv train has no column 'txt'; did you mean 'text'"):
        parts(source("some/csv", column="txt"))


def test_rows_that_are_lines_are_joined_to_a_document(hub: Path) -> None:
    joined = source("some/wiki", split="test", rows="lines")
    assert rows(joined) == [("test", "\n = Title = \nA line .\n\n")]
    with pytest.raises(UserError, match="rows that are joined keep no column 'score'"):
        parts(joined, Told("score"))


def test_lines_of_a_split_that_is_too_long_for_a_document_are_refused(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.corpus.hub_source.DOCUMENT_LIMIT_BYTES", 10)
    with pytest.raises(UserError, match="the split 'test' is too long to be one document"):
        parts(source("some/wiki", split="test", rows="lines"))


def test_reading_begins_at_the_file_that_is_wanted(hub: Path) -> None:
    told = Told()
    told.first_file = 1
    assert rows(source("some/two", config="x"), told) == [("train", "x1a"), ("train", "x1b")]
    told = Told()
    told.first_file = 2
    assert rows(source("some/lines", split=["train", "validation", "dev2"], column="body"), told) == [
        (None, "dev2 text")
    ]


def test_a_bad_row_is_told_with_its_file_inside_the_data_set(hub: Path) -> None:
    write(hub, "some/lines/data/train-0.jsonl.zst", b'{"body": "a"}\n{"body": 5}\n')
    with pytest.raises(UserError, match=r"^some/lines/data/train-0\.jsonl\.zst line 2: 'body' is no string"):
        parts(source("some/lines", column="body"))
    write(hub, "some/two/x/0.parquet", b"")
    with pytest.raises(UserError, match=r"^data set 'some/two' cannot be read|^some/two/x/0\.parquet"):
        parts(source("some/two", config="x"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"id": "some/two"}, "data set 'some/two' cannot be read from .*some/two: Config name is missing"),
        ({"id": "some/two", "config": "z"}, r"BuilderConfig 'z' not found\. Available: \['x', 'y'\]"),
        ({"id": "some/csv", "split": "tran"}, "data set 'some/csv' has no split 'tran'; did you mean 'train'?"),
        ({"id": "some/lines"}, r"some/lines/data/train-0\.jsonl\.zst line 1: the row has no column 'text'"),
        ({"id": "../csv"}, "is no id of a dataset"),
    ],
)
def test_what_does_not_exist_is_named(keys: dict[str, Any], message: str, hub: Path) -> None:
    with pytest.raises(UserError, match=message):
        parts(source(keys.pop("id"), **keys))


def test_the_digest_is_that_of_the_folder_wherever_it_is(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = source("some/two", config="x").resolved()
    assert resolved.digest is not None
    monkeypatch.setenv("CAIRN_HUB", str(shutil.copytree(hub, tmp_path / "other")))
    assert resolved.resolved() == resolved
    write(tmp_path, "other/some/two/x/1.parquet", parquet_bytes({"text": ["new"], "score": [3]}))
    with pytest.raises(UserError, match=r"data set 'some/two' in .*other/some/two is not what its digest"):
        resolved.resolved()


def test_a_data_set_that_has_to_be_obtained_is_asked_for_when_the_recipe_is_loaded(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = source("owner/private", obtain="Ask owner@example.org for it.")
    with pytest.raises(
        UserError, match=rf"'owner/private' is not below CAIRN_HUB={hub}\. Ask owner@example\.org for it"
    ):
        wanted.resolved()
    resolved = source("some/csv").resolved()
    # The text is no part of what the documents are known by.
    assert source("some/csv", obtain="Ask.").resolved() == resolved
    monkeypatch.delenv("CAIRN_HUB")
    with pytest.raises(UserError, match=r"'owner/private' is not here: CAIRN_HUB is not set\. Ask owner@example\.org"):
        wanted.resolved()
    with pytest.raises(UserError, match=r"'some/csv' is not here: CAIRN_HUB is not set\. Its digest is that of a copy"):
        resolved.resolved()
    assert source("owner/public").resolved().digest is None


@pytest.mark.parametrize("corpus", ["local/openstax-textbooks", "local/standard-ebooks"])
def test_real_corpora_are_read_whole(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.environ.get("CAIRN_HUB")
    if folder is None:
        pytest.skip("CAIRN_HUB is not set: the corpora are not here")
    expected = pq.read_table(Path(folder, corpus, "default", "validation-00000-of-00001.parquet"))["text"].to_pylist()
    assert rows(source(corpus, split="validation").resolved()) == [("validation", text) for text in expected]


# From the network.

CLIENT = """
import json, sys
from pathlib import Path
from tasks.corpus.hub_source import HubSource
from tasks.corpus.sources import Reading, Rows
from common.errors import UserError

config, previous, first_file = json.loads(sys.argv[1])
said = []
reading = Reading(folder=Path(sys.argv[2]), previous=previous, first_file=first_file, tell=said.append)
try:
    opened = HubSource(**config).resolved().open(reading)
    texts = [text for part in opened.parts if isinstance(part, Rows) for text in part.table["text"].to_pylist()]
    print(json.dumps({"description": dict(opened.description), "texts": texts, "said": said}))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub on the network whose data set has two commits of two files."""
    for number, commit in enumerate(COMMITS):
        repo = tmp_path / "network" / commit / "some"
        for file in range(2):
            columns = {"text": [f"commit {number} file {file} row {row} " + "x" * 3000 for row in range(200)]}
            data = parquet_bytes(columns, row_group_size=50, compression="none")
            write(repo, f"parquet/data/train-{file}.parquet", data)
        write(repo, "csv/train.csv", b"text,score\none,1\ntwo,2\n")
    with FakeHub(tmp_path / "network").served() as served:
        yield served


def ask(
    network: FakeHub,
    folder: Path,
    config: dict[str, Any],
    previous: dict[str, Any] | None = None,
    first_file: int = 0,
    **environment: str,
) -> dict[str, Any]:
    """Reads a source in a process of its own: the libraries look for the hub's address once."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps([{"kind": "hub", **config}, previous, first_file]), str(folder)],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if name != "CAIRN_HUB"},
            "HF_ENDPOINT": network.url,
            "HF_HOME": str(folder / "home"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_newest_commit_is_read_from_the_network_and_recorded(network: FakeHub, tmp_path: Path) -> None:
    found = ask(network, tmp_path, {"id": "some/parquet"})
    assert found["description"]["revision"] == COMMITS[1]
    assert [text.partition(" x")[0] for text in found["texts"]] == [
        f"commit 1 file {file} row {row}" for file in range(2) for row in range(200)
    ]
    assert found["said"] == [
        f"some/parquet is read at its commit of now; to read the same for ever: revision: {COMMITS[1]}"
    ]


def test_a_pinned_commit_is_read_and_so_is_the_one_of_an_earlier_start(network: FakeHub, tmp_path: Path) -> None:
    pinned = ask(network, tmp_path, {"id": "some/parquet", "revision": COMMITS[0]})
    assert pinned["description"]["revision"] == COMMITS[0]
    assert pinned["texts"][0].startswith("commit 0 file 0 row 0")
    assert pinned["said"] == []
    network.asked.clear()
    later = ask(network, tmp_path, {"id": "some/parquet"}, previous=pinned["description"], first_file=1)
    assert later["texts"] == pinned["texts"][200:]
    # What is done with is not fetched again.
    assert not [line for line in network.asked if "train-0.parquet" in line and "bytes=" in line]


def test_other_formats_are_streamed_from_the_network(network: FakeHub, tmp_path: Path) -> None:
    assert ask(network, tmp_path, {"id": "some/csv"})["texts"] == ["one", "two"]


def test_what_is_in_neither_place_is_told_with_both(network: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    error = ask(network, tmp_path, {"id": "some/where"}, CAIRN_HUB=str(tmp_path / "hub"))["error"]
    assert f"'some/where' was not found: not below CAIRN_HUB={tmp_path}/hub" in error
    assert "404" in error
    assert "CAIRN_HUB is not set" in ask(network, tmp_path, {"id": "some/where"})["error"]
    # The folder comes before the network.
    write(tmp_path, "hub/some/csv/train.csv", b"text\nlocal\n")
    network.asked.clear()
    found = ask(network, tmp_path, {"id": "some/csv"}, CAIRN_HUB=str(tmp_path / "hub"))
    assert found["texts"] == ["local"]
    assert not [line for line in network.asked if "some/csv" in line]
