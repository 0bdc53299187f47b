"""SIGTERM and SIGINT as a wish to stop, which the loop grants between two steps."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignals:
    """Within it, SIGTERM and SIGINT are noted instead of ending the process; a second Ctrl-C ends it at once.

    Python takes signals in its main thread alone; in any other this does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """The name of the signal that came, if one did."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handler: Callable[[int, FrameType | None], None] = self._note
            self._previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = name
