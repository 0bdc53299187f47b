"""Dynamic loss scaling for fp16 (Micikevicius et al., 2018): gradients are computed large, so that small ones stay.

The scale is a power of two, halved when an update is skipped and doubled after many that were not. It decides how
gradients are rounded, so a run that goes on has to have it: it is exported with the optimizer's state, for fp16
alone, and starts afresh where a state has none. No other engine computes in fp16.
"""

from typing import NamedTuple

import mlx.core as mx

_FIRST, _LARGEST, _SMALLEST = 2.0**15, 2.0**24, 1.0
_PATIENCE = 1000
"""Updates without a skip after which the scale is doubled."""


class LossScale(NamedTuple):
    """What a loss is multiplied by before gradients are taken, and for how many updates it has been."""

    scale: mx.array
    """0-d fp32."""
    steady: mx.array
    """0-d int32."""


def fresh_scale(is_fp16: bool) -> LossScale:
    """The scale of a first step; 1 for every other precision."""
    return LossScale(mx.array(_FIRST if is_fp16 else 1.0), mx.array(0, mx.int32))


def next_scale(now: LossScale, finite: mx.array) -> LossScale:
    """The scale after a step with or without a skip."""
    steady = mx.where(finite, now.steady + 1, 0)
    grows = steady >= _PATIENCE
    grown = mx.where(grows, mx.minimum(now.scale * 2, _LARGEST), now.scale)
    return LossScale(mx.where(finite, grown, mx.maximum(now.scale / 2, _SMALLEST)), mx.where(grows, 0, steady))
