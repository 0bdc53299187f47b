"""Folders that are somebody's while a process lives, and nobody's when it is gone, however it went."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from artifacts.local_lease import try_lock


@contextmanager
def temporary_folder(parent: Path, label: str) -> Iterator[Path]:
    """A new folder `<label>.<something>`, removed after the block; a lock on it tells others that it is in use."""
    folder, descriptor = _locked(parent, label)
    try:
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _locked(parent: Path, label: str) -> tuple[Path, int]:
    while True:
        folder = parent / f"{label}.{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        # Until it is locked, `remove_abandoned` takes it for nobody's.
        with suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


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
