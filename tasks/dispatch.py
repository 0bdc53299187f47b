"""Runs one stage, here or on a worker: the only Prefect task, whose runs bear the stages' names."""

import functools
import threading
from collections.abc import Callable
from typing import Any, Self

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Cancelled

from artifacts.store import Store
from common.errors import StageFailed, StageInterrupted, TransientError, UserError
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
    limit = _TimeLimit(work, process.stop_stage)
    try:
        if work.definition.has_engine:
            return process.do(work, listener, limit)
        with limit:
            store = Store.open(work.store)
            stops = lambda: limit.is_up or should_stop()  # noqa: E731
            return produce(store, work, lambda event: listener(as_event(event)), stops)
    except StageInterrupted as error:
        if not limit.is_up or should_stop():
            raise
        raise StageFailed(
            f"stage '{work.name}' took longer than its time_limit_seconds, {limit.seconds:g}; what it saved is kept"
        ) from error


class _TimeLimit:
    """A block in which a stage is told to stop when its time is up."""

    def __init__(self, work: Work, stop: Callable[[], None]) -> None:
        self.seconds = work.runtime.time_limit_seconds
        self.is_up = False
        self._stop = stop

    def __enter__(self) -> Self:
        self._timer = threading.Timer(self.seconds or threading.TIMEOUT_MAX, self._end)
        self._timer.daemon = True
        if self.seconds is not None:
            self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.is_up = True
        self._stop()


def _is_worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """What the user has to mend would end the same way again."""
    try:
        state.result()
    except TransientError:
        return True
    except UserError:
        return False
    except Exception:
        return True
    return False


def stage_task(name: str, runtime: Runtime, body: Callable[..., Outcome]) -> Task[..., Outcome]:
    """The Prefect task of one stage, under its name and with its retries; one that is interrupted is Cancelled.

    The store decides what is done again, not Prefect's cache.
    """

    @functools.wraps(body)
    def stoppable(*arguments: Any, **named: Any) -> Any:
        try:
            return body(*arguments, **named)
        except StageInterrupted as error:
            return Cancelled(message=str(error))

    return Task(
        stoppable,
        name=name,
        task_run_name=name if runtime.worker == "local" else f"{name} on {runtime.worker}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=runtime.retries,
        retry_delay_seconds=runtime.retry_delay_seconds,
        retry_condition_fn=_is_worth_retrying,
    )
