"""A lock for each device of a machine, so that two stages on its workers never share one, whoever started those."""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from artifacts.local_lease import try_lock
from common.errors import StageInterrupted, UserError
from models.machine import accelerators
from tasks.work import Work

LOCKS = "CAIRN_LOCKS"
"""The environment's name for the folder with the locks, one for the whole machine unless set."""
_POLL_SECONDS = 0.5
logger = logging.getLogger("cairn.flows")


@contextmanager
def hold_devices(work: Work, should_stop: Callable[[], bool]) -> Iterator[tuple[int, ...]]:
    """Holds the devices that a work computes with, after waiting for those that hold them; gives the descriptors of the
    locks, for a process that computes to hold them too.

    A stage without an engine takes none. Raises StageInterrupted when told to stop while it waits, and UserError where
    the locks' folder cannot be written.
    """
    pool = work.runtime.worker
    if not work.definition.has_engine or pool == "local":
        yield ()
        return
    folder = Path(os.environ.get(LOCKS) or Path(tempfile.gettempdir()) / "cairn-devices")
    with ExitStack() as stack:
        yield tuple(stack.enter_context(_held(folder, device, work, should_stop)) for device in accelerators(pool))


@contextmanager
def _held(folder: Path, device: str, work: Work, should_stop: Callable[[], bool]) -> Iterator[int]:
    path = folder / f"{device}.lock"
    try:
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o1777)  # workers of other users lock the same devices
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with suppress(PermissionError):  # another user's, who has done so
            os.fchmod(descriptor, 0o666)
    except OSError as error:
        raise UserError(
            f"the lock {path} of a device cannot be made ({error.strerror}); set {LOCKS} to a folder for this machine's"
        ) from error
    try:
        told = False
        # The kernel lets go when the process ends, however it does.
        while not try_lock(descriptor, fcntl.LOCK_EX):
            if not told:
                logger.warning("stage '%s' waits for %s, which another run computes with", work.name, device)
                told = True
            if should_stop():
                raise StageInterrupted(f"stage '{work.name}' was stopped while it waited for {device}")
            time.sleep(_POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)
