"""Stores to test on: a folder, fsspec's memory, and a real S3 server on loopback."""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from artifacts.identity import stage_key
from artifacts.record import InputReference, Record, RecordFields
from artifacts.store import Store

ROOT = Path(__file__).parents[2]


class Maker:
    """Makes small artifacts in a store, as a stage would."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def fields(self, name: str, config: dict[str, Any] | None = None, **inputs: Record) -> RecordFields:
        config = {"seed": 0} if config is None else config
        return RecordFields(
            key=stage_key(name, 1, config, {part: record.output for part, record in inputs.items()}),
            stage=name,
            version=1,
            name=name,
            config=config,
            inputs={part: InputReference(digest=one.output, key=one.key) for part, one in inputs.items()},
            started=datetime(2026, 1, 1, tzinfo=UTC),
        )

    def __call__(
        self, name: str, files: dict[str, bytes] | None = None, config: dict[str, Any] | None = None, **inputs: Record
    ) -> Record:
        fields = self.fields(name, config, **inputs)
        with self.store.workspace(fields["key"]) as folder:
            write_files(folder, {"a.bin": name.encode(), "sub/b.bin": b"b"} if files is None else files)
            return self.store.commit(folder, **fields)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CAIRN_STORE", str(tmp_path / "store"))


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """A real S3 server with a bucket `bucket`; its address and credentials are in the environment."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import boto3

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_address: str) -> str:
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store.open(str(tmp_path / "store"))
    if request.param == "memory":
        return Store.open(f"memory://{uuid.uuid4().hex}")
    return Store.open(request.getfixturevalue("s3_url"))


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def make(store: Store) -> Maker:
    return Maker(store)


@pytest.fixture
def maker() -> Callable[[Store], Maker]:
    return Maker


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts Python code in another process from the checkout's root; what still runs is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        # Reads what is left, so that no pipe stays open.
        process.communicate()
