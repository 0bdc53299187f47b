"""Bytes of files as readers take them: decompressed as far as that goes, and line by line."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Protocol

from common.errors import one_line
from tasks.corpus.sources import DOCUMENT_LIMIT_BYTES, Reading, too_long

BLOCK_BYTES = 1 << 20
LINE_LIMIT_BYTES = 2 * DOCUMENT_LIMIT_BYTES
"""Escapes make a line of JSON longer than its text."""
BOM = b"\xef\xbb\xbf"
ERRORS = (ValueError, OSError)
"""What pyarrow raises for damaged files: its own errors are these or derive from them."""


class Readable(Protocol):
    """A file of bytes."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, none at the end."""
        ...


def line_blocks(file: Readable, name: str, reading: Reading) -> Iterator[tuple[int, bytes]]:
    """Whole lines in blocks of about BLOCK_BYTES without the last newline, each with its first line's number.

    A line over the limit goes to `reading`, and so does the line in which a damaged file ends.
    """
    number, size, start = 1, 0, True
    parts: list[bytes] = []
    while True:
        try:
            data = file.read(BLOCK_BYTES)
            # One byte more than the mark, or what is left of it would look like the end of the file.
            while start and len(data) <= len(BOM) and (more := file.read(BLOCK_BYTES)):
                data += more
        except DamagedFile as error:
            reading.lose(f"{name} line {number}", str(error), 1)
            return
        if start:
            data, start = data.removeprefix(BOM), False
        head, newline, tail = data.rpartition(b"\n")
        if data and not newline:
            size += len(tail)
            parts = [*parts, tail] if size <= LINE_LIMIT_BYTES else []
            continue
        block = b"".join([*parts, head])
        if size > LINE_LIMIT_BYTES:
            first, more, block = head.partition(b"\n")
            reading.refuse("too_long", f"{name} line {number}", too_long(), size + len(first))
            number += 1
            if not more:
                parts, size = [tail], len(tail)
                if data:
                    continue
                return
        if block:
            yield number, block
        if not data:
            return
        number += block.count(b"\n") + 1
        parts, size = [tail], len(tail)


class DamagedFile(Exception):
    """A compressed file ends too early or holds what is not of its format."""


def damage(error: Exception) -> str:
    """What pyarrow found wrong with a file. Raises `error` again where the file is not to blame, as for a connection
    that broke."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error
    return one_line(error)


class Decompressed:
    """Reads a compressed file up to the last byte that can be had before any damage."""

    def __init__(self, opened: Callable[[], Any], compression: str) -> None:
        self._opened = opened
        self._compression = compression
        self._passed = 0
        self._bytewise = False
        self._damage: str | None = None
        self._stream = self._from_start()

    def _from_start(self) -> Any:
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(self._opened(), "r"), self._compression)

    def read(self, size: int) -> bytes:
        """The next bytes, none at the end. Raises DamagedFile where the file is damaged."""
        if self._damage is not None:
            # A stream that was read once more after its error would give what it had given before.
            raise DamagedFile(self._damage)
        if not self._bytewise:
            try:
                data = bytes(self._stream.read(size))
            except ERRORS as error:
                damage(error)
                # A read that meets the damage gives nothing; single bytes give all that is before it.
                self._bytewise = True
                self._stream.close()
                self._stream = self._from_start()
                left = self._passed
                while left:
                    left -= len(self._stream.read(min(left, BLOCK_BYTES)))
            else:
                self._passed += len(data)
                if not data and not self._passed:
                    self._check_begun()
                return data
        found = bytearray()
        try:
            while len(found) < size and (byte := self._stream.read(1)):
                found += byte
        except ERRORS as error:
            self._damage = f"the {self._compression} file is damaged or cut off ({damage(error)})"
            if not found:
                raise DamagedFile(self._damage) from error
        return bytes(found)

    def _check_begun(self) -> None:
        """Raises DamagedFile for a file of no bytes: that of an empty text has some."""
        with closing(self._opened()) as file:
            if not file.read(1):
                self._damage = f"the {self._compression} file is empty"
                raise DamagedFile(self._damage)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()
