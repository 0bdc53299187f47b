"""Where a stage is done, and for how long at most."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from artifacts.store import Store
from common.errors import StageFailed, StageInterrupted, UserError
from tasks.dispatch import dispatch, do_here
from tasks.process import EngineProcess, engine_process
from tasks.registry import STAGES
from tasks.remote import refuse_password, run_on_worker
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
    assert not process.do(documents(21), ignore).reused


def test_a_stage_that_waits_for_its_turn_stops_nobody_else(process: EngineProcess) -> None:
    first, second = documents(22), training(Runtime(time_limit_seconds=0.5))
    begun = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        with Store.open().lease(first.checkpoint_key):
            one = threads.submit(process.do, first, lambda event: begun.set())
            assert begun.wait(60)
            other = threads.submit(do_here, second, process, ignore, lambda: False)
            time.sleep(1.5)
            assert not one.done()
        assert not one.result().reused
        # Its time begins with its turn.
        with pytest.raises(StageFailed, match="took longer than its time_limit_seconds"):
            other.result()


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


def test_a_store_that_workers_cannot_see_is_refused() -> None:
    work = documents().model_copy(update={"store": "memory://x", "runtime": Runtime(worker="cpu")})
    with pytest.raises(UserError, match="a memory:// store is seen by one process alone"):
        run_on_worker(work, ignore, lambda: False, lambda: False)


def test_a_password_in_a_stores_url_is_refused() -> None:
    with pytest.raises(UserError, match="has a password in it, which every run would show") as raised:
        refuse_password("ftp://user:secret@host/store")
    assert "secret" not in str(raised.value)
