"""A store in a local folder: renames, fsync and kernel locks."""

import contextlib
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from artifacts.backend import Entry
from artifacts.errors import DamagedObject
from artifacts.identity import FileEntry
from artifacts.lease import Lease, LeaseInfo
from artifacts.local_lease import live_lease, local_lease, locked, try_lock
from artifacts.temporary import temporary_folder
from artifacts.verified import VerifiedFiles
from common.errors import UserError
from common.files import fsync_file, sha256_file

REPLACEMENT_TRIES = 5


class LocalBackend:
    """The Backend of a local folder, which is made at the first write."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root = root
        self._verified = VerifiedFiles(cache / "verified")

    def url(self, path: str = "") -> str:
        return str(self.root / path)

    def place(self) -> tuple[Any, str]:
        # Imported late: fsspec takes longer to import than most commands take.
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(auto_mkdir=True), str(self.root)

    def read(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def write(self, path: str, data: bytes) -> None:
        self._place(path, lambda file: file.write_bytes(data))

    def create(self, path: str, data: bytes) -> bool:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # The lock makes "only if absent" hold between processes on file systems without hard links too.
        with locked(target.parent / ".lock", fcntl.LOCK_EX):
            if target.exists():
                return False
            self.write(path, data)
            return True

    def put(self, source: Path, path: str) -> None:
        self._place(path, lambda file: shutil.copyfile(source, file))

    def _place(self, path: str, fill: Callable[[Path], object]) -> None:
        """Makes a file in `tmp`, where a crash's leavings are collected, and renames it to its place."""
        target = self.root / path
        with temporary_folder(self.root / "tmp", "write") as folder:
            fill(folder / "file")
            fsync_file(folder / "file")
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / "file").replace(target)
        fsync_file(target.parent)

    def remove(self, path: str) -> None:
        target = self.root / path
        with temporary_folder(self.root / "tmp", "removed") as folder, contextlib.suppress(FileNotFoundError):
            # Renamed first, so that nobody ever sees half a folder.
            target.rename(folder / "it")

    def children(self, folder: str) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self.root / folder) if not entry.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def entries(self, folder: str) -> Iterator[Entry]:
        for name in self.children(folder):
            entry = self.entry(f"{folder}/{name}")
            if entry is not None:
                yield entry

    def entry(self, path: str) -> Entry | None:
        place = self.root / path
        try:
            states = [place.lstat(), *(state for _, state in scan(place, ""))]
        except FileNotFoundError:
            return None
        size = sum(state.st_size for state in states if not stat.S_ISDIR(state.st_mode))
        # Not the time of modification, which an unpacked or copied file brings along.
        modified = max(state.st_ctime for state in states)
        if path.startswith("tmp/") and _in_use(place):
            modified = time.time()
        return Entry(path=path, size=size, modified=modified)

    def sizes(self, folder: str) -> dict[str, int]:
        return {name: entry.st_size for name, entry in scan(self.root / folder, "")}

    def sha256(self, path: str) -> str:
        return sha256_file(self.root / path)

    def set_aside(self, digest: str, name: str) -> None:
        target = self.root / "damaged" / digest / name
        # In a store that cannot be written the file stays, and is reported again.
        with contextlib.suppress(OSError):
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.root / "objects" / digest / name).rename(target)

    @contextmanager
    def guard(self, exclusive: bool) -> Iterator[None]:
        (self.root / "leases").mkdir(parents=True, exist_ok=True)
        with locked(self.root / "leases" / ".guard", fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):
            yield

    def workspace(self, key: str) -> AbstractContextManager[Path]:
        return temporary_folder(self.root / "tmp", key)

    def local_scratch(self, key: str) -> Path:
        return self.root / "checkpoints" / key

    @contextmanager
    def logs(self, key: str) -> Iterator[Path]:
        folder = self.root / "attachments" / key
        folder.mkdir(parents=True, exist_ok=True)
        yield folder

    def put_folder(self, folder: Path, digest: str, files: Mapping[str, FileEntry]) -> None:
        if folder.resolve().is_relative_to((self.root / "tmp").resolve()):
            self._adopt(folder, digest, files)
            return
        with temporary_folder(self.root / "tmp", "commit") as inside:
            for name in files:
                (inside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, inside / name)
            if not _is_intact(inside, files):
                raise UserError(f"{folder} changed while it was copied, or its copy is damaged: run again")
            self._adopt(inside, digest, files)

    def _adopt(self, folder: Path, digest: str, files: Mapping[str, FileEntry]) -> None:
        """Renames a folder on the store's own file system to its place; one that is there intact is kept."""
        _make_durable(folder)
        target = self.root / "objects" / digest
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(REPLACEMENT_TRIES):
            try:
                folder.rename(target)
                break
            except OSError:
                if not target.is_dir() or attempt == REPLACEMENT_TRIES - 1:
                    raise
            if _is_intact(target, files):
                break
            self.remove(f"objects/{digest}")
        fsync_file(target.parent)

    def fetch(self, digest: str, files: Mapping[str, FileEntry], only: Collection[str]) -> Path:
        folder = self.root / "objects" / digest
        for name, problem in self._verified.problems(folder, {name: files[name] for name in only}):
            if problem == "damaged":
                self.set_aside(digest, name)
            raise DamagedObject(f"{folder / name} is {problem}: run the recipe again, which makes the artifact anew")
        return folder

    def lease(
        self, key: str, wait: Callable[[str], None] | None, inputs: Collection[str]
    ) -> AbstractContextManager[Lease]:
        return local_lease(self.root / "leases" / f"{key}.lock", key, wait, tuple(inputs))

    def leases(self) -> Iterator[LeaseInfo]:
        for name in self.children("leases"):
            info = live_lease(self.root / "leases" / name) if name.endswith(".lock") else None
            if info is not None:
                yield info


def _in_use(folder: Path) -> bool:
    """Whether a living process holds a folder of `tmp`."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not try_lock(descriptor, fcntl.LOCK_EX)
    except OSError:
        # Some network file systems lock no folders; what cannot be tried is left alone.
        return True
    finally:
        os.close(descriptor)


def scan(folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below a folder, its path after `prefix` and its state; none where the folder is absent."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        path = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from scan(Path(entry.path), path)
        else:
            with contextlib.suppress(FileNotFoundError):
                yield path, entry.stat(follow_symlinks=False)


def _make_durable(folder: Path) -> None:
    """Write-protects the files of a folder and forces them and every list of names onto the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            path.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
            fsync_file(path)
        fsync_file(Path(parent))


def _is_intact(folder: Path, files: Mapping[str, FileEntry]) -> bool:
    found = {name: entry.st_size for name, entry in scan(folder, "")}
    if found != {name: entry.size for name, entry in files.items()}:
        return False
    return all(sha256_file(folder / name) == entry.sha256 for name, entry in files.items())
