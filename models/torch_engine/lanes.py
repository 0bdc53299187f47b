"""The rows of a batch on several threads, for small models on a CPU.

Their operations are too small to be worth dividing. On two cores, a step of 4 layers of width 128 on 256 rows of 13
tokens in bf16 took 152 ms with one thread, 121 to 134 ms with each operation divided over two, and 102 ms with half of
the rows on each of two.

R rows of a batch.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from models.engine import Batch
from models.torch_engine.model import Transformer
from models.torch_engine.parallel import Ended

LARGEST_MODEL = 16_000_000
"""Parameters from which on each operation keeps several threads busy by itself."""


class Lanes:
    """Copies of a model over the same weights, each with a thread and with gradients of its own."""

    def __init__(self, model: Transformer, threads: int) -> None:
        self._models = [model, *(copy.deepcopy(model).train() for _ in range(threads - 1))]
        for lane in self._models[1:]:
            for parameter, shared in zip(lane.parameters(), model.parameters(), strict=True):
                parameter.data = shared.data
        self._threads = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    @classmethod
    def where_they_help(cls, model: Transformer) -> Self | None:
        """Lanes for a model, or None where they would not help or not be exact.

        Dropout draws from one generator for all threads, and the balance of experts needs the whole batch at once.
        """
        parameters = list(model.parameters())
        small = sum(parameter.numel() for parameter in parameters) <= LARGEST_MODEL
        alone = model.config.dropout > 0 or model.config.mlp == "mixture"
        threads = torch.get_num_threads()
        if parameters[0].device.type != "cpu" or threads == 1 or not small or alone:
            return None
        return cls(model, threads)

    def backward(self, batch: Batch, end_of: Callable[[Transformer, Batch], Ended], together: int = 1) -> Tensor:
        """Adds the gradients of what `end_of` some rows comes to, sums over them, to those of the model; gives what
        was found. `together`: so many rows at a time stay in one lane."""

        def run(lane: Transformer, rows_R: slice) -> Tensor:
            ended = end_of(lane, batch.part(rows_R))
            torch.autograd.backward(ended.loss)
            return ended.found

        count, rows = len(self._models), len(batch.tokens_BT)
        bounds = [rows // together * lane // count * together for lane in range(count + 1)]
        parts = [slice(*pair) for pair in pairwise(bounds)]
        found = list(self._threads.map(run, self._models, parts))
        for lane in self._models[1:]:
            # In the order of the lanes, whichever was first: sums of floats depend on it.
            for parameter, shared in zip(lane.parameters(), self._models[0].parameters(), strict=True):
                if parameter.grad is not None:
                    shared.grad = parameter.grad if shared.grad is None else shared.grad.add_(parameter.grad)
                parameter.grad = None
        return torch.stack(found).sum(0)
