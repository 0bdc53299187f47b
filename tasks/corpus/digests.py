"""The digest of files that a config points at, so that a change of them makes another key."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from artifacts.store import DEFAULT_CACHE
from common.errors import UserError
from common.files import canonical_json, sha256_bytes, sha256_file, write_atomically

TOLD_FROM_BYTES = 1 << 30
SETTLED_NS = 2_000_000_000
HASHED_AT_ONCE = 8

logger = logging.getLogger("cairn.tasks")


def files_digest(files: Mapping[str, Path]) -> str:
    """The SHA-256 over the names of some files, in their order, and the SHA-256s of their bytes.

    A file that was hashed on this machine before, and has its size and times of change still, is not read again.
    Raises UserError for one that cannot be read.
    """
    paths = {name: path.absolute() for name, path in files.items()}
    folder = os.path.commonpath([path.parent for path in paths.values()]) if paths else ""
    cache = Path(os.environ.get("CAIRN_CACHE") or DEFAULT_CACHE).expanduser().absolute()
    index = cache / "digests" / f"{sha256_bytes(folder.encode())}.json"
    known = _load(index)
    # What was changed within the clock's grain could change again unseen.
    settled = time.time_ns() - SETTLED_NS
    try:
        states = {path: path.stat() for path in paths.values()}
        digests = {path: _remembered(known, path, state) for path, state in states.items()}
        unknown = [path for path, digest in digests.items() if digest is None]
        size = sum(states[path].st_size for path in unknown)
        if size >= TOLD_FROM_BYTES:
            logger.warning("hashing %.1f GB below %s, which is done once for each change", size / 1e9, folder)
        with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            digests |= zip(unknown, pool.map(sha256_file, unknown), strict=True)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    found = {
        str(path): f"{_mark(states[path])} {digests[path]}" for path in unknown if states[path].st_ctime_ns < settled
    }
    if found:
        # Only an optimisation: a cache that cannot be written costs hashing, not work.
        with contextlib.suppress(OSError):
            write_atomically(index, json.dumps(known | found).encode())
    return sha256_bytes(canonical_json([[name, digests[path]] for name, path in paths.items()]))


def _remembered(known: Mapping[str, str], path: Path, state: os.stat_result) -> str | None:
    mark, _, digest = str(known.get(str(path), "")).rpartition(" ")
    return digest if mark == _mark(state) else None


def _mark(state: os.stat_result) -> str:
    # The time of change too: a copy that restores the time of modification is still a change.
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


def _load(index: Path) -> dict[str, str]:
    try:
        loaded = json.loads(index.read_bytes())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
