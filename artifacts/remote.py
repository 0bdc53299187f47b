"""A store at any fsspec URL: an object store for a fleet, or `memory://` in tests."""

import contextlib
import errno
import hashlib
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from fsspec.core import url_to_fs

from artifacts.backend import Entry
from artifacts.cache import TRANSFERS, Cache
from artifacts.conditional import ConditionalWrites, conditional_writes, conditions_hold
from artifacts.errors import DamagedObject
from artifacts.identity import FileEntry
from artifacts.lease import Lease, LeaseInfo
from artifacts.object_lease import LEASE_SECONDS, object_lease
from artifacts.temporary import remove_abandoned, temporary_folder
from common.errors import UserError
from common.files import CHUNK_BYTES

UPLOAD_TRIES = 3
READ_BLOCK_BYTES = 8 << 20
_FLAT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "memory"}
_AGE_FIELDS = ("LastModified", "mtime", "updated", "last_modified", "created")


class RemoteBackend:
    """The Backend of an fsspec filesystem. Writes are atomic where the filesystem's are: on every object store."""

    lease_seconds = LEASE_SECONDS

    def __init__(self, filesystem: Any, root: str, url: str, cache: Path) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._url = url.rstrip("/")
        self._cache_folder = cache
        self._cache = Cache(cache)
        self._writes = conditional_writes(filesystem)
        self._tried: bool | None = None
        self._lock = threading.Lock()
        protocol = filesystem.protocol
        self._flat = bool(_FLAT & set(protocol if isinstance(protocol, tuple) else (protocol,)))

    @classmethod
    def open(cls, url: str, cache: Path) -> Self:
        """Opens an fsspec URL; raises UserError for one whose protocol is unknown or whose package is missing."""
        try:
            # A listing from before another machine's write would hide its checkpoints and records.
            uncached = {"use_listings_cache": False} if url.startswith(("s3://", "gs://", "gcs://")) else {}
            filesystem, root = url_to_fs(url, **uncached)
        except ImportError as error:
            raise UserError(f"cannot open {url}: {error}; try `pip install 'cairn[s3]'` or 'cairn[gcs]'") from error
        except ValueError as error:
            raise UserError(f"cannot open {url}: {error}") from error
        return cls(filesystem, str(root), url, cache)

    def url(self, path: str = "") -> str:
        return f"{self._url}/{path}" if path else self._url

    def place(self) -> tuple[Any, str]:
        return self._filesystem, self._root

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _made_parent(self, path: str) -> str:
        full = self._full(path)
        # Object stores have no folders, and asking S3 for one may create a bucket.
        if not self._flat:
            self._filesystem.makedirs(full.rpartition("/")[0], exist_ok=True)
        return full

    def read(self, path: str) -> bytes | None:
        try:
            data: bytes = self._filesystem.cat_file(self._full(path))
        except (FileNotFoundError, IsADirectoryError):
            return None
        return data

    def write(self, path: str, data: bytes) -> None:
        self._filesystem.pipe_file(self._made_parent(path), data)

    def create(self, path: str, data: bytes) -> bool:
        writes = self._sharing()
        if writes is not None:
            return writes.write(self._full(path), data, None) is not None
        if self._filesystem.exists(self._full(path)):
            return False
        self.write(path, data)
        return True

    def put(self, source: Path, path: str) -> None:
        self._filesystem.put_file(str(source), self._made_parent(path))

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm(self._full(path), recursive=True)

    def _find(self, folder: str) -> dict[str, dict[str, Any]]:
        """The files below a folder by their names relative to it, as the place says now."""
        full = self._full(folder)
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.find(full, detail=True)
        except FileNotFoundError:
            return {}
        return {path[len(full) + 1 :]: info for path, info in found.items() if path.startswith(f"{full}/")}

    def children(self, folder: str) -> list[str]:
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.ls(self._full(folder), detail=False)
        except FileNotFoundError:
            return []
        names = {path.rstrip("/").rpartition("/")[2] for path in found if path.rstrip("/") != self._full(folder)}
        return sorted(name for name in names if not name.startswith("."))

    def entries(self, folder: str) -> Iterator[Entry]:
        sizes: dict[str, int] = {}
        modified: dict[str, float] = {}
        for name, info in self._find(folder).items():
            child = name.partition("/")[0]
            sizes[child] = sizes.get(child, 0) + int(info["size"])
            modified[child] = max(modified.get(child, 0.0), _modified(info))
        for child in sorted(sizes):
            yield Entry(path=f"{folder}/{child}", size=sizes[child], modified=modified[child])

    def entry(self, path: str) -> Entry | None:
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.find(self._full(path), detail=True).values()
        except FileNotFoundError:
            return None
        size = sum(int(info["size"]) for info in found)
        return Entry(path=path, size=size, modified=max(map(_modified, found))) if found else None

    def sizes(self, folder: str) -> dict[str, int]:
        return {name: int(info["size"]) for name, info in self._find(folder).items()}

    def sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._filesystem.open(self._full(path), "rb", block_size=READ_BLOCK_BYTES) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def set_aside(self, digest: str, name: str) -> None:
        # In a store that cannot be written the file stays, and is reported again.
        with contextlib.suppress(OSError):
            target = self._made_parent(f"damaged/{digest}/{name}")
            self._filesystem.mv(self._full(f"objects/{digest}/{name}"), target)

    def guard(self, exclusive: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def workspace(self, key: str) -> AbstractContextManager[Path]:
        remove_abandoned(self._cache_folder / "tmp", key)
        return temporary_folder(self._cache_folder / "tmp", key)

    def local_scratch(self, key: str) -> Path:
        return self._cache_folder / "scratch" / key

    @contextmanager
    def logs(self, key: str) -> Iterator[Path]:
        folder = self._cache_folder / "logs" / key
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(path, f"attachments/{key}/{path.relative_to(folder).as_posix()}")
        shutil.rmtree(folder)

    def put_folder(self, folder: Path, digest: str, files: Mapping[str, FileEntry]) -> None:
        present = self.sizes(f"objects/{digest}")

        def upload(name: str) -> None:
            path = f"objects/{digest}/{name}"
            entry = files[name]
            # What an interrupted upload left whole is not sent again.
            if present.get(name) == entry.size and self.sha256(path) == entry.sha256:
                return
            for _ in range(UPLOAD_TRIES):
                self.put(folder / name, path)
                if self.sha256(path) == entry.sha256:
                    return
            raise UserError(f"{self.url(path)} arrives damaged, {UPLOAD_TRIES} times now: check the network")

        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(upload, files))

    def fetch(self, digest: str, files: Mapping[str, FileEntry], only: Collection[str]) -> Path:
        def download(name: str, target: Path) -> None:
            self._filesystem.get_file(self._full(f"objects/{digest}/{name}"), str(target))

        try:
            return self._cache.fetch(digest, files, only, download)
        except DamagedObject as error:
            name = str(error)
            self.set_aside(digest, name)
            raise DamagedObject(
                f"{self.url(f'objects/{digest}/{name}')} is missing or damaged: "
                "run the recipe again, which makes the artifact anew"
            ) from error

    def _sharing(self) -> ConditionalWrites | None:
        """The conditional writes of this place if they were seen to work, tried once; or None."""
        with self._lock:
            if self._writes is not None and self._tried is None:
                probe = f"leases/.probe-{uuid.uuid4().hex}"
                try:
                    self._tried = conditions_hold(self._writes, self._full(probe))
                except OSError as error:
                    # How servers that know no conditions answer one, where they do not ignore it.
                    if error.errno not in (errno.ENOSYS, errno.EINVAL):
                        raise
                    self._tried = False
                self.remove(probe)
            return self._writes if self._tried else None

    def lease(
        self, key: str, wait: Callable[[str], None] | None, inputs: Collection[str]
    ) -> AbstractContextManager[Lease]:
        writes = self._sharing()
        if writes is None:
            raise UserError(
                f"{self.url()} cannot be shared between workers, because it has neither locks nor conditional writes: "
                "set CAIRN_STORE to a folder, or to s3:// (AWS, MinIO, Cloudflare R2) or gs://"
            )
        path = self._full(f"leases/{key}.json")
        return object_lease(writes, path, (key, tuple(inputs)), wait, self.lease_seconds)

    def leases(self) -> Iterator[LeaseInfo]:
        for name in self.children("leases"):
            info = LeaseInfo.from_json(self.read(f"leases/{name}"))
            if info is not None and (info.expires or 0.0) > time.time():
                yield info


def _modified(info: Mapping[str, Any]) -> float:
    """When a listing says that a file was written; now where it does not say, so that nothing is thought old."""
    for field in _AGE_FIELDS:
        value = info.get(field)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(value).timestamp()
    return time.time()
