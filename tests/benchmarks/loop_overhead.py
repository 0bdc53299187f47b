"""What the loop costs beside the engine's own steps: data, schedule, logs, progress and checkpoints, not validation.

    python -m tests.benchmarks.loop_overhead

Pairs of a bare loop around `engine.step`, on batches made beforehand, and of `train` on the same engine, one after
the other; the overhead is the median over the pairs. Both are timed from the first step to the end of the last, so
neither counts its start: by the clock, and by the processor's time of all threads together, which other work on the
machine disturbs less and which also counts what the loop does while the engine computes. The shape is that of the
arithmetic models. `--engine none` steps in no time, so that what is left is the loop itself: its microseconds per
step, which are 3% of a step of 33 times as many.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from models.config import ModelConfig
from models.engine import Batch, EngineName, Precision, State, StepResult, TrainingEngine, training_engine
from models.training.batches import Batches
from models.training.checkpoint import Checkpoints
from models.training.config import CheckpointConfig, TrainingConfig
from models.training.loop import Start, train
from models.training.metrics import Metrics
from models.training.shards import write_shard
from models.weights import Array, Piece, initial_weights
from tests.models.training.folders import folder_source

LENGTH, ROWS, VOCABULARY = 13, 256, 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="torch", help="the engine that steps, or none")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs")
    parser.add_argument("--checkpoint-seconds", type=float, default=5.0, help="time between two checkpoints")
    arguments = parser.parse_args()
    model = ModelConfig.model_validate(
        {
            "architecture": "gpt2",
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
        }
    )
    config = TrainingConfig.model_validate(
        {
            "steps": arguments.steps,
            "batch_size": ROWS,
            "sequence_length": LENGTH,
            "packing": "documents",
            "optimizer": {"learning_rate": 1e-3},
        }
    )
    inner = _Nothing() if arguments.engine == "none" else _made(arguments.engine, model, config, arguments.precision)
    engine = _Timed(inner)
    start = Start(initial_weights(model, 0))
    with tempfile.TemporaryDirectory() as name:
        batches = _batches(Path(name))
        print(f"{engine.device}, {arguments.steps} steps of {ROWS} rows of {LENGTH} positions")
        print(f"{'':>5}{'bare, ms/step':>24}{'loop, ms/step':>24}{'overhead':>20}")
        print(f"{'pair':>5}" + f"{'clock':>12}{'processor':>12}" * 2 + f"{'clock':>10}{'processor':>10}")
        pairs: list[tuple[_Seconds, _Seconds]] = []
        for pair in range(arguments.pairs + 1):

            def bare() -> _Seconds:
                return _bare(engine, batches, start, arguments.steps)

            def loop(folder: Path = Path(name) / f"run-{pair}") -> _Seconds:
                return _loop(engine, model, batches, start, config, folder, arguments.checkpoint_seconds)

            # They take turns in going first: what a machine does meanwhile shall not always hit the same one.
            first, second = (bare, loop) if pair % 2 else (loop, bare)
            times = first(), second()
            pairs.append(times if pair % 2 else times[::-1])
            if pair:
                figures = [f"{1e3 * seconds:>12.3f}" for both in pairs[-1] for seconds in both]
                print(f"{pair:>5}", *figures, *(f"{overhead:>10.1%}" for overhead in _overheads(pairs[-1:])), sep="")
    del pairs[0]  # the first runs warmed everything up
    more = [1e6 * statistics.median(whole[kind] - alone[kind] for alone, whole in pairs) for kind in (0, 1)]
    clock, processor = _overheads(pairs)
    print(
        f"median by the clock: {clock:.1%}, {more[0]:.0f} µs/step; by processor time: {processor:.1%}, {more[1]:.0f} µs"
    )


def _overheads(pairs: "list[tuple[_Seconds, _Seconds]]") -> list[float]:
    """Medians of the overheads by the clock and by processor time."""
    return [statistics.median(whole[kind] / alone[kind] - 1 for alone, whole in pairs) for kind in (0, 1)]


def _made(name: str, model: ModelConfig, config: TrainingConfig, precision: str) -> TrainingEngine:
    return training_engine(cast(EngineName, name), model, config.optimizer, cast(Precision, precision))


class _Seconds(NamedTuple):
    """Of a step, or of several."""

    clock: float
    processor: float


class _Nothing:
    """An engine that does nothing at all, with the arrays that a checkpoint needs."""

    name: EngineName = "torch"
    device = "no engine"

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def step(self, micro_batches: Sequence[Batch], learning_rate_scale: float, dropout_key: int) -> StepResult:
        return StepResult(1.0, 1.0, 0)

    def export(self, state: State) -> Iterator[Piece]:
        prefixes = ("",) if state == "weights" else ("exp_avg:", "exp_avg_sq:")
        return (Piece(p + name, (), array.copy()) for p in prefixes for name, array in self._arrays.items())

    def restore(self, state: State, arrays: Iterable[Piece]) -> None:
        self._arrays = {piece.name: piece.array for piece in arrays}


class _Timed:
    """An engine that notes when its first step begins and when the last one is done."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.reset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def reset(self) -> None:
        self._began: _Seconds | None = None

    def step(self, micro_batches: Sequence[Batch], learning_rate_scale: float, dropout_key: int) -> StepResult:
        if self._began is None:
            self._began = _Seconds(time.perf_counter(), time.process_time())
        result: StepResult = self._engine.step(micro_batches, learning_rate_scale, dropout_key)
        self._ended = _Seconds(time.perf_counter(), time.process_time())
        return result

    def per_step(self, steps: int) -> _Seconds:
        """From the beginning of the first step to the end of the last."""
        assert self._began is not None
        clock, processor = ((end - begin) / steps for begin, end in zip(self._began, self._ended, strict=True))
        return _Seconds(clock, max(processor, 1e-9))


def _loop(
    engine: Any,
    model: ModelConfig,
    batches: Batches,
    start: Start,
    config: TrainingConfig,
    folder: Path,
    checkpoint_seconds: float,
) -> _Seconds:
    """Seconds per step of a whole run."""
    checkpoints = Checkpoints(LocalFileSystem(), str(folder), CheckpointConfig(every_seconds=checkpoint_seconds))
    engine.reset()
    train(
        engine,
        model,
        batches,
        None,
        config,
        checkpoints,
        start,
        report=lambda event: None,
        metrics=Metrics(folder / "logs"),
    )
    return cast(_Seconds, engine.per_step(config.steps))


def _bare(engine: Any, batches: Batches, start: Start, steps: int) -> _Seconds:
    """Seconds per step of nothing but steps."""
    engine.restore("weights", (Piece(name, (), array) for name, array in start.weights.items()))
    made = [[batches.batch(step)] for step in range(steps)]
    engine.reset()
    for step, batch in enumerate(made):
        result = engine.step(batch, 1.0, step)
        # Read as often as in the loop: otherwise the time of the last steps would not be in the clock.
        if step % 10 == 9:
            float(result.loss)
    return cast(_Seconds, engine.per_step(steps))


def _batches(folder: Path) -> Batches:
    numbers = np.random.default_rng(0)
    ends = np.cumsum(numbers.integers(8, LENGTH + 2, 100_000))
    tokens = numbers.integers(0, VOCABULARY, int(ends[-1])).astype(np.uint16)
    write_shard(folder / "tokens" / "train-00000.safetensors", tokens, ends, np.ones(tokens.size))
    return Batches(
        [folder_source(folder / "tokens")],
        seed=0,
        sequence_length=LENGTH,
        packing="documents",
        batch_size=ROWS,
        vocab_size=VOCABULARY,
    )


if __name__ == "__main__":
    main()
