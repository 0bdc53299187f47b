"""Leases: one worker at a time per key, and proof at commit that the key is still held."""

import json
import os
import platform
import uuid
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from artifacts.identity import Digest
from common.config import FrozenModel


class LeaseInfo(FrozenModel):
    """What a lease's file says about its holder."""

    key: Digest
    """The key that is held."""
    holder: str
    """Who holds it, for people."""
    owner: str
    """A random id of this one holding, so that a holder knows its own lease again."""
    token: int
    """The fencing token, which grows by one each time the key changes hands."""
    inputs: tuple[Digest, ...] = ()
    """The keys of the records that the holder reads, which must not be collected meanwhile."""
    process: str | None = None
    """The holding process, as its machine tells it from all others; null where none does."""
    expires: float | None = None
    """When it lapses unless renewed, in seconds since the epoch; null for locks that the kernel releases."""

    def to_json(self) -> bytes:
        """The lease's file."""
        return self.model_dump_json().encode()

    @classmethod
    def from_json(cls, data: bytes | None) -> "LeaseInfo | None":
        """Reads a lease's file; None for one that is absent or was torn by a crash."""
        try:
            return cls.model_validate(json.loads(data)) if data else None
        except (ValueError, ValidationError):
            return None


class Lease(Protocol):
    """A key that is held. Everything here may be called from any thread."""

    @property
    def fencing_token(self) -> int:
        """Grows by one each time the key changes hands."""

    def check(self) -> None:
        """Raises LeaseLost if the key is known to be lost; cheap enough for every step of a loop."""

    def renew(self) -> None:
        """Asks the store itself whether the key is still held; raises LeaseLost if it is not."""


def has_ended(info: LeaseInfo) -> bool:
    """Whether the holding process is one of this machine's and is no more."""
    number = (info.process or "").rpartition(" ")[2]
    if not number or info.process != _process(int(number)):
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's
    return False


def _process(number: int) -> str | None:
    """A process of this one's namespace, by the machine's start, the namespace and its number; on Linux alone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()} {number}"
    except OSError:
        return None


def new_lease(key: str, before: LeaseInfo | None, inputs: tuple[str, ...], expires: float | None) -> LeaseInfo:
    """The lease of this process on `key` after the holder `before`."""
    return LeaseInfo(
        key=key,
        holder=f"process {os.getpid()} on {platform.node()}",
        owner=uuid.uuid4().hex,
        process=_process(os.getpid()),
        token=before.token + 1 if before else 1,
        inputs=inputs,
        expires=expires,
    )
