"""What is this engine's own: what is compiled and when, memory that is handed on, recomputation, parts of a model."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import weights
from models.config import ModelConfig
from models.engine import Batch, Layout, Precision, training_engine
from models.optimizer import OptimizerConfig
from tests.models.test_engines import assert_same, gradients
from tests.models.tiny import COMPOSITIONS, batch, cut, pieces, tiny

pytest.importorskip("jax")

import jax
from flax import nnx

from models.jax_engine.batching import bucket, doubled
from models.jax_engine.model import Block, Ends
from models.jax_engine.parameters import stacks
from models.jax_engine.train import JaxTraining

MUON = OptimizerConfig(name="muon", learning_rate=0.01)
ROOT = Path(__file__).parents[3]


def trainer(config: ModelConfig, *, rematerialize: bool = False, precision: Precision = "float32") -> JaxTraining:
    engine = training_engine("jax", config, MUON, precision, Layout(rematerialize=rematerialize))
    assert isinstance(engine, JaxTraining)
    engine.restore("weights", pieces(dict(weights.initial_weights(config, 1))))
    return engine


@contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """Counts what XLA compiles."""
    found: list[str] = []

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield lambda: len(found)
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def documents(rows: Batch, seed: int) -> Batch:
    ends = np.random.default_rng(seed).random(rows.tokens_BT.shape) < 0.3
    return rows._replace(documents_BT=ends.cumsum(1, dtype=np.int32))


@pytest.mark.parametrize("name", list(COMPOSITIONS))
def test_nothing_is_compiled_after_the_first_step(name: str) -> None:
    engine = trainer(tiny(name, dropout=0.1))
    with compilations() as count:
        engine.step(cut(batch(rows=7), 2), 1.0, 0)
        engine.loss(batch(rows=7))
        first = count()
        assert first > 0
        for step in range(1, 5):
            engine.step(cut(batch(rows=7, seed=step), 2), 1.0 / step, (step << 33) + step)
            engine.loss(batch(rows=7, seed=step))
        assert count() == first
        list(engine.export("weights"))
        list(engine.export("optimizer"))
        engine.step(cut(batch(rows=7), 2), 1.0, 5)
        assert count() == first


def test_a_smaller_batch_of_a_validation_is_compiled_for_no_more() -> None:
    engine = trainer(tiny("llama"))
    whole = batch(rows=7)
    expected = engine.loss(whole)
    with compilations() as count:
        parts = [engine.loss(whole.part(rows)) for rows in (slice(0, 4), slice(4, 6), slice(6, 7))]
        assert count() == 0
    assert sum(loss for loss, _ in parts) == pytest.approx(expected[0], rel=1e-5)
    assert sum(targets for _, targets in parts) == expected[1]


def test_documents_are_no_shapes() -> None:
    engine = trainer(tiny("llama"))
    with compilations() as count:
        engine.step([documents(batch(), 0)], 1.0, 0)
        first = count()
        for step in range(1, 5):
            engine.step([documents(batch(seed=step), step)], 1.0, step)
        assert count() == first


def test_a_restored_engine_does_not_compile_its_step_again() -> None:
    engine = trainer(tiny("llama"))
    engine.step([batch()], 1.0, 0)
    saved = {state: list(engine.export(state)) for state in ("weights", "optimizer")}
    with compilations() as count:
        engine.restore("weights", saved["weights"])
        engine.restore("optimizer", saved["optimizer"])
        engine.step([batch()], 1.0, 1)
        assert count() == 0


def test_a_step_takes_over_the_memory_of_the_state() -> None:
    others = jax.live_arrays()
    engine = trainer(tiny("gpt2"))
    engine.step([batch()], 1.0, 0)
    held = [array for array in jax.live_arrays() if array.size > 8 and all(array is not other for other in others)]
    result = engine.step([batch()], 1.0, 1)
    float(result.loss)
    assert sum(array.is_deleted() for array in held) >= 0.9 * len(held) > 0


@pytest.mark.parametrize("name", list(COMPOSITIONS))
def test_computing_blocks_again_changes_nothing(name: str) -> None:
    config = tiny(name, dropout=0.2)
    plain, again = trainer(config), trainer(config, rematerialize=True)
    assert_same(*(gradients(engine, cut(batch(), 2)) for engine in (plain, again)), atol=1e-6)
    for step in range(4):
        one, other = (engine.step(cut(batch(seed=step), 2), 1.0, step) for engine in (plain, again))
        assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-5)
        assert float(one.gradient_norm) == pytest.approx(float(other.gradient_norm), rel=1e-4)


@pytest.mark.parametrize("name", list(COMPOSITIONS))
def test_the_modules_have_the_parameters_of_the_contract(name: str) -> None:
    config = tiny(name)
    found = {}
    for prefix, module in (("", Ends), ("layers.", Block)):
        state = nnx.state(nnx.eval_shape(lambda module=module: module(config)))
        for path, value in nnx.to_flat_state(state):
            found[prefix + ".".join(map(str, path))] = value.shape
    expected = {name: parameters[0].shape for name, parameters in stacks(config).items()}
    assert found == expected
    assert {parameter.name for stack in stacks(config).values() for parameter in stack} == {
        parameter.name for parameter in weights.parameters(config)
    }


def test_sizes_of_buckets_are_few_and_near() -> None:
    sizes = {bucket(size) for size in range(1, 1025)}
    assert len(sizes) <= 40
    assert all(size <= bucket(size) <= max(size + 1, 1.25 * size) for size in range(1, 1025))
    assert [doubled(size) for size in (1, 2, 3, 8, 9, 1000)] == [1, 2, 4, 8, 16, 1024]


def test_generation_compiles_for_few_shapes() -> None:
    config = tiny("llama", max_position_embeddings=64)
    reader = trainer(config).inference()
    tokens = batch(rows=8, length=12).tokens_BT

    def read(lengths: list[int]) -> None:
        cache, _ = reader.prefill(tokens[: len(lengths)], np.array(lengths, np.int32), 30)
        for rows in (len(lengths), len(lengths) - 1, 4, 3):
            cache = reader.select(cache, np.arange(rows))
            cache, _ = reader.decode(cache, tokens[:rows, 0])

    read([12, 9, 8, 8, 7, 3, 2, 1])
    with compilations() as count:
        read([11, 10, 5, 5, 5, 3, 3, 1])
        read([11, 10, 5, 5, 5, 3, 3])
        assert count() == 0


_LOADED_ALONE = """
import sys
from models.engine import training_engine
from models.optimizer import OptimizerConfig
from tests.models.tiny import tiny
training_engine("jax", tiny("llama"), OptimizerConfig(learning_rate=1e-3), "float32")
print([name for name in ("torch", "mlx") if name in sys.modules])
"""


def test_the_other_engines_are_not_loaded() -> None:
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _LOADED_ALONE]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def equations(primitive: str, jaxpr: Any) -> Iterator[Any]:
    """Every use of a primitive in a traced function, with those of the functions inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(primitive, inner)


