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
from models.jax_engine.head import part_count, weighted_loss
from models.jax_engine.mixture import balance_loss
from models.jax_engine.model import Computing, Rows, Transformer
from models.jax_engine.optimizer import Arrays, OptimizerState, clipped, fresh, prefixed, updated
from models.jax_engine.parameters import stacked_shape, stacks
from models.lora import LORA_A, LORA_B
from models.optimizer import OptimizerConfig
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
    """0-d fp32; counted targets."""
    positions: jax.Array
    """0-d fp32; real positions in all layers together."""
    counts_E: jax.Array | None
    """Assignments to each expert in all layers; None where a micro-batch is the only one, or nobody asks."""


class Steps:
    """The compiled functions of one model, optimizer and mesh."""

    def __init__(self, config: ModelConfig, optimizer: OptimizerConfig, computing: Computing, tuning: Tuning) -> None:
        self._config, self._optimizer, self._lora = config, optimizer, tuning.lora
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
        self.step = computing.compiled(
            self._stepped, donate_argnums=(0, 1), out_shardings=(trained, state, StepResult(whole, whole, whole))
        )
        """(trained, state, frozen, micro-batches, scale of rates, dropout key) to trained, state and result.

        What is trained are the parameters, and nothing is frozen; or the adapters, and the parameters are."""
        self.gradients = computing.compiled(self._gradients, out_shardings=(trained, whole))
        """(trained, frozen, micro-batches, dropout key) to gradients and loss."""
        self.loss = computing.compiled(self._summed_loss, out_shardings=whole)
        """(parameters, one micro-batch) to its summed loss without dropout."""
        self.effective = jax.jit(self._effective, out_shardings={name: lying[name] for name in self.adapted})
        """(base matrices, adapters) to the parameters that the model computes with."""

    @property
    def _balanced(self) -> bool:
        return self._config.mlp == "mixture" and self._config.router_aux_loss_coef > 0

    def _stepped(
        self, trained: Arrays, state: OptimizerState, frozen: Arrays, micro: Micro, scale: jax.Array, words: jax.Array
    ) -> tuple[Arrays, OptimizerState, StepResult]:
        gradients, loss = self._gradients(trained, frozen, micro, words)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        after = updated(self._optimizer, trained, state, clipped(self._optimizer, gradients, norm), scale)
        trained, state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, (trained, state))
        return trained, state, StepResult(loss, norm, 1 - finite.astype(jnp.float32))

    def _gradients(self, trained: Arrays, frozen: Arrays, micro: Micro, words: jax.Array) -> tuple[Arrays, jax.Array]:
        """The gradients of the mean loss, and that loss without the balance of experts."""
        if self._lora is None:
            return self._parameter_gradients(trained, frozen, micro, words)
        moved = {name: frozen[name] for name in self.adapted}
        others = {name: array for name, array in frozen.items() if name not in moved}
        found, loss = self._parameter_gradients(moved, others, micro, words)
        return adapters.gradients(self._lora, trained, found), loss

    def _effective(self, base: Arrays, trained: Arrays) -> Arrays:
        return {} if self._lora is None else adapters.effective(self._lora, base, trained)

    def _parameter_gradients(
        self, moved: Arrays, others: Arrays, micro: Micro, words: jax.Array
    ) -> tuple[Arrays, jax.Array]:
        """Those by some of the parameters."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), words[0]), words[1])
        totals = self._totals({**others, **moved}, micro, key)

        def objective(moved: Arrays, one: Micro) -> tuple[jax.Array, jax.Array]:
            return self._objective({**others, **moved}, one, totals, key)

        of_one = jax.grad(objective, has_aux=True)
        if micro.tokens.shape[0] == 1:
            found: tuple[Arrays, jax.Array] = of_one(moved, _only(micro))
            return found

        def added(carry: tuple[Arrays, jax.Array], one: Micro) -> tuple[tuple[Arrays, jax.Array], None]:
            return jax.tree.map(jnp.add, carry, of_one(moved, one)), None

        nothing = (jax.tree.map(jnp.zeros_like, moved), jnp.zeros(()))
        return jax.lax.scan(added, nothing, micro)[0]

    def _objective(self, parameters: Arrays, one: Micro, totals: Totals, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What one micro-batch adds to what is minimised, and to the loss."""
        read = self._model.read(parameters, self._rows(one), jax.random.fold_in(key, one.numbers))
        loss = self._loss(parameters, read.x_BTD, one, totals.counted)
        if not self._balanced:
            return loss, loss
        assert read.routing is not None
        counts_E = read.routing.counts_E if totals.counts_E is None else totals.counts_E
        balance = balance_loss(read.routing, counts_E, totals.positions)
        return loss + self._config.router_aux_loss_coef * balance, loss

    def _totals(self, parameters: Arrays, micro: Micro, key: jax.Array) -> Totals:
        """The loss of a balance is the product of counts with probabilities, both of the whole batch, so the parts'
        gradients need the counts beforehand: several micro-batches pay one more forward pass for being exact."""
        counted = micro.counted.sum(dtype=jnp.int32).astype(jnp.float32)
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

    def _loss(self, parameters: Arrays, x_BTD: jax.Array, one: Micro, divisor: jax.Array | float) -> jax.Array:
        rows, length = one.tokens.shape
        logits = rows // self._sharding.row_parts * length * self._config.vocab_size
        parts = part_count(self._model.computing.platform, logits // self._sharding.mesh.shape["tensor"], length)
        weights_BT = one.counted.astype(jnp.float32) / divisor
        return weighted_loss(x_BTD, self._model.head_VD(parameters), one.targets, weights_BT, parts)

    def _summed_loss(self, parameters: Arrays, micro: Micro) -> jax.Array:
        one = _only(micro)
        return self._loss(parameters, self._model.read(parameters, self._rows(one)).x_BTD, one, 1.0)


@functools.lru_cache(maxsize=16)
def steps(config: ModelConfig, optimizer: OptimizerConfig, computing: Computing, tuning: Tuning) -> Steps:
    """The compiled functions, which engines of the same kind share."""
    return Steps(config, optimizer, computing, tuning)


def _only(micro: Micro) -> Micro:
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
