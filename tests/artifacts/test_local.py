"""What only a local store can promise or suffer: killed commits, full disks, rivals in other processes."""

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from artifacts.store import Store
from common.errors import UserError
from common.files import sha256_file

KEY = "a" * 64

COMMIT = """
import os, sys, time
from datetime import UTC, datetime
from pathlib import Path
from artifacts.store import Store

store, key, text, size = Store.open(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
with store.workspace(key) as folder:
    for part in range(6):
        (folder / f"part-{part}").write_bytes(text.encode() * size)
    print("ready", flush=True)
    sys.stdin.readline()
    record = store.commit(folder, key=key, stage="s", version=1, name="s", config={}, inputs={},
                          started=datetime.now(UTC))
print(record.output, flush=True)
"""

Start = Callable[..., "subprocess.Popen[str]"]


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def wait_until_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def test_a_killed_commit_leaves_nothing_that_looks_complete(tmp_path: Path, start: Start) -> None:
    root = str(tmp_path / "store")
    seconds = 0.1
    outcomes = []
    for attempt in range(10):
        key = f"{attempt:064x}"
        process = start(COMMIT, root, key, f"text {attempt} ", "40000")
        wait_until_ready(process)
        began = time.monotonic()
        go(process)
        if attempt == 0:
            # One is left alone, to learn how long a commit takes here.
            assert process.stdout is not None
            process.stdout.readline()
            seconds = time.monotonic() - began
            process.communicate(timeout=60)
        else:
            # The first at once, so that one at least does not get through.
            time.sleep(random.Random(attempt).uniform(0, seconds) if attempt > 1 else 0)
            process.kill()
            process.communicate(timeout=60)
        store = Store.open(root)
        record = store.find(key)
        outcomes.append(record is not None)
        # Either there is no record at all, or all that it says is there.
        assert store.backend.children("records") == [f"{i:064x}.json" for i, kept in enumerate(outcomes) if kept]
        if record is not None:
            assert store.verify(record).damages == ()
    assert outcomes[0]
    assert not all(outcomes)
    # What was killed is done again as if nothing had been.
    key = f"{outcomes.index(False):064x}"
    process = start(COMMIT, root, key, "again ", "10")
    output, errors = process.communicate("go\n", timeout=60)
    record = Store.open(root).find(key)
    assert record is not None, errors
    assert record.output in output


def test_rivals_for_one_key_end_with_one_complete_record(tmp_path: Path, start: Start) -> None:
    root = str(tmp_path / "store")
    rivals = [start(COMMIT, root, KEY, f"rival {rival} ", "2000") for rival in range(4)]
    for process in rivals:
        wait_until_ready(process)
    for process in rivals:
        go(process)
    outputs = {process.communicate(timeout=60)[0].split()[-1] for process in rivals}
    store = Store.open(root)
    record = store.find(KEY)
    assert record is not None
    # All were told the same: the first complete record.
    assert outputs == {record.output}
    assert store.verify().damages == ()
    assert store.backend.children("tmp") == []


def test_rivals_with_the_same_content_share_it(tmp_path: Path, start: Start) -> None:
    root = str(tmp_path / "store")
    rivals = [start(COMMIT, root, f"{rival:064x}", "same ", "2000") for rival in range(3)]
    for process in rivals:
        wait_until_ready(process)
    for process in rivals:
        go(process)
    outputs = {process.communicate(timeout=60)[0].split()[-1] for process in rivals}
    store = Store.open(root)
    assert store.backend.children("objects") == list(outputs)
    assert len(list(store.records())) == 3
    assert store.verify().damages == ()


def test_a_commit_from_a_workspace_moves_the_files(local_store: Store, maker: Any) -> None:
    fields = maker(local_store).fields("documents")
    with local_store.workspace(fields["key"]) as folder:
        (folder / "a").write_bytes(b"x")
        inode = (folder / "a").stat().st_ino
        record = local_store.commit(folder, **fields)
    stored = local_store.fetch(record) / "a"
    assert stored.stat().st_ino == inode
    # Nobody changes an artifact by accident.
    assert stored.stat().st_mode & 0o222 == 0
    assert local_store.backend.children("tmp") == []


