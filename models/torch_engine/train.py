"""The training side of the PyTorch engine.

E experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from models import weights
from models.config import ModelConfig
from models.engine import Batch, EngineName, Precision, State, StepResult
from models.optimizer import ADAMW_MOMENTS, MUON_MOMENTS, UPDATES, OptimizerConfig, takes_muon
from models.torch_engine.head import summed_loss
from models.torch_engine.inference import TorchInference
from models.torch_engine.lanes import Lanes
from models.torch_engine.mixture import balance_loss
from models.torch_engine.model import Transformer
from models.torch_engine.optimizer import Optimizer
from models.torch_engine.packing import Packed, packed, real_count
from models.weights import Piece


class TorchTraining:
    """`models.engine.TrainingEngine` on the first CUDA device, or on the CPU where there is none."""

    name: EngineName = "torch"
    process = 0

    def __init__(self, config: ModelConfig, optimizer: OptimizerConfig, precision: Precision) -> None:
        self._config, self._optimizer_config = config, optimizer
        self._place = default_device()
        self.device = described(self._place)
        with torch.device(self._place):
            self._model = Transformer(config, compute_dtype(precision))
        self._parameters: dict[str, Tensor] = dict(self._model.named_parameters())
        self._optimizer = Optimizer(optimizer, self._parameters)
        self._lanes = Lanes.where_they_help(self._model)

    def agreed(self, word: int) -> int:
        return word

    def step(self, micro_batches: Sequence[Batch], learning_rate_scale: float, dropout_key: int) -> StepResult:
        """As the contract says. UserError where no target counts; ValueError for a token beyond the vocabulary."""
        loss = self._backward(micro_batches, dropout_key)
        norm, skipped = self._optimizer.step(learning_rate_scale, loss)
        return StepResult(loss, norm, skipped)

    @torch.no_grad()
    def loss(self, batch: Batch) -> tuple[float, int]:
        self._model.eval()
        return float(self._summed_loss(self._model, batch, 1.0)), int(batch.loss_mask_BT.sum())

    def gradients(self, micro_batches: Sequence[Batch], dropout_key: int) -> Iterator[Piece]:
        self._backward(micro_batches, dropout_key)
        for parameter in weights.parameters(self._config):
            gradient = self._parameters[parameter.name].grad
            assert gradient is not None
            yield from weights.to_canonical(parameter, host_copy(gradient))

    def export(self, state: State) -> Iterator[Piece]:
        for parameter in weights.parameters(self._config):
            if state == "weights":
                array = host_copy(self._parameters[parameter.name])
                yield from weights.to_canonical(parameter, array)
                continue
            for moment, tensors in self._optimizer.moments.items():
                if parameter.name in tensors:
                    array = host_copy(tensors[parameter.name])
                    yield from weights.to_canonical(parameter, array, f"{moment}:")
        if state == "optimizer":
            yield Piece(UPDATES, (), np.array(self._optimizer.updates, np.int64))

    def restore(self, state: State, arrays: Iterable[Piece]) -> None:
        if state == "weights":
            load_weights(self._model, arrays)
            self._optimizer.reset()
            return
        found = weights.gather(arrays, self._optimizer_shapes())
        for parameter in weights.parameters(self._config):
            for moment, tensors in self._optimizer.moments.items():
                if parameter.name in tensors:
                    array = weights.from_canonical(parameter, found.__getitem__, f"{moment}:")
                    tensors[parameter.name].copy_(torch.from_numpy(array))
        self._optimizer.updates = int(found[UPDATES])

    def inference(self) -> TorchInference:
        return TorchInference(self._model, self._place, self.device)

    def _optimizer_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {UPDATES: ()}
        canonical = weights.canonical_shapes(self._config)
        for parameter in weights.parameters(self._config):
            moments = MUON_MOMENTS if takes_muon(self._optimizer_config, parameter.name) else ADAMW_MOMENTS
            for place in parameter.placements:
                shapes |= {f"{moment}:{place.name}": canonical[place.name] for moment in moments}
        return shapes

    def _packed(self, batch: Batch) -> Packed:
        return packed(batch, self._config.vocab_size, self._config.max_position_embeddings, self._place)

    def _summed_loss(self, model: Transformer, batch: Batch, scale: float) -> Tensor:
        part = self._packed(batch)
        return summed_loss(model.read(part.rows), model.head_VD, part.targets_M, scale)

    def _backward(self, micro_batches: Sequence[Batch], dropout_key: int) -> Tensor:
        """Leaves the gradients of the mean loss in `.grad`, and gives that loss without the balance of experts."""
        counted = sum(int(batch.loss_mask_BT.sum()) for batch in micro_batches)
        if not counted:
            raise UserError(
                "a batch has no token that counts in the loss: the loss mask leaves nothing of such short rows; "
                "give training a longer sequence_length"
            )
        self._model.train()
        for parameter in self._parameters.values():
            parameter.grad = None
        positions = sum(map(real_count, micro_batches)) * self._config.num_hidden_layers if self._balanced else 0
        counts_E = self._assignments(micro_batches, dropout_key) if len(micro_batches) > 1 else None
        total, scale = torch.zeros((), device=self._place), 1 / counted
        for number, batch in enumerate(micro_batches):
            if self._lanes is not None:
                total += self._lanes.backward(batch, lambda lane, rows: self._summed_loss(lane, rows, scale))
                continue
            with self._dropout(dropout_key, number):
                loss = self._summed_loss(self._model, batch, scale)
            total += loss.detach()
            if self._balanced:
                routings = [mixture.taken() for mixture in self._model.mixtures()]
                if counts_E is None:
                    counts_E = torch.stack([routing.counts_E for routing in routings]).sum(0)
                loss = loss + self._config.router_aux_loss_coef * balance_loss(routings, counts_E, positions)
            torch.autograd.backward(loss)
        return total

    @property
    def _balanced(self) -> bool:
        return self._config.mlp == "mixture" and self._config.router_aux_loss_coef > 0

    @torch.no_grad()
    def _assignments(self, micro_batches: Sequence[Batch], dropout_key: int) -> Tensor | None:
        """How often each expert was chosen, in all layers and micro-batches together; None where nobody asks.

        The loss is the product of such counts with probabilities, both of the whole batch, so the parts' gradients
        need them beforehand: a mixture with several micro-batches pays one more forward pass for being exact.
        """
        if not self._balanced:
            return None
        counts = []
        for number, batch in enumerate(micro_batches):
            with self._dropout(dropout_key, number):
                self._model.read(self._packed(batch).rows)
            counts += [mixture.taken().counts_E for mixture in self._model.mixtures()]
        return torch.stack(counts).sum(0)

    def _dropout(self, key: int, micro_batch: int) -> AbstractContextManager[None]:
        """Random numbers keyed by the caller and the micro-batch; everyone else's generator stays as it was."""
        return _seeded((key << 20) + micro_batch, self._place) if self._config.dropout else nullcontext()


class _seeded:
    """A context in which PyTorch's generators are freshly seeded, and after which they are as before."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._fork = torch.random.fork_rng([device] if device.type == "cuda" else [])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *details: object) -> None:
        self._fork.__exit__(None, None, None)


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def described(device: torch.device) -> str:
    """A device in words for the record."""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype of matrix products; weights stay fp32."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def host_copy(tensor: Tensor) -> weights.Array:
    """A copy on the host that later updates do not touch."""
    array: weights.Array = tensor.detach().to("cpu", copy=True).numpy()
    return array


@torch.no_grad()
def load_weights(model: Transformer, pieces: Iterable[Piece]) -> None:
    """Fills a model from canonical weights; ValueError names what is missing, unexpected or misshapen."""
    found = weights.gather(pieces, weights.canonical_shapes(model.config))
    tensors = dict(model.named_parameters())
    for parameter in weights.parameters(model.config):
        array = weights.from_canonical(parameter, found.__getitem__)
        tensors[parameter.name].copy_(torch.from_numpy(array))
