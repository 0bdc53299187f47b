"""What every engine has to do alike: the contract of `models.engine`, held against numbers and itself."""

import importlib.util
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from models import weights
from models.config import ModelConfig
from models.engine import Batch, EngineName, Precision, TrainingEngine, inference_engine, training_engine
from models.generation import NotFinite, generate
from models.optimizer import OptimizerConfig
from models.sampling import SamplingConfig
from tests.models.reference import ReferenceOptimizer
from tests.models.tiny import COMPOSITIONS, VOCABULARY, Arrays, batch, cut, pieces, tiny

ENGINES: list[EngineName] = ["torch", "jax", "mlx"]
NAMES = list(COMPOSITIONS)
ADAMW = OptimizerConfig(learning_rate=0.02)
MUON = OptimizerConfig(name="muon", learning_rate=0.02, muon_learning_rate=0.05)


@pytest.fixture(params=ENGINES)
def engine_name(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return name


def trainer(
    engine_name: EngineName, config: ModelConfig, optimizer: OptimizerConfig = ADAMW, precision: Precision = "float32"
) -> TrainingEngine:
    engine = training_engine(engine_name, config, optimizer, precision)
    engine.restore("weights", pieces(dict(weights.initial_weights(config, 1))))
    return engine


def exported(engine: TrainingEngine, *, optimizer: bool = True) -> Arrays:
    """Everything that an engine holds, whole."""
    found = [*engine.export("weights"), *(engine.export("optimizer") if optimizer else [])]
    return weights.assemble(found, weights.canonical_shapes(engine.inference().config))


def gradients(engine: TrainingEngine, batches: list[Batch], step: int = 0) -> Arrays:
    config = engine.inference().config
    return weights.gather(engine.gradients(batches, step), weights.canonical_shapes(config))


def assert_same(one: Arrays, other: Arrays, **tolerance: Any) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        if tolerance:
            np.testing.assert_allclose(array, other[name], err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_a_batch_by_heart(engine_name: EngineName, name: str) -> None:
    engine, rows = trainer(engine_name, tiny(name), MUON), batch()
    first = engine.loss(rows)
    losses = [float(engine.step([rows], 1.0, step).loss) for step in range(12)]
    assert losses[0] == pytest.approx(first[0] / first[1], rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=lambda config: config.name)
@pytest.mark.parametrize("name", NAMES)
def test_updates_are_those_of_the_definition(engine_name: EngineName, name: str, optimizer: OptimizerConfig) -> None:
    config = tiny(name)
    engine = trainer(engine_name, config, optimizer)
    reference = ReferenceOptimizer(config, optimizer, weights.initial_weights(config, 1))
    for step, scale in enumerate((1.0, 0.5, 0.25)):
        rows = batch(seed=step)
        given = gradients(engine, [rows], step)
        norm = reference.step(given, scale)
        result = engine.step([rows], scale, step)
        assert float(result.gradient_norm) == pytest.approx(norm, rel=1e-4)
        assert not float(result.skipped)
        found, expected = exported(engine, optimizer=False), reference.canonical()
        for name, gradient in given.items():
            # Adam makes a step of a gradient however small: rounding is much of it then, and all of a bias of keys.
            part = np.minimum(1e-7 * norm / np.maximum(abs(gradient), 1e-30), 2)
            if gradient.ndim > 1:
                part[gradient == 0] = 0  # of tokens that are not there
            allowed = 2e-5 + 1e-4 * abs(expected[name]) + optimizer.learning_rate * part
            assert (abs(found[name] - expected[name]) <= allowed).all(), name
        # Small differences of gradients near zero grow in Adam's quotient: go on from the same point.
        reference.values = reference._read(found)


@pytest.mark.parametrize("clip", [None, 0.1, 1e9])
def test_the_global_norm_is_clipped(engine_name: EngineName, clip: float | None) -> None:
    # AdamW forgets a constant factor, but for its epsilon; a large one lets it show.
    config, optimizer = tiny("llama"), OptimizerConfig(learning_rate=0.1, eps=1.0, clip=clip)
    engine = trainer(engine_name, config, optimizer)
    reference = ReferenceOptimizer(config, optimizer, weights.initial_weights(config, 1))
    reference.step(gradients(engine, [batch()]), 1.0)
    engine.step([batch()], 1.0, 0)
    assert_same(exported(engine, optimizer=False), reference.canonical(), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_make_no_difference(engine_name: EngineName, name: str) -> None:
    engine, rows = trainer(engine_name, tiny(name)), batch(rows=7)
    whole = gradients(engine, [rows])
    for parts in (2, 7):
        assert_same(gradients(engine, cut(rows, parts)), whole, atol=1e-5)
    one, many = trainer(engine_name, tiny(name)), trainer(engine_name, tiny(name))
    first, second = one.step([rows], 1.0, 0), many.step(cut(rows, 3), 1.0, 0)
    assert float(first.loss) == pytest.approx(float(second.loss), rel=1e-5)
    assert float(first.gradient_norm) == pytest.approx(float(second.gradient_norm), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_padding_makes_no_difference(engine_name: EngineName, name: str) -> None:
    engine, rows = trainer(engine_name, tiny(name)), batch()
    wider = ((0, 3), (0, 5))
    longer = Batch(np.pad(rows[0], wider), np.pad(rows[1], wider), np.pad(rows[2], wider))
    assert engine.loss(longer) == pytest.approx(engine.loss(rows), rel=1e-5)
    assert_same(gradients(engine, [longer]), gradients(engine, [rows]), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_micro_batch_without_targets_adds_nothing(engine_name: EngineName, name: str) -> None:
    engine, rows = trainer(engine_name, tiny(name)), batch()
    nothing = rows._replace(loss_mask_BT=np.zeros_like(rows.loss_mask_BT))
    assert_same(gradients(engine, [rows, nothing]), gradients(engine, [rows]), atol=1e-6)
    assert engine.loss(nothing) == (0.0, 0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=lambda config: config.name)
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_restored_engine_goes_on_bitwise(
    engine_name: EngineName, name: str, optimizer: OptimizerConfig, precision: Precision
) -> None:
    config = tiny(name, dropout=0.2)
    straight = trainer(engine_name, config, optimizer, precision)
    halves: Any = None
    for step in range(6):
        if step == 3:
            halves = training_engine(engine_name, config, optimizer, precision)
            halves.restore("weights", straight.export("weights"))
            halves.restore("optimizer", straight.export("optimizer"))
            assert_same(exported(straight), exported(halves))
        batches = cut(batch(seed=step), 2)
        result = straight.step(batches, 1.0, step)
        if halves is not None:
            again = halves.step(batches, 1.0, step)
            assert [float(value) for value in result[:3]] == [float(value) for value in again[:3]]
    assert_same(exported(straight), exported(halves))
    assert int(exported(straight)["updates"]) == 6


def test_exports_are_copies_and_complete(engine_name: EngineName) -> None:
    engine = trainer(engine_name, tiny("gpt2"), MUON)
    before = weights.gather(engine.export("weights"), weights.canonical_shapes(tiny("gpt2")))
    assert_same(before, dict(weights.initial_weights(tiny("gpt2"), 1)))
    kept = list(engine.export("weights"))
    engine.step([batch()], 1.0, 0)
    assert_same(weights.gather(kept, weights.canonical_shapes(tiny("gpt2"))), before)
    state = {piece.name for piece in engine.export("optimizer")}
    assert {"momentum_buffer:transformer.h.0.attn.c_attn.weight", "exp_avg:transformer.wte.weight"} <= state
    assert "exp_avg_sq:transformer.h.0.attn.c_attn.bias" in state
    assert "exp_avg:transformer.h.0.attn.c_attn.weight" not in state


def test_restoring_weights_alone_leaves_a_fresh_optimizer(engine_name: EngineName) -> None:
    used, fresh = (trainer(engine_name, tiny("llama"), MUON) for _ in range(2))
    used.step([batch()], 1.0, 0)
    used.restore("weights", fresh.export("weights"))
    assert_same(exported(used), exported(fresh))


def test_restoring_names_what_does_not_fit(engine_name: EngineName) -> None:
    engine = trainer(engine_name, tiny("llama"))
    arrays: Arrays = dict(weights.initial_weights(tiny("llama"), 0))
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        engine.restore("weights", pieces({name: array for name, array in arrays.items() if name != "lm_head.weight"}))
    with pytest.raises(ValueError, match="stranger is unexpected"):
        engine.restore("weights", pieces({**arrays, "stranger": np.zeros(1)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(3,\)"):
        engine.restore("weights", pieces({**arrays, "model.norm.weight": np.ones(3, np.float32)}))
    state = [piece for piece in engine.export("optimizer") if piece.name != "updates"]
    with pytest.raises(ValueError, match="updates is missing"):
        engine.restore("optimizer", state)


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=lambda config: config.name)
def test_an_update_that_is_not_finite_is_skipped_whole(engine_name: EngineName, optimizer: OptimizerConfig) -> None:
    engine = trainer(engine_name, tiny("gpt2"), optimizer)
    engine.step([batch()], 1.0, 0)
    broken: Arrays = exported(engine)
    broken["transformer.h.1.mlp.c_fc.weight"][0, 0] = np.inf
    names = weights.canonical_shapes(tiny("gpt2"))
    engine.restore("weights", pieces({name: array for name, array in broken.items() if name in names}))
    engine.restore("optimizer", pieces({name: array for name, array in broken.items() if name not in names}))
    result = engine.step([batch()], 1.0, 1)
    assert float(result.skipped) == 1
    assert_same(exported(engine), broken)


def test_a_rate_of_nothing_changes_no_weight(engine_name: EngineName) -> None:
    engine = trainer(engine_name, tiny("mixtral"), MUON)
    before = exported(engine, optimizer=False)
    engine.step([batch()], 0.0, 0)
    assert_same(exported(engine, optimizer=False), before)


def test_dropout_is_keyed_by_the_step_and_spares_inference(engine_name: EngineName) -> None:
    engine = trainer(engine_name, tiny("gpt2", dropout=0.3))
    first, again, later = (gradients(engine, [batch()], step) for step in (3, 3, 4))
    assert_same(first, again)
    other = trainer(engine_name, tiny("gpt2", dropout=0.3))
    other.restore("weights", engine.export("weights"))
    assert_same(first, gradients(other, [batch()], 3))
    assert abs(first["transformer.wte.weight"] - later["transformer.wte.weight"]).max() > 1e-4
    plain = trainer(engine_name, tiny("gpt2"))
    assert engine.loss(batch()) == plain.loss(batch())
    halves = gradients(engine, [batch(), batch()], 3)
    assert abs(first["transformer.wte.weight"] - halves["transformer.wte.weight"]).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_bf16_stays_near_fp32(engine_name: EngineName, name: str) -> None:
    fp32, bf16 = trainer(engine_name, tiny(name)), trainer(engine_name, tiny(name), precision="bfloat16")
    assert bf16.loss(batch())[0] == pytest.approx(fp32.loss(batch())[0], rel=0.02)
    bf16.step([batch()], 1.0, 0)
    assert all(array.dtype == np.float32 for array in exported(bf16, optimizer=False).values())


def test_tokens_outside_of_the_vocabulary_and_empty_losses_are_refused(engine_name: EngineName) -> None:
    engine, rows = trainer(engine_name, tiny("llama")), batch()
    with pytest.raises(ValueError, match="vocabulary of 23"):
        engine.step([rows._replace(tokens_BT=rows.tokens_BT + VOCABULARY)], 1.0, 0)
    with pytest.raises(UserError, match="no token that counts"):
        engine.step([rows._replace(loss_mask_BT=np.zeros_like(rows.loss_mask_BT))], 1.0, 0)
    with pytest.raises(ValueError, match="at most 24 positions"):
        engine.loss(batch(length=25))


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_sum_to_the_loss(engine_name: EngineName, name: str) -> None:
    engine, rows = trainer(engine_name, tiny(name)), batch()
    found = engine.inference().log_probabilities(rows)
    assert found.shape == rows.tokens_BT.shape
    assert -found[rows.loss_mask_BT].sum() == pytest.approx(engine.loss(rows)[0], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_gives_the_logits_of_the_whole(engine_name: EngineName, name: str) -> None:
    config = tiny(name)
    engine = inference_engine(engine_name, config, "float32", pieces(dict(weights.initial_weights(config, 1))))
    tokens = batch(rows=5, length=14).tokens_BT
    whole = engine.logits(tokens)
    lengths = np.array([7, 3, 5, 1, 7], np.int32)
    cache, found = engine.prefill(tokens[:, :7], lengths, 11)
    rows = np.arange(5)
    np.testing.assert_allclose(found, whole[rows, lengths - 1], atol=1e-5)
    for appended in range(6):
        if appended == 2:
            rows = np.array([3, 1, 2])  # the longest rows leave, and so does the need for their room
            cache = engine.select(cache, np.array([3, 1, 2]))
        places = lengths[rows] + appended
        cache, found = engine.decode(cache, tokens[rows, places])
        np.testing.assert_allclose(found, whole[rows, places], atol=1e-5)
    with pytest.raises(ValueError, match="cache is full"):
        engine.decode(cache, tokens[rows, 0])


def prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(2)
    return [random.integers(0, VOCABULARY, random.integers(1, 9)).tolist() for _ in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation_is_that_of_the_uncached_model(engine_name: EngineName, name: str) -> None:
    config = tiny(name)
    engine = inference_engine(engine_name, config, "float32", pieces(dict(weights.initial_weights(config, 1))))
    stops = {2, 3}
    expected = []
    for prompt in prompts(12):
        row = list(prompt)
        while len(row) < min(len(prompt) + 18, config.max_position_embeddings):
            token = int(engine.logits(np.array([row], np.int32))[0, -1].argmax())
            row.append(token)
            if token in stops:
                break
        expected.append(row[len(prompt) :])
    found = generate(engine, prompts(12), SamplingConfig(max_new_tokens=18), stops, batch_size=5)
    assert found == expected
    assert len({len(answer) for answer in expected}) > 1  # rows left the batch at different times


def test_generation_depends_neither_on_batch_size_nor_on_order(engine_name: EngineName) -> None:
    config = tiny("llama")
    engine = inference_engine(engine_name, config, "float32", pieces(dict(weights.initial_weights(config, 1))))
    sampling = SamplingConfig(max_new_tokens=10, temperature=0.8, top_k=9, repetition_penalty=1.2, seed=5)
    found = generate(engine, prompts(17), sampling, {1}, batch_size=17)
    for size in (1, 4):
        assert generate(engine, prompts(17), sampling, {1}, batch_size=size) == found
    greedy = SamplingConfig(max_new_tokens=10)
    forwards, backwards = (generate(engine, order, greedy, {1}) for order in (prompts(17), prompts(17)[::-1]))
    assert forwards == backwards[::-1]
    assert generate(engine, prompts(17), sampling.model_copy(update={"seed": 6}), {1}) != found


def test_generation_ends_with_the_positions_and_refuses_odd_prompts(engine_name: EngineName) -> None:
    config = tiny("gpt2")
    engine = inference_engine(engine_name, config, "float32", pieces(dict(weights.initial_weights(config, 1))))
    sampling = SamplingConfig(max_new_tokens=100)
    found = generate(engine, [[1] * 24, [1] * 20, [1]], sampling, ())
    assert [len(answer) for answer in found] == [0, 4, 23]
    assert generate(engine, [], sampling, ()) == []
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        generate(engine, [[1], []], sampling, ())
    with pytest.raises(ValueError, match="prompt 0 has 25 tokens"):
        generate(engine, [[1] * 25], sampling, ())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_is_generated_from_logits_that_are_not_finite(
    engine_name: EngineName, temperature: float, value: float
) -> None:
    config = tiny("llama")
    arrays = dict(weights.initial_weights(config, 1))
    arrays["model.norm.weight"] = np.full_like(arrays["model.norm.weight"], value)
    engine = inference_engine(engine_name, config, "float32", pieces(arrays))
    with pytest.raises(NotFinite, match="the model says of the next token is not finite"):
        generate(engine, prompts(3), SamplingConfig(max_new_tokens=4, temperature=temperature), ())


def test_the_memory_that_is_told_holds_the_weights_and_the_moments(engine_name: EngineName) -> None:
    config = tiny("llama")
    assert trainer(engine_name, config).peak_memory() > 3 * 4 * weights.parameter_count(config)


def test_inference_follows_the_weights_in_training(engine_name: EngineName) -> None:
    engine = trainer(engine_name, tiny("llama"))
    reader = engine.inference()
    before = reader.logits(batch().tokens_BT)
    engine.step([batch()], 1.0, 0)
    after = reader.logits(batch().tokens_BT)
    assert abs(after - before).max() > 1e-3
    np.testing.assert_array_equal(after, engine.inference().logits(batch().tokens_BT))
