"""The pipeline as it is launched from the Prefect UI: what its form asks for, and the run on a worker of `pipeline`."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, Literal

from prefect import flow, runtime
from prefect.client.orchestration import get_client
from prefect.states import AwaitingRetry, Cancelled, Completed, Failed
from pydantic import BaseModel, Field, create_model

from artifacts.store import Store
from common.errors import StageInterrupted, UserError
from flows.pipeline import PipelineRun
from flows.recipe import Recipe, known_recipes, load_recipe
from flows.view import LogView
from tasks.registry import STAGES
from tasks.remote import REFUSED
from tasks.stage import Worker

AS_WRITTEN = "as the recipe says"
WorkerChoice = Literal["as the recipe says", "local", "cpu", "cuda", "tpu", "apple"]
EngineChoice = Literal["as the recipe says", "torch", "jax", "mlx"]

RecipeName = Enum("RecipeName", {name: name for name in known_recipes()}, type=str)  # type: ignore[misc]  # no literal
"""The recipes that come with Cairn, for a list to choose from."""


def _choices(name: str, choice: Any, kinds: list[str], what: str) -> type[BaseModel]:
    """A model with a choice for each kind of stage: a form shows it as a list for each."""
    fields: dict[str, Any] = {
        kind: (choice, Field(AS_WRITTEN, title=kind, description=what.format(kind=kind))) for kind in kinds
    }
    return create_model(name, **fields)


Workers = _choices("Workers", WorkerChoice, list(STAGES), "Where stages of the kind `{kind}` run.")
Engines = _choices(
    "Engines",
    EngineChoice,
    [name for name, stage in STAGES.items() if stage.has_engine],
    "What stages of the kind `{kind}` compute with.",
)


@flow(name="pipeline", flow_run_name=lambda: _run_name(runtime.flow_run.parameters), persist_result=False)
def launch(
    recipe: RecipeName = RecipeName("arithmetic"),  # noqa: B008 - it is frozen
    name: str | None = None,
    worker: Worker = "cpu",
    workers: Workers = Workers(),  # type: ignore[valid-type]  # noqa: B008
    engines: Engines = Engines(),  # type: ignore[valid-type]  # noqa: B008
    budget_hours: float | None = Field(default=None, gt=0),
    overrides: list[str] = [],  # noqa: B006 - nobody writes to it
) -> Any:
    """Runs a recipe. What is in the store is reused; what was interrupted goes on.

    Args:
        recipe: What to run.
        name: What the run is called; the recipe's name unless given.
        worker: Where stages run that neither the recipe nor the choices below place: a pool of workers, or `local` for
            the machine of this run.
        workers: Where stages of a kind run, whatever the recipe says.
        engines: What stages of a kind compute with, whatever the recipe says.
        budget_hours: Hours after which the run is stopped; what it has made is kept, and running again goes on.
        overrides: Keys of the recipe, such as stages.base.training.steps=500.
    """
    own = _OwnRun()
    try:
        loaded = _loaded(recipe.value, worker, workers, engines, overrides)
        run = PipelineRun(loaded, Store.open(), LogView(), None)
        with _budget(run, budget_hours) as is_up:
            # A stage on a worker goes on where only this run's own worker is stopped.
            run.leaves_stages = lambda: not (is_up.is_set() or own.is_cancelled)
            result = run.all_stages()
    except UserError as error:
        return Failed(name=REFUSED, message=str(error))
    except StageInterrupted as error:
        if is_up.is_set():
            return Cancelled(message=f"the budget of {budget_hours:g} hours is used up; run again to go on from here")
        if own.is_cancelled:
            return Cancelled(message=str(error))
        return AwaitingRetry(message="its worker was stopped; another goes on with it")
    return Completed(message=f"{result.reference}: {result.records[loaded.stages[-1].name].summary}")


def _run_name(parameters: dict[str, Any]) -> str:
    return str(parameters.get("name") or parameters["recipe"])


def _loaded(recipe: str, worker: Worker, workers: BaseModel, engines: BaseModel, overrides: list[str]) -> Recipe:
    """The recipe as the form has it; what is overridden key by key goes before the choices."""
    chosen = [f"worker={worker}"]
    for entry in load_recipe(recipe, resolve=False).stages:
        for key, choices in (("worker", workers), ("engine", engines)):
            choice = getattr(choices, entry.stage, AS_WRITTEN)
            if choice != AS_WRITTEN:
                chosen.append(f"stages.{entry.name}.{key}={choice}")
    return load_recipe(recipe, [*chosen, *overrides])


@contextmanager
def _budget(run: PipelineRun, hours: float | None) -> Iterator[threading.Event]:
    """Stops the run when its time is up; gives whether it is."""
    up = threading.Event()

    def stop() -> None:
        up.set()
        run.stop()

    timer = threading.Timer(hours * 3600 if hours is not None else threading.TIMEOUT_MAX, stop)
    timer.daemon = True
    timer.start()
    try:
        yield up
    finally:
        timer.cancel()


class _OwnRun:
    """What the server says of this run."""

    @functools.cached_property
    def is_cancelled(self) -> bool:
        """Whether somebody has cancelled it: a worker that stops ends it too, but then it is to go on."""
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(runtime.flow_run.id).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())
