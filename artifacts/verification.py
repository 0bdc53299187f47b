"""Looking for damage: every record, every file and every name of a store."""

from collections.abc import Iterable
from typing import Literal

from artifacts.backend import Backend
from artifacts.record import Record
from common.config import FrozenModel


class Damage(FrozenModel):
    """One thing in a store that is not as it was recorded."""

    kind: Literal["missing", "damaged", "unexpected"]
    """Whether it is gone, differs, or should not be there."""
    path: str
    """Where it is, below the store's root."""
    detail: str
    """What is wrong, for people."""


class Verification(FrozenModel):
    """What `verify` looked at and found."""

    records: int
    """The number of whole records."""
    files: int
    """The number of files that were hashed."""
    size: int
    """Their bytes."""
    damages: tuple[Damage, ...]
    """All that is wrong; empty for a sound store."""


def verify_records(backend: Backend, records: Iterable[Record], damages: list[Damage]) -> Verification:
    """Hashes every file of the records' artifacts, each artifact once; `damages` are those found before.

    A file whose bytes differ is set aside: its size would otherwise let it pass for whole at the next run.
    """
    found = list(damages)
    seen: set[str] = set()
    count = files = size = 0
    for record in records:
        count += 1
        if record.output in seen:
            continue
        seen.add(record.output)
        folder = f"objects/{record.output}"
        present = backend.sizes(folder)
        by = f"made by stage '{record.name}' ({record.key[:8]})"
        for name, entry in record.files.items():
            path = f"{folder}/{name}"
            if name not in present:
                found.append(Damage(kind="missing", path=path, detail=by))
                continue
            files, size = files + 1, size + present[name]
            if present[name] != entry.size:
                text = f"{present[name]} bytes instead of {entry.size}; {by}"
                found.append(Damage(kind="damaged", path=path, detail=text))
            elif backend.sha256(path) != entry.sha256:
                found.append(Damage(kind="damaged", path=path, detail=f"its bytes differ; {by}"))
                backend.set_aside(record.output, name)
        extra = sorted(present.keys() - record.files.keys())
        found += [Damage(kind="unexpected", path=f"{folder}/{name}", detail=by) for name in extra]
    return Verification(records=count, files=files, size=size, damages=tuple(found))
