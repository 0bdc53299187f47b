"""AdamW and Muon exactly as `models.optimizer` defines them, over lists of tensors and with no wait for the device.

P matrices of equal shape, R rows (out), C columns (in). A process may hold some of the rows, or of the experts, alone.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from models.optimizer import NEWTON_SCHULZ, OptimizerConfig, is_decayed, takes_muon
from models.torch_engine.world import ALONE, World, total_norm

_SMALLEST_NORM = 1e-7


def orthogonalised(u_PRC: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by Newton–Schulz iterations on all of them at once; fp32."""
    a, b, c = NEWTON_SCHULZ
    tall = u_PRC.shape[1] > u_PRC.shape[2]
    x = (u_PRC.transpose(1, 2) if tall else u_PRC).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.transpose(1, 2) if tall else x).float()


class _AdamW:
    """AdamW over the parameters that share one weight decay."""

    def __init__(self, config: OptimizerConfig, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.config, self.decay = config, decay
        self.parameters = list(parameters.values())
        self.fused = self.parameters[0].device.type != "mps"
        self.exp_avg = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        # PyTorch counts in fp32, one count for each parameter: exact for 16 million updates.
        self.updates = [torch.zeros((), device=parameter.device) for parameter in self.parameters]

    def step(self, learning_rate: float, shrink: Tensor, skipped: Tensor) -> None:
        gradients = [_gradient(parameter) for parameter in self.parameters]
        if not self.fused:
            self._plain_step(gradients, learning_rate, shrink, skipped)
            return
        adamw(
            self.parameters,
            gradients,
            list(self.exp_avg.values()),
            list(self.exp_avg_sq.values()),
            [],
            self.updates,
            fused=True,
            # The fused kernel divides by the one and does nothing at all where the other is 1.
            grad_scale=shrink.reciprocal(),
            found_inf=skipped,
            amsgrad=False,
            maximize=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=learning_rate,
            weight_decay=self.decay,
            eps=self.config.eps,
        )

    def _plain_step(self, gradients: list[Tensor], learning_rate: float, shrink: Tensor, skipped: Tensor) -> None:
        """The same by plain operations, for MPS: its fused kernel has not always skipped what it was told to."""
        beta1, beta2, kept = self.config.beta1, self.config.beta2, 1 - skipped
        torch._foreach_add_(self.updates, kept)
        count = self.updates[0].clamp(min=1)
        rate, root = learning_rate * kept / (1 - beta1**count), (1 - beta2**count).sqrt()
        moments = zip(self.exp_avg.values(), self.exp_avg_sq.values(), strict=True)
        for parameter, gradient, (mean, square) in zip(self.parameters, gradients, moments, strict=True):
            # A skipped update becomes one by nothing, as in Muon.
            scaled = torch.where(skipped > 0, 0.0, gradient * shrink)
            mean.lerp_(scaled, (1 - beta1) * kept)
            square.lerp_(scaled.square(), (1 - beta2) * kept)
            parameter.mul_(1 - learning_rate * self.decay * kept)
            parameter.sub_(rate * mean / (square.sqrt() / root + self.config.eps))


class _Muon:
    """Muon over matrices of equal shape, stacks of experts unstacked.

    Divided matrices are made whole to be orthogonalised, in every process that holds a part of them.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Mapping[str, Tensor],
        shape: tuple[int, ...],
        stacked: bool,
        world: World,
    ) -> None:
        """`shape` is that of a whole matrix; `stacked`: whether each parameter is a stack of them."""
        self.config, self.world = config, world
        # Of a stack it is the experts that are divided, and each of them is whole.
        self.divided = world.fsdp > 1 and not stacked
        self.rows, columns = shape
        self.parameters = list(parameters.values())
        matrices = [_matrices(parameter) for parameter in self.parameters]
        self.sizes = [matrix.shape[0] for matrix in matrices]
        self.buffer_PRC = torch.zeros_like(torch.cat(matrices))
        parts = torch.split(self.buffer_PRC, self.sizes)
        self.momentum_buffer = {
            name: part.view(parameter.shape) for (name, parameter), part in zip(parameters.items(), parts, strict=True)
        }
        self.ratio = math.sqrt(max(1.0, self.rows / columns))
        self.dtype = torch.float32 if config.newton_schulz_dtype == "float32" else torch.bfloat16

    def step(self, learning_rate: float, shrink: Tensor, skipped: Tensor) -> None:
        config, kept = self.config, 1 - skipped
        g_PRC = torch.cat([_matrices(_gradient(parameter)) for parameter in self.parameters])
        # A skipped update becomes one by nothing: zero gradients at zero rates leave every bit as it is.
        g_PRC = torch.where(skipped > 0, 0.0, g_PRC * shrink)
        self.buffer_PRC.lerp_(g_PRC, (1 - config.momentum) * kept)
        u_PRC = g_PRC.lerp_(self.buffer_PRC, config.momentum)
        if self.divided:
            u_PRC = self.world.whole(u_PRC, self.rows, dim=1)
        change_PRC = orthogonalised(u_PRC, config.newton_schulz_steps, self.dtype)
        if self.divided:
            change_PRC = self.world.part(change_PRC, dim=1)
        change_PRC = change_PRC.mul(-learning_rate * self.ratio * kept)
        changes = [
            part.reshape(parameter.shape)
            for parameter, part in zip(self.parameters, torch.split(change_PRC, self.sizes), strict=True)
        ]
        torch._foreach_mul_(self.parameters, 1 - learning_rate * config.weight_decay * kept)
        torch._foreach_add_(self.parameters, changes)


class Optimizer:
    """One update of all parameters from their `.grad`, and the state that updates leave."""

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        world: World = ALONE,
    ) -> None:
        """`parameters` are what this process holds, by name; `shapes` those of the whole ones, None where they are."""
        self.config, self.world = config, world
        self.parameters = list(parameters.values())
        matrices: dict[tuple[int, ...], dict[str, Tensor]] = {}
        others: dict[bool, dict[str, Tensor]] = {}
        for name, parameter in parameters.items():
            shape = tuple(parameter.shape) if shapes is None else shapes[name]
            if takes_muon(config, name):
                kind = (len(shape), *shape[-2:])
                matrices.setdefault(kind, {})[name] = parameter
            else:
                others.setdefault(is_decayed(shape), {})[name] = parameter
        self.muon = [_Muon(config, group, kind[1:], kind[0] == 3, world) for kind, group in matrices.items()]
        self.adamw = [
            _AdamW(config, group, config.weight_decay if decayed else 0.0) for decayed, group in others.items()
        ]
        self.moments: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}, "momentum_buffer": {}}
        """The moments by their prefix, then by parameter."""
        for part in self.adamw:
            self.moments["exp_avg"] |= part.exp_avg
            self.moments["exp_avg_sq"] |= part.exp_avg_sq
        for muon in self.muon:
            self.moments["momentum_buffer"] |= muon.momentum_buffer

    @torch.no_grad()
    def step(self, learning_rate_scale: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clips and updates, unless the loss or a gradient is not finite; gives the norm before, and 1 if skipped.

        Both are 0-d fp32 tensors on the device. Gradients are left in an unspecified state.
        """
        norm = total_norm(self.world, [_gradient(parameter) for parameter in self.parameters])
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        skipped = (~finite).float()
        shrink = torch.ones_like(norm)
        if self.config.clip is not None:
            shrink = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
        for part in self.adamw:
            part.step(self.config.learning_rate * learning_rate_scale, shrink, skipped)
        for matrices in self.muon:
            matrices.step(self.config.muon_learning_rate * learning_rate_scale, shrink, skipped)
        return norm, skipped

    @property
    def updates(self) -> int:
        """The number of updates done."""
        return int(self.adamw[0].updates[0])

    @updates.setter
    def updates(self, value: int) -> None:
        for part in self.adamw:
            for count in part.updates:
                count.fill_(value)

    def reset(self) -> None:
        """Back to the state before the first update."""
        for tensors in self.moments.values():
            for tensor in tensors.values():
                tensor.zero_()
        self.updates = 0


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _matrices(tensor: Tensor) -> Tensor:
    """A matrix as a stack of one; a stack as it is."""
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
