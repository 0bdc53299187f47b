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
) -> Iterator[NDArray[np.float64]]:
    """Of each document, in order, −ln p(token | tokens before it in its window) of all its tokens but the first, in
    nats, (tokens − 1,).

    A batch may have windows of several documents; some batches' windows are in memory at once. `watch` is told after
    each batch how many tokens it scored. Raises NotFinite where a log-probability is not.
    """
    found: dict[int, NDArray[np.float64]] = {}

    def placed() -> Iterator[tuple[int, int, Window]]:
        """Each window with its document's number, and how many of the document's targets lie before its own."""
        for number, tokens in enumerate(documents):
            found[number] = np.zeros(max(0, len(tokens) - 1))
            done = 0
            for part in windows(tokens, window, stride):
                yield number, done, part
                done += part.scored

    parts = placed()
    while together := list(itertools.islice(parts, batch_size * BATCHES_SORTED)):
        # Long ones first, so that too large a batch fails at once.
        by_length = sorted(together, key=lambda part: -len(part[2].tokens))
        for first in range(0, len(by_length), batch_size):
            batch = by_length[first : first + batch_size]
            losses = _losses(engine, [part for _, _, part in batch])
            for (number, done, part), own in zip(batch, losses, strict=True):
                found[number][done : done + part.scored] = own
            watch(sum(part.scored for _, _, part in batch))
        # The last document may have more windows.
        for number in [number for number in found if number < together[-1][0]]:
            yield found.pop(number)
    yield from found.values()


def _losses(engine: InferenceEngine, parts: Sequence[Window]) -> list[NDArray[np.float64]]:
    """−ln p of each window's scored targets."""
    length = max(len(part.tokens) for part in parts) - 1
    tokens_BT, targets_BT = (np.zeros((len(parts), length), np.int32) for _ in range(2))
    scored_BT = np.zeros((len(parts), length), np.bool_)
    for row, part in enumerate(parts):
        own = len(part.tokens) - 1
        tokens_BT[row, :own], targets_BT[row, :own] = part.tokens[:-1], part.tokens[1:]
        scored_BT[row, own - part.scored : own] = True
    found_BT = engine.log_probabilities(Batch(tokens_BT, targets_BT, scored_BT))
    losses = [-row_T[mask_T].astype(np.float64) for row_T, mask_T in zip(found_BT, scored_BT, strict=True)]
    if not all(np.isfinite(own).all() for own in losses):
        raise NotFinite
    return losses
