"""The scheduled re-evaluation of models: what changed is evaluated, the rest is reused, and a fall is told."""

import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from prefect import State, flow, get_run_logger, runtime
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.states import Completed, Failed
from pydantic import Field

from artifacts.record import Record
from artifacts.store import Store
from common.errors import StageFailed, StageInterrupted, TransientError, UserError, suggestion
from flows.evaluating import Asking, Do, Evaluated, evaluate, history, keep, questions, renewed
from flows.own_run import OwnRun
from flows.showing import show_stage
from flows.stopping import Stopping
from flows.view import LogView
from models.engine import EngineName
from tasks.dispatch import dispatch, stage_task
from tasks.process import EngineProcess, engine_process
from tasks.produce import produce
from tasks.registry import STAGES
from tasks.remote import REFUSED, refuse_password
from tasks.reporting.significance import LEVEL, Difference
from tasks.reporting.wording import p_text
from tasks.scores import figure
from tasks.stage import Kind, Worker
from tasks.work import Outcome, Work

REGRESSED = "cairn.evaluation.regressed"
"""The event that tells of a model which is significantly worse than it was."""
_TELL_SECONDS = 60.0
"""How long the server may take for the events."""


@flow(name="evaluation", persist_result=False)
def evaluation(
    models: Annotated[list[str], Field(min_length=1)] = ["models/*"],  # noqa: B006 - nobody writes to it
    tasks: Annotated[list[str], Field(min_length=1)] = ["seed"],  # noqa: B006
    limit: Annotated[int, Field(ge=0)] = 0,
    num_fewshot: Annotated[int, Field(ge=-1)] = -1,
    worker: Worker = "local",
    engine: EngineName | None = None,
    level: Annotated[float, Field(gt=0, lt=1)] = LEVEL,
) -> Any:
    """Evaluates models again. What the store has is reused; where a model, its benchmarks' data or lm-eval changed, it
    is asked anew, and its report compares it with the time before.

    Args:
        models: Names of the store, folders of published models, and ids on the hub; * stands for any part of a name.
            Relative folders, such as `published/*`, are looked for where the worker of `pipeline` was started.
        tasks: Tasks, groups and tags of lm-eval, the group `seed`, `perplexity` and `behaviour`. A group for which
            lm-eval defines a figure, such as `mmlu`, is reported with it.
        limit: Documents of each task of lm-eval that are asked, 0 for all.
        num_fewshot: Examples before each question of lm-eval, -1 for as many as the task says.
        worker: Where they are asked: on a worker of a pool, or `local` for the machine that this runs on.
        engine: What answers; the one that suits the worker unless given.
        level: The p below which a difference is called significant.
    """
    own = OwnRun()
    try:
        few = None if num_fewshot < 0 else num_fewshot
        asking = Asking(tasks=tuple(tasks), limit=limit or None, num_fewshot=few, worker=worker, engine=engine)
        questions(asking)  # what is wrong with these is wrong for every model
        this_round = _Round(Store.open(), asking, level, own)
        refuse_password(this_round.store.url)
        this_round.store.be_patient()
        with engine_process() as process, Stopping(process.interrupt) as stopping:
            try:
                this_round.evaluate_all(models, process, stopping)
            except StageInterrupted as error:
                own.end_interrupted(error, by_signal=stopping.requested)
    except UserError as error:
        own.end(Failed(name=REFUSED, message=str(error)))
    return this_round.ended()


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


