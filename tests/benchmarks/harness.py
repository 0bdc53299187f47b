"""How long a benchmark takes: Cairn's answers against lm-eval's own `hf` model at its best batch size, side by side.

A Llama of 112M parameters with random weights, the shape of the recipe `elite-112m`, arc_easy whole. Loading the model
and the task is apart; both make the same requests. `python -m tests.benchmarks.harness`
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.tasks.harness.against_hf import Model, answers, compare, ours, random_model, theirs

ELITE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
BATCH_SIZES = (1, 4, 8, 16, 32, 64)
TRIED = 60
"""Documents on which batch sizes are tried."""


def timed(lm: Any, task: str, limit: int | None, data: Path) -> tuple[float, dict[str, Any]]:
    started = time.monotonic()
    found = answers(lm, task, limit, data)
    return time.monotonic() - started, found


def best_batch_size(model: Model, task: str, data: Path) -> int:
    """The batch size at which lm-eval's own model is fastest on some documents."""
    seconds = {}
    for batch_size in BATCH_SIZES:
        seconds[batch_size], _ = timed(theirs(model, batch_size), task, TRIED, data)
        print(f"hf, batch size {batch_size}: {seconds[batch_size]:.1f} s for {TRIED} documents", flush=True)
    return min(seconds, key=seconds.__getitem__)


def main() -> None:
    """Prints the seconds of both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder), "llama", **ELITE)
        data = Path(folder, "data")
        batch_size = best_batch_size(model, options.task, data)
        reference, own = theirs(model, batch_size), ours(model, batch_tokens=options.batch_tokens)
        for _ in range(options.rounds):
            own_seconds, own_answers = timed(own, options.task, options.limit, data)
            seconds, reference_answers = timed(reference, options.task, options.limit, data)
            found = compare(options.task, reference_answers, own_answers)
            print(
                f"{options.task}: Cairn {own_seconds:.1f} s, hf (batch size {batch_size}) {seconds:.1f} s, "
                f"{own_seconds / seconds:.0%}; log-probabilities {found.furthest:.1e} apart, scores {found.scores}",
                flush=True,
            )


if __name__ == "__main__":
    main()
