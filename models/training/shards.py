"""Token shards: one safetensors file each, read by memory map and never as a whole.

N tokens of a shard, D documents of a shard.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import UserError
from models.training.tensor_file import Entry, Written, read_header, write_stream
from models.weights import Array

_SCAN = 1 << 20
Tokens = NDArray[np.uint16] | NDArray[np.uint32]
_DTYPES = {
    "tokens": (np.dtype("<u2"), np.dtype("<u4")),
    "document_ends": (np.dtype("<u8"),),
    "loss_mask": (np.dtype(np.uint8), np.dtype(np.bool_)),
}


class ShardCounts(NamedTuple):
    """What is known of a shard before its file is there."""

    name: str
    """The file's name."""
    tokens: int
    documents: int


class Shard(NamedTuple):
    """The arrays of a shard, as views of its file: only the pages that are looked at come into memory."""

    tokens_N: Tokens
    document_ends_D: NDArray[np.uint64]
    """End of each document in the shard, exclusive; the first document starts at 0."""
    loss_mask_N: NDArray[np.uint8] | None
    """Non-zero where a token counts as a target; None where all do."""


@dataclass(frozen=True)
class ShardFile:
    """A shard whose header has been read and checked, and nothing else."""

    path: Path
    token_count: int
    document_count: int
    entries: dict[str, Entry]

    def map(self) -> Shard:
        """Maps the file into memory. Raises UserError where it is gone or has changed its size."""
        end = max(entry.stop for entry in self.entries.values())
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"token shard {self.path} cannot be read ({error}); make it again") from error
        if len(mapped) != end:
            raise UserError(f"token shard {self.path} has changed its size while in use; make it again")
        arrays = {
            name: np.ndarray(entry.shape, entry.dtype, buffer=mapped, offset=entry.start)
            for name, entry in self.entries.items()
        }
        mask = arrays.get("loss_mask")
        return Shard(
            cast(Tokens, arrays["tokens"]),
            cast(NDArray[np.uint64], arrays["document_ends"]),
            None if mask is None else mask.view(np.uint8),
        )


def open_shard(path: Path) -> ShardFile:
    """Reads and checks the header of a shard. Raises UserError where the file is missing, damaged or no shard."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            entries = read_header(file, size)
        for name, entry in entries.items():
            if name not in _DTYPES:
                raise ValueError(f"it holds an array '{name}'")
            if entry.dtype not in _DTYPES[name] or len(entry.shape) != 1:
                raise ValueError(f"its array '{name}' is {entry.dtype} of {len(entry.shape)} dimensions")
        for name in ("tokens", "document_ends"):
            if name not in entries:
                raise ValueError(f"it holds no array '{name}'")
        if "loss_mask" in entries and entries["loss_mask"].shape != entries["tokens"].shape:
            raise ValueError("its loss_mask is not as long as its tokens")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no intact token shard ({error}); make it again") from error
    return ShardFile(path, entries["tokens"].shape[0], entries["document_ends"].shape[0], entries)


def check_document_ends(shard: Shard, path: Path) -> None:
    """Raises UserError, naming the file, unless the documents' ends rise to the shard's last token."""
    last = 0
    for start in range(0, shard.document_ends_D.size, _SCAN):
        part = shard.document_ends_D[start : start + _SCAN]
        if int(part[0]) < last or np.any(part[1:] < part[:-1]):
            raise UserError(f"{path} is no intact token shard (its document_ends do not rise); make it again")
        last = int(part[-1])
    if last != shard.tokens_N.size:
        raise UserError(f"{path} is no intact token shard (its documents do not end at its last token); make it again")


def write_shard(
    path: Path, tokens_N: Tokens, document_ends_D: ArrayLike, loss_mask_N: ArrayLike | None = None
) -> Written:
    """Writes a shard, seen whole or not at all; one that stands there is replaced and not written into.

    `tokens_N` is uint16 or uint32; `document_ends_D` are the exclusive ends of the documents, which together cover all
    tokens; `loss_mask_N` says of each token whether it counts as a target. Raises ValueError where these do not fit,
    OSError where the file cannot be written. A store forces what it commits onto the disk, so that is not done here.
    """
    ends_D = np.asarray(document_ends_D, np.uint64)
    if tokens_N.dtype not in _DTYPES["tokens"] or tokens_N.ndim != 1:
        raise ValueError(f"tokens are uint16 or uint32 in one dimension, not {tokens_N.dtype} in {tokens_N.ndim}")
    if ends_D.ndim != 1 or np.any(ends_D[1:] < ends_D[:-1]):
        raise ValueError("document_ends do not rise")
    if (int(ends_D[-1]) if ends_D.size else 0) != tokens_N.size:
        raise ValueError(f"document_ends do not end at the {tokens_N.size} tokens")
    arrays: dict[str, Array] = {"tokens": tokens_N, "document_ends": ends_D}
    if loss_mask_N is not None:
        mask_N = np.asarray(loss_mask_N).astype(np.bool_).astype(np.uint8)
        if mask_N.shape != tokens_N.shape:
            raise ValueError(f"loss_mask has the shape {mask_N.shape}, tokens {tokens_N.shape}")
        arrays["loss_mask"] = mask_N
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            written = write_stream(file, arrays)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return written
