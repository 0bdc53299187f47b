"""How well a model predicts documents of any length: windows slide over each, and every token is scored in one.

B windows read at once, T positions of a window.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.engine import Batch, InferenceEngine
from models.generation import NotFinite

BATCHES_SORTED = 16
"""Batches whose windows are sorted by length together: those of short documents then lie beside each other."""


class Window(NamedTuple):
    """A part of a document."""

    tokens: list[int]
    """What the model reads, and the last target behind it."""
    scored: int
    """How many of its targets, the last ones, are scored in it."""


def windows(tokens: Sequence[int], window: int, stride: int) -> Iterator[Window]:
    """Cuts a document so that each token but the first is scored exactly once: the first window scores all of its
    own, each further one the `stride` tokens that it adds, or what is left."""
    targets = len(tokens) - 1
    done = 0
    while done < targets:
        end = min(targets, done + (stride if done else window))
        begin = max(0, end - window)
        yield Window(list(tokens[begin : end + 1]), end - done)
        done = end


def negative_log_likelihoods(
    engine: InferenceEngine,
    documents: Iterable[Sequence[int]],
    window: int,
    stride: int,
    batch_size: int,
    watch: Callable[[int], None] = lambda scored: None,
) -> Iterator[float]:
    """Of each document, in order, the sum over all its tokens but the first of −ln p(token | tokens before it in its
    window), in nats; 0 for one that has no others.

    A batch may have windows of several documents; some batches' windows are in memory at once. `watch` is told after
    each batch how many tokens it scored. Raises NotFinite where a log-probability is not.
    """
    totals: dict[int, float] = {}

    def numbered() -> Iterator[tuple[int, Window]]:
        for number, tokens in enumerate(documents):
            totals[number] = 0.0
            for part in windows(tokens, window, stride):
                yield number, part

    parts = numbered()
    while together := list(itertools.islice(parts, batch_size * BATCHES_SORTED)):
        # Long ones first, so that too large a batch fails at once.
        by_length = sorted(together, key=lambda part: -len(part[1].tokens))
        for first in range(0, len(by_length), batch_size):
            batch = by_length[first : first + batch_size]
            losses_B = _losses(engine, [part for _, part in batch])
            for (number, _), loss in zip(batch, losses_B.tolist(), strict=True):
                totals[number] += loss
            watch(sum(part.scored for _, part in batch))
        # The last document may have more windows.
        for number in [number for number in totals if number < together[-1][0]]:
            yield totals.pop(number)
    yield from totals.values()


def _losses(engine: InferenceEngine, parts: Sequence[Window]) -> NDArray[np.float64]:
    """−ln p summed over each window's scored targets, (B,)."""
    length = max(len(part.tokens) for part in parts) - 1
    tokens_BT, targets_BT = (np.zeros((len(parts), length), np.int32) for _ in range(2))
    scored_BT = np.zeros((len(parts), length), np.bool_)
    for row, part in enumerate(parts):
        own = len(part.tokens) - 1
        tokens_BT[row, :own], targets_BT[row, :own] = part.tokens[:-1], part.tokens[1:]
        scored_BT[row, own - part.scored : own] = True
    found_BT = engine.log_probabilities(Batch(tokens_BT, targets_BT, scored_BT))
    losses_B: NDArray[np.float64] = -found_BT.sum(axis=1, dtype=np.float64, where=scored_BT)
    if not np.isfinite(losses_B).all():
        raise NotFinite
    return losses_B