def products_of_a_step(engine: JaxTraining, rows: Batch) -> list[Any]:
    """Every matrix product of a training step."""
    compiled, held, micro = engine._compiled, engine._held.parameters, engine._micro(cut(rows, 2))
    traced = jax.make_jaxpr(compiled.step)(held, engine._state, {}, micro, np.float32(1), np.zeros(2, np.uint32))
    return list(equations("dot_general", traced))


def is_exact(product: Any) -> bool:
    return str(product.params["precision"]).count("HIGHEST") == 2


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_products_of_fp32_are_fp32_on_every_device_in_gradients_too(name: str) -> None:
    found = products_of_a_step(trainer(tiny(name, dropout=0.1 if name == "gpt2" else 0.0)), batch())
    assert len(found) > 50
    assert all(map(is_exact, found))


def test_the_router_of_a_model_in_bf16_is_fp32() -> None:
    found = products_of_a_step(trainer(tiny("mixtral"), precision="bfloat16"), batch())
    of_fp32 = [product for product in found if any(factor.aval.dtype == np.float32 for factor in product.invars)]
    # The router's, not Muon's: forward once more for the counts of all parts of the batch; of its weight's gradient,
    # two ways, of which a machine takes one.
    rows = (batch().tokens_BT.shape[0] // 2, batch().tokens_BT.shape[1])
    assert sum(product.invars[0].aval.shape[:2] == rows for product in of_fp32) == 5
    assert all(map(is_exact, of_fp32))


def test_products_of_fp32_in_the_kernels_of_tpus_are_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.jax_engine.model.kind_for", lambda *_: "splash_interpreted")
    # No other test has this shape, so that none finds what was compiled for this one.
    engine = trainer(tiny("llama", max_position_embeddings=128, num_hidden_layers=3))
    found = products_of_a_step(engine, batch(rows=2, length=128))
    in_kernels = [product for product in found if len(product.invars[0].aval.shape) == 2]
    assert len(in_kernels) >= 7
    assert all(map(is_exact, found))


@pytest.mark.parametrize("name", list(COMPOSITIONS))
def test_weights_in_bf16_are_not_kept_for_the_backward_pass(name: str) -> None:
    engine = trainer(tiny(name), precision="bfloat16")
    held, micro = engine._held.parameters, engine._micro([batch()])
    traced = jax.make_jaxpr(engine._compiled.gradients)(held, {}, micro, np.zeros(2, np.uint32))
    of_layers = [value.aval for scan in equations("scan", traced) for value in scan.outvars]
    cast = {array.shape for array in of_layers if array.dtype == "bfloat16"}
    assert len(cast) > 3
    assert not cast & {array.shape for name, array in held.items() if array.ndim > 2}
