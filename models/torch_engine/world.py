"""The processes that train one model together, and what they do with each other.

Rows of a batch are divided over all of them. Weights are whole in each (`data`), or divided over some (`fsdp`).

n processes of a shard group, R the first dimension of a tensor, S = ceil(R / n).
"""

import atexit
import math
import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.errors import UserError
from models.engine import Batch, Layout
from models.torch_engine.device import default_device

_PATIENCE = timedelta(hours=2)
"""How long a process waits for another, which may be writing a checkpoint to a slow place. Whoever started them ends
all of them where one dies."""


class World:
    """A number of processes, of which this is one; or this one alone, for which nothing here communicates."""

    def __init__(self, rank: int, size: int, fsdp: int, mesh: DeviceMesh | None) -> None:
        """`mesh` has the dimensions `data` and `fsdp`; None for one process alone."""
        self.rank, self.size, self.fsdp, self.mesh = rank, size, fsdp, mesh
        self._shards = None if mesh is None or fsdp == 1 else mesh.get_group("fsdp")
        self._place = 0 if mesh is None else mesh.get_local_rank("fsdp")

    @classmethod
    def joined(cls, layout: Layout) -> "World":
        """Meets the other processes that were started with this one, as torchrun's variables say.

        On CUDA, this process has the device of its local rank from then on. Raises UserError for a layout that is not
        of as many processes, or that this engine does not have.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        data, fsdp = divided(layout, size)
        if size == 1:
            return ALONE
        if default_device().type == "mps":
            raise UserError(
                f"layout.processes {size}: Apple's GPU is one device, which one process drives; "
                f"set layout.processes to null"
            )
        rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        kind, backend = "cpu", "gloo"
        if torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise UserError(
                    f"layout.processes {size} needs as many CUDA devices, and there are {torch.cuda.device_count()}; "
                    f"set it to that, or hide them with CUDA_VISIBLE_DEVICES= to train on the CPU"
                )
            torch.cuda.set_device(local)
            kind, backend = "cuda", "cpu:gloo,cuda:nccl"
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=_PATIENCE)
            atexit.register(dist.destroy_process_group)
        return cls(rank, size, fsdp, init_device_mesh(kind, (data, fsdp), mesh_dim_names=("data", "fsdp")))

    def agreed(self, word: int) -> int:
        """The largest of the words of all processes. The device is not waited for."""
        if self.size == 1:
            return word
        words = torch.tensor(word)
        dist.all_reduce(words, dist.ReduceOp.MAX)
        return int(words)

    def summed(self, tensor: Tensor) -> Tensor:
        """The tensor with the sums over all processes in it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def summed_over_shards(self, tensor: Tensor) -> Tensor:
        """The tensor with the sums over the processes that hold the parts of the same weights in it."""
        if self._shards is not None:
            dist.all_reduce(tensor, group=self._shards)
        return tensor

    def rows(self, batch: Batch, together: int = 1) -> Batch:
        """This process's rows of a batch, of which so many at a time stay together; as many as the others have, or
        `together` more or less, or none."""
        return batch if self.size == 1 else batch.part(self.own(len(batch.tokens_BT), together))

    def own(self, rows: int, together: int = 1) -> slice:
        """Which of a batch's rows those are."""
        start, end = (rows // together * number // self.size * together for number in (self.rank, self.rank + 1))
        return slice(start, end)

    def part(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """What this process holds of a whole tensor that is divided as FSDP2 divides: S at a time, the last less."""
        if self._shards is None:
            return tensor
        rows = tensor.shape[dim]
        share = math.ceil(rows / self.fsdp)
        start = min(self._place * share, rows)
        return tensor.narrow(dim, start, min(share, rows - start))

    def whole(self, part: Tensor, rows: int, dim: int = 0) -> Tensor:
        """The tensor, of `rows` in its dimension `dim`, that every process of the shard group holds a `part` of."""
        if self._shards is None:
            return part
        share = math.ceil(rows / self.fsdp)
        moved = part.movedim(dim, 0)
        padded = moved.new_zeros((share, *moved.shape[1:]))
        padded[: len(moved)] = moved
        found = padded.new_empty((self.fsdp * share, *moved.shape[1:]))
        dist.all_gather(list(torch.split(found, share)), padded, group=self._shards)
        return found[:rows].movedim(0, dim)


ALONE = World(0, 1, 1, None)
"""One process, which has everything."""


def divided(layout: Layout, processes: int) -> tuple[int, int]:
    """Into how many parts rows are divided with whole weights, and with divided ones.

    Raises UserError for a layout that is not of this number of processes, or that this engine does not have.
    """
    if layout.tensor > 1:
        raise UserError(
            f"layout.tensor {layout.tensor}: engine 'torch' does not divide matrices over devices; "
            f"use layout.fsdp, or engine: jax"
        )
    wanted = layout.fsdp * (layout.data or 1)
    fits = processes % layout.fsdp == 0 if layout.data is None else processes == wanted
    if not fits:
        data = "" if layout.data is None else f"data {layout.data} × "
        raise UserError(
            f"layout: {data}fsdp {layout.fsdp} does not fit {processes} process{'es' if processes > 1 else ''}; "
            f"set layout.processes to {wanted}{' or a multiple of it' if layout.data is None else ''}"
        )
    return processes // layout.fsdp, layout.fsdp


def total_norm(world: World, gradients: Sequence[Tensor]) -> Tensor:
    """The global norm of gradients of which this process may hold parts alone, a 0-d fp32 tensor."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if world.fsdp == 1:
        return norm
    return world.summed_over_shards(norm.square()).sqrt()
