"""Dropout that does not depend on how rows are divided over processes.

Each process draws for all rows of a micro-batch, as one process alone would, and takes what falls on its own: drawing
costs little beside the products. The exception is PyTorch's fused attention on GPUs, which draws by itself for the rows
that it is given: its masks depend on the number of processes.

A entries of a dimension, P those of this process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_FAR = 1 << 40
"""Random numbers of a CUDA generator from one process's to the next one's: more than an attention draws."""


class Share(NamedTuple):
    """Which entries of a dimension are this process's, where others have the rest."""

    size: int
    """A."""
    own_P: Tensor
    """int64, on the model's device; the place of each among all."""
    process: int
    processes: int


def dropped(x: Tensor, rate: float, share: Share | None) -> Tensor:
    """Entries set to 0 at the rate `rate`, and the others enlarged; the first dimension of `x` is that of the share.

    Without a share, all entries are this process's.
    """
    if share is None:
        return F.dropout(x, rate)
    kept = F.dropout(x.new_ones((share.size, *x.shape[1:])), rate)
    return x * kept.index_select(0, share.own_P)


@contextmanager
def drawing_apart(device: torch.device, share: Share | None) -> Iterator[None]:
    """A context for a CUDA kernel that draws for this process's entries alone: others draw other numbers meanwhile,
    and all the same ones after it."""
    if share is None:
        yield
        return
    generator = torch.cuda.default_generators[device.index]
    before = generator.get_offset()
    generator.set_offset(before + share.process * _FAR)
    yield
    generator.set_offset(before + share.processes * _FAR)
