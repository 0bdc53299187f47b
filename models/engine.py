"""The two contracts of an engine, and the choice of one.

B rows of a batch, T positions, V vocabulary.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.config import FrozenModel
from common.errors import UserError
from models.config import ModelConfig
from models.optimizer import OptimizerConfig
from models.tuning import WHOLE, Tuning
from models.weights import Piece

EngineName = Literal["torch", "jax", "mlx"]
Precision = Literal["float32", "bfloat16", "float16"]
Bits = Literal[4, 8]
"""Bits per weight in inference, where they are few."""
State = Literal["weights", "optimizer"]
"""What an engine is given and asked for."""
Given = Literal["weights", "optimizer", "reference"]
"""What it is given: in preference tuning the weights of the reference model too, which stay as they are."""


class Layout(FrozenModel):
    """How a stage's engine lies on its devices: nothing that its output depends on beyond rounding.

    One exception: with PyTorch on GPUs, which attention weights dropout drops depends on the number of processes.
    """

    data: int | None = Field(default=None, gt=0)
    """Parts that the rows of a batch are divided into, each with all weights; null for the devices that are left."""
    fsdp: int = Field(default=1, gt=0)
    """Parts that rows are divided into with the weights, their gradients and moments divided among them too."""
    tensor: int = Field(default=1, gt=0)
    """Parts that heads, the MLP's inner width and the vocabulary are divided into; JAX alone."""
    rematerialize: bool = False
    """Whether blocks are computed again in the backward pass instead of being remembered: less memory, more time."""
    processes: int | None = Field(default=None, gt=0)
    """Processes that the stage starts on this machine; null for one per CUDA device with PyTorch, else one."""


class Batch(NamedTuple):
    """Rows of tokens and what each position has to predict."""

    tokens_BT: NDArray[np.int32]
    """What the model reads."""
    targets_BT: NDArray[np.int32]
    """The next token at each position."""
    loss_mask_BT: NDArray[np.bool_]
    """Which targets count in the loss."""
    documents_BT: NDArray[np.int32] | None = None
    """The number of each token's document within its row, rising: attention stays inside a document, and positions
    restart with each. None where a row is one context."""

    def part(self, rows: slice | NDArray[np.int64]) -> "Batch":
        """Some of the rows."""
        documents_BT = None if self.documents_BT is None else self.documents_BT[rows]
        return Batch(self.tokens_BT[rows], self.targets_BT[rows], self.loss_mask_BT[rows], documents_BT)


class Scored(NamedTuple):
    """What a model makes of targets."""

    log_probabilities_BT: NDArray[np.float32]
    """The log-probability of each target."""
    greedy_BT: NDArray[np.bool_]
    """Whether each target is the likeliest token, of equals the first."""


def counted_targets(micro_batches: Sequence[Batch]) -> int:
    """How many targets count in the loss of a step. Raises UserError where none does."""
    counted = sum(int(batch.loss_mask_BT.sum()) for batch in micro_batches)
    if not counted:
        raise UserError(
            "a batch has no token that counts in the loss: the loss mask leaves nothing of such short rows; "
            "give training a longer sequence_length"
        )
    return counted


class StepResult(NamedTuple):
    """What one step found, as 0-d device values: reading one waits for the device, so it is done only to log."""

    loss: Any
    """Mean cross-entropy over the counted targets of the global batch, auxiliary losses apart; in preference tuning,
    the mean loss of its pairs."""
    gradient_norm: Any
    """Global norm before clipping."""
    skipped: Any
    """1 where the loss or the norm was not finite and nothing was updated, else 0."""
    figures: Any = None
    """(3,) in preference tuning: the means of the pairs' figures behind the loss (`models.preference`), under dropout
    where there is any."""


class TrainingEngine(Protocol):
    """A model with an optimizer on some devices. Schedules, data, logging and checkpoints are the loop's.

    In preference tuning (`models.tuning`), rows 2i and 2i + 1 of every batch are a chosen and a rejected answer, and a
    pair counts where a target of both does (`models.preference`).

    Where it runs in several processes, every method is collective: each process calls it in the same order with the
    same arguments (whole batches, of which the engine takes its rows) and gets the same results. What `export` gives
    is whole in process 0; in the others there may be nothing, but the iterator has to be used up.
    """

    name: EngineName
    device: str
    """What it computes on, for the record: `cpu`, `cuda: NVIDIA H200`, `2 × cpu`."""
    process: int
    """The number of this process among those of the run, 0 where it is alone."""

    def agreed(self, word: int) -> int:
        """The largest of the words of all processes."""
        ...

    def peak_memory(self) -> int:
        """The most bytes that this process has held on its device since it began, which may be before this engine; on
        a CPU, all its memory (`peak_resident_memory`). Not collective."""
        ...

    def step(self, micro_batches: Sequence[Batch], learning_rate_scale: float, dropout_key: int) -> StepResult:
        """One update from the gradient of the mean loss over all counted targets (or pairs) of all micro-batches.

        `learning_rate_scale` (0 to 1, from the schedule) multiplies the optimizer's peak rates.
        `dropout_key` (below 2^43) and a micro-batch's number decide what dropout drops in it.

        Raises UserError where no target (or pair) of any micro-batch counts.
        """
        ...

    def loss(self, batch: Batch) -> tuple[float, int]:
        """Summed cross-entropy over the batch's counted targets, and their number; no dropout.

        In preference tuning, the summed loss of the pairs that count, and the number of these.
        """
        ...

    def rewards(self, batch: Batch) -> NDArray[np.float32]:
        """In preference tuning alone: the reward of each row over the reference, (B,); no dropout."""
        ...

    def gradients(self, micro_batches: Sequence[Batch], dropout_key: int) -> Iterator[Piece]:
        """Unclipped gradients of what `step` would minimise, as canonical pieces; nothing is updated.

        With adapters they are those of the adapters, whole and by their names.
        """
        ...

    def export(self, state: State) -> Iterator[Piece]:
        """Copies of the named arrays: weights by canonical name, moments as `exp_avg:<name>`, and `updates`.

        An engine that scales its loss exports the scale with the moments (`models.optimizer.LOSS_SCALE`). With
        adapters, weights are those beneath them, as they were restored, and the adapters, whole and named as
        `models.lora` says; moments are of the adapters alone.
        """
        ...

    def restore(self, state: Given, arrays: Iterable[Piece]) -> None:
        """Takes over arrays as exported, whole or in pieces; ValueError names what is missing, odd or misshapen.

        A loss scale is passed over by an engine that has none, and begins afresh where one has and the state does not.
        Weights come first, with the adapters where there are any: restoring them leaves the optimizer as fresh as
        before its first update. The reference of preference tuning, canonical weights too, may come at any time before
        the first batch.
        """
        ...

    def inference(self) -> "InferenceEngine":
        """The inference side over the same weights, as they are at each call."""
        ...


