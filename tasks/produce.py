"""Does one stage's work exactly once: finds its record, or holds its lease, runs it, and commits what it made."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from artifacts.record import InputReference, Record
from artifacts.store import DamagedObject, Store
from common.errors import StageInterrupted
from tasks.provenance import git_state, hardware, packages
from tasks.ranks import ranks_of, run_in_ranks
from tasks.stage import Context, Stage
from tasks.stage_log import stage_log
from tasks.work import Outcome, Work

logger = logging.getLogger("cairn.tasks")


def produce(
    store: Store, work: Work, report: Callable[[object], None], should_stop: Callable[[], bool] = lambda: False
) -> Outcome:
    """The record of `work`: found in the store, waited for while another process makes it, or made here.

    Raises UserError for what the user can mend, and what the stage itself raises.
    """
    store.be_patient()
    found = store.find(work.key)
    if found is not None:
        return Outcome(found, reused=True)
    # The work's own key too: its logs lie under that one, and are not to be collected meanwhile.
    held_keys = [work.key, *(reference.key for reference in work.inputs.values())]

    told: set[str] = set()

    def wait(holder: str) -> None:
        if should_stop():
            raise StageInterrupted(f"stage '{work.name}' was stopped while it waited for {holder}")
        if holder not in told:
            logger.warning("stage '%s' is being made by %s; waiting for it", work.name, holder)
            told.add(holder)

    with store.lease(work.checkpoint_key, wait=wait, inputs=held_keys) as lease:
        found = store.find(work.key)
        if found is not None:
            return Outcome(found, reused=True)
        started = datetime.now(UTC)

        def stopping() -> bool:
            # Whoever has lost the lease works beside its new holder, on the same checkpoints.
            lease.check()
            return should_stop()

        with store.workspace(work.key) as output:
            with store.logs(work.key) as logs, stage_log(logs, report) as tell:
                count = ranks_of(work)
                if count > 1:
                    metrics = run_in_ranks(work, count, output, logs, tell, stopping)
                else:
                    metrics = run_stage(store, work, output, logs, tell, stopping)
            commit, dirty = git_state()
            record = store.commit(
                output,
                lease=lease,
                key=work.key,
                stage=work.stage,
                version=work.definition.version,
                name=work.name,
                config=work.config,
                inputs=work.inputs,
                started=started,
                notes=metrics.pop("notes", []),
                metrics=metrics,
                engine=work.config.get("engine"),
                hardware=hardware(),
                packages=packages(),
                git_commit=commit,
                git_dirty=dirty,
                flow_run_id=work.flow_run_id,
            )
        if not work.definition.has_engine:
            # A training stage's checkpoints stay until gc; what another stage kept is part of its output now.
            _clear_scratch(store, work)
    return Outcome(record, reused=False)


def run_stage(
    store: Store,
    work: Work,
    output: Path,
    logs: Path,
    report: Callable[[object], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Runs a work's stage in this process, into `output`; gives what the record says of it."""
    stage = work.definition
    records = {name: _input(store, work, name, reference) for name, reference in work.inputs.items()}

    def fetch(input_name: str, file_name: str) -> Path:
        return store.fetch(records[input_name], [file_name]) / file_name

    context = Context(
        name=work.name,
        output=output,
        logs=logs,
        scratch=store.scratch(work.checkpoint_key),
        local_scratch=store.local_scratch(work.checkpoint_key),
        runtime=work.runtime,
        report=report,
        should_stop=should_stop,
        lineage=_lineage_text(store, records.values()),
        labels={name: record.name for name, record in records.items()},
        fetch=fetch,
    )
    folders = {name: store.fetch(record, _eager(stage, name, record)) for name, record in records.items()}
    return stage.run(stage.config.model_validate(work.config), folders, context)


def _eager(stage: Stage, name: str, record: Record) -> list[str]:
    """The files of an input that are verified before the stage runs."""
    ending = stage.lazy.get(name.partition(".")[0])
    return [file for file in record.files if ending is None or not file.endswith(ending)]


def _clear_scratch(store: Store, work: Work) -> None:
    filesystem, folder = store.scratch(work.checkpoint_key)
    with suppress(OSError):  # it costs room and nothing else
        if filesystem.exists(folder):
            filesystem.rm(folder, recursive=True)
        shutil.rmtree(store.local_scratch(work.checkpoint_key), ignore_errors=True)


def _input(store: Store, work: Work, name: str, reference: InputReference) -> Record:
    record = store.find(reference.key)
    if record is None or record.output != reference.digest:
        raise DamagedObject(
            f"input '{name}' of stage '{work.name}' is gone from the store ({reference.key[:8]}): run the recipe again"
        )
    return record


def _lineage_text(store: Store, records: Iterable[Record]) -> str:
    """What some artifacts were made from, a line each with kind and digest, whole subtrees once.

    Published folders hold it, so it has nothing that changes from run to run, and no names, which are a recipe's own.
    """
    shown: set[str] = set()

    def lines(record: Record, depth: int) -> Iterator[str]:
        again = record.key in shown
        shown.add(record.key)
        line = f"{'  ' * depth}- {record.stage} `{record.output[:12]}`"
        sources = [] if again else [store.read_record(reference.key) for reference in record.inputs.values()]
        yield line + (", see above" if again and record.inputs else "")
        for source in sources:
            if source is not None:
                yield from lines(source, depth + 1)

    return "\n".join(line for record in records for line in lines(record, 0))
