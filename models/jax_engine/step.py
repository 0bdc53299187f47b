"""What a training step computes, as functions that are compiled once for each shape of batches.

Suffixes: A micro-batches, B rows, T positions, D hidden_size, E experts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models.config import ModelConfig
from models.engine import StepResult
from models.jax_engine import lora as adapters
from models.jax_engine.head import part_count, target_log_probabilities, weighted_loss
from models.jax_engine.mixture import balance_loss
from models.jax_engine.model import Computing, Rows, Transformer
from models.jax_engine.optimizer import Arrays, OptimizerState, clipped, fresh, prefixed, updated
from models.jax_engine.parameters import stacked_shape, stacks
from models.jax_engine.preference import counted_pairs, preferences
from models.lora import LORA_A, LORA_B
from models.optimizer import OptimizerConfig
from models.preference import FIGURES
from models.tuning import Tuning


class Micro(NamedTuple):
    """Micro-batches on the devices, (A, B, T), or one of them, (B, T)."""

    tokens: jax.Array
    targets: jax.Array
    counted: jax.Array
    """bool."""
    documents: jax.Array | None
    numbers: jax.Array
    """(A,); each one's number, which dropout depends on."""


class Totals(NamedTuple):
    """What each micro-batch has to know of all."""

    counted: jax.Array
    """0-d fp32; counted targets, or pairs in preference tuning."""
    positions: jax.Array
    """0-d fp32; real positions in all layers together."""
    counts_E: jax.Array | None
    """Assignments to each expert in all layers; None where a micro-batch is the only one, or nobody asks."""


