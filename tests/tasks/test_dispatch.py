"""Where a stage is done, and for how long at most."""

from collections.abc import Iterator

import pytest

from artifacts.store import Store
from common.errors import StageFailed, StageInterrupted, UserError
from tasks.dispatch import dispatch, do_here
from tasks.process import EngineProcess, engine_process
from tasks.registry import STAGES
from tasks.remote import run_on_worker
from tasks.stage import Runtime
from tasks.work import Work
from tests.tasks.test_process import documents, ignore
from tests.tasks.training_stages import pretraining


def training(runtime: Runtime) -> Work:
    config = STAGES["pretrain"].config.model_validate({**pretraining(), "engine": "torch"})
    return Work(
        name="base",
        stage="pretrain",
        config=config.model_dump(mode="json"),
        inputs={},
        runtime=runtime,
        store=Store.open().url,
    )


@pytest.fixture
def process() -> Iterator[EngineProcess]:
    with engine_process() as process:
        yield process


@pytest.mark.parametrize("kind", ["without an engine", "with an engine"])
def test_a_stage_that_takes_too_long_has_failed(kind: str, process: EngineProcess) -> None:
    runtime = Runtime(time_limit_seconds=3.0)
    work = documents().model_copy(update={"runtime": runtime}) if kind == "without an engine" else training(runtime)
    # Somebody else holds it, so that it waits for ever.
    with (
        Store.open().lease(work.checkpoint_key),
        pytest.raises(StageFailed, match=f"stage '{work.name}' took longer than its time_limit_seconds, 3; what it"),
    ):
        do_here(work, process, ignore, lambda: False)
    # The process does the next one.
    assert not do_here(documents(21), process, ignore, lambda: False).reused


def test_a_stage_in_time_is_let_be(process: EngineProcess) -> None:
    work = documents().model_copy(update={"runtime": Runtime(time_limit_seconds=300.0)})
    assert not dispatch(work, process, ignore).reused
    assert dispatch(work, process, ignore).reused


def test_a_stop_is_no_time_limit(process: EngineProcess) -> None:
    work = documents().model_copy(update={"runtime": Runtime(time_limit_seconds=300.0)})
    with Store.open().lease(work.checkpoint_key), pytest.raises(StageInterrupted):
        do_here(work, process, ignore, lambda: True)


def test_what_the_store_has_needs_no_worker(process: EngineProcess) -> None:
    work = documents()
    dispatch(work, process, ignore)
    assert dispatch(work.model_copy(update={"runtime": Runtime(worker="cuda")}), process, ignore).reused


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("memory://x", "a memory:// store is seen by one process alone"),
        ("ftp://user:secret@host/store", "has a password in it, which every run would show"),
    ],
)
def test_stores_that_workers_cannot_share_are_refused(store: str, message: str) -> None:
    work = documents().model_copy(update={"store": store, "runtime": Runtime(worker="cpu")})
    with pytest.raises(UserError, match=message) as raised:
        run_on_worker(work, ignore, lambda: False, lambda: False)
    assert "secret" not in str(raised.value)
