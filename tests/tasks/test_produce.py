"""A stage's work is done exactly once, and what it leaves behind is complete or nothing."""

import dataclasses
import logging
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from artifacts.record import InputReference, Record
from artifacts.store import DamagedObject, Store
from common.config import FrozenModel
from common.errors import StageInterrupted, UserError
from tasks.produce import produce
from tasks.registry import STAGES
from tasks.stage import Context, Kind, Metrics, Runtime, Stage
from tasks.work import Outcome, Work


@dataclass(frozen=True)
class Halfway:
    """An event of the stage below."""

    share: float


class Config(FrozenModel):
    """Of the stage below."""

    text: str = "a"
    """What it writes."""
    engine: str = "torch"
    """What it is said to be made with."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """Registers a stage `write` of up to two inputs, and lists what its runs were given."""
    given: list[Context] = []

    def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
        given.append(context)
        context.report(Halfway(0.5))
        if context.should_stop():
            raise StageInterrupted("stopped")
        (context.logs / "log.txt").write_text("log")
        if config.text == "wrong":
            (context.output / "half").write_text("")
            raise UserError("the text is wrong")
        parts = [config.text, *((inputs[name] / "text").read_text() for name in sorted(inputs))]
        (context.output / "text").write_text("+".join(parts))
        return {"parts": len(parts), "notes": ["a note"]}

    stage = Stage(
        name="write",
        version=3,
        config=Config,
        output=Kind.DOCUMENTS,
        run=run,
        optional_inputs={"left": Kind.DOCUMENTS, "right": Kind.DOCUMENTS},
    )
    monkeypatch.setitem(STAGES, "write", stage)
    return given


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def work(store: Store, text: str = "a", name: str = "written", **inputs: Record) -> Work:
    return Work(
        name=name,
        stage="write",
        config=Config(text=text).model_dump(),
        inputs={part: InputReference(digest=record.output, key=record.key) for part, record in inputs.items()},
        store=store.url,
        flow_run_id="run-1",
    )


def make(store: Store, *arguments: Any, **inputs: Any) -> Record:
    return produce(store, work(store, *arguments, **inputs), lambda event: None).record


def test_it_is_done_once_and_recorded_whole(store: Store, runs: list[Context]) -> None:
    events: list[object] = []
    first = produce(store, work(store), events.append)
    record = first.record
    assert not first.reused
    assert events == [Halfway(0.5)]
    assert (record.stage, record.version, record.name) == ("write", 3, "written")
    assert record.config == {"text": "a", "engine": "torch"}
    assert record.metrics == {"parts": 1}
    assert tuple(record.notes) == ("a note",)
    assert record.engine == "torch"
    assert record.flow_run_id == "run-1"
    assert record.started is not None
    assert record.started <= record.ended
    assert record.packages["python"]
    assert record.hardware["cores"]
    assert (store.fetch(record) / "text").read_text() == "a"
    assert list(store.attachments(record.key)) == ["log.txt", "stage.log"]
    # Neither the name nor how carefully it runs makes it another work.
    again = work(store, name="renamed").model_copy(update={"runtime": Runtime(retries=9)})
    assert produce(store, again, events.append) == Outcome(record, reused=True)
    assert len(runs) == 1


def test_other_content_is_other_work(store: Store, runs: list[Context], monkeypatch: pytest.MonkeyPatch) -> None:
    left = make(store, "a")
    right = make(store, "b")
    both = make(store, "c", left=left, right=right)
    assert (store.fetch(both) / "text").read_text() == "c+a+b"
    assert make(store, "c", left=right, right=left).key != both.key
    monkeypatch.setitem(STAGES, "write", dataclasses.replace(STAGES["write"], version=4))
    assert work(store).key != left.key
    assert len(runs) == 4


def test_what_failed_leaves_nothing_but_its_logs(tmp_path: Path, runs: list[Context]) -> None:
    store = Store.open(str(tmp_path / "store"))
    wrong = work(store, "wrong")
    with pytest.raises(UserError, match="the text is wrong"):
        produce(store, wrong, lambda event: None)
    assert store.find(wrong.key) is None
    assert not list((tmp_path / "store" / "tmp").iterdir())
    assert not list(store.backend.leases())
    assert (runs[0].logs / "log.txt").read_text() == "log"
    # They go on where they stopped when the stage is run again.
    with pytest.raises(UserError):
        produce(store, wrong, lambda event: None)
    assert runs[1].logs == runs[0].logs
    assert runs[1].scratch[1] == runs[0].scratch[1]
    assert runs[1].output != runs[0].output


def test_told_to_stop(store: Store, runs: list[Context]) -> None:
    with pytest.raises(StageInterrupted):
        produce(store, work(store), lambda event: None, should_stop=lambda: True)
    assert store.find(work(store).key) is None
    assert make(store).notes == ["a note"]


def test_checkpoints_lie_under_the_key_without_the_engine(store: Store, runs: list[Context]) -> None:
    torch = work(store)
    jax = torch.model_copy(update={"config": {**torch.config, "engine": "jax"}})
    jax = Work.model_validate(jax.model_dump())
    assert torch.key != jax.key
    for one in (torch, jax):
        produce(store, one, lambda event: None)
    assert runs[0].scratch[1] == runs[1].scratch[1]
    assert runs[0].scratch[1].endswith(torch.checkpoint_key)


def test_two_at_once_make_it_once(store: Store, runs: list[Context], caplog: pytest.LogCaptureFixture) -> None:
    begun, go_on = threading.Event(), threading.Event()
    outcomes: list[Outcome] = []

    def slowly(event: object) -> None:
        begun.set()
        assert go_on.wait(30)

    def said(event: object) -> None:
        raise AssertionError("it is made twice")

    first = threading.Thread(target=lambda: outcomes.append(produce(store, work(store), slowly)))
    second = threading.Thread(target=lambda: outcomes.append(produce(store, work(store, name="other"), said)))
    with caplog.at_level(logging.WARNING, "cairn"):
        first.start()
        assert begun.wait(30)
        second.start()
        while not caplog.messages:
            second.join(0.01)
            assert second.is_alive()
        go_on.set()
        first.join(30)
        second.join(30)
    assert [outcome.reused for outcome in outcomes] == [False, True]
    assert outcomes[0].record == outcomes[1].record
    assert caplog.messages[0].startswith("stage 'other' is being made by ")
    assert caplog.messages[0].endswith("; waiting for it")
    assert len(runs) == 1


def test_an_input_that_is_gone(store: Store, runs: list[Context]) -> None:
    left = make(store)
    store.backend.remove(f"objects/{left.output}")
    with pytest.raises(DamagedObject, match=r"input 'left' of stage 'written' is gone .*: run the recipe again"):
        make(store, "b", left=left)


def test_the_lineage_as_published_text(store: Store, runs: list[Context]) -> None:
    source = make(store, "a", "source")
    middle = make(store, "b", "middle", left=source)
    make(store, "c", "end", left=middle, right=source)
    digests = {record.name: record.output[:12] for record in (source, middle)}
    assert runs[-1].lineage.splitlines() == [
        f"- write `{digests['middle']}`",
        f"  - write `{digests['source']}`",
        f"- write `{digests['source']}`",
    ]
