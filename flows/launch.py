"""The pipeline as it is launched from the Prefect UI: what its form asks for, and the run on a worker of `pipeline`."""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger, runtime
from prefect.states import Cancelled, Completed, Failed
from pydantic import BaseModel, ConfigDict, Field, create_model

from artifacts.store import Store
from common.errors import StageFailed, StageInterrupted, UserError
from flows.own_run import OwnRun
from flows.pipeline import PipelineRun, repairing
from flows.recipe import Recipe, known_recipes, load_recipe
from flows.view import LogView
from models.engine import EngineName
from tasks.registry import STAGES
from tasks.remote import REFUSED, refuse_password
from tasks.stage import Stage, Worker

AS_WRITTEN = "as the recipe says"
AS_ABOVE = "as above"

RecipeName = Enum("RecipeName", {name: name for name in known_recipes()}, type=str)  # type: ignore[misc]  # no literal
"""The recipes that come with Cairn, for a list to choose from."""


def _choices(name: str, choice: Any, descriptions: Mapping[str, str | None]) -> type[BaseModel]:
    """A model with a choice for each kind of stage: a form shows it as a list for each."""
    fields: dict[str, Any] = {
        kind: (choice, Field(AS_ABOVE, title=kind, description=description))
        for kind, description in descriptions.items()
    }
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def _what_it_makes(stage: Stage) -> str:
    """What the file of a kind of stage says of it."""
    first_line = (inspect.getmodule(stage.run).__doc__ or "").partition("\n")[0]
    text = first_line.removeprefix(f"Stage `{stage.name}`: ")
    return text[:1].upper() + text[1:]


Workers = _choices(
    "Workers", Literal[AS_ABOVE, Worker], {name: _what_it_makes(stage) for name, stage in STAGES.items()}
)
Engines = _choices(
    "Engines", Literal[AS_ABOVE, EngineName], {name: None for name, stage in STAGES.items() if stage.has_engine}
)


def _titled(title: str) -> Any:
    """What a form calls a parameter. Prefect titles each with its name, but for what is added to its schema."""
    return Field(json_schema_extra={"title": title})


@flow(name="pipeline", flow_run_name=lambda: _run_name(runtime.flow_run.parameters), persist_result=False)
def launch(
    recipe: RecipeName,
    # Without null, which a form would show as a choice of types.
    name: str = "",
    budget_hours: Annotated[float, Field(ge=0), _titled("budget in hours")] = 0.0,
    worker: Worker = "cpu",
    engine: Literal["as the recipe says", EngineName] = "as the recipe says",
    workers: Annotated[Workers, _titled("worker for each kind of stage")] = Workers(),  # type: ignore[valid-type]  # noqa: B008
    engines: Annotated[Engines, _titled("engine for each kind of stage")] = Engines(),  # type: ignore[valid-type]  # noqa: B008
    overrides: list[str] = [],  # noqa: B006 - nobody writes to it
) -> Any:
    """Runs a recipe. What is in the store is reused; what was interrupted goes on.

    Args:
        recipe: What to run; `cairn recipes` says what each of them trains.
        name: What the run is called once it runs, instead of the Run Name above; the recipe's name unless given.
        budget_hours: Hours after which the run is stopped, 0 for no limit. What it has made is kept, and running again
            goes on from there.
        worker: Where stages run that neither the recipe nor the choices below place: on a worker of a pool, or `local`
            for the machine of the pipeline itself.
        engine: What stages compute with for which neither the recipe nor a choice below names an engine.
        workers: Goes before the worker above and before what the recipe says.
        engines: Goes before the engine above and before what the recipe says.
        overrides: Other keys of the recipe, such as `stages.base.training.steps=500` or `stages.base.worker=cuda`.
    """
    own = OwnRun()
    try:
        loaded = _loaded(recipe.value, worker, engine, workers, engines, overrides)
        made = _run(loaded, own, budget_hours)
    except UserError as error:
        own.end(Failed(name=REFUSED, message=str(error)))
    except StageFailed as error:
        own.end(Failed(message=str(error)))
    return Completed(message=made)


def _run(recipe: Recipe, own: OwnRun, budget_hours: float) -> str:
    """Runs a recipe; says what it made. Raises Abort where it was stopped, or is to begin again."""
    # Asked in a stage's thread, it is the logger of the stage's task.
    view = LogView(lambda stage, line: get_run_logger().info("%s: %s", stage, line))
    store = Store.open()
    refuse_password(store.url)
    store.be_patient()
    run = PipelineRun(recipe, store, view, None)
    with _budget(run, budget_hours, own.age_seconds) as is_up:
        # A stage on a worker goes on where only this run's own worker is stopped.
        run.leaves_stages = lambda: not (is_up.is_set() or own.is_cancelled)
        try:
            result = repairing(recipe, run.all_stages)
        except StageInterrupted as error:
            if is_up.is_set():
                own.end(Cancelled(message=f"its {budget_hours:g} hours are used up; run again to go on from here"))
            own.end_interrupted(error, by_signal=run.stopping.requested)
    return f"{result.reference}: {result.records[recipe.stages[-1].name].summary}"


def _run_name(parameters: dict[str, Any]) -> str:
    return str(parameters.get("name") or RecipeName(parameters["recipe"]).value)


def _loaded(
    recipe: str, worker: Worker, engine: str, workers: BaseModel, engines: BaseModel, overrides: list[str]
) -> Recipe:
    """The recipe as the form has it; what is overridden key by key goes before the choices."""
    chosen = [f"worker={worker}", *([f"engine={engine}"] if engine != AS_WRITTEN else [])]
    for entry in load_recipe(recipe, resolve=False).stages:
        for key, choices in (("worker", workers), ("engine", engines)):
            choice = getattr(choices, entry.stage, AS_ABOVE)
            if choice != AS_ABOVE:
                chosen.append(f"stages.{entry.name}.{key}={choice}")
    return load_recipe(recipe, [*chosen, *overrides])


@contextmanager
def _budget(run: PipelineRun, hours: float, used_seconds: float) -> Iterator[threading.Event]:
    """Stops the run when its time is up, of which some was used before it was begun again; gives whether it is."""
    up = threading.Event()

    def stop() -> None:
        up.set()
        run.stop()

    timer = threading.Timer(max(0.0, hours * 3600 - used_seconds) if hours else threading.TIMEOUT_MAX, stop)
    timer.daemon = True
    timer.start()
    try:
        yield up
    finally:
        timer.cancel()
