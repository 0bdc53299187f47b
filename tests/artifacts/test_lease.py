"""Leases: exclusive, told of, taken over, and proven at commit."""

import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from artifacts.conditional import GcsWrites, MemoryWrites, conditional_writes, conditions_hold
from artifacts.errors import LeaseLost
from artifacts.lease import Lease
from artifacts.object_lease import object_lease
from artifacts.remote import RemoteBackend
from artifacts.store import Store
from common.errors import UserError

KEY = "a" * 64

HOLD = """
import sys
from artifacts.remote import RemoteBackend
from artifacts.store import Store

RemoteBackend.lease_seconds = float(sys.argv[3])
with Store.open(sys.argv[1]).lease(sys.argv[2]) as lease:
    print(lease.fencing_token, flush=True)
    sys.stdin.readline()
    try:
        lease.renew()
        print("held", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""

Start = Callable[..., "subprocess.Popen[str]"]


def first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def short(backend: Any, seconds: float) -> None:
    """Makes the leases of a remote backend lapse fast; a local one's never do."""
    backend.lease_seconds = seconds


def test_one_holder_at_a_time(store: Store) -> None:
    short(store.backend, 1.5)
    order: list[str] = []
    told: list[str] = []

    def rival() -> None:
        with store.lease(KEY, told.append) as lease:
            order.append("rival")
            tokens.append(lease.fencing_token)

    tokens = []
    with store.lease(KEY) as lease:
        tokens.append(lease.fencing_token)
        thread = threading.Thread(target=rival)
        thread.start()
        # Longer than the lease, which is renewed meanwhile.
        time.sleep(1.8 if isinstance(store.backend, RemoteBackend) else 0.2)
        lease.check()
        order.append("first")
    thread.join(timeout=20)
    assert order == ["first", "rival"]
    assert tokens == [1, 2]
    assert len(set(told)) == 1
    assert f"process {os.getpid()}" in told[0]


def test_different_keys_do_not_wait_for_each_other(store: Store) -> None:
    with store.lease(KEY), store.lease("b" * 64) as other:
        other.renew()


def test_live_leases_are_listed_with_their_inputs(store: Store) -> None:
    assert list(store.backend.leases()) == []
    with store.lease(KEY, inputs=["b" * 64]):
        (info,) = store.backend.leases()
        assert (info.key, info.inputs) == (KEY, ("b" * 64,))
    assert list(store.backend.leases()) == []


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_key_is_free_after_its_holder_was_killed(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, start: Start
) -> None:
    url = str(tmp_path / "store") if kind == "local" else request.getfixturevalue("s3_url")
    # Another process of this machine sees that it is gone, however long its lease would have lasted.
    process = start(HOLD, url, KEY, "3600")
    assert first_line(process) == "1"
    store = Store.open(url)
    short(store.backend, 1)
    told: list[str] = []

    def end() -> None:
        process.kill()
        process.wait()

    threading.Timer(0.3, end).start()
    with store.lease(KEY, told.append) as lease:
        assert lease.fencing_token == 2
        assert f"process {process.pid}" in told[0]


def test_a_holder_that_slept_too_long_has_lost(s3_url: str, start: Start) -> None:
    process = start(HOLD, s3_url, KEY, "0.9")
    assert first_line(process) == "1"
    process.send_signal(signal.SIGSTOP)
    store = Store.open(s3_url)
    short(store.backend, 1)
    with store.lease(KEY) as lease:
        assert lease.fencing_token == 2
        process.send_signal(signal.SIGCONT)
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        assert first_line(process) == "LeaseLost"
        lease.renew()


