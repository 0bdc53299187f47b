"""What is asked of a model outside of a recipe: tasks of lm-eval and Cairn's own, each an artifact of its own."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from artifacts.lease import Lease
from artifacts.record import InputReference, Record
from artifacts.store import Store
from common.config import FrozenModel
from common.errors import UserError
from common.files import canonical_json, sha256_bytes
from flows.inference import model_record
from models.engine import EngineName, check_engine
from models.machine import default_engine, engine_for
from tasks.groups import TaskGroup, groups_in
from tasks.harness.catalogue import leaves
from tasks.registry import STAGES
from tasks.report import REPORT_DATA, read_report
from tasks.reporting.significance import LEVEL, Difference
from tasks.stage import Runtime, Worker
from tasks.work import Work

Do = Callable[[Work], Record]
"""Does a work unless it is done, here or elsewhere."""

REPORTS = "evaluations"
"""Where the reports are named."""
MEASURES = ("perplexity", "behaviour")
"""What is no task of lm-eval: the kinds of stage that measure it."""


class Asking(FrozenModel):
    """How a model is evaluated."""

    tasks: tuple[str, ...] = Field(default=("seed",), min_length=1)
    """Tasks, groups and tags of lm-eval, the group `seed`, `perplexity` (of WikiText-2), and `behaviour`. A group of
    lm-eval's that defines a figure of its own, such as `mmlu`, is shown with it beside its tasks; tags and `seed` have
    none, and stand for their tasks alone."""
    limit: int | None = Field(default=None, gt=0)
    """Documents of each task of lm-eval that are asked, the first ones; null for all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question of lm-eval; null for as many as the task says."""
    bos: bool | None = None
    """Whether <bos> stands before every text of lm-eval's; null for as the tokenizer does it by itself."""
    trust_remote_code: bool = False
    """Whether metrics of lm-eval's tasks may run that are fetched from the hub as programs."""
    engine: EngineName | None = None
    """The engine that answers; null for the one that suits the worker."""
    worker: Worker = "local"
    """Where it computes: here, or on a worker of a pool."""


class Evaluated(NamedTuple):
    """What became of a model's evaluation."""

    evaluations: list[Record]
    """One for each task, in order."""
    groups: list[TaskGroup]
    """The groups among what was asked that have a figure of their own."""
    report: Record
    """The report on them, which has the history."""
    is_news: bool
    """Whether anything is in it that was not known before."""
    falls: list[Difference]
    """Where the model is significantly worse than it was at the time before."""
    previous: str | None
    """The key of the report that the history ended with; None where there was none."""


def evaluate(
    store: Store,
    ref: str,
    asking: Asking,
    do: Do,
    level: float = LEVEL,
    run: str | None = None,
    keeps: Callable[[Evaluated], bool] = lambda found: True,
) -> Evaluated:
    """Evaluates a model on all that it is asked, reports it beside what it was given the time before, and keeps that as
    the last of its history.

    What the store has is not done again, and where it has all, the report is the last one. A name, a folder or a hub id
    has a history of its own, in the reports that are called `evaluations/<ref>`. Compared are tasks that were asked in
    the same way, of the same data, by the same version of lm-eval. `level`: the p below which a difference counts.
    `run`: the Prefect run that asks. `keeps`: whether what was found is kept; until then, evaluating again finds the
    same. A name that is given to another model meanwhile is evaluated once more.

    Raises what `works` raises, and what doing them raises.
    """
    while True:
        asked = works(store, model_record(store, ref), asking, run)
        groups = groups_in([name for name in asking.tasks if name not in MEASURES])
        made = [do(work) for work in asked]
        with history(store, ref) as lease:
            if not _is_current(store, ref, made):
                continue
            found = _compared(store, ref, made, groups, do, level, run)
            if keeps(found):
                keep(store, ref, found, lease)
        return found


@contextmanager
def history(store: Store, ref: str) -> Iterator[Lease]:
    """Within the block, nobody else compares with the model's history or adds to it, on this machine or another; waits
    for whoever does, which is as long as a report is made or falls are told of."""
    with store.lease(sha256_bytes(report_name(ref).encode())) as lease:
        yield lease


