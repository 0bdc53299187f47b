"""How fast the MLX engine's step is beside the same model in bare `mlx.nn`, and beside `transformers` in eager PyTorch.

    python -m tests.benchmarks.mlx_step
    python -m tests.benchmarks.mlx_step --memory

The model is a Llama of 6 layers, 384 wide, with a vocabulary of 4,096, on 8 rows of 256 tokens, with AdamW in fp32.
The ways take turns, each in a process of its own with the variables of a stage's; what counts is the median of a way's
steps, and of the rounds.
Every way has OpenBLAS where the system has it. `--memory` says what a step needs with and without
rematerialisation, and what that takes in time.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from models import weights
from models.config import ModelConfig
from models.engine import Batch, Layout
from models.machine import ENGINE_ENVIRONMENT
from models.optimizer import OptimizerConfig

WAYS = ("engine", "engine compiled", "bare", "bare compiled", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--way", choices=[*WAYS, "remembered", "rematerialised"], help="this one alone, in this process"
    )
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    if given.way:
        measure(given.way, given.steps, given.rows, given.length)
        return
    ways = ("remembered", "rematerialised") if given.memory else WAYS
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    for _ in range(given.rounds):
        for way in ways:
            command = [sys.executable, "-m", "tests.benchmarks.mlx_step", "--way", way, "--steps", str(given.steps)]
            command += ["--rows", str(given.rows), "--length", str(given.length)]
            environment = {**ENGINE_ENVIRONMENT, **os.environ}
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            found[way].append([float(number) for number in output.split()[-3:]])
    for way, rounds in found.items():
        seconds, processor, memory = (float(np.median(part)) for part in zip(*rounds, strict=True))
        speed = given.rows * given.length / seconds
        print(
            f"{way:16} {seconds:7.3f} s a step by the clock ({processor:.3f} s of processor time), "
            f"{speed:8,.0f} tokens/s, {memory / 1e6:,.0f} MB"
        )


def measure(way: str, steps: int, rows: int, length: int) -> None:
    """Prints the median seconds of a step by the clock and of the processor, and the peak of memory in bytes."""
    config = llama(length)
    make = {"bare": bare, "bare compiled": bare, "transformers": pytorch}.get(way, engine)
    step, peak = make(config, batch(rows, length, config.vocab_size), way)
    step()
    times = []
    for _ in range(steps):
        clock, processor = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - clock, time.process_time() - processor))
    seconds, spent = (float(np.median(part)) for part in zip(*times, strict=True))
    print(seconds, spent, peak())


def llama(length: int) -> ModelConfig:
    """The model."""
    return ModelConfig.model_validate(
        {
            "architecture": "llama",
            "vocab_size": 4096,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "max_position_embeddings": length,
        }
    )


def batch(rows: int, length: int, vocabulary: int) -> Batch:
    """Random tokens, all of which count."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((rows, length), np.bool_))


def engine(config: ModelConfig, rows: Batch, way: str) -> tuple[Callable[[], object], Callable[[], float]]:
    """The engine's own step."""
    from models.mlx_engine.processes import Processes
    from models.mlx_engine.train import MlxTraining

    optimizer, layout = OptimizerConfig(learning_rate=1e-3), Layout(rematerialize=way == "rematerialised")
    found = MlxTraining(config, optimizer, "float32", layout, Processes(None), way.endswith("compiled") or None)
    found.restore("weights", weights.whole_pieces(dict(weights.initial_weights(config, 0))))

    import mlx.core as mx

    return lambda: float(found.step([rows], 1.0, 0).loss), lambda: float(mx.get_peak_memory())


def bare(config: ModelConfig, rows: Batch, way: str) -> tuple[Callable[[], object], Callable[[], float]]:
    """The same model as MLX's own documentation would write it: `mlx.nn`, `mlx.optimizers`, one compiled step."""
    from models.mlx_engine.blas import preload

    preload()
    import mlx.core as mx
    from mlx import nn, optimizers

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, inner = config.hidden_size, config.intermediate_size
            self.first, self.second = nn.RMSNorm(width, config.norm_eps), nn.RMSNorm(width, config.norm_eps)
            self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
            self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
            self.down, self.rope = nn.Linear(inner, width, bias=False), nn.RoPE(config.head_dim)

        def __call__(self, x: mx.array) -> mx.array:
            shape = (*x.shape[:2], config.num_attention_heads, config.head_dim)
            normed = self.first(x)
            q, k, v = (part(normed).reshape(shape).swapaxes(1, 2) for part in (self.q, self.k, self.v))
            mixed = mx.fast.scaled_dot_product_attention(
                self.rope(q), self.rope(k), v, scale=config.head_dim**-0.5, mask="causal"
            )
            x = x + self.o(mixed.swapaxes(1, 2).reshape(x.shape))
            normed = self.second(x)
            return x + self.down(nn.silu(self.gate(normed)) * self.up(normed))

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = [Layer() for _ in range(config.num_hidden_layers)]
            self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        def __call__(self, tokens: mx.array) -> mx.array:
            x: mx.array = self.embedding(tokens)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x))

    model, adamw = Llama(), optimizers.AdamW(1e-3, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)
    mx.eval(model.parameters())
    state = [model.state, adamw.state]

    def step(tokens: mx.array, targets: mx.array) -> mx.array:
        def loss_of(model: Llama) -> mx.array:
            return nn.losses.cross_entropy(model(tokens), targets, reduction="mean")

        loss: mx.array
        loss, gradients = nn.value_and_grad(model, loss_of)(model)
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        adamw.update(model, gradients)
        return loss

    call: Callable[..., Any] = mx.compile(step, inputs=state, outputs=state) if way.endswith("compiled") else step
    tokens, targets = mx.array(rows.tokens_BT), mx.array(rows.targets_BT)

    def done() -> None:
        mx.eval(call(tokens, targets), state)

    return done, lambda: float(mx.get_peak_memory())


def pytorch(config: ModelConfig, rows: Batch, way: str) -> tuple[Callable[[], object], Callable[[], float]]:
    """Llama of `transformers` in eager PyTorch, with PyTorch's AdamW."""
    import resource

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from models.hub import hub_config

    found: Any = LlamaConfig(**{**hub_config(config, 0, 1, 2), "attn_implementation": "eager"})
    model: Any = LlamaForCausalLM(found)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens, targets = (torch.from_numpy(array).long() for array in (rows.tokens_BT, rows.targets_BT))

    def step() -> float:
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, config.vocab_size), targets.reshape(-1))
        adamw.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        return float(loss.detach())

    return step, lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    main()
