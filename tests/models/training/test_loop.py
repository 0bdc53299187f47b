"""The loop: what it tells, when it stops, and that a stopped run goes on as if it never had stopped."""

import contextlib
import errno
import math
import os
import signal
import threading
import types
from collections.abc import Callable, Sequence
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
from models.training.loop import Interrupted, Start, fingerprint, train
from models.training.metrics import Metrics, read_csv
from models.training.signals import StopSignals
from models.training.state import RunState, TaskScore, ValidationRecord
from models.training.validation import Probe
from tests.models.training.bigrams import MODEL, BigramEngine, Share, batches_for, start, write_chain
from tests.models.training.folders import batches, folder_source

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
        validated: bool = False,
        stop: Callable[[], bool] | None = None,
        probes: Sequence[Probe] = (),
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
            start()._replace(validated=validated),
            report=self.events.append,
            probes=probes,
            should_stop=stop or (lambda: stop_after is not None and len(self.engine.steps_taken) >= stop_after),
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
        with pytest.raises(Interrupted):
            parts.go(stop_after)
    result = parts.go()
    assert result.resumed_from == 1 + 9 + 11 + 4
    assert parts.engine.steps_taken == list(range(25, 30))
    assert Note("going on from the checkpoint of step 25") in parts.events
    assert parts.arrays() == whole.arrays()
    assert result.state.validations == expected.state.validations


