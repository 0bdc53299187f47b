"""What a store needs of the place that holds it: a local folder or an object store."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from artifacts.identity import FileEntry
from artifacts.lease import Lease, LeaseInfo
from common.config import FrozenModel


class Entry(FrozenModel):
    """A file or folder of the store with all in it."""

    path: str
    """Its path below the store's root, with slashes."""
    size: int
    """The bytes in it."""
    modified: float
    """When anything in it last changed, in seconds since the epoch."""


class Backend(Protocol):
    """Files below one root, by slash-separated paths that the store has already checked."""

    def url(self, path: str = "") -> str:
        """Where a path lies, for people and for other programs."""

    def place(self) -> tuple[Any, str]:
        """The fsspec filesystem, and the root's path in it."""

    def read(self, path: str) -> bytes | None:
        """A small file's bytes, or None where there is none."""

    def write(self, path: str, data: bytes) -> None:
        """Writes or replaces a small file, seen whole or not at all."""

    def create(self, path: str, data: bytes) -> bool:
        """As `write`, but only where there is no such file yet; says whether it did."""

    def put(self, source: Path, path: str) -> None:
        """Copies a local file into the store, seen whole or not at all."""

    def remove(self, path: str) -> None:
        """Removes a file, or a folder with all in it; nothing happens where there is neither."""

    def children(self, folder: str) -> list[str]:
        """The sorted names of what lies directly in a folder, dot files left out; none where it is absent."""

    def entries(self, folder: str) -> Iterator[Entry]:
        """The same as `children`, with sizes and ages; this looks at every file and is slow."""

    def entry(self, path: str) -> Entry | None:
        """One file or folder with all in it, or None where there is neither."""

    def sizes(self, folder: str) -> dict[str, int]:
        """The sizes of all files below a folder, by their names relative to it."""

    def sha256(self, path: str) -> str:
        """The SHA-256 of a file's bytes as they lie in the store now."""

    def set_aside(self, digest: str, name: str) -> None:
        """Moves a damaged file of an artifact to `damaged/<digest>/<name>`, so that its record counts as absent."""

    def guard(self, exclusive: bool) -> AbstractContextManager[None]:
        """Keeps commits (shared) and the removal of unused things (exclusive) apart, where that is possible."""

    def workspace(self, key: str) -> AbstractContextManager[Path]:
        """An empty local folder that is gone after the block."""

    def local_scratch(self, key: str) -> Path:
        """The folder on this machine where the work on a key keeps what lets it go on."""

    def logs(self, key: str) -> AbstractContextManager[Path]:
        """A local folder that outlives a kill; after the block its files are attached to the key."""

    def put_folder(self, folder: Path, digest: str, files: Mapping[str, FileEntry]) -> None:
        """Puts a local folder's files under `objects/<digest>`, verified; may move a folder of a workspace."""

    def fetch(self, digest: str, files: Mapping[str, FileEntry], only: Collection[str]) -> Path:
        """A local folder with at least the files named in `only`, each verified; raises DamagedObject."""

    def lease(
        self, key: str, wait: Callable[[str], None] | None, inputs: Collection[str]
    ) -> AbstractContextManager[Lease]:
        """Exclusive work on a key; see `Store.lease`."""

    def leases(self) -> Iterator[LeaseInfo]:
        """The leases that are live now."""
