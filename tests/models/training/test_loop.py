"""The loop: what it tells, when it stops, and that a stopped run goes on as if it never had stopped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from common.errors import UserError
from models.engine import EngineName
from models.training.checkpoint import Checkpoints
from models.training.config import CheckpointConfig, TrainingConfig
from models.training.events import Event, Note, Progress, TrainingResult, Validation
from models.training.loop import EXIT_GO_ON_LATER, Interrupted, train
from tests.models.training.bigrams import MODEL, BigramEngine, batches_for, start, write_chain

pytestmark = pytest.mark.timeout(60)


def config(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "steps": 30,
        "batch_size": 4,
        "sequence_length": 7,
        "packing": "documents",
        "optimizer": {"learning_rate": 0.1},
        "validation": {"every": 10, "exact_match_rows": 8, "samples": 2},
    }
    return TrainingConfig.model_validate({**values, **changes})


class Run:
    """One place in which runs are started, stopped and started again."""

    def __init__(self, folder: Path, settings: TrainingConfig, **checkpoint: Any) -> None:
        self.folder = folder
        self.settings = settings
        self.checkpoint = CheckpointConfig(**checkpoint)
        self.events: list[Event] = []
        self.training = write_chain(folder / "train", masked=True)
        self.validation = write_chain(folder / "validation", shards=1, seed=1, masked=True)
        self.engine = BigramEngine(settings.optimizer)

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(LocalFileSystem(), str(self.folder / "checkpoints"), self.checkpoint)

    def go(
        self,
        stop_after: int | None = None,
        engine: EngineName = "torch",
        poisoned: frozenset[int] = frozenset(),
        continue_on: bool = False,
    ) -> TrainingResult:
        self.engine = BigramEngine(self.settings.optimizer, engine, poisoned)
        validation = self.settings.validation
        return train(
            self.engine,
            MODEL,
            batches_for(self.settings, self.training),
            batches_for(self.settings, self.validation, shuffled=False) if validation else None,
            self.settings,
            self.checkpoints(),
            start(),
            report=self.events.append,
            should_stop=lambda: stop_after is not None and len(self.engine.steps_taken) >= stop_after,
            continue_on=continue_on,
        )

    def arrays(self) -> dict[str, bytes]:
        return {
            piece.name: np.asarray(piece.array).tobytes()
            for state in ("weights", "optimizer")
            for piece in self.engine.export(state)
        }


def test_a_run_learns_and_tells(tmp_path: Path) -> None:
    run = Run(tmp_path, config())
    result = run.go()
    validations = [event for event in run.events if isinstance(event, Validation)]
    progress = [event for event in run.events if isinstance(event, Progress)]
    assert [event.step for event in validations] == [10, 20, 30]
    assert validations[-1].loss < validations[0].loss < np.log(16)
    assert validations[-1].exact_match is not None
    assert len(validations[-1].samples) == 2
    assert validations[-1].samples[0].expected is not None
    assert progress[-1].step == progress[-1].steps == 30
    assert progress[-1].mfu is None
    assert progress[-1].tokens_per_second > 0
    assert result.state.step == 30
    assert not result.stopped_early
    assert result.tokens == 30 * 4 * 7
    assert result.best == min(result.state.validations, key=lambda record: record.loss)


def test_an_interrupted_run_goes_on_as_if_it_never_had_stopped(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", config())
    expected = whole.go()
    parts = Run(tmp_path / "parts", config())
    for stop_after in (1, 9, 11, 4):
        with pytest.raises(Interrupted) as raised:
            parts.go(stop_after)
        assert raised.value.exit_status == EXIT_GO_ON_LATER == 75
    result = parts.go()
    assert result.resumed_from == 1 + 9 + 11 + 4
    assert parts.engine.steps_taken == list(range(25, 30))
    assert Note("going on from the checkpoint of step 25") in parts.events
    assert parts.arrays() == whole.arrays()
    assert result.state.validations == expected.state.validations


def test_too_many_bad_steps_in_a_row_stop_the_run_and_keep_its_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, config(skipped_steps_limit=3), every_seconds=0)
    with pytest.raises(UserError, match="3 steps in a row, up to step 15"):
        run.go(poisoned=frozenset({3, 12, 13, 14}))
    found = run.checkpoints().load("torch", run_fingerprint(run))
    assert found is not None
    assert found.state["skipped"] >= 1


def run_fingerprint(run: Run) -> str:
    from models.training.loop import fingerprint

    return fingerprint(
        MODEL,
        run.settings,
        batches_for(run.settings, run.training),
        batches_for(run.settings, run.validation, shuffled=False),
    )
