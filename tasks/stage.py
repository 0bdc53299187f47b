"""What a stage is: its config, the kinds of artifact that it reads and writes, and what it is given when it runs."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from fsspec import AbstractFileSystem
from pydantic import Field

from common.config import FrozenModel
from common.errors import UserError
from models.config import ModelConfig
from models.engine import Layout
from models.machine import Hardware
from models.training.config import CheckpointConfig

Metrics = dict[str, Any]
Worker = Literal["local", Hardware]
"""Where a stage runs: on the machine that runs the recipe, or on a worker of one of the pools."""


class Kind(StrEnum):
    """What an artifact holds; a stage says which kinds it reads, and a recipe is checked against it."""

    DOCUMENTS = "documents"
    TOKENIZER = "tokenizer"
    TOKENS = "tokens"
    MODEL = "model"
    EVALUATION = "evaluation"
    PUBLISHED = "published"
    REPORT = "report"


class Runtime(FrozenModel):
    """Where and how carefully a stage runs: nothing that its output depends on, so no part of its key."""

    checkpoints: CheckpointConfig = CheckpointConfig()
    """How often a training stage saves its state, and how many of them are kept."""
    worker: Worker = "local"
    """Where it runs: `local` for the machine that runs the recipe, else a pool of workers."""
    retries: int = Field(default=2, ge=0)
    """How often a stage that failed is started again; errors that the user has to mend are not retried."""
    retry_delay_seconds: float = Field(default=1.0, ge=0)
    """Seconds before it is started again."""
    time_limit_seconds: float | None = Field(default=None, gt=0)
    """Seconds after which a start is stopped and counts as failed; null for none. What it has saved is kept."""
    processes: int | None = Field(default=None, gt=0)
    """Processes or threads that a data stage works with; null for one per core."""
    layout: Layout = Layout()
    """How the engine lies on its devices."""
    continue_on: bool = False
    """Whether a training stage goes on from a checkpoint that another engine made, instead of starting anew."""
    ray: str | None = None
    """Address of the Ray cluster that works on token shards, `auto` for the one that is found; null for none."""


def _no_fetch(input_name: str, file_name: str) -> Path:
    raise KeyError(f"input {input_name} of this stage is not lazy")


@dataclass(frozen=True)
class Context:
    """What a stage is given beside its config and its inputs."""

    name: str
    """The stage's name in its recipe, for logs."""
    output: Path
    """An empty folder, which becomes the artifact."""
    logs: Path
    """A folder for what hangs on the record: metrics, pictures, TensorBoard events."""
    scratch: tuple[AbstractFileSystem, str]
    """Where the stage keeps what lets it go on after a kill: a file system and a folder on it."""
    local_scratch: Path
    """The same on this machine's disk, for what needs a real file; it may not be there yet."""
    runtime: Runtime
    """How it runs."""
    report: Callable[[object], None]
    """Takes progress events, dataclasses that JSON can hold."""
    should_stop: Callable[[], bool] = lambda: False
    """Whether the stage has been told to stop; a long one asks now and then, and raises StageInterrupted."""
    lineage: str = ""
    """What the inputs were made from, as text."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the stage that made each input is called in its recipe, for tables."""
    fetch: Callable[[str, str], Path] = _no_fetch
    """Gives the path of one file of a lazy input, by the input's and the file's name, verified at its first use."""


StageFunction = Callable[[Any, Mapping[str, Path], Context], Metrics]
ModelOf = Callable[[Any, Mapping[str, ModelConfig]], ModelConfig]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of stage. Its author raises `version` whenever the same config would give another output."""

    name: str
    version: int
    config: type[FrozenModel]
    output: Kind
    run: StageFunction
    trains: bool = False
    """Whether it trains with an engine, which several processes may do together, each running the whole stage."""
    inputs: Mapping[str, Kind] = field(default_factory=dict)
    optional_inputs: Mapping[str, Kind] = field(default_factory=dict)
    instead: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    """Optional inputs that the stage reads something else without: the config field that says what, and its default,
    which is filled in where the input is not given."""
    many: Mapping[str, str] = field(default_factory=dict)
    """Inputs that may be several artifacts, and the config field with a portion for each of them. Several reach the
    stage as `<input>.0`, `<input>.1`, … and one as `<input>`: see `gathered`."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Inputs that may be several artifacts in the same way, and the config field that gets the names of the stages
    that made them: for an output that speaks of them, and so has to have them in its key."""
    lazy: Mapping[str, str] = field(default_factory=dict)
    """Inputs whose files with an ending are fetched and verified one by one, when the stage asks for them."""
    resolved: Callable[[Any], Any] | None = None
    """The config with everything that it only points at made fast (digests of files), or UserError where it points
    at nothing; asked when a recipe is loaded."""
    model_of: ModelOf | None = None
    """The model that comes out, from the config and the models that go in; raises UserError where they do not fit, so
    that a recipe is refused before anything runs."""

    @property
    def has_engine(self) -> bool:
        """Whether the stage computes with an engine, and so runs in a child process."""
        return "engine" in self.config.model_fields

    def with_defaults(self, keys: Mapping[str, Any], inputs: Collection[str]) -> dict[str, Any]:
        """The keys of a config, with what is read instead of inputs that are not among these.

        Raises UserError where both are given.
        """
        found = dict(keys)
        for name, (key, default) in self.instead.items():
            if name not in inputs:
                found.setdefault(key, default)
            elif found.get(key) is not None:
                raise UserError(f"{key}: it is read where there are no {name}; leave one of them out")
        return found


def gathered(inputs: Mapping[str, Path], name: str) -> dict[str, Path]:
    """The artifacts of an input that may be several, in the recipe's order, by their full input names."""
    if name in inputs:
        return {name: inputs[name]}
    return {full: inputs[full] for full in (f"{name}.{number}" for number in range(len(inputs))) if full in inputs}
