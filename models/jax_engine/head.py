"""The output head together with its cross-entropy, a part of the positions at a time.

The logits of a batch are its largest array by far. Here no more than a part of them exists at once, and its gradient
is taken on the way forward, while it is there, so that nothing is computed twice.

Suffixes: B rows, T positions, P parts of a row, S = T / P positions of a part, D hidden_size, V vocab_size.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_LOGITS = {"cpu": 1 << 21, "gpu": 1 << 27, "tpu": 1 << 27}
"""Logits that a device computes at a time: 8 MB in fp32, or 512 MB on an accelerator."""


class _Gradients(NamedTuple):
    x_BTD: jax.Array
    head_DV: jax.Array
    """fp32. Turned, as `models.jax_engine.products` says."""


def part_count(platform: str, logits: int, length: int) -> int:
    """Into how many parts the positions of a row go, for `logits` of one device altogether."""
    return max(1, min(length, -(-logits // _LOGITS.get(platform, 1 << 27))))


def target_log_probabilities(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, parts: int) -> jax.Array:
    """The log-probability of each target, (B, T) in fp32, without a gradient."""
    found_BT: jax.Array = _in_parts(_log_probabilities, x_BTD, head_VD, targets_BT, parts)
    return found_BT


def target_scores(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, parts: int
) -> tuple[jax.Array, jax.Array]:
    """The same, and whether each target is the likeliest token, of equals the first: (B, T) boolean."""

    def one(logits_BSV: jax.Array, targets_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _log_probabilities(logits_BSV, targets_BS), logits_BSV.argmax(-1) == targets_BS

    found: tuple[jax.Array, jax.Array] = _in_parts(one, x_BTD, head_VD, targets_BT, parts)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_loss(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, parts: int
) -> jax.Array:
    """The sum of the targets' cross-entropies, each times its weight; 0-d fp32.

    x_BTD: normed hidden states, and head_VD: the head, in the dtype of the products; weights_BT: fp32, 0 where a
    target does not count.
    """
    return -(target_log_probabilities(x_BTD, head_VD, targets_BT, parts) * weights_BT).sum()


def _forward(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, parts: int
) -> tuple[jax.Array, _Gradients]:
    length = targets_BT.shape[1]

    def one(x_BSD: jax.Array, targets_BS: jax.Array, weights_BS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits_BSV = _logits(x_BSD, head_VD)
        normaliser_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
        loss = ((normaliser_BS - _at(logits_BSV, targets_BS)) * weights_BS).sum()
        # The gradient by the logits: the probabilities, less 1 at the target.
        at_target_BSV = jnp.arange(logits_BSV.shape[-1]) == targets_BS[..., None]
        dlogits_BSV = (jnp.exp(logits_BSV - normaliser_BS[..., None]) - at_target_BSV) * weights_BS[..., None]
        dlogits_BSV = dlogits_BSV.astype(x_BSD.dtype)
        dhead_DV = jnp.einsum("bsd,bsv->dv", x_BSD, dlogits_BSV, preferred_element_type=jnp.float32)
        return loss, dlogits_BSV @ head_VD, dhead_DV

    if parts == 1:
        loss, dx_BTD, dhead_DV = one(x_BTD, targets_BT, weights_BT)
        return loss, _Gradients(dx_BTD, dhead_DV)

    def added(
        carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        loss, dx_BSD, dhead_DV = one(*part)
        return (carry[0] + loss, carry[1] + dhead_DV), dx_BSD

    nothing = (jnp.zeros(()), jnp.zeros(head_VD.T.shape))
    cut = tuple(_cut(array, parts) for array in (x_BTD, targets_BT, weights_BT))
    (loss, dhead_DV), dx_PBSD = jax.lax.scan(added, nothing, cut)
    return loss, _Gradients(_joined(dx_PBSD, length), dhead_DV)


def _backward(parts: int, found: _Gradients, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    dtype = found.x_BTD.dtype
    dhead_VD = jax.lax.optimization_barrier(found.head_DV).T
    return found.x_BTD * gradient.astype(dtype), (dhead_VD * gradient).astype(dtype), None, None


weighted_loss.defvjp(_forward, _backward)


def _logits(x_BSD: jax.Array, head_VD: jax.Array) -> jax.Array:
    return jnp.einsum("bsd,vd->bsv", x_BSD, head_VD).astype(jnp.float32)


def _log_probabilities(logits_BSV: jax.Array, targets_BS: jax.Array) -> jax.Array:
    return _at(logits_BSV, targets_BS) - jax.nn.logsumexp(logits_BSV, axis=-1)


def _in_parts(
    one: Callable[[jax.Array, jax.Array], Any], x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, parts: int
) -> Any:
    """What `one` makes of the logits and targets of a part, (B, S) each, of all parts: (B, T) each."""
    if parts == 1:
        return one(_logits(x_BTD, head_VD), targets_BT)
    cut = (_cut(x_BTD, parts), _cut(targets_BT, parts))
    found = jax.lax.map(lambda part: one(_logits(part[0], head_VD), part[1]), cut)
    return jax.tree.map(lambda found_PBS: _joined(found_PBS, targets_BT.shape[1]), found)


def _at(logits_BSV: jax.Array, targets_BS: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1, mode="promise_in_bounds")[..., 0]


def _cut(array: jax.Array, parts: int) -> jax.Array:
    """(B, T, …) as (P, B, S, …), with zeros where T is not a multiple of P: they have no weight."""
    rows, length = array.shape[:2]
    size = -(-length // parts)
    padding = [(0, 0), (0, size * parts - length)] + [(0, 0)] * (array.ndim - 2)
    whole = jnp.pad(array, padding).reshape(rows, parts, size, *array.shape[2:])
    return jnp.moveaxis(whole, 1, 0)


def _joined(array: jax.Array, length: int) -> jax.Array:
    """(P, B, S, …) as (B, T, …) again."""
    parts, rows, size = array.shape[:3]
    return jnp.moveaxis(array, 0, 1).reshape(rows, parts * size, *array.shape[3:])[:, :length]
