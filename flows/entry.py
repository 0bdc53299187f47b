"""A stage of a recipe, checked and whole."""

from pydantic import SerializeAsAny

from common.config import FrozenModel
from models.config import ModelConfig
from tasks.registry import stage_named
from tasks.stage import Runtime, Stage


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
