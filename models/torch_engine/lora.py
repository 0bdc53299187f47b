"""Adapters of a model's matrices, as `models.lora` defines them.

The model's own parameters hold what it computes with, W + s·B·A, so that nothing else of it knows of adapters. Every
process has all adapters whole, of matrices that are divided over some too, and updates them alike.

R rank, O out, I in of a matrix; this process may hold some of its rows alone.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.lora import LORA_A, LORA_B, adapted_parameters, adapter_shapes
from models.torch_engine.world import World
from models.tuning import LoraConfig


def freeze(model: nn.Module, config: ModelConfig, lora: LoraConfig) -> None:
    """Leaves gradients to the adapted matrices alone: those of the adapters follow from them."""
    adapted = {parameter.name for parameter in adapted_parameters(config, lora)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapted)


class Adapters:
    """The adapters of a model and the matrices beneath them, which stay as they were restored."""

    def __init__(self, config: ModelConfig, lora: LoraConfig, parameters: Mapping[str, Tensor], world: World) -> None:
        """`parameters`: what this process holds of the model's, by name; those with adapters are written to."""
        self._scale, self._world = lora.scale, world
        self._rows = {parameter.name: parameter.shape[0] for parameter in adapted_parameters(config, lora)}
        self._effective = {name: parameters[name] for name in self._rows}
        self.base = {name: torch.zeros_like(parameter) for name, parameter in self._effective.items()}
        """The frozen matrices, or this process's parts of them, by the parameter's name."""
        device = next(iter(self.base.values())).device
        self.arrays = {name: torch.zeros(shape, device=device) for name, shape in adapter_shapes(config, lora).items()}
        """The adapters by their own names, whole."""

    @torch.no_grad()
    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        """Takes over the adapters, and the parameters as they are now as the matrices beneath."""
        for name, effective in self._effective.items():
            self.base[name].copy_(effective)
        for name, adapter in self.arrays.items():
            adapter.copy_(arrays[name])
        self.form()

    @torch.no_grad()
    def form(self) -> None:
        """Writes W + s·B·A into the model's parameters."""
        for name, effective, a_RI, b_OR in self._each():
            torch.addmm(self.base[name], self._world.part(b_OR), a_RI, alpha=self._scale, out=effective.detach())

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Leaves in the adapters' `.grad` what follows from that of the matrices, which is let go."""
        for name, effective, a_RI, b_OR in self._each():
            assert effective.grad is not None
            dw_OI, effective.grad = effective.grad, None
            da_RI = self._world.part(b_OR).T @ dw_OI * self._scale
            a_RI.grad = self._world.summed_over_shards(da_RI)
            b_OR.grad = self._world.whole(dw_OI @ a_RI.T * self._scale, self._rows[name])

    def _each(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        for name, effective in self._effective.items():
            yield name, effective, self.arrays[LORA_A + name], self.arrays[LORA_B + name]
