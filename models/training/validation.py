"""What is measured while training: on the validation split, and of the tasks that are asked.

B rows, T positions, D documents.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.engine import Batch, TrainingEngine
from models.generation import NotFinite, generate
from models.preference import FIGURES, PreferenceFigures, pairs_that_count, summed_figures
from models.sampling import SamplingConfig
from models.training.batches import Batches
from models.training.config import ValidationConfig
from models.training.events import Sample
from models.training.state import TaskScore

_FREE_PROMPT, _FREE_CONTINUATION = 16, 48
Probe = Callable[[Callable[[], None]], TaskScore]
"""Asks the model in training a task. It calls what it is given after each batch, in every process alike, and is ended
by what that raises. Raises NotFinite where what the model says is not."""


class Measured(NamedTuple):
    """What one validation found."""

    loss: float
    exact_match: float | None
    samples: tuple[Sample, ...]
    by_source: tuple[float, ...] = ()
    """The loss on each source, where there are several."""
    preferences: PreferenceFigures | None = None
    """What else is measured of pairs."""
    tasks: tuple[TaskScore, ...] = ()
    """The scores of the tasks that were asked."""


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
        probes: Sequence[Probe] = (),
    ) -> None:
        """`rows_at_once`: rows that go through the model together. `decode`: from token ids to text. `probes`: one for
        each task that is asked."""
        self._engine = engine
        self._batches = batches
        self._sources = batches.sources
        self._config = config
        self._rows_at_once = rows_at_once
        self._probes = probes
        self._decode = decode or (lambda tokens: " ".join(map(str, tokens)))

    def measure(self, stopping: Callable[[], bool], asks: bool = True) -> Measured | None:
        """Loss over the counted targets, exact match, samples, and the scores of tasks where it `asks` them; None where
        `stopping` came true in between.

        Of pairs, the preference loss and what goes with it; samples go on from the prompts, with the chosen answers.

        Exact match compares what the model writes greedily after a row's last token before its counted targets with
        these, up to the first that does not count or to the model's last position: of several turns, the first. Rows in
        which nothing counts are left out, and where rows hold whole documents, each document is as a row.
        """
        losses: dict[int, float] = {}
        figures: dict[int, NDArray[np.float64]] = {}
        matches: dict[int, float] = {}
        tasks: tuple[TaskScore, ...] = ()
        try:
            for source in range(len(self._sources)):
                if self._batches.packing == "pairs":
                    figures[source] = self._figures(source, stopping)
                    losses[source] = float(figures[source][0])
                    continue
                losses[source] = self._loss(source, stopping)
                matches |= self._exact_match(source, stopping)
            if asks:
                tasks = tuple(self._scores(stopping))
        except _Stopped:
            return None
        return Measured(
            self._average(losses),
            self._average(matches) if matches else None,
            self._samples() if not stopping() else (),
            tuple(losses.values()) if len(losses) > 1 else (),
            PreferenceFigures.of(self._averages(figures)[1:]) if figures else None,
            tasks,
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

    def _scores(self, stopping: Callable[[], bool]) -> Iterator[TaskScore]:
        """The scores of the tasks; of none on which the model's logits are not finite, of which the loss tells."""

        def heed() -> None:
            if stopping():
                raise _Stopped

        for probe in self._probes:
            heed()
            with suppress(NotFinite):
                yield probe(heed)

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
        of_sources = [self._first_tasks(source) for source in range(len(self._sources))]
        in_turn = (task for together in itertools.zip_longest(*of_sources) for task in together if task is not None)
        tasks = [_shown(task) for task in itertools.islice(in_turn, self._config.samples)]
        written = self._write(tasks)
        return tuple(
            Sample(self._decode(task.prompt), self._decode(tokens), None if task.whole else self._decode(task.answer))
            for task, tokens in zip(tasks, written, strict=True)
        )

    def _first_tasks(self, source: int) -> Iterator[_Task]:
        """The tasks of a source's rows, or of the chosen ones of its pairs, one after another, of as many rows as there
        are samples at most."""
        together = self._batches.together
        for number in range(min(self._config.samples, self._sources[source].rows // together)):
            yield from self._tasks(self._batches.source_rows(source, number * together, 1))

    def _tasks(self, batch: Batch) -> list[_Task]:
        if self._batches.packing == "whole":
            batch = _apart(batch)
        return list(_tasks(batch, self._engine.inference().config.max_position_embeddings))

    def _write(self, tasks: Sequence[_Task]) -> list[list[int]]:
        """What the model writes greedily after each prompt, as long as the answer; nothing where its logits are not
        finite, of which the loss tells."""
        if not tasks:
            return []
        sampling = SamplingConfig(max_new_tokens=max(len(task.answer) for task in tasks))
        prompts = [task.prompt for task in tasks]
        try:
            written = generate(self._engine.inference(), prompts, sampling, (), self._rows_at_once)
        except NotFinite:
            return [[] for _ in tasks]
        return [tokens[: len(task.answer)] for task, tokens in zip(tasks, written, strict=True)]


def _apart(batch: Batch) -> Batch:
    """Every document of rows of whole documents in a row of its own, padding too, which has nothing that counts."""
    assert batch.documents_BT is not None  # for the type checker: such rows always say it
    rows_D, starts_D = np.nonzero(np.diff(batch.documents_BT, axis=1, prepend=-1))
    lengths_D = np.diff(np.ravel_multi_index((rows_D, starts_D), batch.documents_BT.shape), append=batch.tokens_BT.size)
    real_DT = np.arange(lengths_D.max()) < lengths_D[:, None]
    tokens_DT, targets_DT = np.zeros_like(real_DT, np.int32), np.zeros_like(real_DT, np.int32)
    counted_DT = np.zeros_like(real_DT)
    for apart_DT, array_BT in zip((tokens_DT, targets_DT, counted_DT), batch[:3], strict=True):
        apart_DT[real_DT] = array_BT.ravel()
    return Batch(tokens_DT, targets_DT, counted_DT)


def _tasks(batch: Batch, longest: int) -> Iterator[_Task]:
    """Each row with a counted target as a prompt up to its first, and an answer up to the next that does not count or
    to the position `longest`, the last that a model writes.

    What a document begins with is no target where documents do not know of each other, but it is no prompt and no end
    for that.
    """
    begins_BT = np.zeros_like(batch.loss_mask_BT)
    if batch.documents_BT is not None:
        begins_BT[:, :-1] = np.diff(batch.documents_BT, axis=1) != 0
    for tokens_T, targets_T, counted_T, begins_T in zip(*batch[:3], begins_BT, strict=True):
        places: NDArray[np.int64] = np.flatnonzero(counted_T)
        if not places.size:
            continue
        first = int(places[0])
        if begins_T[:first].all():
            first = 0
        others = np.flatnonzero(~(counted_T | begins_T)[first:])
        end = first + int(others[0]) if others.size else counted_T.size
        end = min(int(places[places < end][-1]), longest - 2) + 1
        if first < end:
            yield _Task(tokens_T[: first + 1].tolist(), targets_T[first:end].tolist(), first == 0)


def _shown(task: _Task) -> _Task:
    """A row that counts whole is shown as a few tokens and what the model goes on with."""
    if not task.whole:
        return task
    row = task.prompt + task.answer
    length = max(1, min(_FREE_PROMPT, len(row) // 2))
    return _Task(row[:length], row[length : length + _FREE_CONTINUATION], True)
