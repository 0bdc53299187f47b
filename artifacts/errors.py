"""Errors of the store that the user can mend, and the translation of the machine's into them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import TransientError, UserError


class DamagedObject(UserError):
    """A stored file is missing or its bytes are not those that were recorded."""


class Unreachable(TransientError):
    """The store does not answer."""


class LeaseLost(TransientError):
    """Somebody else holds the key now, so what was done under the lease may not be committed."""


@contextmanager
def explained(place: object) -> Iterator[None]:
    """Turns errors of the disk, the network and the credentials that concern `place` into one-line UserErrors."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = _os_reason(error, place)
        if reason is None:
            raise
        raise (Unreachable if is_outage(error) else UserError)(reason) from error
    except Exception as error:
        # These packages are loaded only for their own URLs, so their errors are known by the module's name.
        if not type(error).__module__.startswith(("botocore", "aiobotocore", "google.auth", "gcsfs")):
            raise
        message = f"cannot reach {place}: {error}; check the address and the credentials"
        raise (Unreachable if is_outage(error) else UserError)(message) from error


@contextmanager
def full_disk_explained(place: object) -> Iterator[None]:
    """Turns only the error of a full disk into a UserError, for blocks that do other things too."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(_full(error.filename or place)) from error


_OUTAGES = (
    "EndpointConnectionError",
    "ConnectionClosedError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionError",
)
"""Errors of botocore, by name: it is loaded only for its own URLs."""


def is_outage(error: BaseException) -> bool:
    """Whether an error says that a store does not answer, as opposed to refusing."""
    return type(error).__name__ in _OUTAGES or isinstance(error, ConnectionError | TimeoutError)


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _full(where: object) -> str:
    return f"no space left at {where}: free some (`cairn gc` finds what nothing uses) and run again; nothing was lost"


def _os_reason(error: OSError, place: object) -> str | None:
    where = error.filename or place
    if error.errno in _FULL:
        return _full(where)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) or isinstance(error, PermissionError):
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        return f"no access to {where} ({reason}): grant it or set CAIRN_STORE to another place; nothing was lost"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return (
            f"{where} is in the way: the store needs a folder there; move the file or set CAIRN_STORE to another place"
        )
    if isinstance(error, FileNotFoundError) and error.filename is None and "://" in str(place):
        return f"{place} cannot be used: {error}; make it first, or correct CAIRN_STORE"
    if isinstance(error, ConnectionError | TimeoutError):
        return f"cannot reach {place}: {error}; check the address and the network"
    return None
