"""A lease as an object: it lapses unless renewed, and every change of hands raises its fencing token.

That of a process which was killed is taken over at once on the same machine, and elsewhere when it has lapsed.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from artifacts.conditional import ConditionalWrites
from artifacts.errors import LeaseLost
from artifacts.lease import LeaseInfo, has_ended, new_lease

LEASE_SECONDS = 90.0
"""How long a lease lasts that is not renewed: a store may be out of reach for half a minute, and be waited for in
growing pauses."""
POLL_SECONDS = 5.0

logger = logging.getLogger("cairn.artifacts")


class ObjectLease:
    """A held lease, renewed in the background. Safety rests on conditional writes, never on clocks."""

    def __init__(
        self, writes: ConditionalWrites, path: str, info: LeaseInfo, version: str, seconds: float, asked: float
    ) -> None:
        self._writes = writes
        self._path = path
        self._info = info
        self._version = version
        self._seconds = seconds
        self._valid_until = asked + seconds
        self._lost = False
        self._lock = threading.Lock()

    @property
    def fencing_token(self) -> int:
        return self._info.token

    def check(self) -> None:
        if self._lost or time.monotonic() > self._valid_until:
            raise LeaseLost(self._message())

    def renew(self) -> None:
        with self._lock:
            if self._lost:
                raise LeaseLost(self._message())
            asked = time.monotonic()
            info = self._info.model_copy(update={"expires": time.time() + self._seconds})
            version = _write(self._writes, self._path, info, self._version)
            if version is None:
                self._lost = True
                raise LeaseLost(self._message())
            self._info, self._version, self._valid_until = info, version, asked + self._seconds

    def release(self) -> None:
        """Lets the next one in. The object stays, because it carries the fencing token."""
        with self._lock:
            if not self._lost:
                info = self._info.model_copy(update={"expires": 0.0})
                _write(self._writes, self._path, info, self._version)
                self._lost = True

    def _message(self) -> str:
        now = None
        # Only for the message's sake; the errors of an object store are of many kinds.
        with contextlib.suppress(Exception):
            found = self._writes.read(self._path)
            now = LeaseInfo.from_json(found[0]) if found else None
        by = f" to {now.holder}" if now is not None and now.owner != self._info.owner else ""
        return (
            f"the lease on {self._info.key[:8]} was lost{by} (the store was out of reach for longer than "
            f"{self._seconds:.0f} s, or this process was paused): nothing was committed, run again"
        )


@contextmanager
def object_lease(
    writes: ConditionalWrites,
    path: str,
    wanted: tuple[str, tuple[str, ...]],
    wait: Callable[[str], None] | None,
    seconds: float,
) -> Iterator[ObjectLease]:
    """Holds the lease at `path` on the key and input keys `wanted`, after waiting for its holder."""
    lease = _acquire(writes, path, wanted, wait, seconds)
    stop = threading.Event()
    renewal = threading.Thread(target=_keep, args=(lease, stop, seconds / 6), name="lease", daemon=True)
    renewal.start()
    try:
        yield lease
    finally:
        stop.set()
        renewal.join()
        # Out of reach at the end of the work, the lease lapses by itself, and what was done stays done.
        with contextlib.suppress(Exception):
            lease.release()


def _acquire(
    writes: ConditionalWrites,
    path: str,
    wanted: tuple[str, tuple[str, ...]],
    wait: Callable[[str], None] | None,
    seconds: float,
) -> ObjectLease:
    while True:
        found = writes.read(path)
        before = LeaseInfo.from_json(found[0]) if found else None
        if before is None or (before.expires or 0.0) <= time.time() or has_ended(before):
            asked = time.monotonic()
            info = new_lease(wanted[0], before, wanted[1], expires=time.time() + seconds)
            version = _write(writes, path, info, found[1] if found else None)
            if version is not None:
                return ObjectLease(writes, path, info, version, seconds, asked)
            continue
        if wait is not None:
            wait(before.holder)
        time.sleep(min(seconds / 3, POLL_SECONDS))


def _write(writes: ConditionalWrites, path: str, info: LeaseInfo, version: str | None) -> str | None:
    """Writes a lease conditionally; a write whose answer was lost on the way counts as done."""
    data = info.to_json()
    written = writes.write(path, data, version)
    if written is None:
        found = writes.read(path)
        if found is not None and found[0] == data:
            return found[1]
    return written


def _keep(lease: ObjectLease, stop: threading.Event, period: float) -> None:
    while not stop.wait(period):
        try:
            lease.renew()
        except LeaseLost as error:
            logger.warning("%s", error)
            return
        except Exception as error:
            # The network may be back before the lease lapses; `check` tells when it is too late.
            logger.warning("a lease could not be renewed, trying again: %s", error)
