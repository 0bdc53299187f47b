"""The training side of the MLX engine.

B rows, R those of this process, T positions, E experts.
"""

from collections.abc import Iterable, Iterator, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from models import lora, weights
from models.config import ModelConfig
from models.engine import Batch, EngineName, Given, Layout, Precision, State, StepResult, counted_targets
from models.mlx_engine.batches import check_batch, real_positions, rows_of
from models.mlx_engine.inference import MlxInference, described, peak_memory
from models.mlx_engine.lanes import Arrays
from models.mlx_engine.lora import adapter_gradients, effective
from models.mlx_engine.loss_scale import LossScale, fresh_scale
from models.mlx_engine.model import (
    Parameters,
    Transformer,
    compute_dtype,
    gathered,
    load_weights,
    parameters_of,
    replace_parameters,
)
from models.mlx_engine.optimizer import Rates, fresh_moments
from models.mlx_engine.processes import Processes
from models.mlx_engine.step import OptimizerState, StepFunctions
from models.optimizer import (
    LOSS_SCALE,
    LOSS_SCALE_UPDATES,
    OPTIONAL,
    UPDATES,
    OptimizerConfig,
)
from models.preference import counted_pairs, pairs_that_count, summed_figures
from models.tuning import WHOLE, Tuning
from models.weights import Piece


