"""Waiting for an object store that does not answer for a while, in the middle of long work."""

import logging
import time
from typing import Any

from artifacts.errors import is_outage

logger = logging.getLogger("cairn.artifacts")

_TRIES = 14
"""Tries that s3fs makes, with pauses that grow to 15 s: about a minute and a half."""
_TELL_SECONDS = 15.0


def wait_out_outages(filesystem: Any) -> None:
    """From now on, what is asked of a filesystem waits for a store that does not answer, for about a minute and a half.

    Not from the first: a wrong address should be told at once. Google's filesystem waits half a minute by itself.
    """
    protocols = filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)
    if "s3" in protocols and filesystem.retries < _TRIES:
        from s3fs.core import set_custom_error_handler

        filesystem.retries = _TRIES
        set_custom_error_handler(_Outages().is_one)


class _Outages:
    """Tells outages from other errors, and says now and then that there is one."""

    def __init__(self) -> None:
        self._told = -_TELL_SECONDS

    def is_one(self, error: BaseException) -> bool:
        if not is_outage(error):
            return False
        if time.monotonic() - self._told >= _TELL_SECONDS:
            self._told = time.monotonic()
            logger.warning("the store does not answer, waiting for it: %s", error)
        return True
