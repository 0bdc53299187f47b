"""Runs one stage, here or on a worker: the only Prefect task, whose runs bear the stages' names."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from artifacts.store import Store
from common.errors import StageFailed, StageInterrupted, UserError
from tasks.events import Listener, as_event
from tasks.process import EngineProcess
from tasks.produce import produce
from tasks.remote import run_on_worker
from tasks.stage import Runtime
from tasks.work import Outcome, Work


def dispatch(
    work: Work,
    process: EngineProcess,
    listener: Listener,
    should_stop: Callable[[], bool] = lambda: False,
    leaves: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Does a stage's work where its recipe says, unless the store has it.

    `leaves`: whether a stage on a worker is left to itself when told to stop, instead of being cancelled.

    Raises UserError, StageInterrupted, StageFailed, and what a stage without an engine raises.
    """
    found = Store.open(work.store).find(work.key)
    if found is not None:
        return Outcome(found, reused=True)
    if work.runtime.worker != "local":
        return run_on_worker(work, listener, should_stop, leaves)
    return do_here(work, process, listener, should_stop)


def do_here(work: Work, process: EngineProcess, listener: Listener, should_stop: Callable[[], bool]) -> Outcome:
    """Does a work on this machine: in the engine's child process where it needs an engine, else in this one, where
    `should_stop` is asked now and then.

    Raises as `dispatch` does; StageFailed where the stage's time is up.
    """
    with _time_limit(work, process) as is_up:
        try:
            if work.definition.has_engine:
                return process.do(work, listener)
            store = Store.open(work.store)
            return produce(store, work, lambda event: listener(as_event(event)), lambda: is_up() or should_stop())
        except StageInterrupted as error:
            if not is_up() or should_stop():
                raise
            limit = work.runtime.time_limit_seconds
            raise StageFailed(
                f"stage '{work.name}' took longer than its time_limit_seconds, {limit:g}; what it saved is kept"
            ) from error


@contextmanager
def _time_limit(work: Work, process: EngineProcess) -> Iterator[Callable[[], bool]]:
    """Stops the stage when its time is up; gives whether it is."""
    up = threading.Event()

    def stop() -> None:
        up.set()
        process.stop_stage()

    if work.runtime.time_limit_seconds is None:
        yield up.is_set
        return
    timer = threading.Timer(work.runtime.time_limit_seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield up.is_set
    finally:
        timer.cancel()


def _is_worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """What the user has to mend, and what the user stopped, would end the same way again."""
    try:
        state.result()
    except (UserError, StageInterrupted):
        return False
    except Exception:
        return True
    return False


def stage_task(name: str, runtime: Runtime, body: Callable[..., Outcome]) -> Task[..., Outcome]:
    """The Prefect task of one stage, under its name and with its retries.

    The store decides what is done again, not Prefect's cache.
    """
    return Task(
        body,
        name=name,
        task_run_name=name if runtime.worker == "local" else f"{name} on {runtime.worker}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=runtime.retries,
        retry_delay_seconds=runtime.retry_delay_seconds,
        retry_condition_fn=_is_worth_retrying,
    )
