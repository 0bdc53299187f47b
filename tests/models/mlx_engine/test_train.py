"""What is MLX's own in training: compiled functions, rematerialisation, fp16 with its loss scale, layouts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from models import weights
from models.config import ModelConfig
from models.engine import Batch, EngineName, Layout, Precision, State, TrainingEngine, is_installed, training_engine
from models.optimizer import OPTIONAL, OptimizerConfig
from models.tuning import LoraConfig, Tuning
from tests.models.test_engine_documents import LENGTHS, packed
from tests.models.test_engines import assert_same, exported, gradients
from tests.models.test_lora import random_adapters
from tests.models.tiny import Arrays, batch, cut, pieces, tiny

pytest.importorskip("models.mlx_engine")

import mlx.core as mx  # only where MLX is

from models.mlx_engine.processes import Processes
from models.mlx_engine.train import MlxTraining

ADAMW = OptimizerConfig(learning_rate=0.01)
LORA = LoraConfig(rank=3, alpha=6)
STATES: tuple[State, ...] = ("weights", "optimizer")
MUON = OptimizerConfig(name="muon", learning_rate=0.01, muon_learning_rate=0.02)


@pytest.fixture
def own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place for what MLX compiles on a CPU: other processes at the same time would read it half-written."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def trainer(
    config: ModelConfig,
    optimizer: OptimizerConfig = ADAMW,
    precision: Precision = "float32",
    *,
    compiled: bool | None = None,
    rematerialize: bool = False,
    lora: LoraConfig | None = None,
) -> MlxTraining:
    layout = Layout(rematerialize=rematerialize)
    engine = MlxTraining(config, optimizer, precision, layout, Processes(None), compiled, Tuning(lora=lora))
    adapters = {} if lora is None else random_adapters(config, lora)
    engine.restore("weights", pieces({**weights.initial_weights(config, 1), **adapters}))
    return engine


def losses(engine: TrainingEngine, steps: Sequence[int]) -> list[float]:
    return [float(engine.step(cut(batch(seed=step), 1 + step % 2), 1.0, step).loss) for step in steps]


@pytest.mark.slow
@pytest.mark.usefixtures("own_kernels")
def test_compiled_functions_do_what_others_do() -> None:
    # One layer: a CPU's compiler takes long for each.
    config = tiny("mixtral", dropout=0.1, num_hidden_layers=1)
    compiled, plain = (trainer(config, MUON, compiled=compiled) for compiled in (True, False))
    steps = range(1, 7, 2)  # each shape is compiled: all of them have two micro-batches
    assert losses(compiled, steps) == pytest.approx(losses(plain, steps), rel=1e-5)
    assert_same(exported(compiled), exported(plain), atol=1e-4, rtol=1e-3)
    assert compiled.loss(packed(LENGTHS["short"])) == pytest.approx(plain.loss(packed(LENGTHS["short"])), rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("own_kernels")
def test_compiled_adapters_do_what_others_do() -> None:
    config, steps = tiny("llama", num_hidden_layers=1), range(0, 6, 2)
    compiled, plain = (trainer(config, lora=LORA, compiled=compiled) for compiled in (True, False))
    assert losses(compiled, steps) == pytest.approx(losses(plain, steps), rel=1e-5)
    assert_same(exported(compiled), exported(plain), atol=1e-4, rtol=1e-3)


def test_rematerialised_adapters_are_the_same() -> None:
    again, plain = (trainer(tiny("gpt2", dropout=0.1), rematerialize=again, lora=LORA) for again in (True, False))
    assert losses(again, range(4)) == pytest.approx(losses(plain, range(4)), rel=1e-5)


def test_adapters_in_fp16_have_its_loss_scale() -> None:
    half, plain = (trainer(tiny("gpt2"), precision=precision, lora=LORA) for precision in ("float16", "float32"))
    assert losses(half, range(4)) == pytest.approx(losses(plain, range(4)), rel=1e-2)
    half._scale = half._scale._replace(scale=mx.array(2.0**40))
    before = exported(half)
    assert float(half.step([batch()], 1.0, 9).skipped) == 1
    after = exported(half)
    assert float(after["loss_scale"]) == 2.0**39
    assert_same(*({name: one[name] for name in one.keys() - OPTIONAL} for one in (before, after)))


@pytest.mark.slow
@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
def test_nothing_is_traced_after_the_first_step(documents: bool) -> None:
    def rows(step: int) -> Batch:
        return packed(LENGTHS["short"], seed=step) if documents else batch(seed=step)

    config = tiny("mixtral", num_hidden_layers=1)
    engine = trainer(config, MUON, compiled=True)
    engine.step(cut(rows(0), 2), 1.0, 0)
    engine.loss(rows(0))
    traced = engine.traced
    for step in range(1, 4):
        engine.step(cut(rows(step), 2), 0.5 / step, step)
        engine.loss(rows(step))
    # The last rows of a validation are fewer.
    last = rows(4).part(slice(0, 1))
    assert engine.loss(last) == pytest.approx(trainer(config).loss(last), rel=0.5)
    assert engine.traced == traced


def test_a_smaller_batch_has_the_loss_that_it_has_alone() -> None:
    engine, last = trainer(tiny("gpt2")), batch(rows=6).part(slice(4, 6))
    alone = engine.loss(last)
    engine.loss(batch(rows=6))
    assert engine.loss(last) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_blocks_computed_again_give_the_same(name: str) -> None:
    config = tiny(name, dropout=0.2)
    one, other = (trainer(config, rematerialize=again) for again in (False, True))
    batches = cut(batch(), 2)
    assert_same(gradients(other, batches, 3), gradients(one, batches, 3), atol=1e-6, rtol=1e-5)
    assert losses(other, range(3)) == pytest.approx(losses(one, range(3)), rel=1e-5)


def test_rematerialisation_needs_less_memory() -> None:
    config = tiny("llama", hidden_size=64, intermediate_size=256, num_hidden_layers=8, max_position_embeddings=256)
    peaks = []
    for again in (False, True):
        engine = trainer(config, rematerialize=again)
        engine.step([batch(rows=8, length=256)], 1.0, 0)
        mx.synchronize()
        mx.reset_peak_memory()
        float(engine.step([batch(rows=8, length=256)], 1.0, 0).loss)
        mx.synchronize()
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 0.6 * peaks[0]


def scaling(engine: MlxTraining) -> tuple[float, int]:
    state: dict[str, Any] = {piece.name: piece.array for piece in engine.export("optimizer")}
    return float(state["loss_scale"]), int(state["loss_scale_updates"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_fp16_stays_near_fp32(name: str) -> None:
    fp32, fp16 = trainer(tiny(name)), trainer(tiny(name), precision="float16")
    assert fp16.loss(batch())[0] == pytest.approx(fp32.loss(batch())[0], rel=0.01)
    found, expected = gradients(fp16, [batch()]), gradients(fp32, [batch()])
    whole = np.sqrt(sum((array**2).sum() for array in expected.values()))
    for part, array in expected.items():
        assert np.linalg.norm(found[part] - array) < 0.02 * max(np.linalg.norm(array), 0.1 * whole), part
    assert losses(fp16, range(8)) == pytest.approx(losses(fp32, range(8)), rel=0.05)
    assert all(array.dtype == np.float32 for array in exported(fp16, optimizer=False).values())


def test_small_gradients_stay_in_fp16() -> None:
    # Over so many targets, the gradient of each is below what fp16 has, but for the scale.
    rows = batch(rows=64, length=24, padded=False)
    expected = gradients(trainer(tiny("llama", initializer_range=0.01)), [rows])
    engine = trainer(tiny("llama", initializer_range=0.01), precision="float16")
    scaled = gradients(engine, [rows])
    engine._scale = engine._scale._replace(scale=mx.array(2.0**-12))
    lost = gradients(engine, [rows])
    name = "model.layers.0.self_attn.q_proj.weight"
    norm = np.linalg.norm(expected[name])
    assert np.linalg.norm(scaled[name] - expected[name]) < 0.05 * norm
    assert np.linalg.norm(lost[name] - expected[name]) > 0.5 * norm


def test_an_overflow_in_fp16_is_skipped_and_halves_the_scale() -> None:
    engine = trainer(tiny("llama"), MUON, "float16")
    losses(engine, range(2))
    engine._scale = engine._scale._replace(scale=mx.array(2.0**40))
    before = exported(engine)
    result = engine.step([batch()], 1.0, 2)
    assert float(result.skipped) == 1
    assert np.isfinite(float(result.loss))
    after = exported(engine)
    assert scaling(engine) == (2.0**39, 0)
    own = {"loss_scale", "loss_scale_updates"}
    assert_same({n: a for n, a in after.items() if n not in own}, {n: a for n, a in before.items() if n not in own})
    for step in range(3, 40):
        result = engine.step([batch(seed=step)], 1.0, step)
    assert float(result.skipped) == 0
    assert int(exported(engine)["updates"]) > 2


def test_an_fp16_run_goes_on_bitwise_from_its_scale() -> None:
    config = tiny("gpt2", dropout=0.2)
    straight, halves = (trainer(config, MUON, "float16") for _ in range(2))
    straight._scale = straight._scale._replace(scale=mx.array(2.0**30))
    losses(straight, range(3))
    halves.restore("weights", straight.export("weights"))
    halves.restore("optimizer", straight.export("optimizer"))
    assert scaling(halves) == scaling(straight)
    assert losses(halves, range(3, 20)) == losses(straight, range(3, 20))
    assert_same(exported(halves), exported(straight))


def hand_over(one: TrainingEngine, other: TrainingEngine) -> None:
    for state in STATES:
        other.restore(state, list(one.export(state)))


def test_other_precisions_have_no_scale_and_take_a_state_with_one() -> None:
    fp16, fp32 = trainer(tiny("llama"), precision="float16"), trainer(tiny("llama"))
    losses(fp16, range(2))
    assert "loss_scale" not in exported(fp32)
    fp32.restore("weights", fp16.export("weights"))
    fp32.restore("optimizer", fp16.export("optimizer"))
    assert int(exported(fp32)["updates"]) == 2
    fp16.restore("weights", fp32.export("weights"))
    fp16.restore("optimizer", fp32.export("optimizer"))
    assert scaling(fp16) == (2.0**15, 0)


@pytest.mark.parametrize("other", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_an_fp16_run_goes_on_with_another_engine_and_back(other: EngineName) -> None:
    if not is_installed(other):
        pytest.skip(f"{other} is not installed")
    config = tiny("llama")
    fp16, fp32 = trainer(config, precision="float16"), trainer(config)
    fp16._scale = fp16._scale._replace(scale=mx.array(2.0**10))
    expected = losses(fp32, range(6))
    losses(fp16, range(2))
    assert scaling(fp16) == (2.0**10, 2)
    between = training_engine(other, config, ADAMW, "float32")
    hand_over(fp16, between)
    assert_same(exported(between), {n: array for n, array in exported(fp16).items() if n not in OPTIONAL})
    found = losses(between, range(2, 4))
    hand_over(between, fp16)
    assert scaling(fp16) == (2.0**15, 0)
    assert_same({n: array for n, array in exported(fp16).items() if n not in OPTIONAL}, exported(between))
    assert found + losses(fp16, range(4, 6)) == pytest.approx(expected[2:], rel=0.02)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=2), r"layout\.tensor is 2; use layout\.data, or engine: jax$"),
        (Layout(fsdp=2), r"layout\.fsdp is 2; use layout\.data, or engine: jax or engine: torch$"),
        (Layout(data=3), r"layout\.data is 3, and engine 'mlx' runs in 1 process"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout: Layout, message: str) -> None:
    with pytest.raises(UserError, match=message):
        training_engine("mlx", tiny("llama"), ADAMW, "float32", layout)


def test_moments_are_those_of_the_definition_after_many_updates() -> None:
    # Bias corrections far from 1 and near it, from a state that another engine may have left.
    engine = trainer(tiny("llama"), OptimizerConfig(learning_rate=0.01, beta2=0.999))
    state: Arrays = {piece.name: piece.array for piece in engine.export("optimizer")}
    state["updates"] = np.array(123_456, np.int64)
    engine.restore("optimizer", pieces(state))
    engine.step([batch()], 1.0, 0)
    assert int(exported(engine)["updates"]) == 123_457