class Steps:
    """The compiled functions of one model, optimizer, mesh and tuning.

    Those of training take the parameters of preference tuning's reference last.
    """

    def __init__(self, config: ModelConfig, optimizer: OptimizerConfig, computing: Computing, tuning: Tuning) -> None:
        self._config, self._optimizer = config, optimizer
        self._lora, self._preference = tuning.lora, tuning.preference
        self._model, self._sharding = Transformer(config, computing), computing.sharding
        # Shardings stand in the places of the arrays that they are of.
        lying: dict[str, Any] = {
            name: self._sharding.of_parameter(name, len(stacked_shape(name, parameters)))
            for name, parameters in stacks(config).items()
        }
        whole: Any = self._sharding.of()
        self.adapted: tuple[str, ...] = ()
        """The parameters that have adapters."""
        trained = lying
        if tuning.lora is not None:
            self.adapted = tuple(adapters.adapted(config, tuning.lora))
            trained = {kind + name: whole for name in self.adapted for kind in (LORA_A, LORA_B)}
        state = OptimizerState(prefixed(optimizer, trained), whole)
        self.fresh = jax.jit(lambda trained: fresh(optimizer, trained), out_shardings=state)
        """What is trained to the optimizer's state before the first update."""
        self.step = computing.compiled(self._stepped, donate_argnums=(0, 1), out_shardings=(trained, state, whole))
        """(trained, state, frozen, micro-batches, scale of rates, dropout key) to trained, state and result.

        What is trained are the parameters, and nothing is frozen; or the adapters, and the parameters are."""
        self.gradients = computing.compiled(self._gradients, out_shardings=(trained, whole))
        """(trained, frozen, micro-batches, dropout key) to gradients and loss, or figures."""
        self.row_log_probabilities = computing.compiled(
            lambda parameters, micro: self._read_rows(parameters, only(micro)), out_shardings=whole
        )
        """(parameters, one micro-batch) to the log-probabilities of its rows, (B,), without dropout."""
        self.effective = jax.jit(self._effective, out_shardings={name: lying[name] for name in self.adapted})
        """(base matrices, adapters) to the parameters that the model computes with."""

    @property
    def _balanced(self) -> bool:
        return self._config.mlp == "mixture" and self._config.router_aux_loss_coef > 0

    def _stepped(
        self,
        trained: Arrays,
        state: OptimizerState,
        frozen: Arrays,
        micro: Micro,
        scale: jax.Array,
        words: jax.Array,
        reference: Arrays | None = None,
    ) -> tuple[Arrays, OptimizerState, StepResult]:
        gradients, found = self._gradients(trained, frozen, micro, words, reference)
        loss, figures = (found, None) if self._preference is None else (found[0], found[1:])
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        after = updated(self._optimizer, trained, state, clipped(self._optimizer, gradients, norm), scale)
        trained, state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, (trained, state))
        return trained, state, StepResult(loss, norm, 1 - finite.astype(jnp.float32), figures)

    def _gradients(
        self, trained: Arrays, frozen: Arrays, micro: Micro, words: jax.Array, reference: Arrays | None = None
    ) -> tuple[Arrays, jax.Array]:
        """The gradients of the mean loss, and that loss without the balance of experts; in preference tuning, the mean
        figures of the pairs."""
        if self._lora is None:
            return self._parameter_gradients(trained, frozen, micro, words, reference)
        moved = {name: frozen[name] for name in self.adapted}
        others = {name: array for name, array in frozen.items() if name not in moved}
        gradients, found = self._parameter_gradients(moved, others, micro, words, reference)
        return adapters.gradients(self._lora, trained, gradients), found

    def _effective(self, base: Arrays, trained: Arrays) -> Arrays:
        return {} if self._lora is None else adapters.effective(self._lora, base, trained)

    def _parameter_gradients(
        self, moved: Arrays, others: Arrays, micro: Micro, words: jax.Array, reference: Arrays | None
    ) -> tuple[Arrays, jax.Array]:
        """Those by some of the parameters."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), words[0]), words[1])
        totals = self._totals({**others, **moved}, micro, key)

        def objective(moved: Arrays, one: Micro) -> tuple[jax.Array, jax.Array]:
            return self._objective({**others, **moved}, one, totals, key, reference)

        of_one = jax.grad(objective, has_aux=True)
        if micro.tokens.shape[0] == 1:
            found: tuple[Arrays, jax.Array] = of_one(moved, only(micro))
            return found

        def added(carry: tuple[Arrays, jax.Array], one: Micro) -> tuple[tuple[Arrays, jax.Array], None]:
            return jax.tree.map(jnp.add, carry, of_one(moved, one)), None

        found_shape = () if self._preference is None else (FIGURES,)
        nothing = (jax.tree.map(jnp.zeros_like, moved), jnp.zeros(found_shape))
        return jax.lax.scan(added, nothing, micro)[0]

    def _objective(
        self, parameters: Arrays, one: Micro, totals: Totals, key: jax.Array, reference: Arrays | None
    ) -> tuple[jax.Array, jax.Array]:
        """What one micro-batch adds to what is minimised, and to the loss or the figures."""
        read = self._model.read(parameters, self._rows(one), jax.random.fold_in(key, one.numbers))
        if self._preference is None:
            loss = found = self._loss(parameters, read.x_BTD, one, totals.counted)
        else:
            loss, found = self._preference_loss(parameters, read.x_BTD, one, totals.counted, reference)
        if not self._balanced:
            return loss, found
        assert read.routing is not None
        counts_E = read.routing.counts_E if totals.counts_E is None else totals.counts_E
        balance = balance_loss(read.routing, counts_E, totals.positions)
        return loss + self._config.router_aux_loss_coef * balance, found

    def _totals(self, parameters: Arrays, micro: Micro, key: jax.Array) -> Totals:
        """The loss of a balance is the product of counts with probabilities, both of the whole batch, so the parts'
        gradients need the counts beforehand: several micro-batches pay one more forward pass for being exact."""
        of_kind = micro.counted if self._preference is None else counted_pairs(micro.counted)
        counted = of_kind.sum(dtype=jnp.int32).astype(jnp.float32)
        if not self._balanced:
            return Totals(counted, jnp.ones(()), None)
        real = jax.vmap(_real)(micro.counted, micro.documents)
        positions = real.sum() * self._config.num_hidden_layers
        if micro.tokens.shape[0] == 1:
            return Totals(counted, positions, None)

        def counts_of(one: Micro) -> jax.Array:
            routing = self._model.read(parameters, self._rows(one), jax.random.fold_in(key, one.numbers)).routing
            assert routing is not None
            return routing.counts_E

        return Totals(counted, positions, jax.lax.map(counts_of, micro).sum(0))

    def _rows(self, one: Micro) -> Rows:
        return Rows(one.tokens, one.documents, _real(one.counted, one.documents) if self._balanced else None)

    def _loss(self, parameters: Arrays, x_BTD: jax.Array, one: Micro, divisor: jax.Array) -> jax.Array:
        weights_BT = one.counted.astype(jnp.float32) / divisor
        return weighted_loss(x_BTD, self._model.head_VD(parameters), one.targets, weights_BT, self._parts(one))

    def _preference_loss(
        self, parameters: Arrays, x_BTD: jax.Array, one: Micro, divisor: jax.Array, reference: Arrays | None
    ) -> tuple[jax.Array, jax.Array]:
        """What has the gradients of the pairs' losses over a divisor, and the sums of their figures over it.

        The head is gone through twice, for the log-probabilities and then with the weights that follow from them, but
        the blocks once.
        """
        assert self._preference is not None
        assert reference is not None  # it is restored first
        head_VD = self._model.head_VD(parameters)
        policy_B = self._row_log_probabilities(*jax.lax.stop_gradient((x_BTD, head_VD)), one)
        reference_B = self._read_rows(reference, one)
        found = preferences(policy_B - reference_B, one.counted, self._preference.beta)
        weights_BT = one.counted * found.weights_B[:, None] / divisor
        loss = weighted_loss(x_BTD, head_VD, one.targets, weights_BT, self._parts(one))
        return loss, found.figures_F / divisor

    def _read_rows(self, parameters: Arrays, one: Micro) -> jax.Array:
        """The log-probabilities of the rows, without dropout."""
        x_BTD = self._model.read(parameters, self._rows(one)).x_BTD
        return self._row_log_probabilities(x_BTD, self._model.head_VD(parameters), one)

    def _row_log_probabilities(self, x_BTD: jax.Array, head_VD: jax.Array, one: Micro) -> jax.Array:
        logs_BT = target_log_probabilities(x_BTD, head_VD, one.targets, self._parts(one))
        return jnp.where(one.counted, logs_BT, 0).sum(1)

    def _parts(self, one: Micro) -> int:
        """Into how many parts the head takes the positions of a row."""
        rows, length = one.tokens.shape
        logits = rows // self._sharding.row_parts * length * self._config.vocab_size
        return part_count(self._model.computing.platform, logits // self._sharding.mesh.shape["tensor"], length)


@functools.lru_cache(maxsize=16)
def steps(config: ModelConfig, optimizer: OptimizerConfig, computing: Computing, tuning: Tuning) -> Steps:
    """The compiled functions, which engines of the same kind share."""
    return Steps(config, optimizer, computing, tuning)


def only(micro: Micro) -> Micro:
    """The one micro-batch that there is."""
    found: Micro = jax.tree.map(lambda array: array[0], micro)
    return found


def _real(counted_BT: jax.Array, documents_BT: jax.Array | None) -> jax.Array:
    """1 where a position stands before its context's last counted target or is it, else 0; fp32."""
    length = counted_BT.shape[1]
    places_BT = jnp.where(counted_BT, jnp.arange(length), length)
    next_BT = jax.lax.cummin(places_BT, axis=1, reverse=True)
    real_BT = next_BT < length
    if documents_BT is not None:
        there_BT = jnp.take_along_axis(documents_BT, jnp.minimum(next_BT, length - 1), axis=1)
        real_BT &= there_BT == documents_BT
    return real_BT.astype(jnp.float32)
