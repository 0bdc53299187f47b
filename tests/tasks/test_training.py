"""What the training stages share: on which rows a loss counts as measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.history import Trained, read_history
from tests.tasks.conftest import RunStage
from tests.tasks.training_stages import TOKENIZER, pretraining

Tokens = Callable[..., Path]


@pytest.fixture
def tokens(run_stage: RunStage) -> Tokens:
    tokenizer, _ = run_stage("tokenizer", TOKENIZER)

    def make(**changes: Any) -> Path:
        source = {"kind": "arithmetic", "maximum": 99, "train": 60, "validation": 30, "test": 3, **changes}
        documents, _ = run_stage("documents", {"source": source})
        return run_stage("tokens", {}, documents=documents, tokenizer=tokenizer)[0]

    return make


@pytest.fixture
def measured_on(run_stage: RunStage) -> Callable[..., str]:
    """The identity of the rows that a training of some tokens was validated on; `portions` has a weight for each."""

    def measure(*folders: Path, weights: tuple[float, ...] = (), rows: int | None = None, **training: Any) -> str:
        config = pretraining(
            *({"weight": weight} for weight in weights), steps=1, validation={"every": 1, "rows": rows}, **training
        )
        inputs = {f"tokens.{number}": folder for number, folder in enumerate(folders)}
        folder, _ = run_stage("pretrain", config, **inputs)
        (entry,) = read_history(folder)
        assert isinstance(entry, Trained)
        assert entry.measured_on is not None
        return entry.measured_on

    return measure


def test_rows_that_differ_in_what_stands_in_them_alone_are_others(
    tokens: Tokens, measured_on: Callable[..., str]
) -> None:
    forwards, backwards = tokens(), tokens(reversed_answers=True)
    assert (forwards / "tokens.json").read_bytes() == (backwards / "tokens.json").read_bytes()
    found = measured_on(forwards)
    assert found == measured_on(tokens())
    assert found != measured_on(backwards)
    assert measured_on(forwards, forwards) != measured_on(forwards, backwards)


def test_what_is_trained_on_does_not_matter(tokens: Tokens, measured_on: Callable[..., str]) -> None:
    assert measured_on(tokens()) == measured_on(tokens(train=200), seed=3, batch_size=2)


def test_equal_shares_are_equal_however_they_are_written(tokens: Tokens, measured_on: Callable[..., str]) -> None:
    one, other = tokens(), tokens(maximum=999)
    assert measured_on(one) == measured_on(one, weights=(0.5,))
    found = measured_on(one, other)
    assert found == measured_on(one, other, weights=(0.5, 0.5)) == measured_on(other, one)
    assert found != measured_on(one, other, weights=(1, 2))
    assert measured_on(one, other, weights=(0.1, 0.2)) == measured_on(one, other, weights=(1, 2))


def test_which_rows_are_taken_and_how_they_are_read_matters(tokens: Tokens, measured_on: Callable[..., str]) -> None:
    folder = tokens()
    found = measured_on(folder)
    assert found == measured_on(folder, rows=1000)
    others = [
        measured_on(folder, rows=5),
        measured_on(folder, sequence_length=14),
        measured_on(folder, packing="documents"),
        measured_on(folder, packing="whole"),
        measured_on(folder, document_masking=True),
    ]
    assert len({found, *others}) == 6
