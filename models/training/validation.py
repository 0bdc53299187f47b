"""What is measured on the validation split while training.

B rows, T positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.engine import Batch, TrainingEngine
from models.generation import generate
from models.preference import FIGURES, PreferenceFigures, pairs_that_count, summed_figures
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
    by_source: tuple[float, ...] = ()
    """The loss on each source, where there are several."""
    preferences: PreferenceFigures | None = None
    """What else is measured of pairs."""


class _Task(NamedTuple):
    """A prompt and what follows it."""

    prompt: list[int]
    answer: list[int]
    whole: bool
    """Whether the whole row counts as a target, so that nothing in it is the answer to anything."""


class _Stopped(Exception):
    """The loop is to stop."""


class Validator:
    """Measures an engine's weights on the first rows of each source's validation split.

    Losses and exact matches of several sources are averaged by the shares that were asked for, which is what they
    would be on a mixture of them, whatever the sizes of the validation splits.
    """

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
        self._sources = batches.sources
        self._config = config
        self._rows_at_once = rows_at_once
        self._decode = decode or (lambda tokens: " ".join(map(str, tokens)))

    def measure(self, stopping: Callable[[], bool]) -> Measured | None:
        """Loss over the counted targets, exact match and samples; None where `stopping` came true in between.

        Of pairs, the preference loss and what goes with it; samples go on from the prompts, with the chosen answers.

        Exact match compares what the model writes greedily after a row's last token before its counted targets with
        these, up to the last of them or to the model's last position; rows in which nothing counts are left out.
        """
        losses: dict[int, float] = {}
        figures: dict[int, NDArray[np.float64]] = {}
        matches: dict[int, float] = {}
        try:
            for source in range(len(self._sources)):
                if self._batches.packing == "pairs":
                    figures[source] = self._figures(source, stopping)
                    losses[source] = float(figures[source][0])
                    continue
                losses[source] = self._loss(source, stopping)
                matches |= self._exact_match(source, stopping)
        except _Stopped:
            return None
        return Measured(
            self._average(losses),
            self._average(matches) if matches else None,
            self._samples() if not stopping() else (),
            tuple(losses.values()) if len(losses) > 1 else (),
            PreferenceFigures.of(self._averages(figures)[1:]) if figures else None,
        )

    def by_name(self, losses: Sequence[float]) -> dict[str, float]:
        """Losses on the sources by their names; nothing where there are none."""
        return {source.name: loss for source, loss in zip(self._sources, losses, strict=False)}

    def _loss(self, source: int, stopping: Callable[[], bool]) -> float:
        total, counted = 0.0, 0
        for batch in self._parts(source, self._config.rows, stopping):
            loss, targets = self._engine.loss(batch)
            total, counted = total + loss, counted + targets
        return total / counted if counted else float("nan")

    def _figures(self, source: int, stopping: Callable[[], bool]) -> NDArray[np.float64]:
        """The mean figures of a source's pairs, (F,)."""
        total, counted = np.zeros(FIGURES), 0
        for batch in self._parts(source, self._config.rows, stopping):
            total += summed_figures(self._engine.rewards(batch), batch)
            counted += int(pairs_that_count(batch).sum())
        return total / counted if counted else np.full(FIGURES, np.nan)

    def _averages(self, figures: Mapping[int, NDArray[np.float64]]) -> list[float]:
        of_each = [dict(zip(figures, of_sources, strict=True)) for of_sources in zip(*figures.values(), strict=True)]
        return [self._average(one) for one in of_each]

    def _exact_match(self, source: int, stopping: Callable[[], bool]) -> dict[int, float]:
        """The share of a source's rows that are written exactly; nothing where none is to be written."""
        matches: list[bool] = []
        for batch in self._parts(source, self._config.exact_match_rows, stopping):
            tasks = self._tasks(batch)
            written = self._write(tasks)
            matches += [task.answer == tokens for task, tokens in zip(tasks, written, strict=True)]
        return {source: sum(matches) / len(matches)} if matches else {}

    def _average(self, values: Mapping[int, float]) -> float:
        """The mean of some sources' values by their shares."""
        total = sum(self._sources[source].share for source in values)
        return sum(value * (self._sources[source].share / total) for source, value in values.items())

    def _parts(self, source: int, rows: int | None, stopping: Callable[[], bool]) -> Iterator[Batch]:
        all_rows = self._sources[source].rows
        count = all_rows if rows is None else min(rows, all_rows)
        for first in range(0, count, self._rows_at_once):
            if stopping():
                raise _Stopped
            yield self._batches.source_rows(source, first, min(self._rows_at_once, count - first))

    def _samples(self) -> tuple[Sample, ...]:
        """Continuations of the first rows of the sources in turn."""
        tasks: list[_Task] = []
        for number in range(self._config.samples):
            row, source = divmod(number, len(self._sources))
            first = row * self._batches.together
            tasks += [_shown(task) for task in self._tasks(self._batches.source_rows(source, first, 1))]
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
    for row, (tokens_T, targets_T, counted_T) in enumerate(zip(*batch[:3], strict=True)):
        places: NDArray[np.int64] = np.flatnonzero(counted_T)
        if not places.size:
            continue
        first, end = int(places[0]), min(int(places[-1]), longest - 2) + 1
        # What a document begins with is no target under a mask, but it is no prompt for that.
        if batch.documents_BT is not None and np.diff(batch.documents_BT[row, : first + 1]).all():
            first = 0
        if first < end:
            yield _Task(tokens_T[: first + 1].tolist(), targets_T[first:end].tolist(), first == 0)


def _shown(task: _Task) -> _Task:
    """A row that counts whole is shown as a few tokens and what the model goes on with."""
    if not task.whole:
        return task
    row = task.prompt + task.answer
    length = max(1, min(_FREE_PROMPT, len(row) // 2))
    return _Task(row[:length], row[length : length + _FREE_CONTINUATION], True)
