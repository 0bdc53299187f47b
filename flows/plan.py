"""What a run would do, stage by stage, and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from artifacts.record import InputReference, Record
from artifacts.store import Store
from flows.entry import StageEntry
from flows.recipe import Recipe
from models.engine import EngineName
from tasks.work import Work


@dataclass(frozen=True)
class Step:
    """What would become of one stage."""

    entry: StageEntry
    verdict: Literal["reused", "to run", "waits"]
    reason: str
    record: Record | None = None


def stage_ref(recipe: str, stage: str) -> str:
    """The name that points at a stage's latest record."""
    return f"models/{recipe}@{stage}"


def recipe_ref(recipe: str) -> str:
    """The name that points at what a recipe's last stage made."""
    return f"models/{recipe}"


def work_for(entry: StageEntry, inputs: Mapping[str, Record], store: Store, flow_run_id: str | None = None) -> Work:
    """The work of a stage; `inputs` are what the stages before it made, by their names."""
    return Work(
        name=entry.name,
        stage=entry.stage,
        config=entry.config.model_dump(mode="json"),
        inputs={
            name: InputReference(digest=inputs[source].output, key=inputs[source].key)
            for name, source in entry.inputs.items()
        },
        runtime=entry.runtime,
        store=store.url,
        flow_run_id=flow_run_id,
    )


def continued(work: Work, engine: EngineName, store: Store) -> Work:
    """The work of a stage with an engine as `engine` goes on with it, from checkpoints that others made.

    What any engine has done already counts as done: such a work is given as it was done.
    """
    content = work.model_dump()
    for name in dict.fromkeys((work.config["engine"], engine, *get_args(EngineName))):
        done = Work.model_validate({**content, "config": {**work.config, "engine": name}})
        if store.find(done.key) is not None:
            return done
    config, runtime = {**work.config, "engine": engine}, {**content["runtime"], "continue_on": True}
    return Work.model_validate({**content, "config": config, "runtime": runtime})


def plan(recipe: Recipe, store: Store, continue_on: EngineName | None = None) -> list[Step]:
    """A step for each stage in order, as a run that is told to `continue_on` with an engine would take it; nothing is
    run and nothing is hashed."""
    steps: list[Step] = []
    done: dict[str, Record] = {}
    names = store.names()
    for entry in recipe.stages:
        waiting = [source for source in entry.inputs.values() if source not in done]
        if waiting:
            steps.append(Step(entry, "waits", f"its input '{waiting[0]}' will be made first"))
            continue
        work = work_for(entry, done, store)
        if continue_on is not None and entry.definition.has_engine:
            work = continued(work, continue_on, store)
        record = store.find(work.key)
        if record is not None:
            done[entry.name] = record
            steps.append(Step(entry, "reused", f"made {record.ended:%Y-%m-%d %H:%M} UTC", record))
            continue
        latest = names.get(stage_ref(recipe.name, entry.name))
        steps.append(Step(entry, "to run", _why(work, latest, store.read_record(latest) if latest else None)))
    return steps


def _why(work: Work, latest_key: str | None, latest: Record | None) -> str:
    if latest_key is None:
        return "never made"
    if latest_key == work.key:
        return "its record or files are damaged or gone"
    if latest is None:
        return "never made so, and the record of what was made last is damaged or gone"
    changes = []
    if latest.version != work.definition.version or latest.stage != work.stage:
        changes.append(f"the stage is now {work.stage} version {work.definition.version}")
    before, now = _flat(latest.config), _flat(work.config)
    changes += [
        f"{key}: {before.get(key)!r} → {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    for name in sorted(latest.inputs.keys() | work.inputs.keys()):
        old, new = latest.inputs.get(name), work.inputs.get(name)
        if (old and old.digest) != (new and new.digest):
            changes.append(f"input '{name}' changed")
    return "; ".join(changes)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return found