def take_away(store: Store, key: str) -> AbstractContextManager[Lease]:
    """What another worker does once the lease has lapsed: here at once."""
    backend: Any = store.backend
    if not isinstance(backend, RemoteBackend):
        Path(backend.url(f"leases/{key}.lock")).unlink()
        return store.lease(key)
    path = f"{backend.place()[1]}/leases/{key}.json"
    writes: Any = backend._sharing()
    data, version = writes.read(path)
    expired = data.replace(b'"expires":1', b'"expires":0')
    assert expired != data
    assert writes.write(path, expired, version) is not None
    return store.lease(key)


def test_a_commit_under_a_lost_lease_is_refused(store: Store, make: Any) -> None:
    fields = make.fields("documents")
    with store.workspace(fields["key"]) as folder, store.lease(fields["key"]) as loser:
        (folder / "a").write_bytes(b"loser")
        with take_away(store, fields["key"]) as winner:
            with pytest.raises(LeaseLost, match="run again"):
                store.commit(folder, lease=loser, **fields)
            assert store.find(fields["key"]) is None
            with pytest.raises(LeaseLost):
                loser.check()
            with store.workspace(fields["key"]) as other:
                (other / "a").write_bytes(b"winner")
                record = store.commit(other, lease=winner, **fields)
    assert (store.fetch(record) / "a").read_bytes() == b"winner"