class _Round:
    """One round of evaluations, inside the flow: what came of it so far."""

    def __init__(self, store: Store, asking: Asking, level: float, own: OwnRun) -> None:
        self.store = store
        self._asking = asking
        self._level = level
        self._own = own
        self._problems: list[str] = []
        self._told: list[str] = []
        self._fallen: dict[str, Evaluated] = {}

    def evaluate_all(self, patterns: Sequence[str], process: EngineProcess, stopping: Stopping) -> None:
        """Evaluates every model that a pattern stands for; one that cannot be does not keep the others from it. Raises
        StageInterrupted where it is stopped."""
        for ref in dict.fromkeys(self._matching(patterns)):
            try:
                found = self._evaluated(ref, process, stopping)
            except (UserError, StageFailed) as error:
                self._has_problem(f"{ref}: {error}")
                continue
            self._told.append(f"{ref}: {found.report.summary if found.is_news else 'as it was'}")
            if found.falls:
                self._fallen[ref] = found

    def ended(self) -> State[Any]:
        """How the run ends. Where that is not well, it is ended here, and falls are told of as its last act: whatever
        reacts to them has the last word on how it ended. Falls that were not told of are found again the next time."""
        count = sum(len(found.falls) for found in self._fallen.values())
        message = "; ".join([*self._problems, *self._told, f"{count} significantly worse"])
        state: State[Any] = (Failed if self._problems else Completed)(message=message)
        if self._problems or self._fallen:
            self._own.end(state, last=self._tell_falls)
        return state

    def _matching(self, patterns: Sequence[str]) -> Iterator[str]:
        for pattern in patterns:
            try:
                yield from matching(self.store, pattern)
            except UserError as error:
                self._has_problem(str(error))

    def _has_problem(self, problem: str) -> None:
        self._problems.append(problem)
        get_run_logger().error("%s", problem)

    def _evaluated(self, ref: str, process: EngineProcess, stopping: Stopping) -> Evaluated:
        run_logger = get_run_logger()

        def do(work: Work) -> Record:
            log = LogView(lambda stage, line: run_logger.info("%s, %s: %s", ref, stage, line)).listener(work.name)

            def body() -> Outcome:
                return dispatch(work, process, log, lambda: stopping.requested, lambda: not self._own.is_cancelled)

            known = self.store.find(work.key)
            if known is not None:
                return known
            # `Any` to mypy: it takes the call for one without a state.
            state: Any = stage_task(f"{ref} {work.name}", work.runtime, body)(return_state=True)
            if state.is_cancelled():
                raise StageInterrupted(state.message)
            record: Record = state.result().record
            return record

        run = str(runtime.flow_run.id)
        # A fall is kept when it was told of.
        found = evaluate(self.store, ref, self._asking, do, self._level, run, keeps=lambda found: not found.falls)
        if found.is_news:
            show_stage("evaluation", ref, self.store, found.report)
        return found

    def _tell_falls(self) -> None:
        def do(work: Work) -> Record:
            return produce(self.store, work, lambda event: None).record

        for ref, found in self._fallen.items():
            try:
                self._tell(ref, found, do)
            except (UserError, StageFailed, TransientError, OSError) as error:
                get_run_logger().warning("%s: its fall was not kept, and the next run tells of it: %s", ref, error)

    def _tell(self, ref: str, found: Evaluated, do: Do) -> None:
        with history(self.store, ref) as lease:
            # Another round may have found and told the same meanwhile.
            latest = renewed(self.store, ref, found, do, self._level, str(runtime.flow_run.id))
            if latest is None:
                return
            for fall in latest.falls:
                _tell_fall(ref, latest, fall)
            sent = EventsWorker.drain_all(timeout=_TELL_SECONDS)
            assert isinstance(sent, tuple), "there is no loop here"
            if sent[1]:
                get_run_logger().warning("the Prefect server did not take the events; the next run tells of it")
                return
            keep(self.store, ref, latest, lease)


def _tell_fall(ref: str, found: Evaluated, fall: Difference) -> None:
    """Emits the event of a fall, with the model, the task and both scores."""
    get_run_logger().warning(
        "%s is worse in %s %s: %s, and %s the time before (p %s)",
        *(ref, fall.task, fall.metric),
        *(figure(fall.first, fall.is_share), figure(fall.second, fall.is_share), p_text(fall.p)),
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
