"""What `cairn run` does: a run with its progress on the terminal, and the result laid out and shown."""

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from rich.console import Console
from rich.markup import escape

from artifacts.lineage import to_text, tree
from artifacts.record import Record
from artifacts.store import Store
from flows.console import ConsoleView, evaluation_tables
from flows.pipeline import LOSS_CURVE, pipeline_flow
from flows.recipe import Recipe
from flows.server import prefect_server, wait_until_stored
from tasks.stage import Kind, StageInterrupted


def lay_out(store: Store, record: Record, folder: Path) -> None:
    """Copies a published artifact to a plain folder, replacing what stood there in one move."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    shutil.copytree(store.fetch(record), fresh, copy_function=shutil.copyfile)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old)
    else:
        fresh.rename(folder)


def run_recipe(recipe: Recipe, overrides: Sequence[str], store: Store, published: Path, console: Console) -> None:
    """Runs a recipe, lays out what it published, and shows the result. Raises what the first failed stage raised."""
    with prefect_server(), ConsoleView(console) as view:
        pipeline: Any = pipeline_flow(view)  # its type knows nothing of return_state
        state: State[dict[str, Record]] = pipeline(recipe.source, list(overrides), store.url, return_state=True)
        wait_until_stored(state)
    if state.is_cancelled():
        raise StageInterrupted("stopped; run the same command again to go on from where it was")
    _show_result(recipe, state.result(), store, published, console)


def _show_result(recipe: Recipe, records: dict[str, Record], store: Store, published: Path, console: Console) -> None:
    for entry in recipe.stages:
        if entry.definition.output == Kind.EVALUATION:
            console.print(evaluation_tables(records[entry.name]))
    for entry in recipe.stages:
        if entry.definition.output == Kind.PUBLISHED:
            folder = published / recipe.name
            lay_out(store, records[entry.name], folder)
            console.print(f"[dim]published[/]   {escape(str(folder.absolute()))}", highlight=False, soft_wrap=True)
        picture = store.attachments(records[entry.name].key).get(LOSS_CURVE)
        if picture is not None:
            line = f"[dim]loss curve[/]  {escape(entry.name)}: {escape(picture)}"
            console.print(line, highlight=False, soft_wrap=True)
    console.print(f"\n{escape(to_text(tree(store, records[recipe.stages[-1].name])))}", highlight=False, soft_wrap=True)
