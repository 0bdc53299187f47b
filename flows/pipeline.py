"""The whole run as a Prefect flow: each stage is a task run, started when its inputs are there.

With no server configured, Prefect starts a temporary one of its own.
"""

import base64
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from prefect import flow, runtime
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.futures import PrefectFuture

from artifacts.lineage import to_text, tree
from artifacts.record import Record
from artifacts.store import Store
from flows.plan import recipe_ref, stage_ref, work_for
from flows.recipe import Recipe, StageEntry, load_recipe
from flows.view import LogView, View, summary
from tasks.dispatch import dispatch, stage_task
from tasks.process import EngineProcess, engine_process
from tasks.work import Outcome

LOSS_CURVE = "loss.png"
logger = logging.getLogger("cairn.flows")


@flow(name="pipeline", flow_run_name="{recipe}", persist_result=False)
def pipeline(recipe: str = "arithmetic", overrides: list[str] | None = None, store: str | None = None) -> str:
    """Runs a recipe and gives the name of what its last stage made, such as models/arithmetic.

    `recipe`: a name or the path of a YAML file; `overrides`: key.path=value each; `store`: a folder or URL.
    """
    loaded = load_recipe(recipe, overrides or [])
    run_stages(loaded, Store.open(store), LogView())
    return recipe_ref(loaded.name)


def run_stages(recipe: Recipe, store: Store, view: View) -> dict[str, Record]:
    """Submits every stage to Prefect and waits for them all; called inside a flow. Gives each stage's record.

    Raises what the first failed stage raised.
    """
    with engine_process() as process:
        futures: dict[str, PrefectFuture[Outcome]] = {}
        for entry in recipe.stages:
            body = _stage_body(recipe, entry, store, view, process)
            task = stage_task(entry.name, entry.runtime, body)
            futures[entry.name] = task.submit({source: futures[source] for source in entry.inputs.values()})
        records = {name: future.result().record for name, future in futures.items()}
    store.set_name(recipe_ref(recipe.name), records[recipe.stages[-1].name].key)
    return records


def _stage_body(
    recipe: Recipe, entry: StageEntry, store: Store, view: View, process: EngineProcess
) -> Callable[[dict[str, Outcome]], Outcome]:
    def body(made: dict[str, Outcome]) -> Outcome:
        inputs = {source: outcome.record for source, outcome in made.items()}
        work = work_for(entry, inputs, store, runtime.flow_run.id)
        started = time.monotonic()
        outcome = dispatch(work, process, view.listener(entry.name))
        store.set_name(stage_ref(recipe.name, entry.name), outcome.record.key)
        view.finished(entry.name, outcome.record, outcome.reused, time.monotonic() - started)
        if not outcome.reused:
            _show(recipe, entry, store, outcome.record)
        return outcome

    return body


def _show(recipe: Recipe, entry: StageEntry, store: Store, record: Record) -> None:
    """Puts a stage's table, picture and lineage into the Prefect UI; what fails there does not fail the run."""
    key = re.sub(r"[^a-z0-9]+", "-", f"{recipe.name}-{entry.name}".lower()).strip("-")
    rows = [{"name": name, "value": value} for name, value in sorted(plain_metrics(record).items())]
    try:
        create_table_artifact(rows, key=key, description=summary(record))
        create_markdown_artifact(f"```\n{to_text(tree(store, record))}\n```", key=f"{key}-lineage")
        picture = store.attachments(record.key).get(LOSS_CURVE)
        if picture is not None and Path(picture).is_file():
            encoded = base64.b64encode(Path(picture).read_bytes()).decode()
            create_image_artifact(f"data:image/png;base64,{encoded}", key=f"{key}-loss", description="Loss curve")
    except Exception as error:  # whatever the server answers, the artifact is in the store already
        logger.warning("stage '%s' is done, but the Prefect server did not take its artifacts: %s", entry.name, error)


def plain_metrics(record: Record) -> dict[str, str]:
    """The numbers and short texts among a record's metrics, nested ones by dotted names."""
    found: dict[str, str] = {}

    def visit(name: str, value: object) -> None:
        if isinstance(value, dict):
            for inner_name, inner in value.items():
                visit(f"{name}.{inner_name}" if name else inner_name, inner)
        elif not isinstance(value, list):
            found[name] = f"{value:,.6g}" if isinstance(value, float) else str(value)

    visit("", record.metrics)
    return found
