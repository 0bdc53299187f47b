"""The processes that a stage trains with: rows are divided among them, and their gradients are added up.

One that was started with `MLX_RANK` in its environment joins the others through `mx.distributed`: over sockets
where `MLX_HOSTFILE` names them (MLX's ring), else in the way that MLX finds (MPI, NCCL).
"""

import os
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from common.errors import UserError
from models.engine import Layout


class Processes:
    """This process among those of the run; every method is collective."""

    def __init__(self, group: mx.distributed.Group | None) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        self.rank = 0 if self._group is None else self._group.rank()
        self.count = 1 if self._group is None else self._group.size()

    @classmethod
    def joined(cls, layout: Layout, environment: Mapping[str, str] = os.environ) -> "Processes":
        """Joins the others where there are any. Raises UserError where the layout does not fit this engine or them."""
        if layout.tensor > 1 or layout.fsdp > 1:
            other = "tensor" if layout.tensor > 1 else "fsdp"
            raise UserError(
                f"engine 'mlx' divides the rows of a batch alone, and layout.{other} is {getattr(layout, other)}; "
                f"use layout.data, or engine: {'jax' if other == 'tensor' else 'jax or engine: torch'}"
            )
        group = None
        if "MLX_RANK" in environment:
            backend = "ring" if "MLX_HOSTFILE" in environment else "any"
            group = mx.distributed.init(strict=True, backend=backend)
        found = cls(group)
        if layout.data not in (None, found.count):
            raise UserError(
                f"layout.data is {layout.data}, and engine 'mlx' runs in {found.count} process(es), one part each; "
                f"set layout.data to {found.count} or to null, or layout.processes to {layout.data}"
            )
        return found

    def sum(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """The fp32 arrays added up over the processes, the same bits in each: one message for all of them."""
        if self._group is None:
            return list(arrays)
        flat = mx.concatenate([array.reshape(-1) for array in arrays])
        # Each part is waited for: a GPU that waits for another process in its queue is given up after seconds.
        mx.eval(flat)
        summed = mx.distributed.all_sum(flat, group=self._group)
        mx.eval(summed)
        ends, start = [], 0
        for array in arrays[:-1]:
            start += array.size
            ends.append(start)
        return [part.reshape(array.shape) for part, array in zip(mx.split(summed, ends), arrays, strict=True)]

    def largest(self, word: int) -> int:
        """The largest of the words of all processes."""
        if self._group is None:
            return word
        words: list[int] = np.array(mx.distributed.all_max(mx.array([word], mx.int64), group=self._group)).tolist()
        return words[0]
