"""The safetensors layout as a stream: headers checked like any untrusted input, arrays read and written one by one.

`safetensors` itself builds a whole file in memory; a checkpoint of a large model would need its size twice.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from common.files import CHUNK_BYTES, canonical_json
from models.weights import Array

HEADER_LIMIT = 100_000_000
"""The longest header that the format allows, in bytes."""
_DTYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """Where an array stands in a file."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    stop: int
    """Offset past its last byte."""


class Written(NamedTuple):
    """What a file's bytes are."""

    sha256: str
    size: int


def read_header(file: BinaryIO, size: int) -> dict[str, Entry]:
    """The arrays of a safetensors file of `size` bytes, read from its beginning; `file` then stands at the data.

    Raises ValueError, with the reason, unless the arrays fill the file exactly and every entry is well formed.
    """
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, HEADER_LIMIT):
        raise ValueError("its header is longer than the file")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise ValueError("its header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(f"array '{name}' does not start where the one before it ends")
        end = entry.stop
    if end != size:
        raise ValueError(f"its arrays end at byte {end}, the file at {size}")
    return entries


def _entry(name: str, value: object, data: int) -> Entry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"array '{name}' has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(cast(list[int], offsets)) != 2:
        raise ValueError(f"array '{name}' has no proper shape and data_offsets")
    start, stop = cast(list[int], offsets)
    sizes = tuple(cast(list[int], shape))
    if stop - start != math.prod(sizes) * _DTYPES[dtype].itemsize:
        raise ValueError(f"array '{name}' has {stop - start} bytes, which do not fit its shape and dtype")
    return Entry(_DTYPES[dtype], sizes, data + start, data + stop)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def read_stream(file: BinaryIO, size: int) -> tuple[dict[str, Array], str]:
    """The arrays of a safetensors file of `size` bytes and its SHA-256, in one pass over `file`.

    Raises ValueError, with the reason, for anything that is no such file.
    """
    hashing = _Hashing(file)
    entries = read_header(cast(BinaryIO, hashing), size)
    arrays: dict[str, Array] = {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        arrays[name] = array = np.empty(entry.shape, entry.dtype)
        hashing.fill(array.reshape(-1).view(np.uint8))
    if file.read(1):
        raise ValueError(f"it is longer than its {size} bytes")
    return arrays, hashing.digest.hexdigest()


class _Hashing:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self.digest.update(data)
        return data

    def fill(self, array: NDArray[np.uint8]) -> None:
        for start in range(0, array.size, CHUNK_BYTES):
            data = self.read(min(CHUNK_BYTES, array.size - start))
            if len(data) < min(CHUNK_BYTES, array.size - start):
                raise ValueError("it ends early")
            array[start : start + len(data)] = np.frombuffer(data, np.uint8)


def write_stream(file: BinaryIO, arrays: Mapping[str, Array]) -> Written:
    """Writes arrays as a safetensors file without building it in memory; equal arrays give equal bytes.

    Raises ValueError for a dtype that the format does not know, OSError where the bytes cannot be written.
    """
    # The widest first, as `safetensors` does, so that every array is aligned in a memory map.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {}
    offset = 0
    for name, array in ordered:
        if array.dtype not in _NAMES:
            raise ValueError(f"array '{name}' has the dtype {array.dtype}, which safetensors files do not hold here")
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    for data in (len(text).to_bytes(8, "little"), text):
        digest.update(data)
        size += file.write(data)
    for _, array in ordered:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, flat.size, CHUNK_BYTES):
            chunk = flat[start : start + CHUNK_BYTES].data
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
    return Written(digest.hexdigest(), size)
