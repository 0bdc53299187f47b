"""The training side of the JAX engine.

Everything that a step does is one compiled function, which takes over the memory of the state that it is given.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from models import lora, weights
from models.config import ModelConfig
from models.engine import Batch, EngineName, Given, State, StepResult, counted_targets
from models.jax_engine import distributed
from models.jax_engine import lora as adapters
from models.jax_engine.batching import bucket, check_batch, largest, length_bucket, multiple, stacked
from models.jax_engine.inference import JaxInference
from models.jax_engine.model import Arrays, Computing
from models.jax_engine.optimizer import OptimizerState
from models.jax_engine.parameters import stacks, unstacked
from models.jax_engine.placement import Holder, load, placed
from models.jax_engine.step import Micro, steps
from models.optimizer import UPDATES, OptimizerConfig
from models.preference import counted_pairs, pairs_that_count, summed_figures
from models.tuning import WHOLE, Tuning
from models.weights import Piece


class JaxTraining:
    """`models.engine.TrainingEngine` on the devices of a mesh, in one process or in several."""

    name: EngineName = "jax"

    def __init__(
        self, config: ModelConfig, optimizer: OptimizerConfig, computing: Computing, tuning: Tuning = WHOLE
    ) -> None:
        self._config, self._optimizer, self._tuning = config, optimizer, tuning
        self._sharding = computing.sharding
        self._computing = computing
        self._compiled = steps(config, optimizer, computing, tuning)
        self._stacks = stacks(config)
        self.device = distributed.described(self._sharding.mesh)
        self.process = jax.process_index()
        self._held = Holder()
        self._base: dict[str, jax.Array] = {}
        """The frozen matrices beneath adapters."""
        self._adapters: dict[str, jax.Array] = {}
        self._state: OptimizerState | None = None
        self._reference: Arrays | None = None
        self._loss_rows: dict[tuple[int, bool], int] = {}
        """The most rows that `loss` was given, by their length and whether they have documents."""

    def agreed(self, word: int) -> int:
        return distributed.largest_word(word)

    def peak_memory(self) -> int:
        return distributed.peak_memory(self._sharding.mesh)

    def step(self, micro_batches: Sequence[Batch], learning_rate_scale: float, dropout_key: int) -> StepResult:
        """As the contract says. UserError where no target counts; ValueError for a token beyond the vocabulary."""
        assert self._state is not None  # weights are restored first
        micro = self._micro(micro_batches)
        result: StepResult
        trained, frozen = self._trained()
        trained, self._state, result = self._compiled.step(
            trained,
            self._state,
            frozen,
            micro,
            np.float32(learning_rate_scale),
            _words(dropout_key),
            self._reference,
        )
        self._take(trained)
        return result

    def _trained(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """What the optimizer moves, and what it does not."""
        return (self._held.parameters, {}) if self._tuning.lora is None else (self._adapters, self._held.parameters)

    def _take(self, trained: dict[str, jax.Array]) -> None:
        """Goes on with what the optimizer has moved."""
        if self._tuning.lora is None:
            self._held.parameters = trained
            return
        self._adapters = trained
        # By one compiled function, after a step as after a restore: another one might round otherwise.
        self._held.parameters = {**self._held.parameters, **self._compiled.effective(self._base, trained)}

    def loss(self, batch: Batch) -> tuple[float, int]:
        if self._tuning.preference is not None:
            return float(summed_figures(self.rewards(batch), batch)[0]), int(pairs_that_count(batch).sum())
        found_B = self._compiled.row_log_probabilities(self._held.parameters, self._evaluated(batch))
        return -float(np.array(found_B).sum()), int(batch.loss_mask_BT.sum())

    def rewards(self, batch: Batch) -> NDArray[np.float32]:
        assert self._tuning.preference is not None
        assert self._reference is not None  # it is restored first
        pairs_that_count(batch)
        micro = self._evaluated(batch)
        policy_B, reference_B = (
            np.array(self._compiled.row_log_probabilities(parameters, micro))[: len(batch.tokens_BT)]
            for parameters in (self._held.parameters, self._reference)
        )
        rewards_B: NDArray[np.float32] = self._tuning.preference.beta * (policy_B - reference_B)
        return rewards_B

    def _evaluated(self, batch: Batch) -> Micro:
        """A batch without gradients as a micro-batch."""
        check_batch(batch, self._config, batch.loss_mask_BT)
        rows, positions = batch.tokens_BT.shape
        length = length_bucket(positions, self._config.max_position_embeddings)
        # A last, smaller batch of a validation is padded to the rows of those before it: nothing is compiled for it.
        shape = (length, batch.documents_BT is None)
        self._loss_rows[shape] = at_least = max(self._loss_rows.get(shape, 0), bucket(rows))
        return self._on_devices([batch], at_least, length)

    def gradients(self, micro_batches: Sequence[Batch], dropout_key: int) -> Iterator[Piece]:
        # In the step's own shape: what dropout drops depends on it, and so does every last bit.
        micro = self._micro(micro_batches)
        found, _ = self._compiled.gradients(*self._trained(), micro, _words(dropout_key), self._reference)
        yield from self._unstacked(found)

    def export(self, state: State) -> Iterator[Piece]:
        assert self._state is not None  # weights are restored first
        if state == "weights":
            for name, parameters in self._stacks.items():
                array = self._base.get(name, self._held.parameters[name])
                yield from unstacked(name, parameters, self._sharding.on_host(array))
            if self._tuning.lora is not None:
                yield from self._unstacked(self._adapters)
            return
        for moment, arrays in self._state.moments.items():
            yield from self._unstacked(arrays, f"{moment}:")
        yield Piece(UPDATES, (), np.array(int(self._state.updates), np.int64))

    def _unstacked(self, trained: Mapping[str, jax.Array], prefix: str = "") -> Iterator[Piece]:
        """What is trained, or gradients or moments of it."""
        if self._tuning.lora is None:
            for name, array in trained.items():
                yield from unstacked(name, self._stacks[name], self._sharding.on_host(array), prefix)
        elif trained:
            yield from adapters.unstacked(self._config, self._tuning.lora, self._sharding, trained, prefix)

    def restore(self, state: Given, arrays: Iterable[Piece]) -> None:
        if state == "reference":
            self._reference = load(self._config, self._sharding, arrays)
            return
        if state == "weights":
            self._restore_weights(arrays)
            self._state = self._compiled.fresh(self._trained()[0])
            return
        assert self._state is not None  # weights are restored first
        found = weights.gather(arrays, lora.optimizer_shapes(self._config, self._optimizer, self._tuning.lora))
        moments = {
            moment: self._placed(of_moment, found, f"{moment}:") for moment, of_moment in self._state.moments.items()
        }
        updates = self._sharding.put(np.array(found[UPDATES], np.int32), self._sharding.of())
        self._state = OptimizerState(moments, updates)

    def _placed(self, names: Collection[str], found: Mapping[str, weights.Array], prefix: str) -> dict[str, jax.Array]:
        """Moments of what is trained."""
        if self._tuning.lora is None:
            return {name: placed(self._sharding, name, self._stacks[name], found, prefix) for name in names}
        return adapters.placed(self._config, self._tuning.lora, self._sharding, found, prefix) if names else {}

    def _restore_weights(self, arrays: Iterable[Piece]) -> None:
        if self._tuning.lora is None:
            self._held.parameters = load(self._config, self._sharding, arrays)
            return
        found = weights.gather(arrays, lora.weights_shapes(self._config, self._tuning.lora))
        canonical = weights.canonical_shapes(self._config)
        whole = {name: array for name, array in found.items() if name in canonical}
        self._held.parameters = load(self._config, self._sharding, weights.whole_pieces(whole))
        self._base = {name: self._held.parameters[name] for name in self._compiled.adapted}
        self._take(adapters.placed(self._config, self._tuning.lora, self._sharding, found))

    def inference(self) -> JaxInference:
        return JaxInference(self._config, self._computing, self._held)

    def _micro(self, micro_batches: Sequence[Batch]) -> Micro:
        for batch in micro_batches:
            check_batch(batch, self._config, batch.loss_mask_BT)
        if self._tuning.preference is None:
            counted_targets(micro_batches)
        else:
            counted_pairs(micro_batches)
        return self._on_devices(micro_batches, *largest(micro_batches))

    def _on_devices(self, micro_batches: Sequence[Batch], rows: int, length: int) -> Micro:
        together = (
            self._sharding.row_parts if self._tuning.preference is None else math.lcm(2, self._sharding.row_parts)
        )
        host = stacked(micro_batches, multiple(rows, together), length)
        lying = self._sharding.of("whole", "rows", "whole")
        tokens, targets, counted = (
            self._sharding.put(array, lying) for array in (host.tokens_ABT, host.targets_ABT, host.counted_ABT)
        )
        documents = None if host.documents_ABT is None else self._sharding.put(host.documents_ABT, lying)
        numbers = self._sharding.put(np.arange(len(micro_batches), dtype=np.int32), self._sharding.of())
        return Micro(tokens, targets, counted, documents, numbers)


def _words(dropout_key: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """A key below 2^43 as two numbers of 32 bits."""
    return np.array([dropout_key >> 32, dropout_key & 0xFFFFFFFF], np.uint32)
