"""Runs the loop in a child process that is killed and started again, until one start ends by itself.

As a program: `python -m tests.models.training.killed_runs FOLDER KILLS SEED ENGINE`. It prints what the run came to.
"""

import hashlib
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from models.config import ModelConfig
from models.engine import TrainingEngine, training_engine
from models.lora import initial_adapters
from models.training.checkpoint import Checkpoints
from models.training.config import CheckpointConfig, TrainingConfig
from models.training.loop import Start, train
from models.tuning import WHOLE, LoraConfig, PreferenceConfig, Tuning
from models.weights import initial_weights
from tests.models.training import bigrams

CONFIG = TrainingConfig.model_validate(
    {
        "steps": 300,
        "batch_size": 6,
        "micro_batch_size": 3,
        "sequence_length": 7,
        "packing": "documents",
        "optimizer": {"learning_rate": 0.05},
        "schedule": {"warmup_steps": 5},
        "validation": {
            "every": 5,
            "exact_match_rows": 8,
            "samples": 1,
            "tasks": {"names": ["share"], "every": 10},
        },
        "early_stopping": {"patience": 2, "minimum_improvement": 0.004},
    }
)
TORCH_MODEL = ModelConfig.model_validate(
    {
        "architecture": "llama",
        "vocab_size": bigrams.VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "dropout": 0.1,
    }
)
TUNINGS = {
    "torch-lora": Tuning(lora=LoraConfig(rank=2)),
    "torch-pairs": Tuning(preference=PreferenceConfig(beta=0.5)),
    "torch-lora-pairs": Tuning(lora=LoraConfig(rank=2), preference=PreferenceConfig(beta=0.5)),
}
PAIRS: dict[str, Any] = {"packing": "pairs", "micro_batch_size": 2, "validation": {"every": 5, "rows": 20}}


def run(folder: Path, engine_name: str, every_seconds: float, arm: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """One start: ends with the digest of weights and moments, and the state but for the time that it took.

    `engine_name`: bigrams, torch, or torch with one of the tunings.

    `arm` is called when everything is imported and made, and training begins.
    """
    model, start = bigrams.MODEL, bigrams.start()._replace(validated=True)
    engine: TrainingEngine = bigrams.BigramEngine(CONFIG.optimizer, poisoned=frozenset({7, 8, 23}))
    config = CONFIG
    tuning = TUNINGS.get(engine_name, WHOLE)
    if engine_name != "bigrams":
        # Two early stops in one test would be one too many: this one goes to its last step.
        changes = {} if tuning.preference is None else PAIRS
        config = TrainingConfig.model_validate({**CONFIG.model_dump(), "steps": 23, "early_stopping": None, **changes})
        model = TORCH_MODEL
        adapters = None if tuning.lora is None else initial_adapters(model, tuning.lora, 0)
        start = Start(initial_weights(model, 0), adapters=adapters, validated=True)
        engine = training_engine("torch", model, config.optimizer, "float32", tuning=tuning)
    arm()
    result = train(
        engine,
        model,
        bigrams.batches_for(config, folder / "train"),
        bigrams.batches_for(config, folder / "validation", shuffled=False),
        config,
        Checkpoints(LocalFileSystem(), str(folder / "checkpoints"), CheckpointConfig(every_seconds=every_seconds)),
        start,
        report=lambda event: None,
        probes=[bigrams.Share(lambda: engine)] if config.validation and config.validation.tasks else [],
    )
    digest = hashlib.sha256()
    pieces = [*engine.export("weights"), *engine.export("optimizer")]
    for piece in sorted(pieces, key=lambda piece: (piece.name, str(piece.region))):
        digest.update(piece.name.encode() + np.ascontiguousarray(piece.array).tobytes())
    state = result.state.model_dump(mode="json", exclude={"seconds"})
    return {"digest": digest.hexdigest(), "state": state, "early": result.stopped_early}


def kill_at_flush(number: int) -> None:
    """Has this process killed when it would flush a file or a folder for the `number`-th time: inside a write."""
    flush, count = os.fsync, 0

    def counted(fd: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(fd)

    os.fsync = counted


def kill_after(seconds: float) -> None:
    """Has this process killed in a while."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def start_and_kill(folder: Path, engine: str, numbers: random.Random) -> bool:
    """One start in a process of its own; False where it ended before it was killed."""
    at_flush, number, seconds = numbers.random() < 0.5, numbers.randint(1, 20), numbers.uniform(0.01, 0.25)
    every_seconds = numbers.choice([0.0, 0.0, 0.02])
    child = os.fork()
    if child == 0:
        run(folder, engine, every_seconds, lambda: kill_at_flush(number) if at_flush else kill_after(seconds))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main(folder: Path, kills: int, seed: int, engine: str) -> None:
    bigrams.write_chain(folder / "train", masked=True)
    bigrams.write_chain(folder / "validation", shards=1, seed=1, masked=True)
    numbers = random.Random(seed)
    killed = 0
    while killed < kills and start_and_kill(folder, engine, numbers):
        killed += 1
    # Checkpoints long apart: those of the killed starts are what this one goes on from.
    print(json.dumps({"killed": killed, **run(folder, engine, 1000.0)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
