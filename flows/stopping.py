"""Ctrl-C and SIGTERM in a run: what is under way is told to stop, and the run ends in good order."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class Stopping:
    """Takes SIGINT and SIGTERM in a block: the first asks to stop, a second has the effect that it always has.

    Only the main thread may take signals; in another one the block changes nothing.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        """`stop` is called when the first signal comes, in the main thread."""
        self._stop = stop
        self._before: dict[int, Any] = {}
        self.requested = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def stop(self) -> None:
        """Asks to stop as a signal would, from any thread."""
        self.requested = True
        self._stop()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self.stop()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
