"""A lease as a kernel lock on a file: it ends with its process, however that dies."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from artifacts.errors import LeaseLost
from artifacts.lease import LeaseInfo, new_lease

POLL_SECONDS = 0.1


class LocalLease:
    """A held lease."""

    def __init__(self, path: Path, descriptor: int, info: LeaseInfo) -> None:
        self._path = path
        self._descriptor = descriptor
        self._info = info

    @property
    def fencing_token(self) -> int:
        return self._info.token

    def check(self) -> None:
        """Raises LeaseLost if the lock's file was removed or replaced, so that others may hold the key too."""
        if not _is_at(self._descriptor, self._path):
            raise LeaseLost(f"the lease {self._path} was removed by somebody: run again")

    renew = check


def _acquire(path: Path, wait: Callable[[str], None] | None) -> int:
    """Opens and locks the file at `path`, waiting for its holder; returns the descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # Not one wait in the kernel: whoever waits may be told to stop.
            while not try_lock(descriptor, fcntl.LOCK_EX):
                holder = LeaseInfo.from_json(_content(descriptor))
                if wait is not None:
                    wait(holder.holder if holder else "another process")
                time.sleep(POLL_SECONDS)
            # A collector may have removed the file while we waited for its lock.
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def local_lease(
    path: Path, key: str, wait: Callable[[str], None] | None, inputs: tuple[str, ...]
) -> Iterator[LocalLease]:
    """Holds the lease at `path` after waiting for its holder, who is told to `wait` once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path, wait)
    try:
        info = new_lease(key, LeaseInfo.from_json(_content(descriptor)), inputs, expires=None)
        # Written in place, because the lock belongs to this very file; a torn text only costs its message.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, info.to_json(), 0)
        yield LocalLease(path, descriptor, info)
    finally:
        os.close(descriptor)


def live_lease(path: Path) -> LeaseInfo | None:
    """Who holds the lease at `path` now, or None where nobody does."""
    try:
        with path.open("rb") as file:
            info = LeaseInfo.from_json(file.read())
            return None if try_lock(file.fileno(), fcntl.LOCK_SH) else info
    except FileNotFoundError:
        return None


def try_lock(descriptor: int, kind: int) -> bool:
    """Locks an open file if nobody else holds it; says whether it did. Closing the file lets go."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path, kind: int) -> Iterator[None]:
    """Holds a lock of the kind `fcntl.LOCK_SH` or `LOCK_EX` on a file that is there for this alone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def _content(descriptor: int) -> bytes:
    return os.pread(descriptor, 1 << 20, 0)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
