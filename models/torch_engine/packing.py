"""From a batch on the host to packed positions on the device.

B rows, T positions, S those of a row of continuations, C contexts, N packed positions, P those of one group, M read
positions.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.continuations import Continuations
from models.engine import Batch
from models.torch_engine.attention import Group
from models.torch_engine.dropout import Share
from models.torch_engine.model import Rows

Counts = NDArray[np.int64]

_GROUP_COSTS = {"cpu": 20_000, "cuda": 4_000_000, "mps": 4_000_000}
"""Pairs of positions that attention could read in the time that a group of its own takes."""


class Contexts(NamedTuple):
    """The stretches of a batch that attention stays inside: its rows, or the documents in them."""

    starts_C: Counts
    """row · T + position of the first token of each."""
    lengths_C: Counts
    """Positions up to each one's last counted target: attention is causal, so later ones touch no loss."""


class Own(NamedTuple):
    """The rows of a batch that are this process's."""

    rows: slice
    process: int
    processes: int

    def holds(self, places: Counts, length: int) -> NDArray[np.bool_]:
        """Which of these places in the batch, row · T + position, are in them."""
        found: NDArray[np.bool_] = (places >= self.rows.start * length) & (places < self.rows.stop * length)
        return found

    def share(self, mine: NDArray[np.bool_], device: torch.device) -> Share:
        """Of entries, those that are `mine`."""
        return Share(len(mine), on_device(np.flatnonzero(mine), device), self.process, self.processes)


class Packed(NamedTuple):
    """A batch without its padding."""

    rows: Rows
    targets_M: Tensor
    """int64; the counted targets."""


