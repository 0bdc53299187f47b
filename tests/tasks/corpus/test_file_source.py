"""Local files as a source."""

import os
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from tasks.corpus.file_source import FilesSource
from tasks.corpus.sources import FileStart, Rows
from tests.tasks.corpus.conftest import Told, json_lines, parquet_bytes, texts, write


def source(*paths: Path | str, **keys: Any) -> FilesSource:
    return FilesSource.model_validate({"kind": "files", "path": [str(path) for path in paths], **keys})


def read(files: FilesSource, told: Told | None = None) -> list[str]:
    return texts(part.table for part in files.open(told or Told()).parts if isinstance(part, Rows))


def lines(*texts: str) -> bytes:
    return json_lines({"text": text} for text in texts)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name, text in [("b/1.jsonl", "2"), ("a.jsonl.gz", "1"), ("b/2.json.zst", "3"), ("c.ndjson", "4")]:
        write(folder, name, lines(text))
    # What is no data, as a downloader and an operating system leave it.
    for name in ("README", "b/table.csv", ".a.jsonl", "_b/1.jsonl", ".cache/1.jsonl"):
        write(folder, name, b"no data")
    assert read(source(folder)) == ["1", "2", "3", "4"]
    assert list(source(folder).files()) == [
        str(folder / name) for name in ("a.jsonl.gz", "b/1.jsonl", "b/2.json.zst", "c.ndjson")
    ]


def test_paths_are_read_in_the_order_in_which_they_are_named_and_each_file_once(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path, f"{name}.jsonl", lines(name))
    assert read(source(tmp_path / "c.jsonl", tmp_path)) == ["c", "a", "b"]
    assert read(source(tmp_path / "[ac].jsonl", tmp_path / "b.jsonl")) == ["a", "c", "b"]


def test_a_pattern_is_followed_into_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/a.jsonl", "x/y/b.jsonl", "c.jsonl", "x/d.txt"):
        write(tmp_path, name, lines(name))
    monkeypatch.chdir(tmp_path)
    assert list(source("**/*.jsonl").files()) == ["c.jsonl", "x/a.jsonl", "x/y/b.jsonl"]
    assert list(source("x").model_copy(update={"format": "jsonl"}).files()) == ["x/a.jsonl", "x/y/b.jsonl"]


def test_a_pattern_stands_for_nothing_that_is_hidden(tmp_path: Path) -> None:
    for name in (".git/x.txt", "a/.cache/y.txt", "a/_old/z.txt", "a/b.txt"):
        write(tmp_path / ".home", name, b"text")
    assert list(source(tmp_path / ".home/**/*.txt").files()) == [str(tmp_path / ".home/a/b.txt")]
    assert list(source(tmp_path / ".home/.git/*.txt").files()) == [str(tmp_path / ".home/.git/x.txt")]


def test_a_path_in_the_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.txt", b"text")
    assert read(source("~/a.txt")) == ["text"]


def test_texts_of_a_folder_are_a_document_each_or_one_for_each_line(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", b"one\ntwo\n")
    write(tmp_path, "b.md", b"three")
    assert read(source(tmp_path)) == ["one\ntwo\n", "three"]
    assert read(source(tmp_path, document_per="line")) == ["one", "two", "three"]


def test_a_file_without_a_known_ending_is_read_as_its_format_says(tmp_path: Path) -> None:
    path = write(tmp_path, "data", lines("a"))
    with pytest.raises(UserError, match=r"what .*data holds is not told by its ending: say it with format"):
        source(path).resolved()
    assert read(source(path, format="jsonl")) == ["a"]


def test_other_columns_and_another_text_column_are_read(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", parquet_bytes({"content": ["a"], "text": ["not it"], "url": ["u"]}))
    start, rows = source(tmp_path, column="content").open(Told("url")).parts
    assert start == FileStart(0)
    assert isinstance(rows, Rows)
    assert rows.split is None
    assert rows.table.to_pylist() == [{"text": "a", "url": "u"}]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["missing"], "there is no file or folder missing"),
        (["*.jsonl"], r"\*\.jsonl has no file of a known kind"),
        (["empty"], "empty has no file of a known kind"),
        (["mixed"], "mixed has files of jsonl and text: choose with format"),
        (["mixed/a.jsonl", "mixed/b.txt"], "mixed/a.jsonl has files of jsonl and text"),
    ],
)
def test_paths_without_files_are_refused_when_the_recipe_is_loaded(
    paths: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path, "mixed/a.jsonl", lines("a"))
    write(tmp_path, "mixed/b.txt", b"b")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        source(*paths).resolved()


def test_the_digest_follows_the_content_and_not_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for machine in ("here", "there"):
        write(tmp_path / machine, "data/a.jsonl", lines("a"))
        monkeypatch.chdir(tmp_path / machine)
        digests.append(source("data").resolved().digest)
    assert digests[0] == digests[1] is not None
    write(tmp_path / "there", "data/b.jsonl", lines("b"))
    assert source("data").resolved().digest != digests[0]


def test_files_that_are_not_what_the_digest_says_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines("a"))
    resolved = source(path).resolved()
    assert resolved.resolved() == resolved
    write(tmp_path, "a.jsonl", lines("b"))
    with pytest.raises(UserError, match=r"a\.jsonl is not what its digest .* says .*: it has changed; run again"):
        resolved.resolved()


def test_a_file_that_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines("a"))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: Permission denied"):
        source(path).resolved()


def test_the_description_says_what_was_read(tmp_path: Path) -> None:
    write(tmp_path, "data/a.jsonl", lines("a"))
    resolved = source(tmp_path / "data").resolved()
    described = {"name": "data", "kind": "files", "files": 1, "digest": resolved.digest}
    assert resolved.open(Told()).description == described
    assert resolved.model_copy(update={"name": "mine"}).open(Told()).description == {**described, "name": "mine"}
