"""Folders that are somebody's while a process lives, and nobody's when it is gone, however it went."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from artifacts.local_lease import try_lock


@contextmanager
def temporary_folder(parent: Path, label: str) -> Iterator[Path]:
    """A new folder `<label>.<something>`, removed after the block; a lock on it tells others that it is in use."""
    folder = parent / f"{label}.{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path, label: str) -> None:
    """Removes the folders of a label whose processes were killed."""
    for folder in parent.glob(f"{label}.*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its process has just ended in good order
        try:
            if try_lock(descriptor, fcntl.LOCK_EX):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
