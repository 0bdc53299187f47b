"""The output head together with its cross-entropy, a part of the positions at a time.

The logits of a batch are its largest array by far. Here no more than a part of them exists at once.

M positions, C those of a part, D hidden_size, V vocab_size.
"""

import mlx.core as mx

from models.mlx_engine.device import on_cpu
from models.mlx_engine.elementary import exp
from models.mlx_engine.products import product

_LOGITS = {"cpu": 1 << 22, "gpu": 1 << 27}
"""Logits that are computed at a time: 16 MB in fp32, or 512 MB on a GPU."""


def target_log_probabilities(logits_CV: mx.array, targets_C: mx.array) -> mx.array:
    """The log-probability of each target, (C,) in fp32."""
    logits_CV = logits_CV.astype(mx.float32)
    chosen_C = mx.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
    return chosen_C - mx.logsumexp(logits_CV, axis=-1)


def target_scores(logits_CV: mx.array, targets_C: mx.array) -> tuple[mx.array, mx.array]:
    """The same, and whether each target is the likeliest token, of equals the first: (C,) boolean."""
    return target_log_probabilities(logits_CV, targets_C), mx.argmax(logits_CV, axis=-1) == targets_C


def summed_loss(x_MD: mx.array, head_VD: mx.array, targets_M: mx.array, weights_M: mx.array) -> mx.array:
    """The sum of the targets' cross-entropies, each times its weight, a 0-d fp32 array; for a gradient, which is taken
    on the way.

    x_MD: normed hidden states in the dtype of the products; head_VD: the fp32 parameter; weights_M: fp32, 0 where a
    target does not count.
    """
    found: tuple[mx.array, mx.array, mx.array] = _with_gradients(x_MD, head_VD, targets_M, weights_M)  # type: ignore[assignment]
    return found[0]


def parts_of(positions: int, vocabulary: int) -> list[slice]:
    """The positions as parts of as many logits as are computed at a time."""
    size = max(1, _LOGITS["cpu" if on_cpu() else "gpu"] // vocabulary)
    return [slice(start, start + size) for start in range(0, positions, size)]


@mx.custom_function
def _with_gradients(
    x_MD: mx.array, head_VD: mx.array, targets_M: mx.array, weights_M: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    cast_VD = head_VD.astype(x_MD.dtype)
    total, dhead_VD = mx.zeros(()), mx.zeros(head_VD.shape)
    dx: list[mx.array] = []
    for part in parts_of(len(x_MD), len(head_VD)):
        # One part after the other: MLX would go through all of them side by side.
        x_CD, total = mx.depends([x_MD[part], total], [total, dhead_VD, *dx[-1:]])
        targets_C1, weights_C1 = targets_M[part][:, None], weights_M[part][:, None]
        logits_CV = product(x_CD, cast_VD.T).astype(mx.float32)
        largest_C1 = logits_CV.max(-1, keepdims=True)
        powers_CV = exp(logits_CV - largest_C1)
        sums_C1 = powers_CV.sum(-1, keepdims=True)
        losses_C1 = mx.log(sums_C1) + largest_C1 - mx.take_along_axis(logits_CV, targets_C1, axis=-1)
        total = total + mx.where(weights_C1 != 0, losses_C1 * weights_C1, 0).sum()
        # The gradient by the logits: the probabilities, less 1 at the target.
        dlogits_CV = powers_CV * (weights_C1 / sums_C1)
        hits_C1 = mx.take_along_axis(dlogits_CV, targets_C1, axis=-1) - weights_C1
        dlogits_CV = mx.put_along_axis(dlogits_CV, targets_C1, hits_C1, axis=-1).astype(x_MD.dtype)
        dx.append(product(dlogits_CV, cast_VD))
        dhead_VD = dhead_VD + product(dlogits_CV.T, x_CD).astype(mx.float32)
    return total, mx.concatenate(dx), dhead_VD


@_with_gradients.vjp
def _gradients(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    gradient, (_, dx_MD, dhead_VD) = cotangents[0], outputs
    nothing = (mx.zeros_like(primals[2]), mx.zeros_like(primals[3]))
    return (dx_MD.astype(mx.float32) * gradient).astype(dx_MD.dtype), dhead_VD * gradient, *nothing
