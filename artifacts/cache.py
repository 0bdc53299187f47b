"""What a machine used last of a remote store, bounded in size."""

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from artifacts.errors import DamagedObject, explained
from artifacts.identity import FileEntry
from artifacts.local import scan
from artifacts.local_lease import locked, try_lock
from artifacts.verified import VerifiedFiles
from common.errors import UserError
from common.files import sha256_file

TRANSFERS = 4
TRIES = 2
DEFAULT_GIB = 100.0

logger = logging.getLogger("cairn.artifacts")


class Cache:
    """Artifacts by digest, so that one cache serves every store. What a live process uses is never evicted."""

    # Per process, not per instance: a lock that is closed anywhere in a process would be gone for all of it.
    _in_use: dict[Path, int] = {}  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._verified = VerifiedFiles(folder / "verified")

    def fetch(
        self,
        digest: str,
        files: Mapping[str, FileEntry],
        only: Collection[str],
        download: Callable[[str, Path], None],
    ) -> Path:
        """A local folder with the files named in `only`, each verified; `download(name, path)` gets what is not here.

        Raises DamagedObject naming the first file that arrives damaged or not at all.
        """
        folder = self._folder / "objects" / digest
        with explained(self._folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._use(digest)
            wanted = {name: files[name] for name in only}
            with locked(self._folder / "locks" / f"{digest}.download", fcntl.LOCK_EX):
                absent = [name for name, _ in self._verified.problems(folder, wanted)]
                if absent:
                    self._make_room(sum(files[name].size for name in absent), keep=digest)
                with ThreadPoolExecutor(TRANSFERS) as pool:
                    list(pool.map(lambda name: self._get(folder, name, files[name], download), absent))
            os.utime(folder)
        return folder

    def _get(self, folder: Path, name: str, entry: FileEntry, download: Callable[[str, Path], None]) -> None:
        temporary = self._folder / "tmp" / uuid.uuid4().hex
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            for _ in range(TRIES):
                try:
                    download(name, temporary)
                except FileNotFoundError as error:
                    raise DamagedObject(name) from error
                if temporary.stat().st_size == entry.size and sha256_file(temporary) == entry.sha256:
                    break
            else:
                raise DamagedObject(name)
            temporary.chmod(0o444)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)

    def _use(self, digest: str) -> None:
        """Locks an artifact against eviction for as long as this process lives."""
        path = self._folder / "locks" / f"{digest}.use"
        if path not in self._in_use:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._in_use[path] = descriptor

    def _make_room(self, needed: int, keep: str) -> None:
        limit = cache_limit()
        held = [
            (folder.stat().st_mtime, sum(state.st_size for _, state in scan(folder, "")), folder)
            for folder in (self._folder / "objects").iterdir()
        ]
        total = needed + sum(size for _, size, _ in held)
        for _, size, folder in sorted(held):
            if total <= limit:
                return
            if folder.name != keep and self._evict(folder):
                total -= size
        if total > limit:
            logger.warning("the cache %s is %d bytes over its limit, all of it in use", self._folder, total - limit)

    def _evict(self, folder: Path) -> bool:
        path = self._folder / "locks" / f"{folder.name}.use"
        if path in self._in_use:
            return False
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not try_lock(descriptor, fcntl.LOCK_EX):
                return False
            shutil.rmtree(folder)
            return True
        finally:
            os.close(descriptor)


def cache_limit() -> int:
    """The cache's limit in bytes: `CAIRN_CACHE_GIB`, 100 by default; raises UserError where that is no number."""
    text = os.environ.get("CAIRN_CACHE_GIB") or str(DEFAULT_GIB)
    try:
        return int(float(text) * 2**30)
    except (ValueError, OverflowError) as error:
        raise UserError(f"CAIRN_CACHE_GIB is {text!r}, which is no number of GiB") from error