class MlxTraining:
    """`models.engine.TrainingEngine` on MLX's default device, in one process or in several."""

    name: EngineName = "mlx"

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig,
        precision: Precision,
        layout: Layout,
        processes: Processes,
        compiled: bool | None = None,
        tuning: Tuning = WHOLE,
    ) -> None:
        self._config, self._optimizer_config, self._processes = config, optimizer, processes
        self._tuning = tuning
        self._is_fp16 = precision == "float16"
        self.process = processes.rank
        self.device = described() if processes.count == 1 else f"{processes.count} × {described()}"
        self._model = Transformer(config, compute_dtype(precision), layout.rematerialize)
        self._base: Parameters = {}
        """The frozen matrices beneath adapters."""
        self._adapters: Parameters = {}
        if tuning.lora is not None:
            adapted = [parameter.name for parameter in lora.adapted_parameters(config, tuning.lora)]
            self._base = {name: parameters_of(self._model)[name] for name in adapted}
            shapes = lora.adapter_shapes(config, tuning.lora)
            self._adapters = {name: mx.zeros(shape) for name, shape in shapes.items()}
        self._moments, self._updates, self._scale = self._fresh()
        self._reference: Parameters | None = None
        self._together = 2 if tuning.preference else 1
        """Rows of a batch that stay together."""
        self._loss_rows: dict[tuple[int, bool], int] = {}
        self._functions = StepFunctions(
            self._model,
            optimizer,
            tuning.preference,
            moved=None if tuning.lora is None else list(self._base),
            is_fp16=self._is_fp16,
            processes=processes.count,
            compiled=compiled,
        )

    @property
    def traced(self) -> int:
        """How often a function was traced for a new shape: what `step` costs but once."""
        return self._functions.traced

    def agreed(self, word: int) -> int:
        return self._processes.largest(word)

    def peak_memory(self) -> int:
        return peak_memory()

    def step(self, micro_batches: Sequence[Batch], learning_rate_scale: float, dropout_key: int) -> StepResult:
        """As the contract says. UserError where no target counts; ValueError for a token beyond the vocabulary."""
        found, gradients = self._backward(micro_batches, dropout_key)
        loss, figures = (found, None) if self._tuning.preference is None else (found[0], found[1:])
        config = self._optimizer_config
        rates = Rates(
            *(mx.array(rate * learning_rate_scale) for rate in (config.learning_rate, config.muon_learning_rate))
        )
        state = (self._moments, self._updates, self._scale)
        new, (self._moments, self._updates, self._scale), norm, skipped = self._functions.update(
            self._trained(), state, gradients, loss, rates
        )
        self._take(new)
        # Where nothing else names the old arrays, MLX writes the new ones over them.
        del state, gradients
        mx.async_eval(new, self._moments, self._updates, self._scale, loss, norm, skipped)
        return StepResult(loss, norm, skipped, figures)

    def _trained(self) -> Parameters:
        """What the optimizer moves."""
        return parameters_of(self._model) if self._tuning.lora is None else self._adapters

    def _take(self, trained: Parameters) -> None:
        """Goes on with what the optimizer has moved."""
        if self._tuning.lora is None:
            replace_parameters(self._model, trained)
            return
        self._adapters = trained
        formed = effective(self._tuning.lora, self._base, trained)
        mx.async_eval(formed)
        replace_parameters(self._model, formed)

    def loss(self, batch: Batch) -> tuple[float, int]:
        if self._tuning.preference is not None:
            return float(summed_figures(self.rewards(batch), batch)[0]), int(pairs_that_count(batch).sum())
        (found,) = self._processes.sum([-self._functions.log_probabilities(self._evaluated(batch)).sum()])
        return float(found), int(batch.loss_mask_BT.sum())

    def rewards(self, batch: Batch) -> NDArray[np.float32]:
        assert self._tuning.preference is not None
        pairs_that_count(batch)
        arrays = self._evaluated(batch)
        ratios_R = self._functions.log_probabilities(arrays) - self._functions.log_probabilities(
            arrays, self._of_reference()
        )
        before = self._processes.rank * len(ratios_R)
        after = self._processes.count * len(ratios_R) - before - len(ratios_R)
        (ratios_B,) = self._processes.sum([mx.pad(ratios_R, (before, after))])
        rewards_B: NDArray[np.float32] = np.array(self._tuning.preference.beta * ratios_B)[: len(batch.tokens_BT)]
        return rewards_B

    def _evaluated(self, batch: Batch) -> Arrays:
        """This process's rows of a batch without gradients."""
        shape = (batch.tokens_BT.shape[1], batch.documents_BT is not None)
        # The last rows of a validation are fewer: they are filled up to the shape that is compiled.
        self._loss_rows[shape] = at_least = max(self._loss_rows.get(shape, 0), len(batch.tokens_BT))
        return self._arrays(batch, -(-at_least // self._processes.count), None)

    def gradients(self, micro_batches: Sequence[Batch], dropout_key: int) -> Iterator[Piece]:
        _, gradients = self._backward(micro_batches, dropout_key)
        yield from self._pieces({name: gradient / self._scale.scale for name, gradient in gradients.items()})

    def export(self, state: State) -> Iterator[Piece]:
        if state == "weights":
            yield from self._canonical(parameters_of(self._model) | self._base)
            if self._tuning.lora is not None:
                yield from self._pieces(self._adapters)
            return
        for moment, arrays in self._moments.items():
            yield from self._pieces(arrays, f"{moment}:")
        yield Piece(UPDATES, (), np.array(self._updates).astype(np.int64))
        if self._is_fp16:
            yield Piece(LOSS_SCALE, (), np.array(self._scale.scale))
            yield Piece(LOSS_SCALE_UPDATES, (), np.array(self._scale.steady).astype(np.int64))

    def _pieces(self, trained: Parameters, prefix: str = "") -> Iterator[Piece]:
        """What is trained, or gradients or moments of it."""
        if self._tuning.lora is None:
            return self._canonical(trained, prefix)
        return (Piece(prefix + name, (), np.array(array)) for name, array in trained.items())

    def _canonical(self, parameters: Parameters, prefix: str = "") -> Iterator[Piece]:
        for parameter in weights.parameters(self._config):
            if parameter.name in parameters:
                yield from weights.to_canonical(parameter, np.array(parameters[parameter.name]), prefix)

    def restore(self, state: Given, arrays: Iterable[Piece]) -> None:
        if state == "reference":
            self._reference = gathered(self._config, arrays)
            return
        if state == "weights":
            self._restore_weights(arrays)
            self._moments, self._updates, self._scale = self._fresh()
            return
        pieces = list(arrays)
        scaled = self._is_fp16 and {piece.name for piece in pieces} >= OPTIONAL
        shapes = lora.optimizer_shapes(self._config, self._optimizer_config, self._tuning.lora) | (
            dict.fromkeys(OPTIONAL, ()) if scaled else {}
        )
        found = weights.gather(pieces, shapes)
        for moment, moments in self._moments.items():
            if self._tuning.lora is not None:
                moments.update({name: mx.array(found[f"{moment}:{name}"]) for name in moments})
                continue
            for parameter in weights.parameters(self._config):
                if parameter.name in moments:
                    array = weights.from_canonical(parameter, found.__getitem__, f"{moment}:")
                    moments[parameter.name] = mx.array(array)
        self._updates = mx.array(int(found[UPDATES]), mx.int32)
        if scaled:
            self._scale = LossScale(
                mx.array(float(found[LOSS_SCALE])), mx.array(int(found[LOSS_SCALE_UPDATES]), mx.int32)
            )

    def _restore_weights(self, arrays: Iterable[Piece]) -> None:
        if self._tuning.lora is None:
            load_weights(self._model, arrays)
            return
        found = weights.gather(arrays, lora.weights_shapes(self._config, self._tuning.lora))
        canonical = weights.canonical_shapes(self._config)
        load_weights(self._model, (Piece(name, (), found[name]) for name in canonical))
        parameters = parameters_of(self._model)
        self._base = {name: parameters[name] for name in self._base}
        self._take({name: mx.array(found[name]) for name in self._adapters})

    def inference(self) -> MlxInference:
        return MlxInference(self._model)

    def _fresh(self) -> OptimizerState:
        """The optimizer as it is before its first update."""
        moments = fresh_moments(self._optimizer_config, self._trained())
        return moments, mx.array(0, mx.int32), fresh_scale(self._is_fp16)

    def _arrays(self, batch: Batch, at_least: int, seed: int | None) -> Arrays:
        """This process's rows of a batch on the device."""
        config, processes = self._config, self._processes
        check_batch(batch, config.vocab_size, config.max_position_embeddings)
        rows = rows_of(batch, processes.rank, processes.count, at_least, self._together)
        arrays = {
            "tokens": mx.array(rows.tokens_RT),
            "targets": mx.array(rows.targets_RT),
            "counted": mx.array(rows.counted_RT.astype(np.float32)),
        }
        if rows.documents_RT is not None and rows.positions_RT is not None:
            arrays |= {"documents": mx.array(rows.documents_RT), "positions": mx.array(rows.positions_RT)}
        if self._functions.balanced:
            arrays["real"] = mx.array(rows.real_RT)
        if seed is not None and config.dropout:
            count, start = len(rows.tokens_RT), processes.rank * len(rows.tokens_RT)
            keys_B2 = mx.random.split(mx.random.key(seed), len(batch.tokens_BT))[start : start + count]
            arrays["keys"] = mx.pad(keys_B2, [(0, count - len(keys_B2)), (0, 0)])
        return arrays

    def _backward(self, micro_batches: Sequence[Batch], dropout_key: int) -> tuple[mx.array, Parameters]:
        """The mean loss without the balance of experts, or in preference tuning the mean figures of the pairs; and the
        gradients, multiplied by the loss scale."""
        prefers = self._tuning.preference is not None
        counted = counted_pairs(micro_batches) if prefers else counted_targets(micro_batches)
        parts = [self._arrays(batch, 0, (dropout_key << 20) + number) for number, batch in enumerate(micro_batches)]
        numbers = {"share": mx.array(1 / counted), "scale": self._scale.scale}
        if self._functions.balanced:
            positions = sum(map(real_positions, micro_batches)) * self._config.num_hidden_layers
            numbers["positions"] = mx.array(float(positions))
            if len(parts) > 1 or self._processes.count > 1:
                # Their product with probabilities is the loss, so the parts' gradients need them beforehand.
                counts = [self._functions.counts(arrays) for arrays in parts]
                numbers["counts"] = self._processes.sum([sum(counts[1:], counts[0])])[0]
        loss, gradients = self._gradients(parts[0], numbers)
        for arrays in parts[1:]:
            mx.async_eval(loss, gradients)
            more, further = self._gradients(arrays, numbers)
            loss, gradients = loss + more, {name: array + further[name] for name, array in gradients.items()}
        if self._tuning.lora is not None:
            gradients = adapter_gradients(self._tuning.lora, self._adapters, gradients)
        names = list(gradients)
        loss, *summed = self._processes.sum([loss, *gradients.values()])
        return loss, dict(zip(names, summed, strict=True))

    def _gradients(self, arrays: Arrays, numbers: Arrays) -> tuple[mx.array, Parameters]:
        """A micro-batch's part of the mean loss, and of the scaled gradients."""
        if self._tuning.preference is not None:
            undropped = {name: array for name, array in arrays.items() if name != "keys"}
            arrays = arrays | {"reference": self._functions.log_probabilities(undropped, self._of_reference())}
        return self._functions.gradients(arrays, numbers)

    def _of_reference(self) -> Parameters:
        assert self._reference is not None  # it is restored first
        return self._reference
