"""The stage in a process of its own, with processes of its own, which are killed, stopped or run out of disk."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts.record import InputReference, Record
from artifacts.store import Store
from tasks.stage import Runtime
from tasks.tokens import Config
from tasks.work import Work
from tests.artifacts.conftest import ROOT, Maker
from tests.flows.processes import descendants, kill, runs_module, wait_until_gone
from tests.tasks.encoding.corpora import byte_level, rows, texts, write_documents

UNITS = 64
"""Enough for some kills: two processes finish one in about 10 ms."""
ROWS = 150
Start = Callable[[Work], "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of a documents artifact of many shards, and of a tokenizer."""
    place = tmp_path_factory.mktemp("inputs")
    listed = rows(texts(UNITS * ROWS))
    folders = {
        "documents": write_documents(place / "documents", {"train": listed}, shard_rows=ROWS),
        "tokenizer": byte_level(place / "tokenizer"),
    }
    return {name: {path.name: path.read_bytes() for path in folder.iterdir()} for name, folder in folders.items()}


def stage_process(work: Work) -> "subprocess.Popen[str]":
    """The stage in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.tasks.encoding.stage_process", work.model_dump_json()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the stage; what is left of it is killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(work: Work) -> "subprocess.Popen[str]":
        process = stage_process(work)
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            kill(process.pid, *descendants(process.pid))
        process.communicate()


def work_in(place: Path, inputs: dict[str, dict[str, bytes]], **runtime: Any) -> Work:
    """The work of the stage in a store that has its inputs."""
    store = Store.open(str(place))
    make = Maker(store)
    records: dict[str, Record] = {name: make(name, files) for name, files in inputs.items()}
    references = {name: InputReference(digest=one.output, key=one.key) for name, one in records.items()}
    return Work(
        name="ids",
        stage="tokens",
        config=Config(bos=True, shard_tokens=4000).model_dump(mode="json"),
        inputs=references,
        runtime=Runtime(**runtime),
        store=str(place),
    )


def finished(work: Work) -> dict[str, int]:
    """The units that are said to be finished, and since when."""
    folder = Path(work.store) / "checkpoints" / work.checkpoint_key / "units"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("train-*.json")}


def output_of(work: Work) -> str:
    record = Store.open(work.store).find(work.key)
    assert record is not None
    return record.output


def wait_for(process: "subprocess.Popen[str]", work: Work, count: int) -> None:
    """Waits until so many units are finished, or the process is."""
    while process.poll() is None and len(finished(work)) < count:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(inputs: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one process makes that is left in peace."""
    work = work_in(tmp_path_factory.mktemp("undisturbed") / "store", inputs, processes=1)
    output, _ = stage_process(work).communicate(timeout=120)
    assert f"'encoded': {UNITS}" in output, output
    return output_of(work)


@pytest.mark.slow
def test_killed_again_and_again(
    start: Start, inputs: dict[str, dict[str, bytes]], undisturbed: str, tmp_path: Path
) -> None:
    work = work_in(tmp_path / "store", inputs, processes=2)
    choice = random.Random(5)
    kept: dict[str, int] = {}
    kills = 0
    while kills < 6 and len(kept) < UNITS // 2:
        process = start(work)
        wait_for(process, work, len(kept) + choice.randint(1, 4))
        time.sleep(choice.random() / 50)
        everything = [process.pid, *descendants(process.pid)]
        kill(process.pid)
        assert process.wait() == -signal.SIGKILL
        # Its processes are gone too, without being killed.
        assert all(wait_until_gone(pid, 10) for pid in everything)
        now = finished(work)
        assert kept.items() <= now.items()
        kept = now
        kills += 1
    assert kills > 1
    assert len(kept) < UNITS
    output, _ = start(work).communicate(timeout=120)
    assert f"{{'encoded': {UNITS - len(kept)}, 'found_finished': {len(kept)}}}" in output
    assert output_of(work) == undisturbed
    assert Store.open(work.store).verify().damages == ()


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_that_says_so(
    start: Start, inputs: dict[str, dict[str, bytes]], undisturbed: str, tmp_path: Path
) -> None:
    work = work_in(tmp_path / "store", inputs, processes=2)
    process = start(work)
    wait_for(process, work, 2)
    workers = [pid for pid in descendants(process.pid) if runs_module(pid, "tasks.encoding.worker")]
    assert len(workers) == 2
    kill(workers[0])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    last = output.splitlines()[-1]
    assert last.startswith("StageFailed: the process that encoded train-000")
    assert last.endswith("ended (killed by signal 9)")
    assert all(wait_until_gone(pid, 10) for pid in workers)
    # What a stage's own retries do.
    output, _ = start(work).communicate(timeout=120)
    assert output_of(work) == undisturbed, output


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_no_process(
    start: Start, inputs: dict[str, dict[str, bytes]], undisturbed: str, tmp_path: Path, number: int, processes: int
) -> None:
    work = work_in(tmp_path / "store", inputs, processes=processes)
    process = start(work)
    wait_for(process, work, 2)
    everything = descendants(process.pid)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert all(wait_until_gone(pid, 10) for pid in everything)
    assert 2 <= len(finished(work)) < UNITS
    start(work).communicate(timeout=120)
    assert output_of(work) == undisturbed


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_explained(
    start: Start, inputs: dict[str, dict[str, bytes]], undisturbed: str, disk: Path, processes: int
) -> None:
    work = work_in(disk / "store", inputs, processes=processes)
    used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*"))
    subprocess.run(["mount", "-o", f"remount,size={used + 400_000}", str(disk)], check=True)
    process = start(work)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    last = output.splitlines()[-1]
    assert last.startswith(f"UserError: no space left at {disk}"), output
    assert "run again; nothing was lost" in last
    assert finished(work)
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    start(work).communicate(timeout=120)
    assert output_of(work) == undisturbed


def test_a_record_says_what_encoded(start: Start, inputs: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    work = work_in(tmp_path / "store", inputs, processes=2)
    start(work).communicate(timeout=120)
    record = Store.open(work.store).find(work.key)
    assert record is not None
    metrics: Any = record.metrics
    assert metrics["encoder"]["library"] == "gigatoken"
    assert not finished(work)
    attached = Store.open(work.store).attachments(work.key)
    assert set(attached) == {"data_card.md", "document_lengths.png", "stage.log"}
