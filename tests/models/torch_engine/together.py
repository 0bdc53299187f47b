"""What one of several processes does in the tests of training together, and what one process alone does beside it.

As a program: `python -m tests.models.torch_engine.together RESULTS NAME…` in each of the processes, which do the named
works one after the other; process 0 writes what each came to, as JSON and as arrays.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from models import weights
from models.config import ModelConfig
from models.engine import Batch, Layout, StepResult, training_engine
from models.generation import generate
from models.lora import adapter_shapes
from models.optimizer import OptimizerConfig
from models.sampling import SamplingConfig
from models.torch_engine.train import TorchTraining
from models.training.checkpoint import Checkpoints
from models.training.config import CheckpointConfig, TrainingConfig
from models.training.events import Event, Note
from models.training.loop import Interrupted, Start, train
from models.tuning import LoraConfig, Tuning
from tests.models import preferring, several
from tests.models.test_lora import random_adapters
from tests.models.tiny import VOCABULARY, Arrays, batch, cut, pieces, tiny
from tests.models.training import bigrams

Found = dict[str, Any]
ADAMW = OptimizerConfig(learning_rate=3e-4)
MUON = OptimizerConfig(name="muon", learning_rate=3e-4, muon_learning_rate=5e-3)
OPTIMIZERS = {"adamw": ADAMW, "muon": MUON}
LAYOUTS = {
    "alone": Layout(),
    "data": Layout(),
    "fsdp2": Layout(fsdp=2),
    "fsdp4": Layout(fsdp=4),
    "remade": Layout(rematerialize=True),
    "remade-fsdp2": Layout(fsdp=2, rematerialize=True),
}
LORA = LoraConfig(rank=3, alpha=6, targets=("q_proj", "v_proj", "o_proj"))
STEPS = 20
# Over four processes: rows that do not divide, and micro-batches of which some get none.
ROWS = 7


def engine_for(
    config: ModelConfig, optimizer: OptimizerConfig, layout: str, lora: LoraConfig | None = None
) -> TorchTraining:
    engine = training_engine("torch", config, optimizer, "float32", LAYOUTS[layout], Tuning(lora=lora))
    assert isinstance(engine, TorchTraining)
    adapters = {} if lora is None else random_adapters(config, lora)
    engine.restore("weights", pieces({**weights.initial_weights(config, 1), **adapters}))
    return engine


def micro_batches(step: int) -> list[Batch]:
    """One or three of them, by turns."""
    rows = batch(rows=ROWS, seed=step)
    return cut(rows, 3) if step % 2 else [rows]


def exported(engine: TorchTraining, config: ModelConfig) -> Arrays:
    return weights.assemble([*engine.export("weights"), *engine.export("optimizer")], weights.canonical_shapes(config))


def training(name: str) -> tuple[Found, Arrays]:
    """`train:COMPOSITION:OPTIMIZER:LAYOUT`: steps, with losses and what is left of them. `dropout:` is with it, and
    `lora:` of adapters."""
    kind, composition, optimizer, layout = name.split(":")
    config = tiny(composition, dropout=0.3 if kind == "dropout" else 0.0)
    lora = LORA if kind == "lora" else None
    engine = engine_for(config, OPTIMIZERS[optimizer], layout, lora)
    shapes = weights.canonical_shapes(config) if lora is None else adapter_shapes(config, lora)
    gradients = {
        f"gradient {piece}": array
        for piece, array in weights.gather(engine.gradients(micro_batches(1), 0), shapes).items()
    }
    steps = [engine.step(micro_batches(step), 1.0, step) for step in range(STEPS)]
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (3, 5)).tolist()
    found = {
        "losses": [float(step.loss) for step in steps],
        "norms": [float(step.gradient_norm) for step in steps],
        "loss": engine.loss(batch(rows=ROWS, seed=99)),
        "written": generate(engine.inference(), prompts, SamplingConfig(max_new_tokens=6), ()),
        "device": engine.device,
    }
    return found, {**gradients, **exported(engine, config)}


def restoring(name: str) -> tuple[Found, Arrays]:
    """`restore:LAYOUT`: an update with dropout and Muon again from what another engine exported, bit for bit.

    Every process needs what process 0 alone is given; so all of them are handed the arrays of their first engine's
    start, and the moments are those of zeros.
    """
    config = tiny("mixtral", dropout=0.2, num_local_experts=3)
    first = engine_for(config, MUON, name.split(":")[1])
    start = dict(weights.initial_weights(config, 1))
    random = np.random.default_rng(0)
    canonical = weights.canonical_shapes(config)
    moments: Arrays = {"updates": np.array(5, np.int64)}
    for moment in sorted(weights.optimizer_shapes(config, MUON).keys() - {"updates"}):
        moments[moment] = random.random(canonical[moment.partition(":")[2]], np.float32) / 100
    results: list[list[float]] = []
    states: list[Arrays] = []
    for _ in range(2):
        first.restore("weights", pieces(start))
        first.restore("optimizer", pieces(moments))
        restored = exported(first, config)
        results.append([float(value) for value in first.step(micro_batches(1), 1.0, 7)[:3]])
        states.append(exported(first, config))
    same = first.process > 0 or (
        all((restored[part] == array).all() for part, array in {**start, **moments}.items())
        and all((states[0][part] == array).all() for part, array in states[1].items())
    )
    other = float(first.step(micro_batches(1), 1.0, 8).loss)
    return {"same": bool(same), "results": results, "other": other, "updates": int(states[0].get("updates", 7))}, {}


def skipping(name: str) -> tuple[Found, Arrays]:
    """`skip:LAYOUT`: a weight that is not finite, in one process's part alone where weights are divided."""
    config = tiny("llama")
    engine = engine_for(config, MUON, name.split(":")[1])
    broken: Arrays = dict(weights.initial_weights(config, 1))
    broken["model.layers.1.mlp.down_proj.weight"][0, 0] = np.inf
    engine.restore("weights", pieces(broken))
    before = exported(engine, config)
    result = engine.step(micro_batches(0), 1.0, 0)
    after = exported(engine, config)
    unchanged = all((before[part] == array).all() for part, array in after.items())
    return {"skipped": float(result.skipped), "unchanged": unchanged}, {}


