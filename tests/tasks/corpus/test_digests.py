"""Digests of files, and what is remembered of them."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import canonical_json, sha256_file
from tasks.corpus import digests
from tasks.corpus.digests import files_digest


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed."""
    names: list[str] = []

    def told(path: Path) -> str:
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(digests, "sha256_file", told)
    return names


def files(folder: Path, **contents: str) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)
    return {name: folder / name for name in contents}


def test_the_digest_is_of_names_and_bytes_alone(tmp_path: Path) -> None:
    expected = [[name, hashlib.sha256(text.encode()).hexdigest()] for name, text in (("a", "one"), ("b", "two"))]
    found = files_digest(files(tmp_path / "x", a="one", b="two"))
    assert found == hashlib.sha256(canonical_json(expected)).hexdigest()
    assert found == files_digest(files(tmp_path / "y", a="one", b="two"))
    changes = [{"a": "one"}, {"a": "one", "c": "two"}, {"b": "two", "a": "one"}, {"a": "one", "b": "tw0"}]
    others = {files_digest(files(tmp_path / str(number), **names)) for number, names in enumerate(changes)}
    assert len(others | {found}) == 5


def test_a_file_is_hashed_again_when_it_changes(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    named = files(tmp_path, a="one", b="two")
    time.sleep(0.02)
    first = files_digest(named)
    assert sorted(hashed) == ["a", "b"]
    assert files_digest(named) == first
    assert len(hashed) == 2
    state = (tmp_path / "b").stat()
    (tmp_path / "b").write_text("2wo")
    # As a copy that brings the time of modification along.
    os.utime(tmp_path / "b", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert files_digest(named) != first
    assert hashed[2:] == ["b"]
    time.sleep(0.02)
    files_digest(named)
    files_digest({"a": tmp_path / "a"})
    assert hashed[3:] in (["b"], [])


def test_what_was_changed_a_moment_ago_is_not_trusted(tmp_path: Path, hashed: list[str]) -> None:
    named = files(tmp_path, a="one")
    first = files_digest(named)
    state = (tmp_path / "a").stat()
    (tmp_path / "a").write_text("0ne")
    os.utime(tmp_path / "a", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert files_digest(named) != first
    assert len(hashed) == 2


def test_a_damaged_memory_and_one_that_cannot_be_written_cost_hashing_alone(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    named = files(tmp_path / "x", a="one")
    time.sleep(0.02)
    first = files_digest(named)
    (index,) = Path(os.environ["CAIRN_CACHE"], "digests").iterdir()
    for damage in (b"", b"[1]", b'{"' + str(named["a"]).encode() + b'": 5}', b"\xff"):
        index.write_bytes(damage)
        assert files_digest(named) == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "file"))
    assert files_digest(named) == first
    assert len(hashed) == 6


def test_a_file_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/a cannot be read: No such file"):
        files_digest({"a": tmp_path / "a"})
