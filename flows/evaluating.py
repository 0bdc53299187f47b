"""What is asked of a model outside of a recipe: tasks of lm-eval and Cairn's own, each an artifact of its own."""

from typing import Any

from pydantic import Field

from artifacts.record import InputReference, Record
from artifacts.store import Store
from common.config import FrozenModel
from common.errors import UserError
from models.engine import EngineName, Precision, check_engine
from models.machine import default_engine, engine_for
from tasks.harness.catalogue import leaves
from tasks.registry import STAGES
from tasks.stage import Runtime, Worker
from tasks.work import Work

MEASURES = ("perplexity", "behaviour")
"""What is no task of lm-eval: the kinds of stage that measure it."""


class Asking(FrozenModel):
    """How a model is evaluated."""

    tasks: tuple[str, ...] = Field(default=("seed",), min_length=1)
    """Tasks, groups and tags of lm-eval, the group `seed`, `perplexity` (of WikiText-2), and `behaviour`."""
    limit: int | None = Field(default=None, gt=0)
    """Documents of each task of lm-eval that are asked, the first ones; null for all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question of lm-eval; null for as many as the task says."""
    bos: bool | None = None
    """Whether <bos> stands before every text of lm-eval's; null for as the tokenizer does it by itself."""
    engine: EngineName | None = None
    """The engine that answers; null for the one that suits the worker."""
    precision: Precision = "float32"
    """What it computes in."""
    worker: Worker = "local"
    """Where it computes: here, or on a worker of a pool."""


def works(store: Store, model: Record, asking: Asking, flow_run_id: str | None = None) -> list[Work]:
    """The work of each task on a model, in order.

    Raises UserError for a task that does not exist, data that are nowhere to be had, and an engine that is not there.
    """
    engine = asking.engine or (default_engine() if asking.worker == "local" else engine_for(asking.worker))
    if asking.worker == "local":
        check_engine(engine, asking.precision)
    common = {"engine": engine, "precision": asking.precision}
    own = [name for name in asking.tasks if name in MEASURES]
    asked: list[tuple[str, str, dict[str, Any]]] = []
    others = [name for name in asking.tasks if name not in MEASURES]
    for leaf in leaves(others) if others else ():
        few = leaf.num_fewshot if leaf.num_fewshot is not None else asking.num_fewshot
        config = {"task": leaf.name, "limit": asking.limit, "num_fewshot": few, "bos": asking.bos}
        asked.append((leaf.name, "benchmark", config))
    asked += [(name, name, {}) for name in own]
    return [
        Work(
            name=name,
            stage=kind,
            config=_config(kind, {**common, **config}),
            inputs={"model": InputReference(digest=model.output, key=model.key)},
            runtime=Runtime(worker=asking.worker),
            store=store.url,
            flow_run_id=flow_run_id,
        )
        for name, kind, config in asked
    ]


def _config(kind: str, keys: dict[str, Any]) -> dict[str, Any]:
    stage = STAGES[kind]
    config = stage.config.model_validate(keys)
    try:
        config = stage.resolved(config) if stage.resolved else config
    except UserError as error:
        raise UserError(f"{keys.get('task', kind)}: {error}") from error
    return config.model_dump(mode="json")
