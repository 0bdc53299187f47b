"""A model over several processes: DDP where each holds all weights, FSDP2 where they are divided.

N packed positions, M read positions, V vocab_size, D hidden_size.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models import weights
from models.torch_engine.head import summed_loss
from models.torch_engine.model import Transformer
from models.torch_engine.packing import Packed
from models.torch_engine.world import World

# Loading FSDP2 takes a second (SymPy comes with it), which only those who divide weights pay.
if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class Ended(NamedTuple):
    """What a forward pass comes to."""

    loss: Tensor
    """0-d; what is differentiated."""
    found: Tensor
    """Without a gradient; sums over rows."""


End = Callable[[Tensor, Tensor, Tensor], Ended]
"""What is made of what the head reads, (M, D), of the head (V, D) and of the counted targets (M,)."""


def cross_entropy(scale: float) -> End:
    """The end whose loss is the sum of the counted targets' cross-entropies times `scale`, a 0-d fp32 tensor."""

    def end(x_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Ended:
        loss = summed_loss(x_MD, head_VD, targets_M, scale)
        return Ended(loss, loss.detach())

    return end


def _unread(x_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Ended:
    return Ended(x_MD.new_zeros(()), x_MD.new_zeros(()))


class Whole(nn.Module):
    """A model and its end as one forward pass, which is what DDP and FSDP2 know to wrap."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, part: Packed, end: End) -> Ended:
        """What the end makes of these rows."""
        return end(self.model.read(part.rows), self.model.head_VD, part.targets_M)


class Parallel:
    """A model as the processes of a world train it: gradients become sums over all of them.

    `parameters` are what this process holds of each: the whole, or with FSDP2 a part along the first dimension.
    """

    def __init__(self, model: Transformer, world: World, frozen: bool = False) -> None:
        """`frozen`: whether the model only reads."""
        self.model, self.world = model, world
        self.evaluated = self.trained = cast(Callable[[Packed, End], Ended], Whole(model))
        """Forward passes without and with gradients to follow."""
        self._replicated: DistributedDataParallel | None = None
        self._sharded: FSDPModule | None = None
        self._warm = False
        if world.fsdp > 1:
            self.evaluated = self.trained = self._fully_sharded(cast(nn.Module, self.trained))
        elif world.size > 1 and not frozen:
            self.trained = self._replicated = _replicated(cast(nn.Module, self.trained))
        self._originals = dict(model.named_parameters())
        self.parameters: dict[str, Tensor] = {name: self._local(tensor) for name, tensor in self._originals.items()}

    def _fully_sharded(self, module: nn.Module) -> nn.Module:
        """Divides the weights of each block, then those of the rest."""
        from torch.distributed.fsdp import fully_shard

        mesh = self.world.mesh
        assert mesh is not None
        # Over a mesh of two dimensions the first one replicates.
        mesh = mesh["fsdp"] if self.world.size == self.world.fsdp else mesh
        for part in (*self.model.layers, module):
            sharded = fully_shard(part, mesh=mesh)
            # Losses are divided by the targets of all processes already: gradients add up.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        self._sharded = cast("FSDPModule", module)
        return module

    def load(self, found: Mapping[str, weights.Array]) -> None:
        """Takes over canonical weights."""
        self.fill(self.parameters, found)

    @torch.no_grad()
    def fill(self, parts: Mapping[str, Tensor], found: Mapping[str, weights.Array], prefix: str = "") -> None:
        """Fills parameters, or what this process holds of their moments, from canonical arrays of that prefix."""
        for parameter in weights.parameters(self.model.config):
            if parameter.name in parts:
                array = weights.from_canonical(parameter, found.__getitem__, prefix)
                parts[parameter.name].copy_(self.world.part(torch.from_numpy(array)))

    def read(self, part: Packed) -> None:
        """A forward pass for what modules note of it; without the head."""
        if self._sharded is None:
            self.model.read(part.rows)
        else:
            self.evaluated(part, _unread)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """A context for each micro-batch's pass; with whole weights, gradients are summed in the `last` one alone.

        Divided ones are summed each time: keeping them whole meanwhile would take the memory that dividing saves.
        """
        return nullcontext() if last or self._replicated is None else self._replicated.no_sync()

    def clear(self) -> None:
        """Forgets the gradients."""
        for name, original in self._originals.items():
            original.grad = self.parameters[name].grad = None

    def collect(self) -> None:
        """After the last backward pass: gives the parts of divided weights their parts of the gradients."""
        if self._sharded is None:
            return
        for name, original in self._originals.items():
            if original.requires_grad:
                assert original.grad is not None
                self.parameters[name].grad = self._local(original.grad)

    @torch.no_grad()
    def _local(self, tensor: Tensor) -> Tensor:
        """What this process holds of a parameter or of its gradient."""
        return tensor if self._sharded is None else cast("DTensor", tensor).to_local()

    def warm_up(self, part: Packed) -> None:
        """Before the first step: one pass there and back through `part`, whose gradients are forgotten.

        DDP lays out its buckets by the order in which gradients came in its first backward pass, from the next one on.
        Without this, the first step after a start or a resume would add in another order than the others.
        """
        if self._replicated is None or self._warm:
            return
        torch.autograd.backward(self.trained(part, cross_entropy(1.0)).loss)
        self.clear()
        self._warm = True

    def settle(self) -> None:
        """After passes that no backward pass follows: lets go of weights that were made whole for them."""
        if self._sharded is not None:
            self._sharded.reshard()


def _replicated(module: nn.Module) -> DistributedDataParallel:
    # Nothing to copy at first: every process restores the same weights.
    replicated = DistributedDataParallel(module, init_sync=False, gradient_as_bucket_view=True)
    replicated.register_comm_hook(None, _summed)
    return replicated


def _summed(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """DDP's communication without its division: losses are divided by the targets of all processes already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
