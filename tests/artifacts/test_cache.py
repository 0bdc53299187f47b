"""The local cache of a remote store."""

import os
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts.cache import Cache, cache_limit
from artifacts.identity import FileEntry, content_digest
from artifacts.store import DamagedObject, Store
from common.errors import UserError
from common.files import sha256_bytes


@pytest.fixture
def remote() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def count_downloads(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    plain = store.filesystem.get_file

    def counted(path: str, target: str) -> None:
        names.append(path.rpartition("/")[2])
        plain(path, target)

    monkeypatch.setattr(store.filesystem, "get_file", counted)
    return names


def test_a_file_comes_from_the_store_once(remote: Store, maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = maker(remote)("one", {"a": b"a", "b": b"b"})
    names = count_downloads(remote, monkeypatch)
    remote.fetch(record, only=["a"])
    assert names == ["a"]
    folder = remote.fetch(record)
    Store.open(remote.url).fetch(record)
    assert sorted(names) == ["a", "b"]
    assert (folder / "a").stat().st_mode & 0o222 == 0


def test_a_cached_file_that_was_damaged_comes_again(remote: Store, maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = maker(remote)("one", {"a": b"a"})
    path = remote.fetch(record) / "a"
    path.chmod(0o644)
    path.write_bytes(b"b")
    names = count_downloads(remote, monkeypatch)
    assert (remote.fetch(record) / "a").read_bytes() == b"a"
    assert names == ["a"]


def test_a_download_that_was_torn_is_tried_again(remote: Store, maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = maker(remote)("one", {"a": b"whole"})
    plain = remote.filesystem.get_file
    broken = [True]

    def torn(path: str, target: str) -> None:
        plain(path, target)
        if broken.pop() if broken else False:
            Path(target).write_bytes(b"who")

    monkeypatch.setattr(remote.filesystem, "get_file", torn)
    assert (remote.fetch(record) / "a").read_bytes() == b"whole"


def test_nothing_incomplete_is_ever_seen_in_the_cache(
    remote: Store, maker: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = maker(remote)("one", {"a": b"whole"})

    def broken(path: str, target: str) -> None:
        Path(target).write_bytes(b"who")
        raise ConnectionError("the network went away")

    with monkeypatch.context() as patch:
        patch.setattr(remote.filesystem, "get_file", broken)
        with pytest.raises(UserError, match="cannot reach"):
            remote.fetch(record)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and "locks" not in path.parts] == []
    # A network that failed says nothing about the store's file.
    assert remote.find(record.key) == record
    assert (remote.fetch(record) / "a").read_bytes() == b"whole"


def test_what_the_store_lost_is_named(remote: Store, maker: Any) -> None:
    record = maker(remote)("one", {"a": b"a"})
    remote.backend.remove(f"objects/{record.output}/a")
    with pytest.raises(DamagedObject, match=r"memory://.*/a is missing or damaged.*run the recipe again"):
        remote.fetch(record)


FETCH = """
import sys
from pathlib import Path
from artifacts.cache import Cache
from artifacts.identity import FileEntry
from common.files import sha256_bytes

cache = Cache(Path(sys.argv[1]))
for text in sys.argv[2:]:
    data = text.encode() * 1000
    cache.fetch(sha256_bytes(data), {"f": FileEntry(sha256=sha256_bytes(data), size=len(data))}, ["f"],
                lambda name, path: path.write_bytes(data))
print("ready", flush=True)
sys.stdin.readline()
"""


def test_the_longest_unused_goes_first_and_what_is_in_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    cache = tmp_path / "cache"
    # Room for two of the four.
    monkeypatch.setenv("CAIRN_CACHE_GIB", str(2500 / 2**30))

    def fetch(*texts: str) -> "subprocess.Popen[str]":
        process = start(FETCH, str(cache), *texts)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def cached() -> set[str]:
        names = {sha256_bytes(text.encode() * 1000): text for text in "abcd"}
        return {names[path.name] for path in (cache / "objects").iterdir()}

    fetch("a").communicate("\n", timeout=30)
    fetch("b").communicate("\n", timeout=30)
    os.utime(cache / "objects" / sha256_bytes(b"b" * 1000), (1, 1))
    user = fetch("c")
    assert cached() == {"a", "c"}
    # `c` is older now than `a`, but its user lives.
    os.utime(cache / "objects" / sha256_bytes(b"c" * 1000), (1, 1))
    fetch("d").communicate("\n", timeout=30)
    assert cached() == {"c", "d"}
    user.communicate("\n", timeout=30)
    fetch("a").communicate("\n", timeout=30)
    assert len(cached()) == 2
    assert "a" in cached()


def test_more_than_the_limit_may_be_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAIRN_CACHE_GIB", "0")
    files = {"f": FileEntry(sha256=sha256_bytes(b"x"), size=1)}

    def download(name: str, path: Path) -> None:
        path.write_bytes(b"x")

    for digest in (content_digest(files), "b" * 64):
        folder = Cache(tmp_path).fetch(digest, files, ["f"], download)
        assert (folder / "f").read_bytes() == b"x"


def test_the_limit_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAIRN_CACHE_GIB", raising=False)
    assert cache_limit() == 100 * 2**30
    monkeypatch.setenv("CAIRN_CACHE_GIB", "0.5")
    assert cache_limit() == 2**29
    for wrong in ("much", "inf", "nan"):
        monkeypatch.setenv("CAIRN_CACHE_GIB", wrong)
        with pytest.raises(UserError, match="CAIRN_CACHE_GIB"):
            cache_limit()
