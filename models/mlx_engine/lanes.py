"""The rows of a batch on several streams of a CPU.

On one stream MLX does one operation after the other, and all but matrix products on a single core. With the rows
divided over streams, and each product on one core, all cores are busy all of the time: on two, a step of 6 layers of
width 384 took two thirds as long.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx

from models.mlx_engine import blas
from models.mlx_engine.device import on_cpu
from models.mlx_engine.model import Parameters

MOST = 8
"""Lanes at most."""
_AT_A_TIME = 16
"""Gradients whose computation is asked for together, of all lanes."""

Arrays = dict[str, mx.array]


class Part(NamedTuple):
    """What the gradients' function gives for some of the rows."""

    loss: mx.array
    gradients: Parameters
    between: Sequence[mx.array]
    """The residual stream after each block."""


class Lanes:
    """Streams that a batch's rows and a model's parameters are divided among; one is MLX's own."""

    def __init__(self, count: int) -> None:
        self._streams = [mx.new_stream(mx.cpu) for _ in range(count)] if count > 1 else []

    @classmethod
    def where_they_help(cls) -> "Lanes":
        """One for each core that OpenBLAS divides products over, which from now on it does not; one on GPUs."""
        count = min(blas.cores(), MOST) if on_cpu() else 1
        if count > 1:
            blas.divide_products(1)
            # MLX orders operations in breadth up to this, read once: two blocks side by side are broader than its 20.
            os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100")
        return cls(count)

    def on(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """A block whose operations belong to the lane of this turn."""
        return mx.stream(self._streams[number % len(self._streams)]) if self._streams else contextlib.nullcontext()

    def divided(self, names: list[str]) -> list[list[str]]:
        """Names as a part for each lane, without empty ones."""
        count = min(len(names), max(1, len(self._streams)))
        return [names[lane::count] for lane in range(count)]

    def each(self, function: Callable[[Arrays], Any], arrays: Arrays, together: int = 1) -> list[Any]:
        """What a function gives for each lane's part of the rows, in their order; so many at a time stay together."""
        groups = len(arrays["tokens"]) // together
        count = min(len(self._streams), groups)
        if count < 2:
            return [function(arrays)]
        found = []
        bounds = (groups * lane // count * together for lane in range(count + 1))
        for number, (start, end) in enumerate(pairwise(bounds)):
            with self.on(number):
                found.append(function({name: array[start:end] for name, array in arrays.items()}))
        return found

    def added(self, parts: Sequence[Part]) -> tuple[mx.array, Parameters]:
        """The sums of losses and gradients, in the order of the parts.

        MLX would go through one lane after the other: it is asked for little at a time, of all lanes.
        """
        if len(parts) == 1:
            return parts[0].loss, parts[0].gradients
        for streams in zip(*(part.between for part in parts), strict=True):
            mx.async_eval(*streams)
        loss = sum((part.loss for part in parts[1:]), parts[0].loss)
        mx.async_eval(loss)
        names = list(parts[0].gradients)
        summed: Parameters = {}
        backwards, size = names[::-1], max(1, _AT_A_TIME // len(parts))
        for start in range(0, len(names), size):
            some = backwards[start : start + size]
            for number, name in enumerate(some):
                first, *others = (part.gradients.pop(name) for part in parts)
                with self.on(number):
                    summed[name] = sum(others, first)
            mx.async_eval(*(summed[name] for name in some))
        return loss, {name: summed[name] for name in names}
