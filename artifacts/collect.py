"""Removing what no name reaches and nobody holds."""

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Literal

from artifacts.backend import Entry
from artifacts.errors import explained
from artifacts.record import Record
from artifacts.store import Store
from common.config import FrozenModel

DEFAULT_GRACE = timedelta(days=14)

Kind = Literal["record", "object", "checkpoint", "attachment", "attempt", "damaged", "temporary", "lease"]
_FOLDERS: dict[str, Kind] = {
    # Records first: whatever is interrupted, no record is left without its files.
    "records": "record",
    "objects": "object",
    "checkpoints": "checkpoint",
    "attachments": "attachment",
    "attempts": "attempt",
    "damaged": "damaged",
    "tmp": "temporary",
    "leases": "lease",
}


class Garbage(FrozenModel):
    """One thing that may go."""

    kind: Kind
    """What it is."""
    path: str
    """Where it is, below the store's root."""
    size: int
    """Its size in bytes."""
    modified: float
    """When it last changed, in seconds since the epoch."""


class CollectionPlan(FrozenModel):
    """What a collection would remove, or did."""

    garbage: tuple[Garbage, ...]
    """All that may go, in the order of its removal."""
    grace_seconds: float
    """How long everything is kept at least."""

    @property
    def size(self) -> int:
        """The bytes of it all."""
        return sum(one.size for one in self.garbage)


class _Roots:
    """What must stay: the records and contents that are reached, and the keys that are held."""

    def __init__(self, store: Store, young: Iterable[str]) -> None:
        leases = list(store.backend.leases())
        self.held = {lease.key for lease in leases}
        used = {key for lease in leases for key in lease.inputs}
        self.keys, self.outputs = _reach(store, {*store.names().values(), *self.held, *used, *young})

    def keep(self, kind: Kind, name: str) -> bool:
        """Whether the thing of this kind and file name must stay, whatever its age."""
        key = name.partition(".")[0]
        if kind == "object":
            return name in self.outputs
        if kind in ("record", "attachment"):
            return key in self.keys
        # A finished stage needs its checkpoints no longer, whoever reaches its record.
        return key in self.held


def plan(store: Store, grace: timedelta = DEFAULT_GRACE) -> CollectionPlan:
    """What no name's lineage reaches, nobody holds, and has not changed for `grace`. Removes nothing.

    Roots are the names, the live leases with their inputs, and the records younger than `grace`. Checkpoints go
    once they are older than `grace` and their key is not held.
    """
    with explained(store.url):
        return CollectionPlan(garbage=tuple(_garbage(store, grace)), grace_seconds=grace.total_seconds())


def _garbage(store: Store, grace: timedelta) -> Iterator[Garbage]:
    limit = time.time() - grace.total_seconds()
    records = list(store.backend.entries("records"))
    roots = _Roots(store, _young(records, limit))
    for folder, kind in _FOLDERS.items():
        for entry in records if kind == "record" else store.backend.entries(folder):
            name = entry.path.rpartition("/")[2]
            if entry.modified <= limit and not roots.keep(kind, name):
                yield Garbage(kind=kind, path=entry.path, size=entry.size, modified=entry.modified)


def _young(records: Iterable[Entry], limit: float) -> set[str]:
    names = (entry.path.rpartition("/")[2] for entry in records if entry.modified > limit)
    return {name.removesuffix(".json") for name in names}


def _reach(store: Store, keys: set[str]) -> tuple[set[str], set[str]]:
    """The keys and the contents that can be reached from `keys` through the inputs of records."""
    outputs: set[str] = set()
    seen: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key in seen or len(key) != 64:
            continue
        seen.add(key)
        record: Record | None = store.read_record(key)
        if record is not None:
            outputs.add(record.output)
            # Their contents too: the record of an input may by now be of other content.
            outputs.update(reference.digest for reference in record.inputs.values())
            waiting += [reference.key for reference in record.inputs.values()]
    return seen, outputs


def remove(store: Store, planned: CollectionPlan) -> CollectionPlan:
    """Removes what was planned, except what has been reached, held or changed since; returns what went."""
    gone = []
    state: tuple[object, ...] | None = None
    limit = time.time() - planned.grace_seconds
    with explained(store.url):
        for one in planned.garbage:
            with store.backend.guard(exclusive=True):
                # Looked at again under the guard for each thing: a commit may have taken an old object into use.
                if state != (state := _state(store)):
                    roots = _Roots(store, _young(store.backend.entries("records"), limit))
                now = store.backend.entry(one.path)
                if now is None or now.modified > limit or roots.keep(one.kind, one.path.rpartition("/")[2]):
                    continue
                store.backend.remove(one.path)
                gone.append(one)
    return CollectionPlan(garbage=tuple(gone), grace_seconds=planned.grace_seconds)


def _state(store: Store) -> tuple[object, ...]:
    """What changes whenever the roots do, and is quick to ask for."""
    backend = store.backend
    return tuple(backend.children("records")), tuple(backend.entries("refs")), tuple(backend.entries("leases"))
