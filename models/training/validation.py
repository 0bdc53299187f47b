"""What is measured on the validation split while training.

B rows, T positions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.engine import Batch, TrainingEngine
from models.generation import generate
from models.sampling import SamplingConfig
from models.training.batches import Batches
from models.training.config import ValidationConfig
from models.training.events import Sample

_FREE_PROMPT, _FREE_CONTINUATION = 16, 48


class Measured(NamedTuple):
    """What one validation found."""

    loss: float
    exact_match: float | None
    samples: tuple[Sample, ...]


class _Task(NamedTuple):
    """A prompt and what follows it."""

    prompt: list[int]
    answer: list[int]
    whole: bool
    """Whether the whole row counts as a target, so that nothing in it is the answer to anything."""


class Validator:
    """Measures an engine's weights on the first rows of the validation split."""

    def __init__(
        self,
        engine: TrainingEngine,
        batches: Batches,
        config: ValidationConfig,
        rows_at_once: int,
        decode: Callable[[Sequence[int]], str] | None,
    ) -> None:
        """`rows_at_once`: rows that go through the model together. `decode`: from token ids to text."""
        self._engine = engine
        self._batches = batches
        self._config = config
        self._rows_at_once = rows_at_once
        self._decode = decode or (lambda tokens: " ".join(map(str, tokens)))

    def measure(self, stopping: Callable[[], bool]) -> Measured | None:
        """Loss over the counted targets, exact match and samples; None where `stopping` came true in between.

        Exact match compares what the model writes greedily after a row's last token before its counted targets with
        these, up to the last of them or to the model's last position; rows in which nothing counts are left out.
        """
        total, counted = 0.0, 0
        for batch in self._parts(self._config.rows or self._batches.sources[0].rows):
            if stopping():
                return None
            loss, targets = self._engine.loss(batch)
            total, counted = total + loss, counted + targets
        matches: list[bool] = []
        for batch in self._parts(self._config.exact_match_rows):
            if stopping():
                return None
            tasks = self._tasks(batch)
            written = self._write(tasks)
            matches += [task.answer == tokens for task, tokens in zip(tasks, written, strict=True)]
        return Measured(
            total / counted if counted else float("nan"),
            sum(matches) / len(matches) if matches else None,
            self._samples() if not stopping() else (),
        )

    def _parts(self, rows: int) -> Iterator[Batch]:
        for first in range(0, rows, self._rows_at_once):
            yield self._batches.rows(first, min(self._rows_at_once, rows - first))

    def _samples(self) -> tuple[Sample, ...]:
        if not self._config.samples:
            return ()
        batch = self._batches.rows(0, self._config.samples)
        tasks = [_shown(task) for task in self._tasks(batch)]
        written = self._write(tasks)
        return tuple(
            Sample(self._decode(task.prompt), self._decode(tokens), None if task.whole else self._decode(task.answer))
            for task, tokens in zip(tasks, written, strict=True)
        )

    def _tasks(self, batch: Batch) -> list[_Task]:
        return list(_tasks(batch, self._engine.inference().config.max_position_embeddings))

    def _write(self, tasks: Sequence[_Task]) -> list[list[int]]:
        """What the model writes greedily after each prompt, as long as the answer."""
        if not tasks:
            return []
        sampling = SamplingConfig(max_new_tokens=max(len(task.answer) for task in tasks))
        prompts = [task.prompt for task in tasks]
        written = generate(self._engine.inference(), prompts, sampling, (), self._rows_at_once)
        return [tokens[: len(task.answer)] for task, tokens in zip(tasks, written, strict=True)]


def _tasks(batch: Batch, longest: int) -> Iterator[_Task]:
    """Each row with a counted target as a prompt up to its first, and an answer up to its last or to the position
    `longest`, the last that a model writes."""
    for tokens_T, targets_T, counted_T in zip(*batch[:3], strict=True):
        places: NDArray[np.int64] = np.flatnonzero(counted_T)
        if not places.size:
            continue
        first, end = int(places[0]), min(int(places[-1]), longest - 2) + 1
        if first < end:
            yield _Task(tokens_T[: first + 1].tolist(), targets_T[first:end].tolist(), first == 0)


def _shown(task: _Task) -> _Task:
    """A row that counts whole is shown as a few tokens and what the model goes on with."""
    if not task.whole:
        return task
    row = task.prompt + task.answer
    length = max(1, min(_FREE_PROMPT, len(row) // 2))
    return _Task(row[:length], row[length : length + _FREE_CONTINUATION], True)
