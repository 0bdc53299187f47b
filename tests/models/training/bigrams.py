"""A tiny engine in NumPy that keeps the contract: a linear bigram model with AdamW, quick enough to be killed often.

B rows, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.config import ModelConfig
from models.engine import Batch, EngineName, Given, InferenceEngine, Scored, State, StepResult, TrainingEngine
from models.generation import NotFinite
from models.optimizer import OptimizerConfig
from models.training.batches import Batches
from models.training.config import TrainingConfig
from models.training.loop import Start
from models.training.shards import write_shard
from models.training.state import TaskScore
from models.weights import Piece
from tests.models.training.folders import folder_source

Floats = NDArray[np.float64]
VOCABULARY = 16
MODEL = ModelConfig.model_validate(
    {
        "architecture": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 64,
    }
)
_WEIGHTS = ("bigram.weight", "bigram.bias")


def _probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    result: NDArray[np.float64] = raised / raised.sum(-1, keepdims=True)
    return result


class BigramEngine:
    """`models.engine.TrainingEngine`: the logits of the next token are a row of a table plus a bias."""

    def __init__(self, optimizer: OptimizerConfig, name: EngineName = "torch", poisoned: frozenset[int] = frozenset()):
        """`poisoned`: steps whose loss is not finite."""
        self.name: EngineName = name
        self.device = "cpu"
        self.process = 0
        self.steps_taken: list[int] = []
        self._optimizer = optimizer
        self._poisoned = poisoned
        self._arrays: dict[str, Floats] = {}
        self._moments: dict[str, Floats] = {}
        self._updates = 0

    def agreed(self, word: int) -> int:
        return word

    def peak_memory(self) -> int:
        return 0

    def step(self, micro_batches: Sequence[Batch], learning_rate_scale: float, dropout_key: int) -> StepResult:
        step = dropout_key % (1 << 32)
        self.steps_taken.append(step)
        loss, gradients = self._gradients(micro_batches)
        norm = np.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
        if step in self._poisoned:
            return StepResult(np.float64(np.nan), norm, np.int64(1))
        self._updates += 1
        settings = self._optimizer
        for name, gradient in gradients.items():
            first, second = self._moments[f"exp_avg:{name}"], self._moments[f"exp_avg_sq:{name}"]
            first += (1 - settings.beta1) * (gradient - first)
            second += (1 - settings.beta2) * (gradient**2 - second)
            mean = first / (1 - settings.beta1**self._updates)
            root = np.sqrt(second / (1 - settings.beta2**self._updates)) + settings.eps
            self._arrays[name] -= learning_rate_scale * settings.learning_rate * mean / root
        return StepResult(loss, norm, np.int64(0))

    def _gradients(self, micro_batches: Sequence[Batch]) -> tuple[float, dict[str, Floats]]:
        weight, bias = (self._arrays[name] for name in _WEIGHTS)
        counted = sum(int(batch.loss_mask_BT.sum()) for batch in micro_batches)
        loss, d_weight, d_bias = 0.0, np.zeros_like(weight), np.zeros_like(bias)
        for batch in micro_batches:
            tokens, targets = batch.tokens_BT[batch.loss_mask_BT], batch.targets_BT[batch.loss_mask_BT]
            errors = _probabilities(weight[tokens] + bias)
            loss -= float(np.log(errors[np.arange(len(targets)), targets]).sum()) / counted
            errors[np.arange(len(targets)), targets] -= 1
            np.add.at(d_weight, tokens, errors / counted)
            d_bias += errors.sum(0) / counted
        return loss, {"bigram.weight": d_weight, "bigram.bias": d_bias}

    def loss(self, batch: Batch) -> tuple[float, int]:
        chances = _probabilities(self._arrays["bigram.weight"][batch.tokens_BT] + self._arrays["bigram.bias"])
        chosen = np.take_along_axis(chances, batch.targets_BT[..., None], -1)[..., 0]
        return -float(np.log(chosen)[batch.loss_mask_BT].sum()), int(batch.loss_mask_BT.sum())

    def rewards(self, batch: Batch) -> NDArray[np.float32]:
        raise NotImplementedError  # it has no preference tuning

    def gradients(self, micro_batches: Sequence[Batch], dropout_key: int) -> Iterator[Piece]:
        for name, gradient in self._gradients(micro_batches)[1].items():
            yield Piece(name, (), gradient)

    def export(self, state: State) -> Iterator[Piece]:
        for name, array in (self._arrays if state == "weights" else self._moments).items():
            yield Piece(name, (), array.copy())
        if state == "optimizer":
            yield Piece("updates", (), np.array(self._updates, np.int64))

    def restore(self, state: Given, arrays: Iterable[Piece]) -> None:
        found: dict[str, Floats] = {piece.name: np.array(piece.array) for piece in arrays}
        if state == "optimizer":
            self._updates = int(found.pop("updates"))
            self._moments = found
            return
        self._arrays = found
        self._updates = 0
        self._moments = {
            f"{moment}:{name}": np.zeros_like(array)
            for name, array in found.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }

    def inference(self) -> InferenceEngine:
        return _BigramInference(self.name, self._arrays)


class _BigramInference:
    def __init__(self, name: EngineName, arrays: dict[str, Floats]) -> None:
        self.name: EngineName = name
        self.device = "cpu"
        self.config = MODEL
        self._weight, self._bias = (arrays[name] for name in _WEIGHTS)

    def logits(self, tokens_BT: NDArray[np.int32]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = (self._weight[tokens_BT] + self._bias).astype(np.float32)
        return result

    def log_probabilities(self, batch: Batch) -> NDArray[np.float32]:
        chances = _probabilities(self._weight[batch.tokens_BT] + self._bias)
        chosen: NDArray[np.float64] = np.take_along_axis(chances, batch.targets_BT[..., None], -1)[..., 0]
        return np.log(chosen).astype(np.float32)

    def prefill(
        self, tokens_BT: NDArray[np.int32], lengths_B: NDArray[np.int32], capacity: int
    ) -> tuple[Any, NDArray[np.float32]]:
        return None, self.logits(tokens_BT[np.arange(len(tokens_BT)), lengths_B - 1])

    def decode(self, cache: Any, tokens_B: NDArray[np.int32]) -> tuple[Any, NDArray[np.float32]]:
        return cache, self.logits(tokens_B)

    def continuations(self, cache: Any, batch: Batch) -> Scored:
        likeliest_BT = self.logits(batch.tokens_BT).argmax(-1)
        return Scored(self.log_probabilities(batch), likeliest_BT == batch.targets_BT)

    def select(self, cache: Any, rows: NDArray[np.int64]) -> Any:
        return cache


def start() -> Start:
    """Zero weights in fp64, so that any difference shows."""
    return Start({"bigram.weight": np.zeros((VOCABULARY, VOCABULARY)), "bigram.bias": np.zeros(VOCABULARY)})


def write_chain(folder: Path, shards: int = 3, tokens: int = 400, seed: int = 0, masked: bool = False) -> Path:
    """Shards of a chain in which each token is mostly followed by one of its own; documents of 8 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    for shard in range(shards):
        noise = numbers.random(tokens) < 0.2
        chain = np.empty(tokens, np.uint16)
        token = 1
        for place in range(tokens):
            token = int(numbers.integers(VOCABULARY)) if noise[place] else (token * 5 + 3) % VOCABULARY
            chain[place] = token
        mask = np.arange(tokens) % 8 >= 4 if masked else None
        write_shard(folder / f"train-{shard:05d}.safetensors", chain, np.arange(8, tokens + 1, 8), mask)
    return folder


def batches_for(config: TrainingConfig, folder: Path, **options: Any) -> Batches:
    """The batches that a config asks for."""
    return Batches(
        [folder_source(folder)],
        seed=config.seed,
        sequence_length=config.sequence_length,
        packing=config.packing,
        batch_size=config.batch_size,
        **options,
    )


class Share:
    """A task, `models.training.validation.Probe`: the share of tokens that a model finds likelier to follow themselves
    than others on the whole. One that is named `broken` finds nothing finite."""

    def __init__(self, engine: Callable[[], TrainingEngine], name: str = "share") -> None:
        self._engine, self._name = engine, name
        self.times = 0

    def __call__(self, heed: Callable[[], None]) -> TaskScore:
        self.times += 1
        logits_BV = self._engine().inference().logits(np.arange(VOCABULARY, dtype=np.int32)[:, None])[:, 0]
        heed()
        if self._name == "broken":
            raise NotFinite
        own_B = np.diagonal(logits_BV) > logits_BV.mean(axis=1)
        return TaskScore(self._name, "acc", float(own_B.mean()), None, len(own_B), 0.5)
