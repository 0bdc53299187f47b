"""The child process of an engine: what it says, how it dies, and that nothing of it is left."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts.record import InputReference
from artifacts.store import DamagedObject, Store
from common.errors import StageFailed, StageInterrupted, UserError
from tasks.events import Event
from tasks.process import EngineProcess, engine_process
from tasks.work import Work
from tests.flows.conftest import spoil
from tests.flows.processes import descendants, kill, runs_module, wait_until_gone

ROOT = Path(__file__).parents[2]
SOURCE = {"kind": "arithmetic", "operands": 2, "maximum": 9, "train": 20, "validation": 4, "test": 4}


def documents(train: int = 20) -> Work:
    """Any stage can be done in the child; this one is quick and imports no framework."""
    return Work(
        name="numbers",
        stage="documents",
        config={"source": {**SOURCE, "train": train}},
        inputs={},
        store=Store.open().url,
    )


def ignore(event: Event) -> None:
    pass


@pytest.fixture
def process() -> Iterator[EngineProcess]:
    with engine_process() as process:
        yield process


def pid_of(process: EngineProcess) -> int:
    assert process._process is not None
    return process._process.pid


def while_it_waits(process: EngineProcess, work: Work, act: Callable[[], None]) -> None:
    """Does a work that somebody else holds, and acts when the child has said that it waits."""
    said = []

    def listen(event: Event) -> None:
        said.append(event)
        act()

    with Store.open().lease(work.checkpoint_key):
        process.do(work, listen)
    raise AssertionError(f"the child did not wait: {said}")


def test_it_stays_warm_between_works(process: EngineProcess) -> None:
    first = process.do(documents(), ignore)
    pid = pid_of(process)
    assert not first.reused
    assert Store.open().find(first.record.key) == first.record
    again = process.do(documents(), ignore)
    assert again.reused
    assert again.record == first.record
    assert process.do(documents(train=21), ignore).record != first.record
    assert pid_of(process) == pid


def test_it_waits_for_no_processes_of_a_cluster(
    process: EngineProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from tests.tasks.test_ranks import Training

    there = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "45999"}
    there |= {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:45777", "JAX_NUM_PROCESSES": "2", "MLX_RANK": "0"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    training = Training(str(tmp_path / "store"), steps=2)
    made = process.do(training.work(processes=1), lambda event: said.append(event.get("message", ""))).record
    assert made.metrics["device"] == "cpu"
    [warning] = [message for message in said if "in the environment is ignored" in message]
    assert all(name in warning for name in there)


def test_what_the_user_can_mend_arrives_as_such(process: EngineProcess) -> None:
    with pytest.raises(UserError, match=r"source\.train: 99999 unique problems wanted, but there are only") as error:
        process.do(documents(train=99999), ignore)
    assert not isinstance(error.value, DamagedObject)
    pid = pid_of(process)
    process.do(documents(), ignore)
    assert pid_of(process) == pid


def test_damage_arrives_as_such(process: EngineProcess) -> None:
    made = process.do(documents(), ignore).record
    vocabulary = {"kind": "characters", "characters": "0123456789+-*/="}
    tokenizer = Work(
        name="characters", stage="tokenizer", config={"vocabulary": vocabulary}, inputs={}, store=Store.open().url
    )
    inputs = {
        name: InputReference(digest=record.output, key=record.key)
        for name, record in (("documents", made), ("tokenizer", process.do(tokenizer, ignore).record))
    }
    work = Work(name="ids", stage="tokens", config={}, inputs=inputs, store=Store.open().url)
    path = Path(Store.open().root) / "objects" / made.output / "train-00000.parquet"
    spoil(path)
    with pytest.raises(DamagedObject, match=r"train-00000\.parquet is damaged: run the recipe again"):
        process.do(work, ignore)
    # It was moved away, so that its record counts as absent.
    with pytest.raises(DamagedObject, match=r"input 'documents' of stage 'ids' is gone from the store"):
        process.do(work, ignore)


def test_a_defect_brings_the_traceback_of_the_child(process: EngineProcess) -> None:
    work = documents().model_copy(update={"config": {"source": "nonsense"}})
    with pytest.raises(StageFailed, match=r"(?s)^stage 'numbers' failed:\nTraceback .*ValidationError"):
        process.do(work, ignore)
    pid = pid_of(process)
    process.do(documents(), ignore)
    assert pid_of(process) == pid


def test_a_crash_says_how_it_died_and_the_next_work_starts_afresh(process: EngineProcess) -> None:
    work = documents()
    with pytest.raises(StageFailed, match=r"^the process of stage 'numbers' ended \(killed by signal 9\)$"):
        while_it_waits(process, work, lambda: kill(pid_of(process)))
    assert not process.do(work, ignore).reused


def test_one_that_died_between_two_works_is_replaced(process: EngineProcess) -> None:
    process.do(documents(), ignore)
    first = pid_of(process)
    kill(first)
    assert process._process is not None
    process._process.wait()
    process.do(documents(train=21), ignore)
    assert pid_of(process) != first


def test_a_stage_that_is_told_to_stop(process: EngineProcess) -> None:
    work = documents()
    with pytest.raises(StageInterrupted, match="stage 'numbers' was stopped; it goes on from there when run again"):
        while_it_waits(process, work, process.interrupt)
    # Nothing more is begun by a run that is to end.
    with pytest.raises(StageInterrupted):
        process.do(work, ignore)
    with engine_process() as another:
        assert not another.do(work, ignore).reused


def test_closing_ends_it() -> None:
    process = EngineProcess()
    process.close()
    process.do(documents(), ignore)
    pid = pid_of(process)
    process.close()
    assert wait_until_gone(pid, 1)
    process.close()
    # It may be used again.
    assert process.do(documents(), ignore).reused
    process.close()


def test_works_from_many_threads_are_done_one_after_another(process: EngineProcess) -> None:
    done = {}

    def do(train: int) -> None:
        done[train] = process.do(documents(train), ignore).record

    threads = [threading.Thread(target=do, args=(train,)) for train in range(10, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for train, record in done.items():
        splits: Any = record.metrics["splits"]
        counts = {name: split["documents"] for name, split in splits.items()}
        assert counts == {"train": train, "validation": 4, "test": 4}
    assert sorted(done) == list(range(10, 16))


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_it_ends_when_its_parent_is_gone(busy: bool, tmp_path: Path) -> None:
    work = documents()
    code = f"""
from tasks.process import EngineProcess
from tasks.work import Work
process = EngineProcess()
work = Work.model_validate_json({work.model_dump_json()!r})
process.do(work, lambda event: print("waits", flush=True))
print("done", flush=True)
input()
"""
    with Store.open().lease(work.checkpoint_key if busy else "0" * 64):
        parent = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == ("waits\n" if busy else "done\n")
            children = [child for child in descendants(parent.pid) if runs_module(child, "tasks.child")]
            assert len(children) == 1
            kill(parent.pid)
        # The stage under way stops for it, although nobody tells it to.
        assert wait_until_gone(children[0], 10)


_TWO_SIGNALS = """
import os, signal
from tasks import child

both = {signal.SIGINT, signal.SIGTERM}
for number in both:
    signal.signal(number, child._raise_interrupted)
signal.pthread_sigmask(signal.SIG_BLOCK, both)
for number in both:
    os.kill(os.getpid(), number)
try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
    list(range(1000))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_two_signals_in_the_same_moment_are_one() -> None:
    command = [sys.executable, "-c", _TWO_SIGNALS]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
