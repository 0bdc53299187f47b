"""The scheduled re-evaluation of models: what changed is evaluated, the rest is reused, and a fall is told."""

import fnmatch
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from prefect import Task, flow, get_run_logger, runtime
from prefect.events import emit_event
from prefect.states import Completed, Failed
from pydantic import Field

from artifacts.record import Record
from artifacts.store import Store
from common.errors import StageFailed, StageInterrupted, UserError, suggestion
from flows.evaluating import Asking, Evaluated, evaluate
from flows.own_run import OwnRun
from flows.showing import show_stage
from flows.stopping import Stopping
from flows.view import LogView
from models.engine import EngineName
from tasks.dispatch import dispatch, stage_task
from tasks.process import EngineProcess, engine_process
from tasks.registry import STAGES
from tasks.remote import REFUSED
from tasks.reporting.significance import LEVEL, Difference
from tasks.stage import Kind, Worker
from tasks.work import Outcome, Work

REGRESSED = "cairn.evaluation.regressed"
"""The event that tells of a model which is significantly worse than it was."""
logger = logging.getLogger("cairn.flows")


@flow(name="evaluation", persist_result=False)
def evaluation(
    models: list[str] = ["models/*"],  # noqa: B006 - nobody writes to it
    tasks: list[str] = ["seed"],  # noqa: B006
    limit: Annotated[int, Field(ge=0)] = 0,
    worker: Worker = "local",
    engine: EngineName | None = None,
    level: Annotated[float, Field(gt=0, lt=1)] = LEVEL,
) -> Any:
    """Evaluates models again. What the store has is reused; where a model, its benchmarks' data or lm-eval changed, it
    is asked anew, and its report compares it with the time before.

    Args:
        models: Names of the store, folders of published models, and ids on the hub; * stands for any part of a name.
        tasks: Tasks, groups and tags of lm-eval, the group `seed`, `perplexity` and `behaviour`.
        limit: Documents of each task that are asked, 0 for all.
        worker: Where they are asked: on a worker of a pool, or `local` for the machine that this runs on.
        engine: What answers; the one that suits the worker unless given.
        level: The p below which a difference is called significant.
    """
    asking = Asking(tasks=tuple(tasks), limit=limit or None, worker=worker, engine=engine)
    own = OwnRun()
    store = Store.open()
    problems: list[str] = []
    told: list[str] = []
    falls = 0
    try:
        refs = [ref for pattern in models for ref in matching(store, pattern)]
        with engine_process() as process, Stopping(process.interrupt) as stopping:
            for ref in dict.fromkeys(refs):
                try:
                    found = _evaluated(store, ref, asking, process, stopping, level)
                except (UserError, StageFailed) as error:
                    problems.append(f"{ref}: {error}")
                    get_run_logger().error("%s", problems[-1])
                    continue
                told.append(f"{ref}: {found.report.summary if found.is_news else 'as it was'}")
                falls += len(found.falls)
                for fall in found.falls:
                    _tell_fall(ref, found, fall)
    except UserError as error:
        own.end(Failed(name=REFUSED, message=str(error)))
    except StageInterrupted:
        # Prefect ends a run whose worker was stopped; what is done is kept.
        raise
    message = "; ".join([*told, f"{falls} significantly worse"])
    if problems:
        own.end(Failed(message="; ".join([*problems, message])))
    return Completed(message=message)


def matching(store: Store, pattern: str) -> list[str]:
    """The models that a pattern stands for: names in the store, without those of single stages unless it has an @; or
    else folders that hold one; or itself, where it is no pattern.

    Raises UserError where a pattern stands for none.
    """
    if not any(character in pattern for character in "*?["):
        return [pattern]
    names = [
        name
        for name, key in store.names().items()
        if fnmatch.fnmatchcase(name, pattern) and ("@" in pattern or "@" not in name) and _has_model(store, key)
    ]
    folders = [str(path.parent) for path in sorted(_folders(pattern))]
    if not names and not folders:
        raise UserError(f"no model is called '{pattern}'{suggestion(pattern, store.names())}")
    return names or folders


def _folders(pattern: str) -> Iterator[Path]:
    path = Path(pattern).expanduser()
    root = Path(path.anchor) if path.is_absolute() else Path()
    return root.glob(str(Path(*path.parts[1:] if path.is_absolute() else path.parts) / "config.json"))


def _has_model(store: Store, key: str) -> bool:
    record = store.read_record(key)
    kinds = (Kind.MODEL, Kind.PUBLISHED)
    return record is not None and record.stage in STAGES and STAGES[record.stage].output in kinds


def _evaluated(
    store: Store, ref: str, asking: Asking, process: EngineProcess, stopping: Stopping, level: float
) -> Evaluated:
    run_logger = get_run_logger()

    def do(work: Work) -> Record:
        listener = LogView(lambda stage, line: run_logger.info("%s, %s: %s", ref, stage, line)).listener(work.name)

        def body() -> Outcome:
            return dispatch(work, process, listener, lambda: stopping.requested)

        if store.find(work.key) is not None:
            return body().record
        task: Task[..., Outcome] = stage_task(f"{ref} {work.name}", work.runtime, body)
        return task().record

    found = evaluate(store, ref, asking, do, level, str(runtime.flow_run.id))
    if found.is_news:
        show_stage("evaluation", ref, store, found.report)
    return found


def _tell_fall(ref: str, found: Evaluated, fall: Difference) -> None:
    """Emits the event of a fall, with the model, the task and both scores."""
    get_run_logger().warning(
        "%s is worse in %s %s: %.4g, and %.4g the time before (p %.2g)",
        *(ref, fall.task, fall.metric, fall.first, fall.second, fall.p),
    )
    emit_event(
        event=REGRESSED,
        resource={"prefect.resource.id": f"cairn.model.{ref}", "prefect.resource.name": ref},
        related=[
            {"prefect.resource.id": f"prefect.flow-run.{runtime.flow_run.id}", "prefect.resource.role": "flow-run"}
        ],
        payload={
            "model": ref,
            "task": fall.task,
            "metric": fall.metric,
            "group": fall.group,
            "score": fall.first,
            "before": fall.second,
            "documents": fall.n,
            "p": fall.p,
            "report": found.report.key,
        },
    )
