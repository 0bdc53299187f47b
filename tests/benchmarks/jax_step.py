"""How fast the JAX engine steps, beside a bare jitted step of the same model and beside transformers in eager PyTorch.

    python -m tests.benchmarks.jax_step
    python -m tests.benchmarks.jax_step --rounds 5 --steps 10 --precision float32

The model is a Llama of 6 layers, 384 wide, with rows of 256 tokens of a vocabulary of 4,096, eight to a step, with
AdamW. Each kind runs in a process of its own with the variables of a stage's, in turns, so that what else the machine
does falls on all alike. Speeds are medians over all steps of all rounds, by the clock; ratios are medians over the
rounds. The memory is the most that a process held (VmHWM), less what it held before the first step was compiled.

`bare` is what one would write for this one model and nothing else: unrolled layers, plain softmax, `optax.adamw`, no
masks, no check of tokens, no accumulation, no skipping.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models import weights
from models.config import ModelConfig
from models.engine import Batch, Layout, training_engine
from models.machine import ENGINE_ENVIRONMENT
from models.optimizer import OptimizerConfig

KINDS = ("engine", "engine-remat", "bare", "transformers")
ROWS, LENGTH, VOCABULARY = 8, 256, 4096
OPTIMIZER = OptimizerConfig(learning_rate=3e-4)
Step = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=KINDS, help="run one kind here and print what it took as JSON")
    given = parser.parse_args()
    if given.only is not None:
        print(json.dumps(measured(given.only, given.precision, given.steps)))
        return
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(given.rounds):
        for kind in KINDS:
            found[kind].append(in_process(kind, given.precision, given.steps))
    for kind, rounds in found.items():
        seconds = float(np.median([second for part in rounds for second in part["seconds"]]))
        memory = np.median([part["megabytes"] for part in rounds])
        print(f"{kind:>13}: {ROWS * LENGTH / seconds:8,.0f} tokens/s, {1000 * seconds:7.1f} ms, {memory:6,.0f} MB")
    for other in ("bare", "transformers", "engine-remat"):
        ratios = [
            np.median(one["seconds"]) / np.median(two["seconds"])
            for one, two in zip(found["engine"], found[other], strict=True)
        ]
        print(
            f"engine / {other}: {np.median(ratios):.3f} of the time (rounds: {', '.join(f'{x:.3f}' for x in ratios)})"
        )


def in_process(kind: str, precision: str, steps: int) -> dict[str, Any]:
    """Measures a kind in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.jax_step", "--only", kind]
    command += ["--precision", precision, "--steps", str(steps)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**ENGINE_ENVIRONMENT, **os.environ}
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(kind: str, precision: str, steps: int) -> dict[str, Any]:
    """Seconds of each step after the first two, and megabytes that the steps took at their peak."""
    make = {"bare": bare, "transformers": transformers_eager}.get(kind)
    step = make(precision) if make is not None else engine(precision, rematerialize=kind == "engine-remat")
    before = resident_megabytes()
    losses = [step(), step()]
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {"seconds": seconds, "megabytes": peak - before, "losses": losses}


def resident_megabytes() -> float:
    """VmRSS of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1000


def llama() -> ModelConfig:
    """The model."""
    return ModelConfig.model_validate(
        {
            "architecture": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "max_position_embeddings": LENGTH,
        }
    )


def rows() -> Batch:
    """Random tokens, all of which count."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH + 1), dtype=np.int32)
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), np.ones((ROWS, LENGTH), np.bool_))


def engine(precision: str, *, rematerialize: bool) -> Step:
    """The engine's step."""
    model = llama()
    trainer = training_engine("jax", model, OPTIMIZER, precision, Layout(rematerialize=rematerialize))  # type: ignore[arg-type]
    trainer.restore("weights", weights.whole_pieces(dict(weights.initial_weights(model, 0))))
    batch = rows()
    return lambda: float(trainer.step([batch], 1.0, 0).loss)


def bare(precision: str) -> Step:
    """The same model written straight down."""
    import jax
    import jax.numpy as jnp
    import optax

    model, dtype = llama(), jnp.dtype(precision)
    parameters = {name: jnp.array(array) for name, array in weights.initial_weights(model, 0).items()}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            OPTIMIZER.learning_rate,
            OPTIMIZER.beta1,
            OPTIMIZER.beta2,
            weight_decay=OPTIMIZER.weight_decay,
            mask=lambda tree: jax.tree.map(lambda array: array.ndim > 1, tree),
        ),
    )
    frequencies = 1 / 10_000 ** (jnp.arange(0, model.head_dim, 2) / model.head_dim)
    angles = jnp.outer(jnp.arange(LENGTH), frequencies)
    cosine, sine = jnp.cos(angles)[:, None].astype(dtype), jnp.sin(angles)[:, None].astype(dtype)

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + model.norm_eps) * weight).astype(dtype)

    def turned(x: jax.Array) -> jax.Array:
        one, two = jnp.split(x, 2, -1)
        return jnp.concatenate((one * cosine - two * sine, two * cosine + one * sine), -1)

    def loss(parameters: dict[str, jax.Array], tokens: jax.Array, targets: jax.Array) -> jax.Array:
        def linear(x: jax.Array, name: str) -> jax.Array:
            return x @ parameters[name + ".weight"].astype(dtype).T

        x = parameters["model.embed_tokens.weight"][tokens]
        for layer in range(model.num_hidden_layers):
            block = f"model.layers.{layer}."
            inner = norm(x, parameters[block + "input_layernorm.weight"])
            q, k, v = (
                linear(inner, f"{block}self_attn.{part}_proj").reshape(ROWS, LENGTH, -1, model.head_dim)
                for part in "qkv"
            )
            mixed = jax.nn.dot_product_attention(turned(q), turned(k), v, is_causal=True)
            x = x + linear(mixed.reshape(ROWS, LENGTH, -1), block + "self_attn.o_proj")
            inner = norm(x, parameters[block + "post_attention_layernorm.weight"])
            gated = jax.nn.silu(linear(inner, block + "mlp.gate_proj")) * linear(inner, block + "mlp.up_proj")
            x = x + linear(gated, block + "mlp.down_proj")
        logits = linear(norm(x, parameters["model.norm.weight"]), "lm_head").astype(jnp.float32)
        found: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        return found

    def stepped(parameters: Any, state: Any, tokens: jax.Array, targets: jax.Array) -> tuple[Any, Any, jax.Array]:
        found, gradients = jax.value_and_grad(loss)(parameters, tokens, targets)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, found

    compiled = jax.jit(stepped, donate_argnums=(0, 1))
    batch = rows()
    held = [parameters, optimizer.init(parameters)]

    def step() -> float:
        held[0], held[1], found = compiled(
            held[0], held[1], jnp.asarray(batch.tokens_BT), jnp.asarray(batch.targets_BT)
        )
        return float(found)

    return step


def transformers_eager(precision: str) -> Step:
    """The Llama of transformers with PyTorch's AdamW, as it comes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = llama()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        max_position_embeddings=LENGTH,
        rms_norm_eps=model.norm_eps,
        use_cache=False,
    )
    module = LlamaForCausalLM(config).train()
    named = {name: torch.from_numpy(array) for name, array in weights.initial_weights(model, 0).items()}
    module.load_state_dict(named)
    betas = (OPTIMIZER.beta1, OPTIMIZER.beta2)
    optimizer = torch.optim.AdamW(module.parameters(), OPTIMIZER.learning_rate, betas, weight_decay=0.1)
    batch = rows()
    tokens, targets = (torch.from_numpy(array).long() for array in (batch.tokens_BT, batch.targets_BT))

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = module(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
