"""The functions of a step of the MLX engine.

State goes through them as arguments and results, and the module only holds it in between, so that they can be
compiled: as they are on a GPU, or where a caller says so.

R rows of this process, T positions, D hidden_size, M = R · T, V vocabulary, E experts, F figures of pairs.
"""

from collections.abc import Callable, Collection
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from models.mlx_engine.attention import row_places
from models.mlx_engine.device import on_cpu
from models.mlx_engine.head import summed_loss
from models.mlx_engine.lanes import Arrays, Lanes, Part
from models.mlx_engine.loss_scale import LossScale, next_scale
from models.mlx_engine.mixture import balance_loss, total
from models.mlx_engine.model import Parameters, Read, Transformer, parameters_of, replace_parameters
from models.mlx_engine.optimizer import Moments, Rates, gradient_norm, updated
from models.mlx_engine.preference import preferences, row_log_probabilities
from models.optimizer import OptimizerConfig
from models.tuning import PreferenceConfig

OptimizerState = tuple[Moments, mx.array, LossScale]
"""The moments, the number of updates (0-d int32), and the loss scale."""


class StepFunctions:
    """What is computed of this process's rows, with the parameters that the module holds."""

    def __init__(
        self,
        model: Transformer,
        optimizer: OptimizerConfig,
        preference: PreferenceConfig | None,
        *,
        moved: Collection[str] | None,
        is_fp16: bool,
        processes: int,
        compiled: bool | None,
    ) -> None:
        """`moved`: the parameters that have gradients; None for all. `compiled`: None where the device decides."""
        self._model, self._config, self._optimizer_config = model, model.config, optimizer
        self._preference, self._moved, self._is_fp16 = preference, moved, is_fp16
        self._together = 2 if preference else 1
        """Rows that stay together."""
        self.traced = 0
        """How often a function was traced for a new shape: what a step costs but once."""
        # On a CPU, compiled steps were no faster, and MLX compiles with a g++ that may be missing, into files that two
        # processes at a time, or one that is killed, leave half-written for all later ones.
        self.compiled = not on_cpu() if compiled is None else compiled
        # The balance of experts needs all rows at once, and processes are as many as the cores are to be.
        alone = self.compiled or self.balanced or processes > 1
        self.lanes = Lanes(1) if alone else Lanes.where_they_help()
        self._gradients_of = self._ready(self._gradients)
        self._counts_of = self._ready(self._counts)
        self._log_probabilities_of = self._ready(self._log_probabilities)
        self.update = self._ready(self._updated)
        """See `_updated`."""

    @property
    def balanced(self) -> bool:
        """Whether the balance of experts is part of the loss."""
        return self._config.mlp == "mixture" and self._config.router_aux_loss_coef > 0

    def gradients(self, arrays: Arrays, numbers: Arrays) -> tuple[mx.array, Parameters]:
        """What rows add to the mean loss, or to the figures of pairs, and to the scaled gradients."""
        parts = self.lanes.each(
            lambda rows: self._with_parameters(self._gradients_of, rows, numbers), arrays, self._together
        )
        return self.lanes.added(parts)

    def counts(self, arrays: Arrays) -> mx.array:
        """How often each expert was chosen, in all layers together, (E,)."""
        found: mx.array = self._with_parameters(self._counts_of, arrays)
        return found

    def log_probabilities(self, arrays: Arrays, others: Parameters | None = None) -> mx.array:
        """The log-probabilities of rows, (R,), by the model or by other parameters."""
        return mx.concatenate(
            self.lanes.each(lambda rows: self._with_parameters(self._log_probabilities_of, rows, others=others), arrays)
        )

    def _ready(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.traced += 1
            return function(*arguments)

        ready: Callable[..., Any] = mx.compile(counted) if self.compiled else counted
        return ready

    def _with_parameters(self, function: Callable[..., Any], *arguments: Any, others: Parameters | None = None) -> Any:
        """Calls with the parameters, or others, and gives the module its own back: tracing leaves others in it."""
        parameters = parameters_of(self._model)
        try:
            return function(parameters if others is None else others, *arguments)
        finally:
            replace_parameters(self._model, parameters)

    def _read(self, parameters: Parameters, arrays: Arrays) -> Read:
        replace_parameters(self._model, parameters)
        places = row_places(arrays.get("documents"), arrays.get("positions"))
        return self._model.read(arrays["tokens"], places, arrays.get("real"), arrays.get("keys"))

    def _gradients(self, parameters: Parameters, arrays: Arrays, numbers: Arrays) -> Part:
        """What these rows add to the mean loss, and to the scaled gradients."""
        moved = parameters if self._moved is None else {name: parameters[name] for name in self._moved}

        def objective(moved: Parameters) -> tuple[mx.array, mx.array, list[mx.array]]:
            read = self._read({**parameters, **moved}, arrays)
            whole, found = (part * numbers["share"] for part in self._end(read.x_BTD, arrays))
            if self.balanced:
                routing = total(read.routings)
                counts_E = numbers.get("counts", routing.counts_E)
                balance = balance_loss(routing.probabilities_E, counts_E, numbers["positions"])
                whole = whole + self._config.router_aux_loss_coef * balance
            # What is compiled would give back all that it names.
            between = [] if self.compiled else read.between
            return (whole * numbers["scale"] if self._is_fp16 else whole), found, between

        (_, found, between), gradients = mx.value_and_grad(objective)(moved)
        return Part(found, gradients, between)

    def _end(self, x_RTD: mx.array, arrays: Arrays) -> tuple[mx.array, mx.array]:
        """The summed loss of rows for its gradient, and the same to be told, or the sums of the pairs' figures."""
        head_VD, targets_RT, counted_RT = self._model.head_VD, arrays["targets"], arrays["counted"]
        weights_RT, found = counted_RT, None
        if self._preference is not None:
            # The head is gone through twice, but the blocks once: dropout drops the same for both.
            policy_R = row_log_probabilities(x_RTD, head_VD, targets_RT, counted_RT)
            preferred = preferences(policy_R - arrays["reference"], counted_RT, self._preference.beta)
            weights_RT, found = mx.stop_gradient(counted_RT * preferred.weights_R1), preferred.figures_F
        x_MD = x_RTD.reshape(-1, x_RTD.shape[-1])
        loss = summed_loss(x_MD, head_VD, targets_RT.reshape(-1), weights_RT.reshape(-1))
        return loss, loss if found is None else found

    def _counts(self, parameters: Parameters, arrays: Arrays) -> mx.array:
        """How often each expert was chosen, in all layers together."""
        return total(self._read(parameters, arrays).routings).counts_E

    def _log_probabilities(self, parameters: Parameters, arrays: Arrays) -> mx.array:
        """The log-probabilities of rows, (R,), without a gradient and without dropout."""
        x_RTD = self._read(parameters, arrays).x_BTD
        return row_log_probabilities(x_RTD, self._model.head_VD, arrays["targets"], arrays["counted"])

    def _updated(
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
        norm = gradient_norm(gradients, self.lanes)
        finite = mx.isfinite(norm) & mx.isfinite(loss)
        after = next_scale(scale, finite) if self._is_fp16 else scale
        skipped = 1.0 - finite.astype(mx.float32)
        if not self.compiled and not finite.item():
            return parameters, (moments, updates, after), norm, skipped
        new, new_moments, count = updated(
            self._optimizer_config, parameters, moments, updates, gradients, rates, norm, self.lanes
        )
        if self.compiled:
            # On a CPU, choosing element by element would take as long as the rest of the update.
            new, new_moments, count = tree_map(
                lambda old, new: mx.where(finite, new, old),
                (parameters, moments, updates),
                (new, new_moments, count),
            )
        return new, (new_moments, count, after), norm, skipped
