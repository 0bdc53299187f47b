"""What `cairn run` does: a run with its progress on the terminal, and the result laid out and shown."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import tags
from prefect.client.schemas.objects import State
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from artifacts.lineage import to_text, tree
from artifacts.record import Record
from artifacts.store import Store
from common.errors import StageInterrupted, UserError
from flows.console import ConsoleView, blend_table
from flows.entry import StageEntry
from flows.evaluation_tables import Scored, evaluation_tables, exact_match_table, last_of_each
from flows.growth_tables import comparison_table, growth_table
from flows.pipeline import TAG, RunResult, pipeline_flow, repairing
from flows.recipe import Recipe
from flows.report_table import report_table
from flows.server import prefect_server, wait_until_stored
from flows.showing import LOSS_CURVE
from models.engine import EngineName
from tasks.compare import COMPARISON_PICTURE
from tasks.remote import refuse_password
from tasks.report import REPORT_DATA, REPORT_PAGE, read_report
from tasks.stage import Kind


def lay_out(store: Store, record: Record, folder: Path) -> None:
    """Copies a published artifact to a plain folder, replacing an earlier one.

    Raises DamagedObject, and UserError where the folder cannot be written or holds something else.
    """
    source = store.fetch(record)
    if folder.exists() and any(folder.iterdir()) and not (folder / "generation_config.json").is_file():
        raise UserError(
            f"{folder} holds something else than a published model; move it or give --published another place"
        )
    fresh, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}") for _ in range(2))
    try:
        for name in record.files:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, fresh / name)
        with _alone_in(folder.parent):
            if folder.exists():
                folder.rename(old)
            try:
                fresh.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error}): make room or give --published another place; "
            f"what was made is in the store"
        ) from error
    finally:
        for leaving in (fresh, old):
            shutil.rmtree(leaving, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps two runs that publish at once from moving each other's folder away."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def run_recipe(
    recipe: Recipe,
    overrides: Sequence[str],
    store: Store,
    published: Path,
    console: Console,
    continue_on: EngineName | None = None,
) -> None:
    """Runs a recipe, lays out what it published, and shows the result. Raises what the first failed stage raised.

    An artifact that turns out to be damaged is made anew. `continue_on`: the engine that does what is not done yet,
    going on from checkpoints of others.
    """
    refuse_password(store.url)
    with prefect_server():
        records = repairing(recipe, lambda: _run_once(recipe, overrides, store, published, console, continue_on))
    _show_result(recipe, records, store, published, console)


def _run_once(
    recipe: Recipe,
    overrides: Sequence[str],
    store: Store,
    published: Path,
    console: Console,
    continue_on: EngineName | None,
) -> dict[str, Record]:
    with ConsoleView(console) as view, tags(TAG):
        pipeline: Any = pipeline_flow(view)  # its type knows nothing of return_state
        state: State[RunResult] = pipeline(recipe.source, list(overrides), store.url, continue_on, return_state=True)
        wait_until_stored(state)
    if state.is_cancelled():
        raise StageInterrupted("stopped; run the same command again to go on from where it was")
    records = state.result().records
    for stage, folder in _folders(recipe, published).items():
        lay_out(store, records[stage], folder)
    return records


def _folders(recipe: Recipe, published: Path) -> dict[str, Path]:
    """Where each publishing stage's folder is laid out: that of the last bears the recipe's name alone."""
    stages = [entry.name for entry in recipe.stages if entry.definition.output == Kind.PUBLISHED]
    return {stage: published / (recipe.name if stage == stages[-1] else f"{recipe.name}@{stage}") for stage in stages}


def _asked(entry: StageEntry, record: Record) -> str:
    """What a model was evaluated on: the stage that made the documents, or the data sets that it read itself."""
    data: Any = record.metrics.get("data", {})
    return entry.inputs.get("documents") or ", ".join(data)


def _show_result(recipe: Recipe, records: dict[str, Record], store: Store, published: Path, console: Console) -> None:
    trained = blend_table({entry.name: records[entry.name] for entry in recipe.stages})
    if trained is not None:
        console.print(trained)
    evaluations = [
        Scored(entry.inputs["model"], _asked(entry, records[entry.name]), records[entry.name])
        for entry in recipe.stages
        if entry.definition.output == Kind.EVALUATION
    ]
    for evaluation in last_of_each(evaluations):
        console.print(evaluation_tables(evaluation.record))
    compared = exact_match_table(evaluations)
    if compared is not None:
        console.print(compared)
    grown = growth_table({entry.name: records[entry.name] for entry in recipe.stages})
    if grown is not None:
        console.print(grown)
    for entry in recipe.stages:
        if entry.definition.output == Kind.REPORT:
            record = records[entry.name]
            console.print(comparison_table(record) if entry.stage == "compare" else _report(store, record))
    for folder in _folders(recipe, published).values():
        console.print(f"[dim]published[/]   {escape(str(folder.absolute()))}", highlight=False, soft_wrap=True)
    for entry in recipe.stages:
        attached = store.attachments(records[entry.name].key)
        for name, what in (
            (LOSS_CURVE, "loss curve"),
            (COMPARISON_PICTURE, "comparison"),
            (REPORT_PAGE, "report"),
        ):
            if name in attached:
                line = f"[dim]{what}[/]  {escape(entry.name)}: {escape(attached[name])}"
                console.print(line, highlight=False, soft_wrap=True)
    console.print(f"\n{escape(to_text(tree(store, records[recipe.stages[-1].name])))}", highlight=False, soft_wrap=True)


def _report(store: Store, record: Record) -> Table:
    return report_table(read_report(store.fetch(record, [REPORT_DATA]) / REPORT_DATA))