def test_a_validation_that_is_interrupted_is_done_again(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", config())
    expected = whole.go()
    parts = Run(tmp_path / "parts", config())
    with pytest.raises(Interrupted):
        parts.go(stop_after=10)  # the tenth step is followed by a validation, which is asked first
    assert not any(isinstance(event, Validation) for event in parts.events)
    result = parts.go()
    assert result.resumed_from == 10
    assert parts.arrays() == whole.arrays()
    assert result.state.validations == expected.state.validations


def asking(*names: str, **changes: Any) -> TrainingConfig:
    return config(validation={"every": 5, "rows": 8, "tasks": {"names": names, **changes}})


def test_tasks_are_asked_at_their_own_steps_and_the_last(tmp_path: Path) -> None:
    run = Run(tmp_path, asking("share", every=20))
    share = Share(lambda: run.engine)
    result = run.go(probes=[share], validated=True)
    told = [event for event in run.events if isinstance(event, Validation)]
    assert [event.step for event in told] == [0, 5, 10, 15, 20, 25, 30]
    assert [event.step for event in told if event.tasks] == [0, 20, 30]
    assert [record.tasks for record in result.state.validations] == [event.tasks for event in told]
    assert share.times == 3
    unasked = Run(tmp_path / "unasked", config(validation={"every": 5, "rows": 8}))
    unasked.go(validated=True)
    assert unasked.arrays() == run.arrays()


@pytest.mark.parametrize("asked", range(8, 20))
def test_a_run_that_is_stopped_in_a_task_asks_it_again(tmp_path: Path, asked: int) -> None:
    whole = Run(tmp_path / "whole", asking("share", "other"))
    expected = whole.go(probes=[Share(lambda: whole.engine), Share(lambda: whole.engine, "other")])
    parts = Run(tmp_path / "parts", asking("share", "other"))
    times = iter(range(asked))
    probes = [Share(lambda: parts.engine), Share(lambda: parts.engine, "other")]
    with pytest.raises(Interrupted):
        parts.go(probes=probes, stop=lambda: next(times, None) is None)
    result = parts.go(probes=probes)
    assert result.state == expected.state.model_copy(update={"seconds": result.state.seconds})
    assert [event.step for event in parts.events if isinstance(event, Validation)] == [5, 10, 15, 20, 25, 30]
    assert probes[0].times <= 6 + 1
    assert probes[1].times <= 6 + 1


def test_a_task_on_which_nothing_finite_is_said_has_no_score(tmp_path: Path) -> None:
    run = Run(tmp_path, asking("broken", "share"))
    result = run.go(probes=[Share(lambda: run.engine, "broken"), Share(lambda: run.engine)])
    assert all([score.task for score in record.tasks] == ["share"] for record in result.state.validations)
    with pytest.raises(ValueError, match="a probe for each task"):
        run.go()


def test_tasks_are_asked_at_validations_alone_and_once() -> None:
    with pytest.raises(ValueError, match=r"tasks\.every 7 is no multiple of 5"):
        asking("share", every=7)
    with pytest.raises(ValueError, match="a task is named twice"):
        asking("share", "share")


def test_a_checkpoint_of_the_time_before_tasks_is_read() -> None:
    """As JSON has it."""
    record: dict[str, Any] = {"step": 10, "loss": 1.5, "exact_match": None, "by_source": [], "preferences": None}
    state = RunState.model_validate({"step": 10, "validations": [record], "seconds": 1.0, "engines": ["torch"]})
    assert state.validations[0].tasks == ()
    scored = ValidationRecord(step=20, loss=math.inf, tasks=(TaskScore("copa", "acc", 0.5, None, 1, None),))
    again = RunState(step=20, validations=(*state.validations, scored))
    assert RunState.model_validate(again.to_json()) == again


def test_what_comes_in_is_validated_where_asked_and_training_is_the_same(tmp_path: Path) -> None:
    fresh = Run(tmp_path / "fresh", config())
    expected = fresh.go()
    run = Run(tmp_path / "run", config())
    result = run.go(validated=True)
    assert run.arrays() == fresh.arrays()
    assert result.state.validations[1:] == expected.state.validations
    assert result.state.validations[0].step == 0
    assert result.state.validations[0].loss == pytest.approx(np.log(16))
    first = next(event for event in run.events if isinstance(event, Validation))
    assert (first.step, len(first.samples)) == (0, 2)
    unmeasured = Run(tmp_path / "unmeasured", config(validation=None))
    assert unmeasured.go(validated=True).state.validations == ()


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_start_that_is_interrupted_in_its_validation_is_validated_once(tmp_path: Path, asked: int) -> None:
    whole = Run(tmp_path / "whole", config())
    expected = whole.go(validated=True)
    parts = Run(tmp_path / "parts", config())
    times = iter(range(1, 100))
    with pytest.raises(Interrupted, match="after step 0;"):
        parts.go(validated=True, stop=lambda: next(times) >= asked)
    result = parts.go(validated=True)
    assert result.resumed_from == 0
    assert parts.arrays() == whole.arrays()
    assert result.state.validations == expected.state.validations
    assert [event.step for event in parts.events if isinstance(event, Validation)] == [0, 10, 20, 30]


def test_no_checkpoint_is_kept_as_the_best_of_what_came_in(tmp_path: Path) -> None:
    # At this rate, training makes it worse.
    run = Run(tmp_path, config(optimizer={"learning_rate": 30.0}), every_seconds=0)
    with pytest.raises(Interrupted, match="after step 0;"):
        run.go(validated=True, stop=lambda: any(isinstance(event, Validation) for event in run.events))
    result = run.go(validated=True)
    assert result.resumed_from == 0
    assert result.best == result.state.validations[0]
    best = min(result.state.validations[1:], key=lambda record: record.loss)
    steps = {int(path.name.split("-")[1]) for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {best.step, 29, 30}


def test_a_run_stops_early_where_nothing_improves(tmp_path: Path) -> None:
    stopping = {"patience": 2, "minimum_improvement": 10.0}
    run = Run(tmp_path, config(steps=100, early_stopping=stopping))
    result = run.go()
    assert result.stopped_early
    assert [record.step for record in result.state.validations] == [10, 20, 30]
    again = run.go()
    assert again.state.validations == result.state.validations


def test_micro_batches_are_parts_of_the_batch(tmp_path: Path) -> None:
    losses = []
    for micro in (None, 1, 2):
        run = Run(tmp_path / str(micro), config(micro_batch_size=micro))
        losses.append(run.go().state.validations[-1].loss)
    assert losses[1] == pytest.approx(losses[0])
    assert losses[2] == pytest.approx(losses[0])


def test_another_engine_goes_on_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, config())
    with pytest.raises(Interrupted):
        run.go(stop_after=12, engine="jax")
    result = run.go(continue_on=True)
    assert (result.resumed_from, result.other_engines) == (12, ("jax",))
    whole = Run(tmp_path / "whole", config())
    whole.go()
    assert run.arrays() == whole.arrays()


def test_a_run_on_a_blend_goes_on_as_if_it_never_had_stopped(tmp_path: Path) -> None:
    settings = config(packing="stream", document_masking=True)
    chains = [write_chain(tmp_path / name, seed=seed) for seed, name in enumerate(("books", "web"))]
    engine = BigramEngine(settings.optimizer)

    def go(place: str, stop_after: int | None = None) -> tuple[TrainingResult, list[Event]]:
        events: list[Event] = []
        engine.steps_taken.clear()
        sources = [folder_source(chains[0], "books", weight=3.0, budget=350), folder_source(chains[1], "web")]
        result = train(
            engine,
            MODEL,
            batches(*sources, length=7, size=4, document_masking=True),
            batches(*(folder_source(chain, chain.name) for chain in chains), length=7, size=4, shuffled=False),
            settings,
            Checkpoints(LocalFileSystem(), str(tmp_path / place), CheckpointConfig()),
            start(),
            report=events.append,
            should_stop=lambda: stop_after is not None and len(engine.steps_taken) >= stop_after,
        )
        return result, events

    def arrays() -> dict[str, bytes]:
        return {piece.name: np.asarray(piece.array).tobytes() for piece in engine.export("weights")}

    expected, events = go("whole")
    weights = arrays()
    for stop_after in (3, 9, 11):
        with pytest.raises(Interrupted):
            go("parts", stop_after)
    result, _ = go("parts")
    assert arrays() == weights
    assert result.state.validations == expected.state.validations
    told = [event for event in events if isinstance(event, Validation)]
    assert [tuple(event.by_source) for event in told] == [("books", "web")] * 3
    assert [tuple(event.by_source.values()) for event in told] == [one.by_source for one in result.state.validations]


def test_another_engines_checkpoint_is_not_used_unasked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, config())
    with pytest.raises(Interrupted):
        run.go(stop_after=12, engine="jax")
    assert run.go().resumed_from is None
    assert "engine 'jax' made it" in caplog.text