def preferring_pairs(name: str) -> tuple[Found, Arrays]:
    """`pairs:COMPOSITION:DROPOUT:LAYOUT`: steps of preference tuning on pairs that do not divide among processes.
    `lora-pairs:` is of adapters."""
    kind, composition, dropout, layout = name.split(":")
    config, lora = tiny(composition, dropout=float(dropout)), LORA if kind == "lora-pairs" else None
    engine = preferring.preferring("torch", config, layout=LAYOUTS[layout], lora=lora)
    batches = [[preferring.pairs(3, seed=step), preferring.pairs(1, seed=50 + step)] for step in range(6)]
    gradients = preferring.gradients(engine, batches[0], lora=lora)
    steps = [engine.step(batch, 1.0, step) for step, batch in enumerate(batches)]
    found = {
        "losses": [float(step.loss) for step in steps],
        "figures": [step.figures.tolist() for step in steps],
        "rewards": engine.rewards(preferring.pairs(3, seed=99)).tolist(),
        "loss": engine.loss(preferring.pairs(3, seed=99)),
    }
    return found, {f"gradient {piece}": array for piece, array in gradients.items()}


class Watched(TorchTraining):
    """Writes down what it is given to step on."""

    seen: list[str]

    def step(self, micro_batches: Sequence[Batch], learning_rate_scale: float, dropout_key: int) -> StepResult:
        digest = hashlib.sha256()
        for one in micro_batches:
            for part in one:
                digest.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
        self.seen.append(digest.hexdigest())
        return super().step(micro_batches, learning_rate_scale, dropout_key)


LOOP = TrainingConfig.model_validate(
    {
        "steps": 24,
        "batch_size": 6,
        "micro_batch_size": 3,
        "sequence_length": 7,
        "packing": "documents",
        "optimizer": {"learning_rate": 3e-4},
        "validation": {"every": 6, "exact_match_rows": 8, "samples": 1},
    }
)
LOOP_MODEL = tiny("llama", vocab_size=bigrams.VOCABULARY)


def looping(name: str) -> tuple[Found, Arrays]:
    """`loop:LAYOUT:FOLDER:STOP`: the training loop to its end, or until one process wants to stop after some steps."""
    _, layout, place, stop = name.split(":")
    folder = Path(place)
    engine = Watched(LOOP_MODEL, LOOP.optimizer, "float32", LAYOUTS[layout])
    engine.seen = []
    events: list[Event] = []

    def should_stop() -> bool:
        # The last process alone knows of it.
        return engine.process == engine._world.size - 1 and len(engine.seen) == int(stop or -1)

    found: Found = {"interrupted": None}
    try:
        result = train(
            engine,
            LOOP_MODEL,
            bigrams.batches_for(LOOP, folder / "train"),
            bigrams.batches_for(LOOP, folder / "validation", shuffled=False),
            LOOP,
            Checkpoints(LocalFileSystem(), str(folder / "checkpoints"), CheckpointConfig(every_seconds=0.05)),
            Start(weights.initial_weights(LOOP_MODEL, 0)),
            report=events.append,
            should_stop=should_stop,
        )
        found["losses"] = [record.loss for record in result.state.validations]
    except Interrupted as interrupted:
        found["interrupted"] = interrupted.step
    told = engine.agreed(len(events) if engine.process else 0)
    notes = [event.text for event in events if isinstance(event, Note)]
    return {**found, "seen": engine.seen, "told_by_others": told, "notes": notes}, exported(engine, LOOP_MODEL)


WORKS: dict[str, Callable[[str], tuple[Found, Arrays]]] = {
    "train": training,
    "restore": restoring,
    "dropout": training,
    "lora": training,
    "skip": skipping,
    "loop": looping,
    "pairs": preferring_pairs,
    "lora-pairs": preferring_pairs,
}


def do(name: str) -> tuple[Found, Arrays]:
    """One work, in this process."""
    return WORKS[name.partition(":")[0]](name)


def together(folder: Path, count: int, names: Sequence[str]) -> dict[str, tuple[Found, Arrays]]:
    """The works in `count` processes."""
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return several.together("torch", "tests.models.torch_engine.together", folder, count, names, environment)


if __name__ == "__main__":
    several.main(do)
