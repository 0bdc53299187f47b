"""The training loop on any engine, watched: which batches it stepped on and what it lost there.

As a program: `python -m tests.models.loop_run FOLDER ENGINE JOB LAYOUT` in each of the processes of a run; it goes on
from the checkpoints below FOLDER, and process 0 writes what was found there as JSON.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from models import weights
from models.config import ModelConfig
from models.engine import (
    Batch,
    EngineName,
    Given,
    InferenceEngine,
    Layout,
    State,
    StepResult,
    TrainingEngine,
    training_engine,
)
from models.lora import initial_adapters
from models.training.checkpoint import Checkpoints
from models.training.config import CheckpointConfig, TrainingConfig
from models.training.events import Event, Note
from models.training.loop import Interrupted, Start, train
from models.tuning import LoraConfig, Tuning
from models.weights import Piece
from tests.models.agreement import ADAMW, MUON, exported
from tests.models.several import explained, number, run_all
from tests.models.tiny import tiny
from tests.models.training import bigrams

OPTIMIZERS = {"adamw": ADAMW, "muon": MUON}


class Found(NamedTuple):
    """What one start of a run came to."""

    losses: list[float]
    """Of each step."""
    batches: list[str]
    """A digest of what each step was given."""
    validations: list[float]
    """The losses of all validations so far, where the run came to its end."""
    notes: list[str]
    device: str
    state: str
    """A digest of the weights and moments in the end."""


def named(batch: Batch) -> list[tuple[str, weights.Array]]:
    return [(name, array) for name, array in batch._asdict().items() if array is not None]


def digest(arrays: Mapping[str, weights.Array]) -> str:
    """The same for the same names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return found.hexdigest()


class Watched:
    """An engine, and what it was given to step on."""

    def __init__(self, engine: TrainingEngine) -> None:
        self.name, self.device, self.process = engine.name, engine.device, engine.process
        self._engine = engine
        self.results: list[StepResult] = []
        self.digests: list[str] = []

    def agreed(self, word: int) -> int:
        return self._engine.agreed(word)

    def peak_memory(self) -> int:
        return self._engine.peak_memory()

    def step(self, micro_batches: Sequence[Batch], learning_rate_scale: float, dropout_key: int) -> StepResult:
        given = {
            f"{number} {name}": array for number, batch in enumerate(micro_batches) for name, array in named(batch)
        }
        self.digests.append(digest({**given, "numbers": np.array([learning_rate_scale, dropout_key])}))
        self.results.append(self._engine.step(micro_batches, learning_rate_scale, dropout_key))
        return self.results[-1]

    def loss(self, batch: Batch) -> tuple[float, int]:
        return self._engine.loss(batch)

    def rewards(self, batch: Batch) -> NDArray[np.float32]:
        return self._engine.rewards(batch)

    def gradients(self, micro_batches: Sequence[Batch], dropout_key: int) -> Iterator[Piece]:
        return self._engine.gradients(micro_batches, dropout_key)

    def export(self, state: State) -> Iterator[Piece]:
        return self._engine.export(state)

    def restore(self, state: Given, arrays: Iterable[Piece]) -> None:
        self._engine.restore(state, arrays)

    def inference(self) -> InferenceEngine:
        return self._engine.inference()


def model(variant: str) -> ModelConfig:
    """What eight devices divide."""
    size = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": bigrams.VOCABULARY}
    return tiny(variant, **size, initializer_range=0.02)


def settings(optimizer: str, steps: int) -> TrainingConfig:
    """Rows of several documents, in two micro-batches, with a schedule."""
    return TrainingConfig.model_validate(
        {
            "steps": steps,
            "batch_size": 16,
            "micro_batch_size": 8,
            "sequence_length": 12,
            "document_masking": True,
            "optimizer": OPTIMIZERS[optimizer].model_dump(),
            "schedule": {"warmup_steps": 5, "floor": 0.1},
            "validation": {"every": 25, "rows": 8},
        }
    )


def write_data(folder: Path) -> Path:
    """The tokens of a run, in a folder that its checkpoints go to as well."""
    bigrams.write_chain(folder / "train", masked=True)
    bigrams.write_chain(folder / "validation", shards=1, seed=1, masked=True)
    return folder


def go(
    engine: EngineName,
    variant: str,
    config: TrainingConfig,
    folder: Path,
    checkpoints: str,
    stop: int | None = None,
    layout: Layout = Layout(),  # noqa: B008 - it is frozen
    lora: LoraConfig | None = None,
) -> Found:
    """Trains from the newest checkpoint to the end, or until so many steps are done and a checkpoint is written."""
    tuning = Tuning(lora=lora)
    watched = Watched(training_engine(engine, model(variant), config.optimizer, "float32", layout, tuning))
    adapters = None if lora is None else initial_adapters(model(variant), lora, 0)
    events: list[Event] = []
    validations: list[float] = []
    try:
        result = train(
            watched,
            model(variant),
            bigrams.batches_for(config, folder / "train", document_masking=True),
            bigrams.batches_for(config, folder / "validation", shuffled=False, document_masking=True),
            config,
            Checkpoints(LocalFileSystem(), str(folder / checkpoints), CheckpointConfig()),
            Start(weights.initial_weights(model(variant), 0), adapters=adapters),
            report=events.append,
            should_stop=lambda: stop is not None and len(watched.results) >= stop,
            continue_on=True,
        )
        validations = [record.loss for record in result.state.validations]
    except Interrupted:
        pass
    losses = [float(result.loss) for result in watched.results]
    assert np.isfinite(losses).all()
    notes = [event.text for event in events if isinstance(event, Note)]
    return Found(losses, watched.digests, validations, notes, watched.device, digest(exported(watched)))


def elsewhere(
    engine: EngineName, job: Mapping[str, int], folder: Path, layout: Layout, processes: int, devices: int
) -> dict[str, Found]:
    """What `main` comes to in other processes, started as a stage starts them; JAX has so many devices in each."""
    command = ["tests.models.loop_run", str(folder), engine, json.dumps(job), layout.model_dump_json()]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    run_all(engine, command, processes, environment, folder)
    found = json.loads((folder / "found.json").read_text())
    return {optimizer: Found(**one) for optimizer, one in found.items()}


def main(folder: Path, engine: EngineName, job: Mapping[str, int], layout: Layout) -> None:
    """Goes on with a run of each optimizer for `stop` steps of `steps`."""
    found = {
        optimizer: go(engine, "llama", settings(optimizer, job["steps"]), folder, optimizer, job["stop"], layout)
        for optimizer in OPTIMIZERS
    }
    if number() == 0:
        text = json.dumps({optimizer: one._asdict() for optimizer, one in found.items()})
        (folder / "found.json").write_text(text)


if __name__ == "__main__":
    place, name, work, lying = sys.argv[1:]
    explained(
        Path(place),
        lambda: main(Path(place), name, json.loads(work), Layout.model_validate_json(lying)),  # type: ignore[arg-type]  # mypy sees a str
    )