def renewed(
    store: Store, ref: str, found: Evaluated, do: Do, level: float = LEVEL, run: str | None = None
) -> Evaluated | None:
    """What was found and not kept, compared with what others have added to the history since; None where the name is
    another model's by now. Within `history`."""
    if not _is_current(store, ref, found.evaluations):
        return None
    if store.names().get(report_name(ref)) == found.previous:
        return found
    return _compared(store, ref, found.evaluations, found.groups, do, level, run)


def keep(store: Store, ref: str, found: Evaluated, lease: Lease) -> None:
    """Makes what was found the last of the model's history, which the next time is compared with. Within `history`,
    whose lease it has; raises LeaseLost where somebody else holds it by now."""
    # What is no news either: one who kept it may have been killed at it.
    wanted = {report_name(ref): found.report.key} if found.is_news else {}
    wanted |= {_base_name(ref, one): one.key for one in found.evaluations}
    names = store.names()
    if missing := {name: key for name, key in wanted.items() if names.get(name) != key}:
        lease.renew()
        for name, key in missing.items():
            store.set_name(name, key)


def _is_current(store: Store, ref: str, evaluations: Sequence[Record]) -> bool:
    """Whether evaluations are of the model that a reference stands for by now."""
    return model_record(store, ref).output == evaluations[0].inputs["model"].digest


def _compared(
    store: Store, ref: str, made: list[Record], groups: list[TaskGroup], do: Do, level: float, run: str | None
) -> Evaluated:
    names = store.names()
    key = names.get(report_name(ref))
    previous = None if key is None else store.find(key)
    earlier = _evaluations(store, previous)
    last = {_asked_as(one): one for one in earlier}
    told = _groups(previous)
    if previous is not None and all(_is_of(last.get(_asked_as(one)), one) for one in made) and {*groups} <= {*told}:
        return Evaluated(made, groups, previous, False, [], key)
    before = {_asked_as(one): old for one in made if (old := _base(store, names, ref, one)) is not None}
    others = [old for one in made if (old := before.get(_asked_as(one))) is not None and not _is_of(old, one)]
    model = made[0].inputs["model"].digest
    tasks = {_task(one) for one in made}
    kept = [one for one in earlier if _task(one) not in tasks and one.inputs["model"].digest == model]
    same = {_task(one) for one in [*made, *kept] if _is_of(last.get(_asked_as(one)), one)}
    # A group some of whose tasks are asked otherwise now is none that anybody asked for.
    known = {one.name for one in groups}
    groups_kept = [one for one in told if one.name not in known and same.issuperset(one.tasks)]
    report = do(_report(store, ref, [*made, *kept], [*groups, *groups_kept], others, previous, level, run))
    marked: Any = report.metrics["differences"]
    found = [Difference.model_validate(one) for one in marked]
    return Evaluated(made, groups, report, True, [one for one in found if one.is_fall(level)], key)


def report_name(ref: str) -> str:
    """What the reports on a model are called in the store: folders by their last two parts."""
    path = Path(ref).expanduser()
    is_folder = path.is_absolute() or ref.startswith((".", "~"))
    shown = path.resolve().parts[-2:] if is_folder else ref.split("/")
    parts = [re.sub(r"[^A-Za-z0-9._@-]+", "-", part).strip(".-@") for part in shown]
    return "/".join([REPORTS, *(part for part in parts if part)])


def _report(
    store: Store,
    ref: str,
    evaluations: Sequence[Record],
    groups: Sequence[TaskGroup],
    others: Sequence[Record],
    previous: Record | None,
    level: float,
    run: str | None,
) -> Work:
    inputs = {f"evaluations.{number}": one for number, one in enumerate(evaluations)}
    inputs |= {f"others.{number}": one for number, one in enumerate(others)}
    config = {
        "title": f"Evaluation of {ref}",
        # What it is called, however it was named: a folder may be by several paths.
        "model": report_name(ref).removeprefix(f"{REPORTS}/"),
        "other": "the time before",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "digest": evaluations[0].inputs["model"].digest,
        # As data: were the last report an input, every model that was ever evaluated would be kept for good.
        "history": _history(store, previous),
        "level": level,
        "groups": [one.model_dump(mode="json") for one in groups],
        "names": [one.name for one in evaluations],
        "other_names": [one.name for one in others],
    }
    return Work(
        name=report_name(ref),
        stage="report",
        config=_config("report", config),
        inputs={name: InputReference(digest=one.output, key=one.key) for name, one in inputs.items()},
        store=store.url,
        flow_run_id=run,
    )


