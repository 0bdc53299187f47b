"""The training side of the MLX engine.

B rows, R those of this process, T positions, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from numpy.typing import NDArray

from models import lora, weights
from models.config import ModelConfig
from models.engine import Batch, EngineName, Given, Layout, Precision, State, StepResult, counted_targets
from models.mlx_engine.attention import row_places
from models.mlx_engine.batches import check_batch, real_positions, rows_of
from models.mlx_engine.device import on_cpu
from models.mlx_engine.head import summed_loss
from models.mlx_engine.inference import MlxInference, described, peak_memory
from models.mlx_engine.lanes import Arrays, Lanes, Part
from models.mlx_engine.lora import adapter_gradients, effective
from models.mlx_engine.loss_scale import LossScale, fresh_scale, next_scale
from models.mlx_engine.mixture import balance_loss, total
from models.mlx_engine.model import (
    Parameters,
    Read,
    Transformer,
    compute_dtype,
    gathered,
    load_weights,
    parameters_of,
    replace_parameters,
)
from models.mlx_engine.optimizer import Moments, Rates, fresh_moments, gradient_norm, updated
from models.mlx_engine.preference import preferences, row_log_probabilities
from models.mlx_engine.processes import Processes
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

OptimizerState = tuple[Moments, mx.array, LossScale]
"""The moments, the number of updates (0-d int32), and the loss scale."""


class MlxTraining:
    """`models.engine.TrainingEngine` on MLX's default device, in one process or in several.

    State goes through the functions of a step as arguments and results, and the module only holds it in between, so
    that they can be compiled: as they are on a GPU, or where `compiled` says so.
    """

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
        self.traced = 0
        """How often a function was traced for a new shape: what `step` costs but once."""
        if compiled is None:
            # On a CPU, compiled steps were no faster, and MLX compiles with a g++ that may be missing, into files that
            # two processes at a time, or one that is killed, leave half-written for all later ones.
            compiled = not on_cpu()
        compile_: Callable[..., Any] = mx.compile if compiled else lambda function: function
        self._compiled = compiled
        # The balance of experts needs all rows at once, and processes are as many as the cores are to be.
        alone = compiled or self._balanced or processes.count > 1
        self._lanes = Lanes(1) if alone else Lanes.where_they_help()
        self._gradients_of = compile_(self._traced(self._gradients_function))
        self._counts_of = compile_(self._traced(self._counts_function))
        self._log_probabilities_of = compile_(self._traced(self._log_probabilities_function))
        self._update = compile_(self._traced(self._update_function))

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
        new, (self._moments, self._updates, self._scale), norm, skipped = self._update(
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
        (found,) = self._processes.sum([-self._log_probabilities(self._evaluated(batch)).sum()])
        return float(found), int(batch.loss_mask_BT.sum())

    def rewards(self, batch: Batch) -> NDArray[np.float32]:
        assert self._tuning.preference is not None
        pairs_that_count(batch)
        arrays = self._evaluated(batch)
        ratios_R = self._log_probabilities(arrays) - self._log_probabilities(arrays, self._of_reference())
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

    def _traced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.traced += 1
            return function(*arguments)

        return counted

    def _with_parameters(self, function: Callable[..., Any], *arguments: Any, others: Parameters | None = None) -> Any:
        """Calls with the parameters, or others, and gives the module its own back: tracing leaves others in it."""
        parameters = parameters_of(self._model)
        try:
            return function(parameters if others is None else others, *arguments)
        finally:
            replace_parameters(self._model, parameters)

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
        if self._balanced:
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
        if self._balanced:
            positions = sum(map(real_positions, micro_batches)) * self._config.num_hidden_layers
            numbers["positions"] = mx.array(float(positions))
            if len(parts) > 1 or self._processes.count > 1:
                # Their product with probabilities is the loss, so the parts' gradients need them beforehand.
                counts = [self._with_parameters(self._counts_of, arrays) for arrays in parts]
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
            arrays = arrays | {"reference": self._log_probabilities(undropped, self._of_reference())}
        parts = self._lanes.each(
            lambda rows: self._with_parameters(self._gradients_of, rows, numbers), arrays, self._together
        )
        return self._lanes.added(parts)

    def _log_probabilities(self, arrays: Arrays, others: Parameters | None = None) -> mx.array:
        """The log-probabilities of rows, (R,), by the model or by other parameters."""
        return mx.concatenate(
            self._lanes.each(
                lambda rows: self._with_parameters(self._log_probabilities_of, rows, others=others), arrays
            )
        )

    def _of_reference(self) -> Parameters:
        assert self._reference is not None  # it is restored first
        return self._reference

    @property
    def _balanced(self) -> bool:
        return self._config.mlp == "mixture" and self._config.router_aux_loss_coef > 0

    def _read(self, parameters: Parameters, arrays: Arrays) -> Read:
        replace_parameters(self._model, parameters)
        places = row_places(arrays.get("documents"), arrays.get("positions"))
        return self._model.read(arrays["tokens"], places, arrays.get("real"), arrays.get("keys"))

    def _gradients_function(self, parameters: Parameters, arrays: Arrays, numbers: Arrays) -> Part:
        """What these rows add to the mean loss, and to the scaled gradients."""

        moved = parameters if self._tuning.lora is None else {name: parameters[name] for name in self._base}

        def objective(moved: Parameters) -> tuple[mx.array, mx.array, list[mx.array]]:
            read = self._read({**parameters, **moved}, arrays)
            whole, found = (part * numbers["share"] for part in self._end(read.x_BTD, arrays))
            if self._balanced:
                routing = total(read.routings)
                counts_E = numbers.get("counts", routing.counts_E)
                balance = balance_loss(routing.probabilities_E, counts_E, numbers["positions"])
                whole = whole + self._config.router_aux_loss_coef * balance
            # What is compiled would give back all that it names.
            between = [] if self._compiled else read.between
            return (whole * numbers["scale"] if self._is_fp16 else whole), found, between

        (_, found, between), gradients = mx.value_and_grad(objective)(moved)
        return Part(found, gradients, between)

    def _end(self, x_RTD: mx.array, arrays: Arrays) -> tuple[mx.array, mx.array]:
        """The summed loss of rows for its gradient, and the same to be told, or the sums of the pairs' figures."""
        head_VD, targets_RT, counted_RT = self._model.head_VD, arrays["targets"], arrays["counted"]
        weights_RT, found = counted_RT, None
        if self._tuning.preference is not None:
            # The head is gone through twice, but the blocks once: dropout drops the same for both.
            policy_R = row_log_probabilities(x_RTD, head_VD, targets_RT, counted_RT)
            preferred = preferences(policy_R - arrays["reference"], counted_RT, self._tuning.preference.beta)
            weights_RT, found = mx.stop_gradient(counted_RT * preferred.weights_R1), preferred.figures_F
        x_MD = x_RTD.reshape(-1, x_RTD.shape[-1])
        loss = summed_loss(x_MD, head_VD, targets_RT.reshape(-1), weights_RT.reshape(-1))
        return loss, loss if found is None else found

    def _counts_function(self, parameters: Parameters, arrays: Arrays) -> mx.array:
        """How often each expert was chosen, in all layers together."""
        return total(self._read(parameters, arrays).routings).counts_E

    def _log_probabilities_function(self, parameters: Parameters, arrays: Arrays) -> mx.array:
        """The log-probabilities of rows, (R,), without a gradient and without dropout."""
        x_RTD = self._read(parameters, arrays).x_BTD
        return row_log_probabilities(x_RTD, self._model.head_VD, arrays["targets"], arrays["counted"])

    def _update_function(
        self,
        parameters: Parameters,
        state: OptimizerState,
        gradients: Parameters,
        loss: mx.array,
        rates: Rates,
    ) -> tuple[Parameters, OptimizerState, mx.array, mx.array]:
        """Parameters and state after the update, the gradients' norm, and 1 where it was skipped."""
        moments, updates, scale = state
        if self._is_fp16:
            gradients = {name: gradient / scale.scale for name, gradient in gradients.items()}
        norm = gradient_norm(gradients, self._lanes)
        finite = mx.isfinite(norm) & mx.isfinite(loss)
        after = next_scale(scale, finite) if self._is_fp16 else scale
        skipped = 1.0 - finite.astype(mx.float32)
        if not self._compiled and not finite.item():
            return parameters, (moments, updates, after), norm, skipped
        new, new_moments, count = updated(
            self._optimizer_config, parameters, moments, updates, gradients, rates, norm, self._lanes
        )
        if self._compiled:
            # On a CPU, choosing element by element would take as long as the rest of the update.
            new, new_moments, count = tree_map(
                lambda old, new: mx.where(finite, new, old),
                (parameters, moments, updates),
                (new, new_moments, count),
            )
        return new, (new_moments, count, after), norm, skipped
