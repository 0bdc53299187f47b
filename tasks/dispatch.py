"""Runs one stage: the only Prefect task, whose runs bear the stages' names."""

from collections.abc import Callable
from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from artifacts.store import Store
from common.errors import StageInterrupted, UserError
from tasks.events import Listener, as_event
from tasks.process import EngineProcess
from tasks.produce import produce
from tasks.stage import Runtime
from tasks.work import Outcome, Work


def dispatch(
    work: Work, process: EngineProcess, listener: Listener, should_stop: Callable[[], bool] = lambda: False
) -> Outcome:
    """Does a stage's work: in the engine's child process where it needs an engine, else in this one, where
    `should_stop` is asked now and then.

    Raises UserError, StageInterrupted, StageFailed, and what a stage without an engine raises.
    """
    store = Store.open(work.store)
    found = store.find(work.key)
    if found is not None:
        return Outcome(found, reused=True)
    if work.definition.has_engine:
        return process.do(work, listener)
    return produce(store, work, lambda event: listener(as_event(event)), should_stop)


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
        task_run_name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=runtime.retries,
        retry_delay_seconds=runtime.retry_delay_seconds,
        retry_condition_fn=_is_worth_retrying,
    )
