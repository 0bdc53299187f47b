"""One stage's work as it travels between processes: configs and digests alone."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from artifacts.identity import stage_key
from artifacts.record import InputReference, Record
from common.config import FrozenModel
from tasks.registry import stage_named
from tasks.stage import Runtime, Stage


class Work(FrozenModel):
    """A stage to be done."""

    name: str
    """The stage's name in its recipe."""
    stage: str
    """The kind of stage."""
    config: dict[str, Any]
    """The stage's config, whole."""
    inputs: dict[str, InputReference]
    """The inputs by name."""
    runtime: Runtime = Runtime()
    """Where and how carefully it runs."""
    store: str
    """The store's folder or URL."""
    flow_run_id: str | None = None
    """The Prefect run that asked for it."""

    @property
    def definition(self) -> Stage:
        """The stage that this is work for."""
        return stage_named(self.stage)

    @cached_property
    def key(self) -> str:
        """The key of the work's record."""
        return self._key(self.config)

    @cached_property
    def checkpoint_key(self) -> str:
        """The key that checkpoints and the lease lie under: the engine has no part in it, so that another engine
        may go on from them."""
        return self._key({name: value for name, value in self.config.items() if name != "engine"})

    def _key(self, config: dict[str, Any]) -> str:
        digests = {name: reference.digest for name, reference in self.inputs.items()}
        return stage_key(self.stage, self.definition.version, config, digests)


@dataclass(frozen=True)
class Outcome:
    """What became of a work."""

    record: Record
    reused: bool