class InferenceEngine(Protocol):
    """A model that reads and writes tokens. Sampling is done in `models.generation`, once for every engine."""

    name: EngineName
    device: str
    config: ModelConfig

    def logits(self, tokens_BT: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits of the next token at every position, (B, T, V)."""
        ...

    def log_probabilities(self, batch: Batch) -> NDArray[np.float32]:
        """Log-probability of each target, (B, T)."""
        ...

    def prefill(
        self, tokens_BT: NDArray[np.int32], lengths_B: NDArray[np.int32], capacity: int
    ) -> tuple[Any, NDArray[np.float32]]:
        """Reads prompts padded on the right.

        Gives a cache with room for `capacity` positions, and the logits (B, V) after each prompt's last token.
        """
        ...

    def decode(self, cache: Any, tokens_B: NDArray[np.int32]) -> tuple[Any, NDArray[np.float32]]:
        """Appends one token to each row; gives the cache to go on with (the old is used up) and the logits (B, V)."""
        ...

    def continuations(self, cache: Any, batch: Batch) -> Scored:
        """Scores targets behind what the cache holds of each row. The cache stays as it is and may be used again.

        With `documents_BT`, each document of a row continues the row's cached prefix by itself: it attends to that and
        to itself, and its positions begin where the prefix ends. Several documents of a row may together be longer
        than the model. Padding may be a document of its own. Where the loss mask leaves a target out, what is found is
        0 and False.

        Raises ValueError for other rows than the cache's, for tokens or counted targets outside of the vocabulary, and
        where a prefix and a document, up to its last counted target, are longer than the model.
        """
        ...

    def select(self, cache: Any, rows: NDArray[np.int64]) -> Any:
        """The cache of some rows alone, so that finished rows cost nothing."""
        ...


_PACKAGES: dict[EngineName, tuple[str, ...]] = {"torch": ("torch",), "jax": ("jax", "flax", "optax"), "mlx": ("mlx",)}


def is_installed(engine: EngineName) -> bool:
    """Whether an engine's packages are there; imports nothing."""
    return all(importlib.util.find_spec(package) is not None for package in _PACKAGES[engine])


def check_engine(engine: EngineName, precision: Precision = "float32", bits: Bits | None = None) -> None:
    """Raises UserError for an engine that is not there, naming the extra that brings it, and for a precision or bits
    that it does not have; imports nothing."""
    if not is_installed(engine):
        raise UserError(f"engine '{engine}' is not installed; run: pip install 'cairn[{engine}]'")
    check_abilities(engine, precision, bits)


def check_abilities(engine: EngineName, precision: Precision, bits: Bits | None) -> None:
    """Raises UserError for a precision or bits that an engine does not have, be it installed here or not."""
    if precision == "float16" and engine != "mlx":
        raise UserError(f"engine '{engine}' does not compute in float16; use bfloat16, or engine: mlx")
    if bits is not None and engine != "mlx":
        raise UserError(f"engine '{engine}' does not read weights of {bits} bits; use bits: null, or engine: mlx")


def _module(engine: EngineName, precision: Precision, bits: Bits | None = None) -> Any:
    check_engine(engine, precision, bits)
    return importlib.import_module(f"models.{engine}_engine")


def training_engine(
    engine: EngineName,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    precision: Precision,
    layout: Layout = Layout(),  # noqa: B008 - it is frozen
    tuning: Tuning = WHOLE,
) -> TrainingEngine:
    """An engine ready to train; its weights are those of `restore`, which has to be called first.

    Raises UserError where the engine is not installed, naming the extra that brings it, and where the layout does not
    fit the devices or the model.
    """
    trainer: TrainingEngine = _module(engine, precision).training_engine(model, optimizer, precision, layout, tuning)
    return trainer


def inference_engine(
    engine: EngineName,
    model: ModelConfig,
    precision: Precision,
    weights: Iterable[Piece],
    *,
    bits: Bits | None = None,
) -> InferenceEngine:
    """An engine that only reads: no gradients, no optimizer. With `bits`, it holds its matrices in so few per weight.

    Raises UserError where it is not installed, has no such bits, or the model no matrix that they fit.
    """
    few = {} if bits is None else {"bits": bits}
    reader: InferenceEngine = _module(engine, precision, bits).inference_engine(model, precision, weights, **few)
    return reader
