"""How fast a model of the size of `books` trains with the PyTorch engine, and how much of the machine that uses.

    python -m tests.benchmarks.training_step
    python -m tests.benchmarks.training_step --precision float32 --batch 16 --length 256 --documents 6

The model is a Llama of 7.9M parameters. Speed is in tokens per second of processor time, which other work on the
machine does not change much, and by the clock in brackets. The share is of the matrix products that the machine does
in the same precision and measure: products of 2,048 × 2,048, the best of ten. As in a run's own process, glibc keeps
the memory that is freed; that has to be set before Python starts:

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647 OMP_WAIT_POLICY=PASSIVE
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from models import weights
from models.config import ModelConfig
from models.engine import Batch, Precision, training_engine
from models.optimizer import OptimizerConfig
from models.training.flops import training_flops_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=512, help="positions of a row")
    parser.add_argument("--heads", type=int, default=8, help="query heads; half as many have keys and values")
    parser.add_argument("--documents", type=int, help="documents of a row, with attention inside each alone")
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    model = books(given.length, given.heads)
    engine = training_engine("torch", model, optimizer(given.optimizer), given.precision)
    engine.restore("weights", weights.whole_pieces(dict(weights.initial_weights(model, 0))))
    batch = rows(given.batch, given.length, model.vocab_size, given.documents)
    engine.step([batch], 1.0, 0)
    times = [timed(lambda: float(engine.step([batch], 1.0, 0).loss)) for _ in range(given.steps)]
    processor, clock = (float(np.median(part)) for part in zip(*times, strict=True))
    tokens = batch.tokens_BT.size
    print(f"{tokens / processor:,.0f} tokens per second of processor time ({tokens / clock:,.0f} by the clock)")
    flops = tokens * training_flops_per_token(model, given.length)
    best = product_flops(given.precision)
    shares = [flops / seconds / peak for seconds, peak in zip((processor, clock), best, strict=True)]
    print(f"{best[0] / 1e9:,.0f} GFLOP/s of one core in matrix products, of which a step uses {shares[0]:.0%}")
    print(f"{best[1] / 1e9:,.0f} GFLOP/s of all cores by the clock, of which a step uses {shares[1]:.0%}")


def books(length: int, heads: int) -> ModelConfig:
    """A Llama with a vocabulary of 8,192."""
    return ModelConfig.model_validate(
        {
            "architecture": "llama",
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 8,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": length,
            "tie_word_embeddings": True,
        }
    )


def optimizer(name: str) -> OptimizerConfig:
    """AdamW, or Muon with its iterations in bf16."""
    return OptimizerConfig.model_validate(
        {"name": name, "learning_rate": 1e-3, "newton_schulz_dtype": "bfloat16" if name == "muon" else "float32"}
    )


def rows(count: int, length: int, vocabulary: int, documents: int | None) -> Batch:
    """Random tokens, all of which count."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocabulary, (count, length + 1), dtype=np.int32)
    numbers = None
    if documents is not None:
        numbers = (random.random((count, length)) < (documents - 1) / length).cumsum(1, dtype=np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((count, length), np.bool_), numbers)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of processor time, and by the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - processor, time.perf_counter() - clock


def product_flops(precision: Precision) -> tuple[float, float]:
    """The most FLOPs per second of processor time, and by the clock, of large products."""
    size, dtype = 2048, torch.bfloat16 if precision == "bfloat16" else torch.float32
    one, other = (torch.randn(size, size).to(dtype) for _ in range(2))
    times = [timed(lambda: one @ other) for _ in range(11)][1:]
    return 2 * size**3 / min(part[0] for part in times), 2 * size**3 / min(part[1] for part in times)


if __name__ == "__main__":
    main()