def on_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy of an array on the device, sent without waiting for it."""
    tensor = torch.tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def check_tokens(tokens_BT: NDArray[np.int32], vocab_size: int, longest: int) -> None:
    """Raises ValueError for rows that the model cannot read, before a device fails on them without saying why."""
    if tokens_BT.ndim != 2 or tokens_BT.shape[1] > longest:
        raise ValueError(f"tokens of shape {tokens_BT.shape}: rows of at most {longest} positions were expected")
    if tokens_BT.size and not 0 <= int(tokens_BT.min()) <= int(tokens_BT.max()) < vocab_size:
        raise ValueError(f"tokens from {tokens_BT.min()} to {tokens_BT.max()} for a vocabulary of {vocab_size}")


def contexts(counted_BT: NDArray[np.bool_], documents_BT: NDArray[np.int32] | None) -> Contexts:
    """The contexts of a batch in the order of its positions, those that count no target included (of length 0).

    Raises ValueError where the numbers of documents fall within a row.
    """
    begins_BT = np.zeros(counted_BT.shape, np.bool_)
    begins_BT[:, :1] = True
    if documents_BT is not None:
        if documents_BT.shape != counted_BT.shape or (documents_BT[:, 1:] < documents_BT[:, :-1]).any():
            raise ValueError(f"documents of shape {documents_BT.shape}: numbers that rise along each row were expected")
        begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts_C = np.flatnonzero(begins_BT)
    past_counted = np.where(counted_BT.reshape(-1), np.arange(1, counted_BT.size + 1), 0)
    ends_C = np.maximum.reduceat(past_counted, starts_C) if starts_C.size else starts_C
    return Contexts(starts_C, np.maximum(ends_C - starts_C, 0))


def real_count(batch: Batch) -> int:
    """How many positions `packed` keeps."""
    return int(contexts(batch.loss_mask_BT, batch.documents_BT).lengths_C.sum())


def packed(batch: Batch, vocab_size: int, longest: int, device: torch.device, own: Own | None = None) -> Packed:
    """A batch's real positions, and its counted targets; with `own`, of these rows alone, and their shares of all.

    Raises ValueError for tokens, targets or documents that are not as they have to be.
    """
    check_tokens(batch.tokens_BT, vocab_size, longest)
    found = contexts(batch.loss_mask_BT, batch.documents_BT)
    rows, places_N = arranged(batch.tokens_BT, found, batch.documents_BT is not None, device, own)
    counted_N = batch.loss_mask_BT.reshape(-1)[places_N]
    all_counted = bool(counted_N.all())
    if own is not None:
        mine_N = own.holds(places_N, batch.tokens_BT.shape[1])
        rows = rows._replace(share_M=own.share(mine_N[counted_N], device))
        places_N, counted_N = places_N[mine_N], counted_N[mine_N]
    targets_M = batch.targets_BT.reshape(-1)[places_N][counted_N].astype(np.int64)
    if targets_M.size and not 0 <= int(targets_M.min()) <= int(targets_M.max()) < vocab_size:
        raise ValueError(f"targets from {targets_M.min()} to {targets_M.max()} for a vocabulary of {vocab_size}")
    read_M = None if all_counted else on_device(np.flatnonzero(counted_N), device)
    return Packed(rows._replace(read_M=read_M), on_device(targets_M, device))


def arranged(
    tokens_BT: NDArray[np.int32], found: Contexts, by_length: bool, device: torch.device, own: Own | None = None
) -> tuple[Rows, Counts]:
    """The positions of contexts, all to be read, and the place of each in the batch, row · T + position, on the host.

    One group holds all contexts in their order, or `by_length` each group such as are about equally long: documents
    of a stream may be a thousand tokens or one. With `own`, the positions are those of its rows alone, in the groups
    that all rows make; the places are those of all.
    """
    starts_C, lengths_C = found
    sizes = [starts_C.size]
    if by_length:
        # The longest first; those of no length take no part.
        order = np.argsort(-lengths_C, kind="stable")[: np.count_nonzero(lengths_C)]
        starts_C, lengths_C = starts_C[order], lengths_C[order]
        sizes = _group_sizes(lengths_C, _GROUP_COSTS[device.type])
    positions_N = np.arange(lengths_C.sum()) - np.repeat(np.cumsum(lengths_C) - lengths_C, lengths_C)
    places_N = np.repeat(starts_C, lengths_C) + positions_N
    ends = np.cumsum(sizes)[:-1]
    if own is None:
        groups = tuple(_group(part_C, int(part_C.max(initial=0)), device) for part_C in np.split(lengths_C, ends))
        tokens_N = on_device(tokens_BT.reshape(-1)[places_N], device)
        return Rows(tokens_N, on_device(positions_N, device), groups, None), places_N
    mine_C, mine_N = (own.holds(starts, tokens_BT.shape[1]) for starts in (starts_C, places_N))
    groups = tuple(
        _group(part_C[mine], int(part_C.max(initial=0)), device)._replace(share_B=own.share(mine, device))
        for part_C, mine in zip(np.split(lengths_C, ends), np.split(mine_C, ends), strict=True)
    )
    tokens_N = on_device(tokens_BT.reshape(-1)[places_N[mine_N]], device)
    share_N = own.share(mine_N, device)
    return Rows(tokens_N, on_device(positions_N[mine_N], device), groups, None, share_N), places_N


def _group_sizes(lengths_C: Counts, group_cost: int) -> list[int]:
    """How many contexts each group takes of those that fall in length: as many as waste no more than a group costs."""
    sizes, longest, wasted = [0], int(lengths_C.max(initial=0)), 0
    for length in lengths_C.tolist():
        wasted += longest**2 - length**2
        if wasted > group_cost:
            sizes.append(0)
            longest, wasted = length, 0
        sizes[-1] += 1
    return sizes


def _group(lengths_B: Counts, longest: int, device: torch.device) -> Group:
    positions = int(lengths_B.sum())
    if positions == lengths_B.size * longest:
        return Group((lengths_B.size, longest), positions, None)
    # What the rows before leave empty is skipped.
    empty_B = np.arange(lengths_B.size) * longest - (np.cumsum(lengths_B) - lengths_B)
    places_P = np.arange(positions) + np.repeat(empty_B, lengths_B)
    return Group((lengths_B.size, longest), positions, on_device(places_P, device))


def whole(tokens_BT: NDArray[np.int32], device: torch.device) -> Rows:
    """Every position of every row, in order."""
    rows, length = tokens_BT.shape
    return arranged(tokens_BT, Contexts(np.arange(rows) * length, np.full(rows, length)), False, device)[0]


def behind(found: Continuations, device: torch.device) -> Rows:
    """Continuations, row by row, with their counted targets to be read."""
    real_BS = found.documents_BS >= 0
    group = _group(real_BS.sum(1), real_BS.shape[1], device)
    read_M = real_BS.cumsum().reshape(real_BS.shape)[found.rows_M, found.places_M] - 1
    tokens_N, positions_N = found.tokens_BS[real_BS], found.positions_BS[real_BS].astype(np.int64)
    return Rows(on_device(tokens_N, device), on_device(positions_N, device), (group,), on_device(read_M, device))
