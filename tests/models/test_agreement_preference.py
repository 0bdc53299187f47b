"""Preference tuning on every engine against every other: losses, gradients, and curves of the whole loop.

The largest differences are printed: `pytest -rP` shows them.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from models import weights
from models.engine import EngineName, training_engine
from models.training.checkpoint import Checkpoints
from models.training.config import CheckpointConfig, TrainingConfig
from models.training.events import Event, Note
from models.training.loop import Interrupted, Start, train
from models.training.state import ValidationRecord
from models.tuning import LoraConfig
from tests.models.agreement import (
    HERE,
    assert_bitwise,
    by_engine,
    exported,
    largest_share,
    pairs_of,
    several_engines,
    tell,
)
from tests.models.preferring import LORA, TUNING, gradients, pairs, preferring
from tests.models.tiny import Arrays, tiny
from tests.models.training import bigrams

pytestmark = pytest.mark.agreement
STEPS, HALF = 24, 11
MODEL = tiny("llama", vocab_size=bigrams.VOCABULARY)


@several_engines
@pytest.mark.parametrize(("variant", "lora"), [("gpt2", None), ("llama", None), ("mixtral", None), ("mixtral", LORA)])
def test_losses_and_gradients_agree(variant: str, lora: LoraConfig | None) -> None:
    """Of two micro-batches of other sizes, with adapters too."""
    batches = [pairs(3), pairs(2, length=14, seed=1)]
    engines = by_engine(lambda engine: preferring(engine, tiny(variant), lora=lora))
    found = {name: gradients(engine, batches, lora=lora) for name, engine in engines.items()}
    for names, one, other in pairs_of(found):
        share, where = largest_share(one, other)
        tell(names, share)
        assert share <= 1, f"{names}: {where}"
    for names, a, b in pairs_of({name: engine.step(batches, 1.0, 0) for name, engine in engines.items()}):
        assert float(a.loss) == pytest.approx(float(b.loss), abs=1e-5), names
        assert a.figures.tolist() == pytest.approx(b.figures.tolist(), abs=1e-4), names


class Run(NamedTuple):
    """What one start of the loop came to."""

    losses: list[float]
    """Of the logged steps."""
    validations: tuple[ValidationRecord, ...]
    notes: list[str]
    arrays: Arrays


def settings(**changes: object) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "steps": STEPS,
            "batch_size": 8,
            "micro_batch_size": 4,
            "sequence_length": 7,
            "packing": "pairs",
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup_steps": 5, "floor": 0.1},
            "validation": {"every": 6, "rows": 20, "samples": 1},
            **changes,
        }
    )


def go(engine: EngineName, folder: Path, stop: int | None = None, dropout: float = 0.0) -> Run:
    """Trains from the newest checkpoint to the end, or until so many steps are done."""
    config, model = settings(), MODEL.model_copy(update={"dropout": dropout})
    trainer = training_engine(engine, model, config.optimizer, "float32", tuning=TUNING)
    events: list[Event] = []
    losses: list[float] = []
    step = trainer.step

    def noted(*arguments: object) -> object:
        result = step(*arguments)  # type: ignore[arg-type]
        losses.append(float(result.loss))
        return result

    trainer.step = noted  # type: ignore[method-assign, assignment]
    validations: tuple[ValidationRecord, ...] = ()
    for part, seed in (("train", 0), ("validation", 1)):
        if not (folder / part).exists():
            bigrams.write_chain(folder / part, shards=2, tokens=160, seed=seed, masked=True)
    try:
        result = train(
            trainer,
            model,
            bigrams.batches_for(config, folder / "train"),
            bigrams.batches_for(config, folder / "validation", shuffled=False),
            config,
            Checkpoints(LocalFileSystem(), str(folder / "checkpoints"), CheckpointConfig()),
            Start(weights.initial_weights(model, 0)),
            report=events.append,
            should_stop=lambda: stop is not None and len(losses) >= stop,
            continue_on=True,
        )
        validations = result.state.validations
    except Interrupted:
        pass
    notes = [event.text for event in events if isinstance(event, Note)]
    return Run(losses, validations, notes, exported(trainer))


def curve(*runs: Run) -> list[float]:
    """The losses of all steps, and what the validations say of them."""
    found = [loss for run in runs for loss in run.losses]
    for record in runs[-1].validations:
        assert record.preferences is not None
        found += [record.loss, record.preferences.margin]
    assert len(found) == STEPS + 8
    return found


@several_engines
def test_curves_agree_and_another_engine_goes_on_with_the_same_reference(tmp_path: Path) -> None:
    whole = {name: go(name, tmp_path / name) for name in HERE}
    for names, one, other in pairs_of(whole):
        difference = float(abs(np.array(curve(one)) - np.array(curve(other))).max())
        tell(names, difference)
        assert difference <= 1e-3, names
    for run in whole.values():
        assert run.losses[0] == pytest.approx(np.log(2), abs=1e-5)
        assert np.mean(run.losses[-5:]) < 0.6
    for origin, target in itertools.permutations(HERE, 2):
        folder = tmp_path / f"{origin}-{target}"
        half = go(origin, folder, stop=HALF)
        rest = go(target, folder)
        assert rest.notes == [
            f"going on from the checkpoint of step {HALF}, made by engine '{origin}'; engine '{target}' goes on"
        ]
        difference = float(abs(np.array(curve(half, rest)) - np.array(curve(whole[target]))).max())
        tell(f"{origin}, then {target}:", difference)
        assert difference <= 1e-3


@pytest.mark.parametrize("engine", HERE)
def test_an_interrupted_run_goes_on_bitwise(engine: EngineName, tmp_path: Path) -> None:
    """With the weights that it began with as its reference, and not those of the checkpoint."""
    whole = go(engine, tmp_path / "whole", dropout=0.1)
    parts = [go(engine, tmp_path / "parts", stop=stop, dropout=0.1) for stop in (5, HALF, None)]
    assert [loss for part in parts for loss in part.losses] == whole.losses
    assert parts[-1].validations == whole.validations
    assert_bitwise(parts[-1].arrays, whole.arrays)