def test_a_file_is_hashed_at_its_first_use_only(
    local_store: Store, maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr("artifacts.verified.sha256_file", counted)
    record = maker(local_store)("one", {"a": b"a", "b": b"b"})
    local_store.fetch(record, only=["a"])
    assert hashed == ["a"]
    for _ in range(2):
        Store.open(local_store.url).fetch(record)
    assert hashed == ["a", "b"]
    # A change shows even where size and time of modification were restored.
    path = Path(local_store.url) / "objects" / record.output / "a"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.chmod(0o644)
    path.write_bytes(b"?")
    os.utime(path, ns=times)
    with pytest.raises(UserError, match="damaged"):
        local_store.fetch(record)


def test_threads_that_hash_files_of_one_artifact_at_once_all_remember_them(
    local_store: Store, maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"file-{number}" for number in range(4)]
    record = maker(local_store)("one", {name: name.encode() for name in names})
    hashed: list[str] = []
    together = threading.Barrier(len(names))

    def counted(path: Path) -> str:
        hashed.append(path.name)
        together.wait(30)
        return sha256_file(path)

    monkeypatch.setattr("artifacts.verified.sha256_file", counted)
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: local_store.fetch(record, [name]), names))
    local_store.fetch(record)
    assert sorted(hashed) == names


def test_an_index_of_hashed_files_that_is_damaged_costs_hashing_only(local_store: Store, maker: Any) -> None:
    record = maker(local_store)("one")
    local_store.fetch(record)
    for index in Path(os.environ["CAIRN_CACHE"], "verified").iterdir():
        index.write_bytes(b"[1")
    assert (local_store.fetch(record) / "a.bin").read_bytes() == b"one"


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system in memory at a folder; skips the test where this process may not mount one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        mount = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if mount.returncode:
        pytest.skip(f"cannot mount a file system here: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_explained_and_loses_nothing(tmp_path: Path, maker: Any) -> None:
    folder = tmp_path / "small"
    with mounted(folder, "size=512k"):
        store = Store.open(str(folder / "store"))
        make = maker(store)
        first = make("first", {"a": b"x" * 1000})

        def fill(name: str) -> None:
            with store.workspace(make.fields(name)["key"]) as workspace:
                (workspace / "big").write_bytes(b"x" * 1_000_000)

        with pytest.raises(UserError, match=r"no space left at .*small.*cairn gc.*run again"):
            fill("second")
        (tmp_path / "big").mkdir()
        (tmp_path / "big/file").write_bytes(b"x" * 1_000_000)
        with pytest.raises(UserError, match="no space left"):
            store.commit(tmp_path / "big", **make.fields("second"))
        assert (tmp_path / "big/file").stat().st_size == 1_000_000
        assert store.find(make.fields("second")["key"]) is None
        assert store.find(first.key) == first
        assert store.backend.children("tmp") == []
        # With room again, the same call does it.
        make("second", {"a": b"small"})
        assert store.verify().damages == ()


def test_a_store_that_cannot_be_written_is_explained_and_still_read(tmp_path: Path, maker: Any) -> None:
    folder = tmp_path / "fixed"
    with mounted(folder, "size=1m"):
        store = Store.open(str(folder / "store"))
        make = maker(store)
        record = make("first")
        store.set_name("models/x", record.key)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        assert store.resolve("models/x") == record
        assert (store.fetch(record) / "a.bin").read_bytes() == b"first"
        attempts: list[Callable[[], Any]] = [
            lambda: make("second"),
            lambda: store.commit(store.fetch(record), **make.fields("third")),
            lambda: store.set_name("models/y", record.key),
            lambda: store.lease(KEY).__enter__(),
            lambda: store.attach(KEY, tmp_path / "nothing", "x"),
        ]
        for attempt in attempts:
            with pytest.raises(UserError, match=r"no access to .*fixed.*read-only.*CAIRN_STORE"):
                attempt()


def test_a_store_without_permission_is_explained(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permission bits do not bind root, so the refusal is made up.
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"no access to .*tmp.*permission denied"), local_store.workspace(KEY):
        pass


def test_a_file_where_the_store_should_be_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not a folder"):
        Store.open(str(tmp_path / "file"))


def test_a_file_where_a_folder_of_the_store_should_be_is_explained(tmp_path: Path) -> None:
    (tmp_path / "tmp").write_text("x")
    with pytest.raises(UserError, match="is in the way"), Store.open(str(tmp_path)).workspace(KEY):
        pass


def test_looking_ten_stages_up_takes_milliseconds(local_store: Store, maker: Any) -> None:
    make = maker(local_store)
    records = [make(f"stage-{i}", {f"file-{j}": b"x" for j in range(5)}) for i in range(10)]
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        assert all(local_store.find(record.key) is not None for record in records)
        seconds.append(time.perf_counter() - began)
    # Ten times what it takes on a slow machine, so that only a change of kind fails.
    assert min(seconds) < 0.1