def _evaluations(store: Store, report: Record | None) -> list[Record]:
    """What a report is of, as far as the store still has it."""
    if report is None:
        return []
    keys = [reference.key for name, reference in report.inputs.items() if name.partition(".")[0] == "evaluations"]
    return [found for key in keys if (found := store.find(key)) is not None]


def _groups(report: Record | None) -> list[TaskGroup]:
    """The groups whose figures a report shows."""
    told: Any = [] if report is None else report.config.get("groups", [])
    return [TaskGroup.model_validate(one) for one in told]


def _history(store: Store, report: Record | None) -> list[dict[str, Any]]:
    """What a report tells of the time before it and of its own."""
    if report is None:
        return []
    found = read_report(store.fetch(report, [REPORT_DATA]) / REPORT_DATA)
    return [snapshot.model_dump(mode="json") for snapshot in found.history]


def _base_name(ref: str, evaluation: Record) -> str:
    """What the last evaluation of a task is called that was asked as this one is: what the next is compared with."""
    return f"{report_name(ref)}@{_task(evaluation)}.{sha256_bytes(_asked_as(evaluation).encode())[:8]}"


def _base(store: Store, names: Mapping[str, str], ref: str, evaluation: Record) -> Record | None:
    key = names.get(_base_name(ref, evaluation))
    return None if key is None else store.find(key)


_IMMATERIAL = ("engine", "batch_tokens", "batch_size", "shown_samples")
"""Keys of configs that change no score beyond rounding."""


def _asked_as(evaluation: Record) -> str:
    """What was asked and how, by which evaluations at two times may be compared."""
    config = {name: value for name, value in evaluation.config.items() if name not in _IMMATERIAL}
    return canonical_json([evaluation.stage, evaluation.version, config]).decode()


def _task(evaluation: Record) -> str:
    return str(evaluation.config.get("task", evaluation.stage))


def _is_of(old: Record | None, new: Record) -> bool:
    """Whether two evaluations are one, or of models with the same output and the same answers."""
    return old is not None and old.output == new.output and old.inputs["model"].digest == new.inputs["model"].digest


class Question(NamedTuple):
    """What every model is asked in the same way: one task."""

    name: str
    stage: str
    """The kind of stage that asks it."""
    config: dict[str, Any]
    """That stage's config, whole."""


def questions(asking: Asking) -> list[Question]:
    """What models are asked, in order.

    Raises UserError for a task that does not exist, data that are nowhere to be had, and an engine that is not there.
    """
    engine = asking.engine or (default_engine() if asking.worker == "local" else engine_for(asking.worker))
    if asking.worker == "local":
        check_engine(engine)
    common = {"engine": engine}
    own = [name for name in dict.fromkeys(asking.tasks) if name in MEASURES]
    others = [name for name in asking.tasks if name not in MEASURES]
    found: list[Question] = []
    for leaf in leaves(others) if others else ():
        # As lm-eval has it: who asks has the last word, but where a group says 0.
        few = leaf.num_fewshot if asking.num_fewshot is None or leaf.num_fewshot == 0 else asking.num_fewshot
        keys = {**common, "task": leaf.name, "limit": asking.limit, "num_fewshot": few, "bos": asking.bos}
        keys |= {"trust_remote_code": asking.trust_remote_code}
        found.append(Question(leaf.name, "benchmark", _config("benchmark", keys)))
    return found + [Question(name, name, _config(name, common)) for name in own]


def works(store: Store, model: Record, asking: Asking, flow_run_id: str | None = None) -> list[Work]:
    """The work of each task on a model, in order. Raises what `questions` raises."""
    return [
        Work(
            name=question.name,
            stage=question.stage,
            config=question.config,
            inputs={"model": InputReference(digest=model.output, key=model.key)},
            runtime=Runtime(worker=asking.worker),
            store=store.url,
            flow_run_id=flow_run_id,
        )
        for question in questions(asking)
    ]


def _config(kind: str, keys: dict[str, Any]) -> dict[str, Any]:
    stage = STAGES[kind]
    config = stage.config.model_validate(stage.with_defaults(keys, ("evaluations", "model")))
    try:
        config = stage.resolved(config) if stage.resolved else config
    except UserError as error:
        if kind == "benchmark":  # whose errors name their task
            raise
        raise UserError(f"{kind}: {error}") from error
    return config.model_dump(mode="json")
