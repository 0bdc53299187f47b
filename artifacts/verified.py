"""Which local files were hashed already, so that each is hashed at its first use on a machine only."""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from artifacts.identity import FileEntry
from common.files import sha256_bytes, sha256_file, write_atomically


class VerifiedFiles:
    """Remembers per artifact folder the files whose digests were found right, by size and times of change."""

    def __init__(self, index: Path) -> None:
        self._index = index
        self._lock = threading.Lock()

    def problems(self, folder: Path, files: Mapping[str, FileEntry]) -> Iterator[tuple[str, str]]:
        """Checks files against their entries; yields the name and what is wrong with each that fails."""
        index = self._index / f"{sha256_bytes(str(folder.resolve()).encode())}.json"
        known = _load(index)
        seen = dict(known)
        for name, entry in files.items():
            path = folder / name
            try:
                # The time of change too: a copy that restores the time of modification is still a change.
                state = path.stat()
                mark = f"{entry.sha256} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"
                if known.get(name) == mark:
                    continue
                seen.pop(name, None)
                if state.st_size != entry.size or sha256_file(path) != entry.sha256:
                    yield name, "damaged"
                else:
                    seen[name] = mark
            except FileNotFoundError:
                yield name, "missing"
        if seen != known:
            # Only an optimisation: a home that cannot be written costs hashing, not work.
            with self._lock, contextlib.suppress(OSError):
                # Another thread may have hashed other files of the same folder meanwhile.
                others = {name: mark for name, mark in _load(index).items() if name not in files}
                own = {name: seen[name] for name in files if name in seen}
                write_atomically(index, json.dumps({**others, **own}).encode())


def _load(index: Path) -> dict[str, str]:
    try:
        loaded = json.loads(index.read_bytes())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
