"""Preference tuning with the JAX engine: `models.preference` on the devices.

The gradient of a pair's loss −log σ(z) is that of a cross-entropy whose targets weigh beta · σ(−z) in the chosen row,
and as much less than nothing in the rejected one.

Suffixes: B rows, T positions, P = B / 2 pairs, F figures.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Preferences(NamedTuple):
    """What the rows' log-probabilities come to."""

    weights_B: jax.Array
    """How much a row's cross-entropy weighs."""
    figures_F: jax.Array
    """The figures' sums over the pairs that count."""


def counted_pairs(counted_BT: jax.Array) -> jax.Array:
    """Which pairs have a counted target in both rows, (…, P), out of counted targets, (…, B, T)."""
    counted_B = counted_BT.any(-1)
    return counted_B.reshape(*counted_B.shape[:-1], -1, 2).all(-1)


def preferences(ratios_B: jax.Array, counted_BT: jax.Array, beta: float) -> Preferences:
    """ratios_B: log-probabilities of the rows, less those of the reference."""
    counted_P = counted_pairs(counted_BT).astype(jnp.float32)
    rewards_P2 = beta * ratios_B.reshape(-1, 2)
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    weights_P = beta * jax.nn.sigmoid(-margins_P) * counted_P
    figures_PF = jnp.stack([jax.nn.softplus(-margins_P), margins_P > 0, rewards_P2[:, 0], rewards_P2[:, 1]], 1)
    return Preferences(jnp.stack([weights_P, -weights_P], 1).reshape(-1), counted_P @ figures_PF)
