"""A training stage in several processes: what it makes, and that all of them end together, however one of them ends."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifacts.record import InputReference, Record
from artifacts.store import Store
from common.errors import StageFailed, StageInterrupted, UserError
from models.engine import EngineName, is_installed
from tasks.events import Event
from tasks.process import EngineProcess, engine_process
from tasks.produce import produce
from tasks.work import Work
from tests.flows.processes import descendants, kill, runs_module, wait_until_gone
from tests.tasks.training_stages import TOKENIZER, pretraining

pytest.importorskip("torch")

SOURCE = {"kind": "arithmetic", "operands": 2, "maximum": 9, "train": 60, "validation": 8, "test": 4}
Listen = Callable[[Event], None]


@pytest.fixture
def process() -> Iterator[EngineProcess]:
    with engine_process() as process:
        yield process


def reference(record: Record) -> InputReference:
    return InputReference(digest=record.output, key=record.key)


class Training:
    """A stage `pretrain` over tokens that are made where it is asked for, in some store."""

    def __init__(self, store: str, **training: Any) -> None:
        self.store = store
        documents = self._make("documents", {"source": SOURCE})
        tokenizer = self._make("tokenizer", TOKENIZER)
        self.tokens = self._make("tokens", {"loss_on": "target"}, documents=documents, tokenizer=tokenizer)
        self.config = pretraining(packing="documents", validation={"every": 10, "exact_match_rows": 4}, **training)

    def _make(self, stage: str, config: dict[str, Any], **inputs: Record) -> Record:
        return produce(Store.open(self.store), self._work(stage, config, {}, **inputs), lambda event: None).record

    def _work(self, stage: str, config: dict[str, Any], runtime: dict[str, Any], **inputs: Record) -> Work:
        return Work.model_validate(
            {
                "name": stage,
                "stage": stage,
                "config": config,
                "inputs": {name: reference(record) for name, record in inputs.items()},
                "runtime": runtime,
                "store": self.store,
            }
        )

    def work(self, **layout: Any) -> Work:
        """To be done by as many processes as `layout` says; a checkpoint after every step."""
        config = {"engine": "torch", "precision": "float32", **self.config}
        runtime = {"layout": layout, "checkpoints": {"every_seconds": 0}}
        return self._work("pretrain", config, runtime, tokens=self.tokens)


def ranks(process: EngineProcess) -> list[int]:
    """The processes of the stage under way, in the order of their numbers."""
    assert process._process is not None
    found = [pid for pid in descendants(process._process.pid) if runs_module(pid, "tasks.rank")]
    return sorted(found, key=lambda pid: (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")[-2])


def after(step: int, act: Callable[[], None]) -> Listen:
    """Acts once when training has come to some step."""
    done: list[Event] = []

    def listen(event: Event) -> None:
        if event["event"] == "Progress" and event["step"] >= step and not done:
            done.append(event)
            act()

    return listen


def ignore(event: Event) -> None:
    pass


def validations(record: Record) -> list[dict[str, Any]]:
    found: Any = record.metrics["validation"]
    return list(found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """What two processes make of it that nobody disturbs."""
    store = str(tmp_path_factory.mktemp("undisturbed") / "store")
    with engine_process() as process:
        return process.do(Training(store, steps=30).work(processes=2), ignore).record


@pytest.mark.slow
def test_several_processes_make_what_one_makes(process: EngineProcess, undisturbed: Record, tmp_path: Path) -> None:
    events: list[Event] = []
    store = str(tmp_path / "one")
    one = process.do(Training(store, steps=30).work(processes=1), events.append).record
    assert one.key == undisturbed.key
    assert one.metrics["device"] == "cpu"
    assert undisturbed.metrics["device"] == "2 × cpu"
    for name in ("steps", "tokens", "parameters", "blend"):
        assert undisturbed.metrics[name] == one.metrics[name]
    found, expected = validations(undisturbed), validations(one)
    assert [record["step"] for record in found] == [10, 20, 30]
    losses, wanted = ([record["loss"] for record in records] for records in (found, expected))
    np.testing.assert_allclose(losses, wanted, atol=1e-3)


@pytest.mark.slow
def test_what_is_said_is_said_once(process: EngineProcess, tmp_path: Path) -> None:
    events: list[Event] = []
    training = Training(str(tmp_path / "store"), steps=20)
    record = process.do(training.work(processes=3, fsdp=3), events.append).record
    assert [event["step"] for event in events if event["event"] == "Validation"] == [10, 20]
    assert record.metrics["device"] == "3 × cpu"
    assert {"loss.png", "training.csv"} <= set(Store.open(training.store).attachments(record.key))
    assert ranks(process) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_the_death_of_one_ends_all_and_the_stage_goes_on(
    process: EngineProcess, undisturbed: Record, tmp_path: Path, number: int
) -> None:
    work = Training(str(tmp_path / "store"), steps=30).work(processes=2)
    seen: list[int] = []

    def strike() -> None:
        seen.extend(ranks(process))
        kill(seen[number])

    with pytest.raises(StageFailed, match=rf"process {number} of 2 ended \(killed by signal 9\)$"):
        process.do(work, after(12, strike))
    assert len(seen) == 2
    assert all(wait_until_gone(pid, 5) for pid in seen)
    notes: list[str] = []
    again = process.do(work, lambda event: notes.append(event.get("text", ""))).record
    assert any("going on from the checkpoint of step" in note for note in notes)
    assert again.output == undisturbed.output


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["stage", "rank"])
def test_all_stop_together_and_go_on(process: EngineProcess, undisturbed: Record, tmp_path: Path, whom: str) -> None:
    """A stage that is told to stop, and one process alone that gets a signal: either way a checkpoint is written."""
    work = Training(str(tmp_path / "store"), steps=30).work(processes=2)
    seen: list[int] = []

    def stop() -> None:
        seen.extend(ranks(process))
        if whom == "stage":
            process.interrupt()
        else:
            os.kill(seen[1], signal.SIGTERM)

    with pytest.raises(StageInterrupted, match="it goes on from there when run again"):
        process.do(work, after(12, stop))
    assert all(wait_until_gone(pid, 5) for pid in seen)
    with engine_process() as another:
        notes: list[str] = []
        again = another.do(work, lambda event: notes.append(event.get("text", ""))).record
    assert any("going on from the checkpoint of step" in note for note in notes)
    assert again.output == undisturbed.output


@pytest.mark.slow
def test_nothing_is_left_where_the_stages_own_process_is_killed(process: EngineProcess, tmp_path: Path) -> None:
    work = Training(str(tmp_path / "store"), steps=2000).work(processes=2)
    seen: list[int] = []

    def strike() -> None:
        seen.extend(ranks(process))
        assert process._process is not None
        kill(process._process.pid)

    with pytest.raises(StageFailed, match="killed by signal 9"):
        process.do(work, after(10, strike))
    assert len(seen) == 2
    assert all(wait_until_gone(pid, 5) for pid in seen)


@pytest.mark.slow
def test_what_the_user_can_mend_arrives_as_such_and_once(process: EngineProcess, tmp_path: Path) -> None:
    training = Training(str(tmp_path / "store"), steps=20)
    with pytest.raises(
        UserError, match=r"^layout: data 3 × fsdp 1 does not fit 2 processes; set layout.processes to 3$"
    ):
        process.do(training.work(processes=2, data=3), ignore)
    assert ranks(process) == []
    with pytest.raises(UserError, match=r"layout\.tensor 2: engine 'torch' does not divide matrices"):
        process.do(training.work(processes=2, tensor=2), ignore)
    # Steps that are not finite are seen by all of them at different times.
    training.config["training"] |= {"skipped_steps_limit": 3, "optimizer": {"learning_rate": 1e30, "clip": None}}
    with pytest.raises(UserError, match="3 steps in a row, up to step"):
        process.do(training.work(processes=2), ignore)
    assert ranks(process) == []


@pytest.mark.slow
def test_a_defect_in_one_brings_its_traceback(process: EngineProcess, tmp_path: Path) -> None:
    training = Training(str(tmp_path / "store"), steps=20)
    training.config["training"] |= {"batch_size": 0}
    started = time.monotonic()
    with pytest.raises(StageFailed, match=r"(?s)process \d of 2:\nTraceback .*ValidationError"):
        process.do(training.work(processes=2), ignore)
    assert time.monotonic() - started < 60
    assert ranks(process) == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["jax", "mlx"])
def test_other_engines_meet_in_their_own_way(process: EngineProcess, tmp_path: Path, engine: EngineName) -> None:
    """JAX through its coordinator, MLX through its ring."""
    if not is_installed(engine):
        pytest.skip(f"{engine} is not installed")
    work = Training(str(tmp_path / "store"), steps=20).work(processes=2)
    one, two = (
        Work.model_validate({**work.model_dump(), "config": {**work.config, "engine": engine}, "runtime": runtime})
        for runtime in ({}, {"layout": {"processes": 2}})
    )
    made = process.do(two, ignore).record
    assert made.metrics["device"] == "2 × cpu"
    assert ranks(process) == []
    alone = process.do(one.model_copy(update={"store": Training(str(tmp_path / "other")).store}), ignore).record
    losses, wanted = ([record["loss"] for record in validations(record)] for record in (made, alone))
    np.testing.assert_allclose(losses, wanted, atol=1e-3)
