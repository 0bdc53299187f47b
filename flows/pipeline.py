"""The whole run as a Prefect flow: each stage is a task run, started when its inputs are there."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from prefect import Flow, flow, runtime
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture
from prefect.states import Cancelled

from artifacts.record import Record
from artifacts.store import DamagedObject, Store
from common.errors import StageInterrupted
from flows.entry import StageEntry
from flows.plan import continued, recipe_ref, stage_ref, work_for
from flows.recipe import Recipe, load_recipe
from flows.showing import LiveProgress, show_stage
from flows.stopping import Stopping
from flows.view import View
from models.engine import EngineName
from tasks.dispatch import dispatch, stage_task
from tasks.events import Event, Listener
from tasks.process import EngineProcess
from tasks.work import Outcome

TAG = "cairn"
"""The tag of all of Cairn's flow runs, by which automations know them."""
Result = TypeVar("Result")
logger = logging.getLogger("cairn.flows")


@dataclass(frozen=True)
class RunResult:
    """What a run made."""

    reference: str
    """The name of what its last stage made, such as models/arithmetic."""
    records: dict[str, Record]
    """Each stage's record."""


def pipeline_flow(view: View) -> Flow[..., RunResult]:
    """The flow that runs a recipe where the user is, and tells `view` how it goes."""

    @flow(name="pipeline", flow_run_name="{recipe}", persist_result=False, validate_parameters=False)
    def pipeline(
        recipe: str,
        overrides: list[str] | None = None,
        store: str | None = None,
        continue_on: EngineName | None = None,
    ) -> Any:
        """Runs a recipe. What is in the store is reused; what was interrupted goes on.

        `recipe`: a name or the path of a YAML file; `overrides`: key.path=value each; `store`: a folder or URL;
        `continue_on`: the engine that does what is not done, going on from checkpoints of others.
        """
        loaded = load_recipe(recipe, overrides or [], continue_on=continue_on)
        try:
            return PipelineRun(loaded, Store.open(store), view, continue_on).all_stages()
        except StageInterrupted as error:
            return Cancelled(message=str(error))

    return pipeline


def repairing(recipe: Recipe, run: Callable[[], Result]) -> Result:
    """Runs it, and once more after each artifact that turned out to be damaged: it is then made anew."""
    for _ in recipe.stages:
        try:
            return run()
        except DamagedObject as error:
            logger.warning("%s; going through the recipe once more", error)
    # More come of a disk that damages what is written to it.
    return run()


class PipelineRun:
    """One run of a recipe, inside the flow."""

    def __init__(self, recipe: Recipe, store: Store, view: View, continue_on: EngineName | None) -> None:
        self.recipe = recipe
        self.continue_on = continue_on
        self.store = store
        self.view = view
        self.process = EngineProcess()
        self.stopping = Stopping(self.process.interrupt)
        self.leaves_stages: Callable[[], bool] = lambda: False
        """Whether stages on workers are left to themselves when the run is stopped, instead of being cancelled."""

    def stop(self) -> None:
        """Stops the run in good order, from any thread, as SIGTERM does."""
        self.stopping.stop()

    def all_stages(self) -> RunResult:
        """Submits every stage to Prefect and waits for them all; raises what the first failed stage raised."""
        self.store.names()  # raises at once where the store is out of reach
        self.store.be_patient()
        with self.stopping, closing(self.process):
            futures: dict[str, PrefectFuture[Outcome]] = {}
            for entry in self.recipe.stages:
                task = stage_task(entry.name, entry.runtime, self._body(entry))
                futures[entry.name] = task.submit({source: futures[source] for source in entry.inputs.values()})
            for future in futures.values():
                future.wait()
            _close_unbegun(futures)
        cancelled = [name for name, future in futures.items() if future.state.is_cancelled()]
        failed = [future for future in futures.values() if future.state.is_failed()]
        if self.stopping.requested or (cancelled and not failed):
            raise StageInterrupted(f"stage '{cancelled[0]}' was stopped" if cancelled else "stopped")
        for future in failed:
            future.result()
        records = {name: future.result().record for name, future in futures.items()}
        reference = recipe_ref(self.recipe.name)
        self._name(reference, records[self.recipe.stages[-1].name])
        return RunResult(reference, records)

    def _name(self, name: str, record: Record) -> None:
        # What stands already is not written again: a store that may only be read serves a run that makes nothing.
        if self.store.names().get(name) != record.key:
            self.store.set_name(name, record.key)

    def _body(self, entry: StageEntry) -> Callable[[dict[str, Outcome]], Outcome]:
        def body(made: dict[str, Outcome]) -> Outcome:
            return self._stage(entry, {source: outcome.record for source, outcome in made.items()})

        return body

    def _listener(self, entry: StageEntry) -> Listener:
        """Tells of a stage, and shows how far it is; one on a worker shows that itself."""
        tell = self.view.listener(entry.name)
        if entry.runtime.worker != "local":
            return tell
        live = LiveProgress(entry.name)

        def listen(event: Event) -> None:
            tell(event)
            live.listen(event)

        return listen

    def _stage(self, entry: StageEntry, inputs: dict[str, Record]) -> Outcome:
        if self.stopping.requested:
            raise StageInterrupted(f"stage '{entry.name}' was stopped before it began")
        work = work_for(entry, inputs, self.store, runtime.flow_run.id)
        if self.continue_on is not None and entry.definition.has_engine:
            work = continued(work, self.continue_on, self.store)
        started = time.monotonic()
        listener = self._listener(entry)
        outcome = dispatch(work, self.process, listener, lambda: self.stopping.requested, self.leaves_stages)
        self._name(stage_ref(self.recipe.name, entry.name), outcome.record)
        self.view.finished(entry.name, outcome.record, outcome.reused, time.monotonic() - started)
        if not outcome.reused:
            show_stage(self.recipe.name, entry.name, self.store, outcome.record)
        return outcome


def _close_unbegun(futures: Mapping[str, PrefectFuture[Outcome]]) -> None:
    """Says of stages whose inputs were not made that they are over: they would be shown as waiting for ever."""
    unbegun = [future.task_run_id for future in futures.values() if future.state.is_pending()]
    # How they are listed must not decide how the run ends.
    with suppress(Exception), get_client(sync_client=True) as client:
        for run in unbegun:
            client.set_task_run_state(run, Cancelled(message="its inputs were not made"), force=True)
