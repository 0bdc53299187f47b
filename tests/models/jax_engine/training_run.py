"""Trains a tiny model in a process of its own, on as many devices and in as many processes as its environment says.

    python -m tests.models.jax_engine.training_run JOB.json

The job says what to train; the losses, skips, the device in words and digests of the batches are written beside it as
JSON, by process 0. A job may save its arrays at the end.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models import weights
from models.engine import Batch, Layout, TrainingEngine, training_engine
from models.optimizer import OptimizerConfig
from models.tuning import LoraConfig, Tuning
from tests.models import preferring
from tests.models.test_lora import random_adapters
from tests.models.tiny import batch, cut, pieces, tiny

ROOT = Path(__file__).parents[3]
SIZE: dict[str, object] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 24, "max_position_embeddings": 32}
"""What eight devices divide."""
STEPS = 20
OPTIMIZERS = {
    "adamw": OptimizerConfig(learning_rate=3e-4),
    "muon": OptimizerConfig(name="muon", learning_rate=3e-4, muon_learning_rate=5e-3),
}


def batches(step: int, documents: bool) -> list[Batch]:
    """Two micro-batches of a step."""
    whole = batch(rows=16, length=12, seed=step)
    if documents:
        ends = np.random.default_rng(step).random(whole.tokens_BT.shape) < 0.3
        whole = whole._replace(documents_BT=ends.cumsum(1, dtype=np.int32))
    return cut(whole, 2)


def trained(job: dict[str, Any]) -> dict[str, Any]:
    """Does a job in this process."""
    config = tiny(job["model"], **SIZE, **job.get("changes", {}))
    layout = Layout.model_validate(job["layout"])
    if job.get("pairs"):
        return preferred(preferring.preferring("jax", config, layout=layout))
    lora = LoraConfig.model_validate(job["lora"]) if "lora" in job else None
    engine = training_engine("jax", config, OPTIMIZERS[job["optimizer"]], "float32", layout, Tuning(lora=lora))
    adapters = {} if lora is None else random_adapters(config, lora)
    engine.restore("weights", pieces({**weights.initial_weights(config, 3), **adapters}))
    found, digest = [], hashlib.sha256()
    for step in range(STEPS):
        parts = batches(step, job.get("documents", False))
        for part in parts:
            digest.update(part.tokens_BT.tobytes())
        found.append(engine.step(parts, 1.0, step))
    after = engine.loss(batch(rows=5, length=12, seed=99))
    words = [engine.agreed(engine.process + 7), engine.agreed(-engine.process)]
    save(engine, job, config)
    return {
        "losses": [float(result.loss) for result in found],
        "norms": [float(result.gradient_norm) for result in found],
        "loss": after,
        "device": engine.device,
        "agreed": words,
        "batches": digest.hexdigest(),
    }


def preferred(engine: TrainingEngine) -> dict[str, Any]:
    """Some steps of preference tuning on pairs that do not divide among the devices."""
    batches = [[preferring.pairs(3, seed=step), preferring.pairs(1, seed=50 + step)] for step in range(6)]
    steps = [engine.step(batch, 1.0, step) for step, batch in enumerate(batches)]
    return {
        "losses": [float(step.loss) for step in steps],
        "norms": [float(step.gradient_norm) for step in steps],
        "figures": [step.figures.tolist() for step in steps],
        "rewards": engine.rewards(preferring.pairs(3, seed=99)).tolist(),
    }


def save(engine: TrainingEngine, job: dict[str, Any], config: Any) -> None:
    """Writes the engine's arrays where the job says, in process 0; every process takes part."""
    shapes = weights.canonical_shapes(config)
    for state in ("weights", "optimizer"):
        exported = list(engine.export(state))
        if "save" in job and engine.process == 0:
            Path(job["save"]).mkdir(exist_ok=True)
            arrays = weights.assemble(exported, shapes)
            weights.write_arrays(Path(job["save"]) / f"{state}.safetensors", arrays)


def run(job: dict[str, Any], folder: Path, *, devices: int = 1, processes: int = 1, port: int = 0) -> dict[str, Any]:
    """Does a job in fresh processes with so many CPU devices each; gives what it found."""
    path = folder / f"job-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(job))
    started = [_start(path, devices, processes, number, port) for number in range(processes)]
    outputs = [process.communicate(timeout=500)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    found: dict[str, Any] = json.loads(path.with_suffix(".found").read_text())
    return found


def _start(path: Path, devices: int, processes: int, number: int, port: int) -> "subprocess.Popen[str]":
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
    }
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(number),
        }
    command: Sequence[str] = [sys.executable, "-m", "tests.models.jax_engine.training_run", str(path)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def main() -> None:
    path = Path(sys.argv[1])
    found = trained(json.loads(path.read_text()))
    if os.environ.get("JAX_PROCESS_ID", "0") == "0":
        path.with_suffix(".found").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
