"""Batches made ahead of the steps that need them."""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from models.engine import Batch
from models.training.batches import Batches

_AHEAD_TOKENS = 1 << 17
_BLOCKS = 2
_PAUSE_SECONDS = 0.1


class Prefetcher:
    """A thread that makes the batches of `first_step` to `steps`, in blocks of some steps where batches are small.

    A block costs little more than its largest step would alone, and as the thread shares the interpreter with the
    loop, what it costs is taken from the loop.
    """

    def __init__(self, batches: Batches, first_step: int, steps: int, micro_batch_size: int | None) -> None:
        """`micro_batch_size`: rows of each of a step's micro-batches; None for one of all rows."""
        self._batches = batches
        self._steps = range(first_step, steps)
        self._micro = micro_batch_size or batches.batch_size
        self._queue: queue.Queue[list[list[Batch]] | BaseException] = queue.Queue(maxsize=_BLOCKS)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="prefetch", daemon=True)
        self._ready: Iterator[list[Batch]] = iter(())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def next(self) -> list[Batch]:
        """The micro-batches of the next step. Raises what making them raised."""
        for micro_batches in self._ready:
            return micro_batches
        block = self._queue.get()
        if isinstance(block, BaseException):
            raise block
        self._ready = iter(block)
        return next(self._ready)

    def _produce(self) -> None:
        rows = self._batches.batch_size
        together = max(1, _AHEAD_TOKENS // (rows * self._batches.sequence_length))
        try:
            for step in self._steps[::together]:
                count = min(together, self._steps.stop - step)
                batch = self._batches.rows(step * rows, count * rows)
                self._put([self._micro_batches(batch, start) for start in range(0, count * rows, rows)])
                if self._stopped.is_set():
                    return
        except BaseException as error:  # it is raised in the loop
            self._put(error)

    def _micro_batches(self, block: Batch, first: int) -> list[Batch]:
        starts = range(first, first + self._batches.batch_size, self._micro)
        return [block.part(slice(start, start + self._micro)) for start in starts]

    def _put(self, block: list[list[Batch]] | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(block, timeout=_PAUSE_SECONDS)
            except queue.Full:
                continue
            return