def test_a_run_knows_all_its_engines_however_often_it_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, config())
    with pytest.raises(Interrupted):
        run.go(stop_after=12, engine="jax")
    with pytest.raises(Interrupted):
        run.go(stop_after=5, engine="mlx", continue_on=True)
    assert run.go(engine="mlx").resumed_from is None
    assert "engines 'jax' and 'mlx' made it" in caplog.text
    # What was made in one way is no less there after it was made in another.
    result = run.go(engine="jax")
    assert (result.resumed_from, result.other_engines, result.state.engines) == (12, (), ("jax",))


def test_a_record_names_the_engines_before_the_last_stop(tmp_path: Path) -> None:
    run = Run(tmp_path, config())
    with pytest.raises(Interrupted):
        run.go(stop_after=12, engine="jax")
    with pytest.raises(Interrupted):
        run.go(stop_after=5, engine="mlx", continue_on=True)
    result = run.go(engine="mlx", continue_on=True)
    assert (result.resumed_from, result.other_engines) == (17, ("jax",))


def test_another_config_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Interrupted):
        Run(tmp_path, config()).go(stop_after=12)
    assert Run(tmp_path, config(seed=1)).go().resumed_from is None
    assert "another config or other data" in caplog.text


def test_moments_to_begin_with_are_taken_over(tmp_path: Path) -> None:
    run = Run(tmp_path, config(validation=None, steps=5))
    run.go()
    moments = {piece.name: piece.array for piece in run.engine.export("optimizer")}
    weights = {piece.name: piece.array for piece in run.engine.export("weights")}
    other = BigramEngine(run.settings.optimizer)
    train(
        other,
        MODEL,
        batches_for(run.settings, run.training),
        None,
        run.settings,
        Checkpoints(LocalFileSystem(), str(tmp_path / "other"), CheckpointConfig()),
        Start(weights, moments),
        report=run.events.append,
    )
    assert {piece.name: piece.array for piece in other.export("optimizer")}["updates"] == 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_a_run_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    run = Run(tmp_path, config())
    before = signal.getsignal(number)

    def report(event: Event) -> None:
        if isinstance(event, Validation):
            signal.raise_signal(number)

    run.events = types.SimpleNamespace(append=report)  # type: ignore[assignment]  # all that the run asks of it
    with pytest.raises(Interrupted, match="after step 10; start it again"):
        run.go()
    assert signal.getsignal(number) is before
    run.events = []
    assert run.go().resumed_from == 10


