"""Preference tuning with the MLX engine: `models.preference` on the device.

The gradient of a pair's loss −log σ(z) is that of a cross-entropy whose targets weigh beta · σ(−z) in the chosen row,
and as much less than nothing in the rejected one.

M positions, R rows, T positions of a row, P = R / 2 pairs, D hidden_size, F figures.
"""

from typing import NamedTuple

import mlx.core as mx

from models.mlx_engine.head import parts_of, target_log_probabilities
from models.mlx_engine.products import product


class Preferences(NamedTuple):
    """What the rows' log-probabilities come to."""

    weights_R1: mx.array
    """How much a row's cross-entropy weighs."""
    figures_F: mx.array
    """The figures' sums over the pairs that count."""


def row_log_probabilities(x_RTD: mx.array, head_VD: mx.array, targets_RT: mx.array, counted_RT: mx.array) -> mx.array:
    """The summed log-probabilities of the rows' counted targets, (R,) in fp32, without a gradient.

    x_RTD: normed hidden states in the dtype of the products; head_VD: the fp32 parameter; counted_RT: 1 or 0, fp32.
    """
    x_MD, head_VD = (mx.stop_gradient(array) for array in (x_RTD.reshape(-1, x_RTD.shape[-1]), head_VD))
    cast_VD, targets_M = head_VD.astype(x_MD.dtype), targets_RT.reshape(-1)
    logs: list[mx.array] = []
    for part in parts_of(len(x_MD), len(head_VD)):
        # One part after the other: MLX would go through all of them side by side.
        x_CD = mx.depends([x_MD[part]], logs[-1:])[0] if logs else x_MD[part]
        logs.append(target_log_probabilities(product(x_CD, cast_VD.T), targets_M[part]))
    logs_RT = mx.concatenate(logs).reshape(targets_RT.shape)
    return mx.where(counted_RT > 0, logs_RT, 0).sum(1)


def preferences(ratios_R: mx.array, counted_RT: mx.array, beta: float) -> Preferences:
    """ratios_R: log-probabilities of the rows, less those of the reference."""
    counted_P = (counted_RT.max(1) > 0).reshape(-1, 2).all(1).astype(mx.float32)
    rewards_P2 = beta * ratios_R.reshape(-1, 2)
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    weights_P = beta * mx.sigmoid(-margins_P) * counted_P
    losses_P = mx.logaddexp(mx.zeros_like(margins_P), -margins_P)
    figures_PF = mx.stack([losses_P, margins_P > 0, rewards_P2[:, 0], rewards_P2[:, 1]], 1)
    weights_R1 = mx.stack([weights_P, -weights_P], 1).reshape(-1, 1)
    return Preferences(weights_R1, (figures_PF * counted_P[:, None]).sum(0))
