"""How many tokens an engine trains per second on this machine's device, and how much of the device that uses.

    python -m tests.benchmarks.throughput --engine jax
    python -m tests.benchmarks.throughput --engine torch --recipe mtlm2-40m --rows 16 --steps 20 --json

The models, micro-batches, optimizers and precision are those of the recipes, of whose batches `--rows` go into a step.
Every step reads fresh random tokens, made beforehand; of each of the repeats the steps are timed together, to the
moment when the last result is there, so that the device is never waited for between them. The figure is the median of
the repeats, with the slowest and the fastest.

MFU is `models.training.flops`'s count of FLOPs (a multiply-add is two, causal attention counts half, recomputation
does not count) over the dense bf16 peak of the data sheet. Peak memory is `TrainingEngine.peak_memory`.
"""

import argparse
import json
import time
from typing import Any

import numpy as np

from flows.recipe import load_recipe
from models import weights
from models.engine import Batch, EngineName, Layout, Precision, TrainingEngine, training_engine
from models.training.config import TrainingConfig
from models.training.flops import peak_flops_per_second, training_flops_per_token

RECIPES = ("elite-112m", "mtlm2-40m")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["torch", "jax", "mlx"], required=True)
    parser.add_argument("--recipe", action="append", help="a recipe with a stage `base`; several times for several")
    parser.add_argument("--set", action="append", default=[], help="as of `cairn run`")
    parser.add_argument("--rows", type=int, help="rows of a step; the recipe's micro-batch unless given")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each repeat")
    parser.add_argument("--rematerialize", action="store_true", help="compute blocks again in the backward pass")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each recipe")
    given = parser.parse_args()
    for recipe in given.recipe or RECIPES:
        overrides = [f"engine={given.engine}", *given.set]
        found = measured(
            recipe, overrides, given.rows, given.repeats, given.steps, Layout(rematerialize=given.rematerialize)
        )
        print(json.dumps(found) if given.json else described(found), flush=True)


def measured(
    recipe: str, overrides: list[str], rows: int | None, repeats: int, steps: int, layout: Layout
) -> dict[str, Any]:
    """What a recipe's base reaches."""
    stage = next(stage for stage in load_recipe(recipe, overrides, resolve=False).stages if stage.stage == "pretrain")
    config: Any = stage.config
    training: TrainingConfig = config.training
    engine_name: EngineName = config.engine
    precision: Precision = config.precision
    rows = rows or training.micro_batch_size or training.batch_size
    micro_rows = min(rows, training.micro_batch_size or rows)
    model, length = config.model, training.sequence_length
    engine = training_engine(engine_name, model, training.optimizer, precision, layout)
    engine.restore("weights", weights.whole_pieces(dict(weights.initial_weights(model, 0))))
    random = np.random.default_rng(0)
    started = time.perf_counter()
    stepped(engine, [fresh(random, rows, micro_rows, length, model.vocab_size)])
    first = time.perf_counter() - started
    stepped(engine, [fresh(random, rows, micro_rows, length, model.vocab_size) for _ in range(3)])
    speeds = []
    for _ in range(repeats):
        batches = [fresh(random, rows, micro_rows, length, model.vocab_size) for _ in range(steps)]
        started = time.perf_counter()
        stepped(engine, batches)
        speeds.append(steps * rows * length / (time.perf_counter() - started))
    peak, flops = peak_flops_per_second(engine.device), training_flops_per_token(model, length)
    return {
        "recipe": recipe,
        "engine": engine_name,
        "precision": precision,
        "device": engine.device,
        "rows": rows,
        "micro_rows": micro_rows,
        "sequence_length": length,
        "rematerialize": layout.rematerialize,
        "first_step_seconds": first,
        "tokens_per_second": speeds,
        "mfu": None if peak is None else float(np.median(speeds)) * flops / peak,
        "peak_memory_megabytes": engine.peak_memory() / 1e6,
    }


def fresh(random: np.random.Generator, rows: int, micro_rows: int, length: int, vocabulary: int) -> list[Batch]:
    """The micro-batches of one step: random tokens, all of which count."""
    tokens = random.integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
    whole = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), np.ones((rows, length), np.bool_))
    return [whole.part(slice(first, first + micro_rows)) for first in range(0, rows, micro_rows)]


def stepped(engine: TrainingEngine, batches: list[list[Batch]]) -> None:
    """Takes steps, and waits for the last."""
    results = [engine.step(micro_batches, 1.0, number) for number, micro_batches in enumerate(batches)]
    if not np.isfinite(float(results[-1].loss)):
        raise RuntimeError("the loss is not finite")


def described(found: dict[str, Any]) -> str:
    """One line."""
    speeds = found["tokens_per_second"]
    mfu = "" if found["mfu"] is None else f", {found['mfu']:.1%} MFU"
    return (
        f"{found['recipe']} with {found['engine']} in {found['precision']} on {found['device']}: "
        f"{np.median(speeds):,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f}){mfu}, "
        f"{found['peak_memory_megabytes']:,.0f} MB, {found['rows']} rows of {found['sequence_length']} a step "
        f"in parts of {found['micro_rows']}, first step {found['first_step_seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