def test_a_second_interrupt_from_the_keyboard_stops_at_once() -> None:
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def look() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, config())
    with pytest.raises(Interrupted):
        run.go(stop_after=12)
    run.checkpoint = CheckpointConfig(every_seconds=0)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"step-00000013-torch cannot be written \(No space left"):
        run.go()
    monkeypatch.undo()
    assert run.go().resumed_from == 12


def test_a_shard_that_is_damaged_meanwhile_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, config())
    batches = batches_for(run.settings, run.training)
    for path in run.training.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="token shard"):
        train(
            BigramEngine(run.settings.optimizer),
            MODEL,
            batches,
            batches_for(run.settings, run.validation),
            run.settings,
            run.checkpoints(),
            start(),
            report=run.events.append,
        )


def test_logs_of_a_run_in_parts_have_every_step_once(tmp_path: Path) -> None:
    run = Run(tmp_path, config(), every_seconds=1000, keep_best=0)
    for stop_after in (15, None):
        engine = BigramEngine(run.settings.optimizer)

        def stop(engine: BigramEngine = engine, after: int | None = stop_after) -> bool:
            return after is not None and len(engine.steps_taken) >= after

        with contextlib.suppress(Interrupted):
            train(
                engine,
                MODEL,
                batches_for(run.settings, run.training),
                batches_for(run.settings, run.validation, shuffled=False),
                run.settings,
                run.checkpoints(),
                start(),
                report=run.events.append,
                metrics=Metrics(tmp_path / "logs"),
                should_stop=stop,
                decode=lambda tokens: "".join(chr(97 + token) for token in tokens),
            )
    assert read_csv(tmp_path / "logs" / "training.csv")["step"] == [10, 15, 20, 30]
    assert read_csv(tmp_path / "logs" / "validation.csv")["step"] == [10, 20, 30]
    assert '"prompt": "' in (tmp_path / "logs" / "samples.jsonl").read_text()


def test_bad_steps_are_skipped_and_counted(tmp_path: Path) -> None:
    run = Run(tmp_path, config(skipped_steps_limit=3))
    result = run.go(poisoned=frozenset({3, 12, 13}))
    assert result.state.skipped == 3
    assert result.state.skipped_in_row == 0
    assert result.loss is not None
    assert math.isfinite(result.loss)


def test_too_many_bad_steps_in_a_row_stop_the_run_and_keep_its_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, config(skipped_steps_limit=3), every_seconds=0)
    with pytest.raises(UserError, match="3 steps in a row, up to step 15"):
        run.go(poisoned=frozenset({3, 12, 13, 14}))
    found = run.checkpoints().load("torch", run_fingerprint(run))
    assert found is not None
    assert found.step == 14
    assert found.state["skipped"] == 3


def run_fingerprint(run: Run) -> str:
    return fingerprint(
        MODEL,
        run.settings,
        batches_for(run.settings, run.training),
        batches_for(run.settings, run.validation, shuffled=False),
    )
