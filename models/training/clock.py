"""The loop's times: they decide what is said and when something is written, never what is computed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Times of one start of a run."""

    def __init__(self, step: int, seconds: float) -> None:
        """`step` and `seconds` of the run so far."""
        self._began = self._read_at = self._saved_at = time.perf_counter()
        self._before = seconds
        self._first_step = self._read_step = step
        self._reported_at = float("-inf")
        self._pauses = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as training time."""
        start = time.perf_counter()
        yield
        self._pauses += time.perf_counter() - start

    def elapsed(self) -> float:
        """Seconds of the run, over all its starts."""
        return self._before + time.perf_counter() - self._began

    def since_reading(self) -> float:
        """Seconds since `step_seconds` was last called."""
        return time.perf_counter() - self._read_at

    def step_seconds(self, step: int) -> float:
        """Training seconds per step since this was last called."""
        now = time.perf_counter()
        spent = (now - self._read_at - self._pauses) / max(1, step - self._read_step)
        self._read_at, self._read_step, self._pauses = now, step, 0.0
        return max(spent, 1e-9)

    def eta(self, step: int, steps: int) -> float:
        """Seconds to the last step, at the pace of this start with its pauses."""
        done = max(1, step - self._first_step)
        return (steps - step) * (time.perf_counter() - self._began) / done

    def since_saving(self) -> float:
        """Seconds since `saved` was last called, or since the start."""
        return time.perf_counter() - self._saved_at

    def saved(self) -> None:
        """A checkpoint has been handed over."""
        self._saved_at = time.perf_counter()

    def report_is_due(self, every: float) -> bool:
        """Whether `every` seconds have passed since this last said so."""
        now = time.perf_counter()
        if now - self._reported_at < every:
            return False
        self._reported_at = now
        return True
