"""The training side of the PyTorch engine.

E experts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from models import lora, weights
from models.config import ModelConfig
from models.engine import Batch, EngineName, Given, Layout, Precision, State, StepResult, counted_targets
from models.optimizer import UPDATES, OptimizerConfig
from models.preference import FIGURES, counted_pairs, pairs_that_count, summed_figures
from models.torch_engine.device import compute_dtype, default_device, described, peak_memory, seeded
from models.torch_engine.inference import TorchInference
from models.torch_engine.lanes import Lanes
from models.torch_engine.lora import Adapters, freeze
from models.torch_engine.mixture import balance_loss
from models.torch_engine.model import Transformer
from models.torch_engine.optimizer import Optimizer
from models.torch_engine.packing import Own, Packed, packed, real_count
from models.torch_engine.parallel import End, Ended, Parallel, cross_entropy
from models.torch_engine.preference import Pairs, Reference, log_probabilities, preference
from models.torch_engine.world import World
from models.tuning import WHOLE, Tuning
from models.weights import Piece

ONE_DEVICE = Layout()


class TorchTraining:
    """`models.engine.TrainingEngine` on one device, or on one in each of the processes that were started together."""

    name: EngineName = "torch"

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig,
        precision: Precision,
        layout: Layout = ONE_DEVICE,
        tuning: Tuning = WHOLE,
    ) -> None:
        self._config, self._optimizer_config, self._tuning = config, optimizer, tuning
        self._world = World.joined(layout)
        self.process = self._world.rank
        self._place = default_device()
        self.device = described(self._place, self._world.size)
        self._compute = compute_dtype(precision, self._place)
        if layout.rematerialize and config.dropout and self._place.type == "mps":
            raise UserError("layout.rematerialize repeats no dropout on Apple's GPU; set one of them to null or 0")
        with torch.device(self._place):
            self._model = Transformer(config, self._compute, layout.rematerialize)
        if tuning.lora is not None:
            freeze(self._model, config, tuning.lora)
        self._lanes = Lanes.where_they_help(self._model) if self._world.size == 1 else None
        self._parallel = Parallel(self._model, self._world)
        self._parameters = self._parallel.parameters
        self._shapes = {parameter.name: parameter.shape for parameter in weights.parameters(config)}
        self._adapters: Adapters | None = None
        if tuning.lora is None:
            self._optimizer = Optimizer(optimizer, self._parameters, self._shapes, self._world)
        else:
            self._adapters = Adapters(config, tuning.lora, self._parameters, self._world)
            self._optimizer = Optimizer(optimizer, self._adapters.arrays)
        self._whole_model: Transformer | None = None
        self._reference: Reference | None = None
        self._together = 2 if tuning.preference else 1
        """Rows of a batch that stay together."""

    def agreed(self, word: int) -> int:
        return self._world.agreed(word)

    def peak_memory(self) -> int:
        return peak_memory(self._place)

    def step(self, micro_batches: Sequence[Batch], learning_rate_scale: float, dropout_key: int) -> StepResult:
        """As the contract says. UserError where no target counts; ValueError for a token beyond the vocabulary."""
        self._whole_model = None
        found = self._backward(micro_batches, dropout_key)
        loss, figures = (found, None) if self._tuning.preference is None else (found[0], found[1:])
        norm, skipped = self._optimizer.step(learning_rate_scale, loss)
        if self._adapters is not None:
            self._adapters.form()
        return StepResult(loss, norm, skipped, figures)

    def loss(self, batch: Batch) -> tuple[float, int]:
        if self._tuning.preference is not None:
            return float(summed_figures(self.rewards(batch), batch)[0]), int(pairs_that_count(batch).sum())
        total = self._evaluated(self._packed(self._world.rows(batch)), cross_entropy(1.0))
        return float(self._world.summed(total)), int(batch.loss_mask_BT.sum())

    def rewards(self, batch: Batch) -> NDArray[np.float32]:
        assert self._tuning.preference is not None
        assert self._reference is not None  # it is restored first
        mine = self._world.rows(batch, self._together)
        part, pairs = self._packed(mine), Pairs.of(mine, self._place)
        found_B = torch.zeros(len(batch.tokens_BT), device=self._place)
        own = self._world.own(len(found_B), self._together)
        policy_B = self._evaluated(part, log_probabilities(pairs))
        found_B[own] = self._tuning.preference.beta * (policy_B - self._reference.log_probabilities(part, pairs))
        rewards_B: NDArray[np.float32] = self._world.summed(found_B).cpu().numpy()
        return rewards_B

    @torch.no_grad()
    def _evaluated(self, part: Packed, end: End) -> Tensor:
        self._model.eval()
        found = self._parallel.evaluated(part, end).found
        self._parallel.settle()
        return found

    def gradients(self, micro_batches: Sequence[Batch], dropout_key: int) -> Iterator[Piece]:
        self._backward(micro_batches, dropout_key)
        if self._adapters is not None:
            for name, adapter in self._adapters.arrays.items():
                assert adapter.grad is not None
                yield Piece(name, (), host_copy(adapter.grad))
            return
        for parameter in weights.parameters(self._config):
            gradient = self._parameters[parameter.name].grad
            assert gradient is not None
            yield from weights.to_canonical(parameter, host_copy(self._whole(parameter.name, gradient)))

    def export(self, state: State) -> Iterator[Piece]:
        """As the contract says; only process 0 gives anything."""
        if state == "weights":
            yield from self._exported(
                self._parameters if self._adapters is None else self._parameters | self._adapters.base
            )
            if self._adapters is not None:
                yield from self._exported_adapters(self._adapters.arrays)
            return
        for moment, tensors in self._optimizer.moments.items():
            if self._adapters is None:
                yield from self._exported(tensors, f"{moment}:")
            else:
                yield from self._exported_adapters(tensors, f"{moment}:")
        if not self.process:
            yield Piece(UPDATES, (), np.array(self._optimizer.updates, np.int64))

    def _exported(self, parts: Mapping[str, Tensor], prefix: str = "") -> Iterator[Piece]:
        for parameter in weights.parameters(self._config):
            if parameter.name in parts:
                tensor = self._whole(parameter.name, parts[parameter.name])
                if not self.process:
                    yield from weights.to_canonical(parameter, host_copy(tensor), prefix)

    def _exported_adapters(self, adapters: Mapping[str, Tensor], prefix: str = "") -> Iterator[Piece]:
        if not self.process:
            yield from (Piece(prefix + name, (), host_copy(tensor)) for name, tensor in adapters.items())

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """A parameter, moment or gradient whole, from what every process holds of it."""
        return self._world.whole(part, self._shapes[name][0])

    @torch.no_grad()
    def restore(self, state: Given, arrays: Iterable[Piece]) -> None:
        if state == "reference":
            self._reference = Reference(self._config, self._compute, self._world, self._place)
            self._reference.load(arrays)
            return
        self._whole_model = None
        if state == "weights":
            found = weights.gather(arrays, lora.weights_shapes(self._config, self._tuning.lora))
            self._parallel.load(found)
            if self._adapters is not None:
                self._adapters.restore({name: torch.from_numpy(found[name]) for name in self._adapters.arrays})
            self._optimizer.reset()
            self._warm_up()
            return
        found = weights.gather(arrays, lora.optimizer_shapes(self._config, self._optimizer_config, self._tuning.lora))
        for moment, tensors in self._optimizer.moments.items():
            if self._adapters is None:
                self._parallel.fill(tensors, found, f"{moment}:")
                continue
            for name, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(found[f"{moment}:{name}"]))
        self._optimizer.updates = int(found[UPDATES])

    @torch.enable_grad()
    def _warm_up(self) -> None:
        """As `Parallel.warm_up`, with the same row in each process."""
        rows = Batch(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32), np.ones((1, 1), np.bool_))
        self._model.train()
        with self._dropout(0, 0):
            self._parallel.warm_up(self._packed(rows))
        for mixture in self._model.mixtures():
            mixture.routing = None

    def inference(self) -> TorchInference:
        """As the contract says. Every process reads all rows: only making divided weights whole is collective."""
        return TorchInference(self._readable, self._config, self._place, self.device)

    @torch.no_grad()
    def _readable(self) -> Transformer:
        """The model with whole weights; where they are divided, a copy that is kept until they change."""
        if self._world.fsdp == 1:
            return self._model
        if self._whole_model is None:
            with torch.device(self._place):
                self._whole_model = Transformer(self._config, self._compute).requires_grad_(False)
            for name, tensor in self._whole_model.named_parameters():
                tensor.copy_(self._whole(name, self._parameters[name]))
        return self._whole_model

    def _packed(self, batch: Batch, own: Own | None = None) -> Packed:
        return packed(batch, self._config.vocab_size, self._config.max_position_embeddings, self._place, own)

    def _own(self, batch: Batch) -> Packed:
        """This process's rows of a micro-batch. For dropout, they know their places among those of all processes."""
        world = self._world
        if world.size == 1 or not self._config.dropout:
            return self._packed(world.rows(batch, self._together))
        return self._packed(batch, Own(world.own(len(batch.tokens_BT), self._together), world.rank, world.size))

    def _end(self, mine: Batch, scale: float) -> End:
        """What is minimised on some rows."""
        if self._tuning.preference is None:
            return cross_entropy(scale)
        assert self._reference is not None  # it is restored first
        pairs = Pairs.of(mine, self._place)
        reference_B = self._reference.log_probabilities(self._packed(mine), pairs)
        return preference(pairs, reference_B, self._tuning.preference.beta, scale)

    def _backward(self, micro_batches: Sequence[Batch], dropout_key: int) -> Tensor:
        """Leaves the gradients of the mean loss in `.grad`, and gives that loss without the balance of experts; in
        preference tuning, the mean figures of the pairs."""
        prefers = self._tuning.preference is not None
        counted = counted_pairs(micro_batches) if prefers else counted_targets(micro_batches)
        self._model.train()
        self._parallel.clear()
        positions = sum(map(real_count, micro_batches)) * self._config.num_hidden_layers if self._balanced else 0
        counts_E = self._assignments(micro_batches, dropout_key) if len(micro_batches) > 1 else None
        total, scale = torch.zeros(FIGURES if prefers else (), device=self._place), 1 / counted
        for number, batch in enumerate(micro_batches):
            if self._lanes is not None:
                total += self._lanes.backward(batch, lambda lane, rows: self._lane(lane, rows, scale), self._together)
                continue
            end = self._end(self._world.rows(batch, self._together), scale)
            with self._parallel.accumulating(last=number == len(micro_batches) - 1):
                with self._dropout(dropout_key, number):
                    loss, found = self._parallel.trained(self._own(batch), end)
                total += found
                if self._balanced:
                    routings = [mixture.taken() for mixture in self._model.mixtures()]
                    if counts_E is None:
                        counts_E = self._world.summed(torch.stack([routing.counts_E for routing in routings]).sum(0))
                    loss = loss + self._config.router_aux_loss_coef * balance_loss(routings, counts_E, positions)
                torch.autograd.backward(loss)
        for mixture in self._model.mixtures():
            # What was computed again on the way back has left its routing, and a graph with it.
            mixture.routing = None
        self._parallel.collect()
        if self._adapters is not None:
            self._adapters.take_gradients()
        return self._world.summed(total)

    def _lane(self, lane: Transformer, batch: Batch, scale: float) -> Ended:
        part = self._packed(batch)
        return self._end(batch, scale)(lane.read(part.rows), lane.head_VD, part.targets_M)

    @property
    def _balanced(self) -> bool:
        return self._config.mlp == "mixture" and self._config.router_aux_loss_coef > 0

    @torch.no_grad()
    def _assignments(self, micro_batches: Sequence[Batch], dropout_key: int) -> Tensor | None:
        """How often each expert was chosen, in all layers, micro-batches and processes; None where nobody asks.

        The loss is the product of such counts with probabilities, both of the whole batch, so the parts' gradients
        need them beforehand: a mixture with several micro-batches pays one more forward pass for being exact.
        """
        if not self._balanced:
            return None
        counts = []
        for number, batch in enumerate(micro_batches):
            with self._dropout(dropout_key, number):
                self._parallel.read(self._own(batch))
            counts += [mixture.taken().counts_E for mixture in self._model.mixtures()]
        return self._world.summed(torch.stack(counts).sum(0))

    def _dropout(self, key: int, micro_batch: int) -> AbstractContextManager[None]:
        """Random numbers keyed by the caller and the micro-batch, the same in each process, of which each takes those
        of its rows (`dropout.py`); other generators stay as they were."""
        return seeded((key, micro_batch), self._place) if self._config.dropout else nullcontext()


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