def test_a_lease_lost_during_the_upload_is_noticed(store: Store, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = make.fields("documents")
    backend: Any = store.backend
    upload = backend.put_folder
    taken = []

    def slow_upload(*arguments: Any) -> None:
        upload(*arguments)
        block = take_away(store, fields["key"])
        block.__enter__()
        taken.append(block)

    monkeypatch.setattr(backend, "put_folder", slow_upload)
    with store.workspace(fields["key"]) as folder, store.lease(fields["key"]) as loser:
        (folder / "a").write_bytes(b"loser")
        with pytest.raises(LeaseLost):
            store.commit(folder, lease=loser, **fields)
    assert store.find(fields["key"]) is None
    taken[0].__exit__(None, None, None)


class Flaky(MemoryWrites):
    """Conditional writes over a network that loses answers or is down."""

    down = False
    loses_answers = False

    def write(self, path: str, data: bytes, version: str | None) -> str | None:
        if self.down:
            raise RuntimeError("no network, in the words of some package")
        answer = super().write(path, data, version)
        # A client that hears nothing asks again, and is refused by its own first write.
        return super().write(path, data, version) if self.loses_answers else answer


def flaky_lease(writes: MemoryWrites, path: str, seconds: float) -> AbstractContextManager[Lease]:
    return object_lease(writes, path, (KEY, ()), None, seconds)


def test_a_renewal_whose_answer_was_lost_counts() -> None:
    writes = Flaky(MemoryFileSystem())
    writes.loses_answers = True
    with flaky_lease(writes, f"/{uuid.uuid4().hex}", 60) as lease:
        for _ in range(3):
            lease.renew()
        lease.check()


def test_a_lease_survives_a_short_outage_but_no_long_one() -> None:
    writes = Flaky(MemoryFileSystem())
    with flaky_lease(writes, f"/{uuid.uuid4().hex}", 1.2) as lease:
        writes.down = True
        time.sleep(0.6)
        writes.down = False
        time.sleep(0.8)
        lease.check()
        writes.down = True
        time.sleep(1.4)
        with pytest.raises(LeaseLost, match="out of reach"):
            lease.check()


def test_a_lease_file_that_was_torn_is_taken_over() -> None:
    writes = MemoryWrites(MemoryFileSystem())
    path = f"/{uuid.uuid4().hex}"
    writes.write(path, b'{"key": "a', None)
    with flaky_lease(writes, path, 60) as lease:
        lease.renew()


class Careless(MemoryWrites):
    """A server that ignores conditions, as some that only look like S3 do."""

    def __init__(self, filesystem: Any, ignored: Collection[str]) -> None:
        super().__init__(filesystem)
        self._ignored = ignored

    def write(self, path: str, data: bytes, version: str | None) -> str | None:
        found = self.read(path)
        ignored = "create" if version is None else "replace"
        return super().write(path, data, (found[1] if found else None) if ignored in self._ignored else version)


@pytest.mark.parametrize("ignored", [["create"], ["replace"], ["create", "replace"]])
def test_a_server_that_ignores_conditions_is_refused_for_sharing(
    ignored: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: Any
) -> None:
    filesystem = MemoryFileSystem()
    monkeypatch.setattr("artifacts.remote.conditional_writes", lambda _: Careless(filesystem, ignored))
    root = f"/{uuid.uuid4().hex}"
    store = Store(RemoteBackend(filesystem, root, f"memory:/{root}", tmp_path))
    with (
        pytest.raises(UserError, match=r"cannot be shared.*neither locks nor conditional writes.*s3://"),
        store.lease(KEY),
    ):
        pass
    # One worker alone may use it all the same, and nothing of the trial is left.
    record = maker(store)("documents")
    assert store.find(record.key) == record
    assert maker(store)("documents", {"a": b"other"}) == record
    assert filesystem.find(f"{root}/leases") == []


def test_conditions_are_really_kept_by_the_test_server(s3_url: str) -> None:
    backend = RemoteBackend.open(s3_url, Path("unused"))
    filesystem, root = backend.place()
    writes = conditional_writes(filesystem)
    assert writes is not None
    assert conditions_hold(writes, f"{root}/probe")
    assert writes.read(f"{root}/none") is None
    version = writes.write(f"{root}/x", b"1", None)
    assert writes.read(f"{root}/x") == (b"1", version)
    assert writes.write(f"{root}/x", b"2", None) is None
    later = writes.write(f"{root}/x", b"2", version)
    assert later is not None
    assert writes.write(f"{root}/x", b"3", version) is None
    assert writes.write(f"{root}/none", b"3", version) is None
    assert writes.read(f"{root}/x") == (b"2", later)


def test_a_place_without_locks_is_refused_for_sharing(tmp_path: Path, maker: Any) -> None:
    from fsspec.implementations.local import LocalFileSystem

    # Stands for FTP, SFTP and the like: folders, but no conditions.
    store = Store(RemoteBackend(LocalFileSystem(), str(tmp_path / "far"), "sftp://host/far", tmp_path / "cache"))
    with pytest.raises(UserError, match="sftp://host/far cannot be shared"), store.lease(KEY):
        pass
    record = maker(store)("documents")
    assert store.find(record.key) == record
    assert (store.fetch(record) / "a.bin").read_bytes() == b"documents"


class FakeGcs:
    """The four things that are asked of gcsfs, answered as it does."""

    _location = "https://storage.example"

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def url(self, path: str) -> str:
        return f"{self._location}/download/{path.partition('/')[2]}"

    def call(self, method: str, url: str, data: bytes = b"", json_out: bool = False, **condition: str) -> Any:
        if method == "GET":
            name = url.removeprefix(f"{self._location}/download/")
            if name not in self.objects:
                raise FileNotFoundError(url)
            return {"X-Goog-Generation": self.objects[name][1]}, self.objects[name][0]
        assert (method, url, condition["uploadType"]) == ("POST", f"{self._location}/upload/storage/v1/b/b/o", "media")
        if condition["ifGenerationMatch"] != self.objects.get(condition["name"], (b"", "0"))[1]:
            raise FileExistsError(url)
        generation = str(1000 + len(data))
        self.objects[condition["name"]] = (data, generation)
        return {"generation": generation}


def test_google_cloud_storage_is_asked_by_generation() -> None:
    writes = GcsWrites(FakeGcs())
    assert conditions_hold(writes, "b/leases/probe")
    assert writes.read("b/none") is None
    version = writes.write("b/x", b"1", None)
    assert version is not None
    assert writes.write("b/x", b"22", version) is not None
    assert writes.write("b/x", b"333", version) is None
    assert writes.read("b/x") == (b"22", "1002")
