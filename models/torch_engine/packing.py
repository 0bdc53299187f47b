"""From a batch on the host to packed positions on the device.

B rows, T positions, N packed positions, M read positions.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.engine import Batch
from models.torch_engine.model import Rows


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


def real_positions(loss_mask_BT: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The positions up to each row's last counted target: attention is causal, so later ones touch no loss."""
    real_BT: NDArray[np.bool_] = np.logical_or.accumulate(loss_mask_BT[:, ::-1], axis=1)[:, ::-1]
    return real_BT


def real_count(batch: Batch) -> int:
    """How many positions `packed` keeps."""
    return int(real_positions(batch.loss_mask_BT).sum())


def packed(batch: Batch, vocab_size: int, longest: int, device: torch.device) -> Packed:
    """A batch's real positions, and its counted targets."""
    check_tokens(batch.tokens_BT, vocab_size, longest)
    real_BT = real_positions(batch.loss_mask_BT)
    # Columns that no row needs are cut off, so that attention does not pad to them either.
    columns = int(real_BT.any(axis=0).sum())
    real_BT, mask_BT = real_BT[:, :columns], batch.loss_mask_BT[:, :columns]
    targets_M = batch.targets_BT[:, :columns][mask_BT].astype(np.int64)
    if targets_M.size and not 0 <= int(targets_M.min()) <= int(targets_M.max()) < vocab_size:
        raise ValueError(f"targets from {targets_M.min()} to {targets_M.max()} for a vocabulary of {vocab_size}")
    places_N = np.flatnonzero(real_BT)
    counted_N = mask_BT.reshape(-1)[places_N]
    rows = Rows(
        tokens_N=on_device(batch.tokens_BT[:, :columns].reshape(-1)[places_N], device),
        positions_N=on_device(places_N % max(columns, 1), device),
        size=real_BT.shape,
        places_N=None if places_N.size == real_BT.size else on_device(places_N, device),
        read_M=None if counted_N.all() else on_device(np.flatnonzero(counted_N), device),
    )
    return Packed(rows, on_device(targets_M, device))


def whole(tokens_BT: NDArray[np.int32], device: torch.device) -> Rows:
    """Every position of every row."""
    rows, length = tokens_BT.shape
    positions_BT = np.broadcast_to(np.arange(length), tokens_BT.shape)
    return Rows(
        on_device(tokens_BT.reshape(-1), device),
        on_device(positions_BT.reshape(-1), device),
        (rows, length),
        None,
        None,
    )
