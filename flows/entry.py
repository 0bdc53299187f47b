"""A stage of a recipe, checked and whole."""

from collections.abc import Iterator, Mapping

from pydantic import SerializeAsAny

from common.config import FrozenModel
from models.config import ModelConfig
from models.training.config import TrainingConfig
from tasks.registry import stage_named
from tasks.stage import Runtime, Stage
from tasks.training import TrainingStageConfig


class StageEntry(FrozenModel):
    """One stage of a recipe."""

    name: str
    """Its name in the recipe."""
    stage: str
    """Its kind."""
    inputs: dict[str, str]
    """The stages whose output it reads, by the input's name."""
    config: SerializeAsAny[FrozenModel]
    """Its config, of the class that its kind has."""
    runtime: Runtime
    """Where and how carefully it runs."""
    model: ModelConfig | None
    """The model that it makes, where it makes one."""

    @property
    def definition(self) -> Stage:
        """The kind of stage."""
        return stage_named(self.stage)


def trainings(entry: StageEntry, before: Mapping[str, StageEntry]) -> Iterator[StageEntry]:
    """A stage and those that made its model, back to the fresh weights: those that train.

    `before`: all stages before it by name.
    """
    return (one for one in chain(entry, before) if isinstance(one.config, TrainingStageConfig))


def chain(entry: StageEntry, before: Mapping[str, StageEntry]) -> Iterator[StageEntry]:
    """A stage and those that made its model, back to the fresh weights."""
    yield entry
    while "model" in entry.inputs:
        entry = before[entry.inputs["model"]]
        yield entry


def training_of(entry: StageEntry) -> TrainingConfig:
    """How a stage that trains does so."""
    assert isinstance(entry.config, TrainingStageConfig)
    return entry.config.training
