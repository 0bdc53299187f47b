"""Stage `stack` on model folders: what comes out, what is said of it, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from common.errors import UserError
from models.config import ModelConfig
from models.engine import inference_engine
from models.optimizer import OptimizerConfig
from models.tokenizer import write_tokenizer
from models.training.events import Note
from models.training.flops import training_flops_per_token
from models.weights import Array, optimizer_shapes, parameter_count, whole_pieces
from tasks.checkpoint import ModelFolder, read_model, write_model
from tasks.history import Grown, History, Trained
from tasks.stack import Config, grown_model, run
from tasks.vocabulary.config import ROLES, Characters
from tasks.vocabulary.written import characters_tokenizer
from tests.models.tiny import random_weights
from tests.tasks.conftest import RunStage, context_in

SHAPE = {
    "vocab_size": 18,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "gpt2": {"architecture": "gpt2"},
    "llama": {"architecture": "llama", "num_key_value_heads": 2},
    "mixtral": {"architecture": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
}
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("stack", "interleave", "middle", "overlap", "zero", "random", "width")},
    "upcycle": {"method": "upcycle", "num_local_experts": 4, "num_experts_per_tok": 2},
}
PRESERVING = ("zero", "width", "upcycle")
ADAMW = OptimizerConfig(learning_rate=0.01)


def config_of(architecture: str) -> ModelConfig:
    return ModelConfig.model_validate({**SHAPE, **ARCHITECTURES[architecture]})


def trained(config: ModelConfig, tokens: int) -> Trained:
    return Trained(
        parameters=parameter_count(config), steps=7, tokens=tokens, flops=1e9, measured_on=None, validation=()
    )


def write_base(
    folder: Path, config: ModelConfig, optimizer: dict[str, Array] | None = None, history: History = ()
) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    vocabulary = Characters(kind="characters", characters="0123456789+-*/=")
    write_tokenizer(folder / "tokenizer", characters_tokenizer(vocabulary), ROLES)
    weights: dict[str, Array] = dict(random_weights(config, 3))
    write_model(folder, ModelFolder(config, weights, optimizer, ADAMW, history))
    return folder


def moments(config: ModelConfig) -> dict[str, Array]:
    random = np.random.default_rng(0)
    shapes = optimizer_shapes(config, ADAMW)
    found: dict[str, Array] = {name: random.random(shape, np.float32) for name, shape in shapes.items() if shape}
    return found | {"updates": np.array(7, np.int64)}


def relative(difference: NDArray[np.float32], whole: NDArray[np.float32]) -> float:
    """Root mean square, as a share of that of the whole."""
    return float(np.sqrt((difference**2).mean() / (whole**2).mean()))


@pytest.mark.parametrize(
    ("architecture", "method"),
    [(one, other) for one in ARCHITECTURES for other in METHODS if other != "upcycle" or one == "llama"],
)
def test_a_grown_model_opens_in_transformers_and_agrees(
    run_stage: RunStage, tmp_path: Path, architecture: str, method: str
) -> None:
    config = config_of(architecture)
    base = write_base(tmp_path / "base", config)
    folder, metrics = run_stage("stack", METHODS[method], model=base)
    grown = read_model(folder)
    assert grown.config == grown_model(Config.model_validate(METHODS[method]), {"model": config})
    assert metrics["parameters"] == {"before": parameter_count(config), "after": parameter_count(grown.config)}
    published, _ = run_stage("publish", {"title": "Grown"}, model=folder)
    assert not list(published.glob("*.py"))
    theirs: Any = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    ids = np.random.default_rng(1).integers(0, 18, (3, 12), dtype=np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    found = inference_engine("torch", grown.config, "float32", whole_pieces(grown.weights)).logits(ids)
    assert relative(found - expected, expected) <= 5e-6
    before = inference_engine("torch", config, "float32", whole_pieces(read_model(base).weights)).logits(ids)
    changed = relative(found - before, before)
    assert changed <= 1e-6 if method in PRESERVING else changed > 1e-2


def test_the_record_and_the_history_say_where_each_layer_comes_from(run_stage: RunStage, tmp_path: Path) -> None:
    config = config_of("llama")
    base = write_base(tmp_path / "base", config, history=(trained(config, 100),))
    folder, metrics = run_stage("stack", {"method": "zero", "factor": 1.5}, model=base)
    assert metrics["source_layers"] == [0, 1, 1, 2, 3, 3]
    assert metrics["silent_layers"] == [2, 5]
    grown = read_model(folder)
    flops = metrics["flops_per_token"]
    assert flops["sequence_length"] == 16
    assert flops["before"] == training_flops_per_token(config, 16)
    assert flops["after"] == training_flops_per_token(grown.config, 16) > flops["before"]
    counts = (parameter_count(config), parameter_count(grown.config))
    assert metrics["summary"] == (f"zero: num_hidden_layers 4 → 6, {counts[0]:,} → {counts[1]:,} parameters")
    assert metrics["notes"] == []
    entry = Grown(
        operator="zero × 1.5",
        parameters_before=counts[0],
        parameters=counts[1],
        source_layers=(0, 1, 1, 2, 3, 3),
        optimizer_state="reset",
    )
    assert grown.history == (trained(config, 100), entry)
    _, fresh = run_stage("stack", {"method": "random", "num_hidden_layers": 6}, model=base)
    assert fresh["source_layers"] == [0, 1, None, 2, 3, None]


def test_what_a_wider_model_and_a_mixture_are_called(run_stage: RunStage, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", config_of("llama"))
    folder, wider = run_stage("stack", METHODS["width"], model=base)
    assert wider["summary"].startswith(
        "width: hidden_size 16 → 32, intermediate_size 24 → 48, num_attention_heads 4 → 8, num_key_value_heads 2 → 4, "
    )
    assert wider["source_layers"] == []
    (entry,) = read_model(folder).history
    assert isinstance(entry, Grown)
    assert entry.operator == "width × 2"
    folder, _ = run_stage("stack", {**METHODS["width"], "factor": 3, "axes": ["num_attention_heads"]}, model=base)
    (entry,) = read_model(folder).history
    assert isinstance(entry, Grown)
    assert entry.operator == "width × 3 of num_attention_heads"
    folder, mixture = run_stage("stack", METHODS["upcycle"], model=base)
    assert mixture["summary"].startswith("upcycle: num_local_experts 4, num_experts_per_tok 2, ")
    assert read_model(folder).config.architecture == "mixtral"


def test_the_optimizer_s_state_is_copied_in_whole_in_part_or_not_at_all(run_stage: RunStage, tmp_path: Path) -> None:
    config = config_of("gpt2")
    state = moments(config)
    base = write_base(tmp_path / "base", config, state)
    name = "transformer.h.{}.mlp.c_fc.weight"

    def grown(policy: str) -> dict[str, Array] | None:
        folder, metrics = run_stage("stack", {"optimizer_state": policy}, model=base)
        assert metrics["notes"] == []
        found = read_model(folder, with_optimizer=True)
        assert found.trained_with == ADAMW
        if found.optimizer is not None:
            shapes = optimizer_shapes(found.config, ADAMW)
            assert {key: array.shape for key, array in found.optimizer.items()} == shapes
        return found.optimizer

    whole, part = grown("copy"), grown("copy-momentum")
    assert grown("reset") is None
    assert whole is not None
    assert part is not None
    for moment in ("exp_avg:", "exp_avg_sq:"):
        np.testing.assert_array_equal(whole[moment + name.format(5)], state[moment + name.format(1)])
    assert (int(whole["updates"]), int(part["updates"])) == (7, 1)
    mean = state["exp_avg:" + name.format(1)].astype(np.float64) / (1 - 0.9**7)
    np.testing.assert_allclose(part["exp_avg:" + name.format(5)].astype(np.float64), 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(part["exp_avg_sq:" + name.format(5)].astype(np.float64), 0.05 * mean**2, rtol=1e-5)


def test_a_state_of_some_weights_alone_is_left_behind_and_it_is_said(tmp_path: Path) -> None:
    """In the record, and while the stage runs."""
    config = config_of("gpt2")
    state = moments(config)
    del state["exp_avg:transformer.wte.weight"]
    base = write_base(tmp_path / "base", config, state)
    events: list[object] = []
    context = replace(context_in(tmp_path / "stacked", "stacked"), report=events.append)
    metrics = run(Config(), {"model": base}, context)
    assert read_model(context.output, with_optimizer=True).optimizer is None
    (note,) = metrics["notes"]
    assert "is not of all weights" in note
    assert events == [Note(note)]


@pytest.mark.parametrize(
    ("config", "tokens_per_parameter", "said"),
    [
        ({"factor": 2}, 20, []),
        (
            {"factor": 2},
            20.5,
            ["20.5 positions per parameter, padding .*: after more than 20 tokens, .*2510.06548, 2605.13405"],
        ),
        ({"factor": 4}, 1, []),
        ({"factor": 5}, 1, ["grows 5 times: past 4 times, .*2605.13405, 2510.06548; .*2405.15319"]),
        ({"method": "width", "factor": 3}, 30, ["30.0 positions per parameter", "grows 8.49 times: past"]),
        ({"method": "upcycle", "num_local_experts": 16, "num_experts_per_tok": 1}, 1, []),
    ],
)
def test_growth_that_is_known_not_to_pay_is_advised_against(
    run_stage: RunStage, tmp_path: Path, config: dict[str, Any], tokens_per_parameter: float, said: list[str]
) -> None:
    model = config_of("llama")
    half = round(tokens_per_parameter * parameter_count(model) / 2)
    base = write_base(tmp_path / "base", model, history=(trained(model, half), trained(model, half)))
    _, metrics = run_stage("stack", config, model=base)
    assert len(metrics["notes"]) == len(said)
    for note, pattern in zip(metrics["notes"], said, strict=True):
        assert re.search(pattern, note), note


def grown(config: ModelConfig, layers: int, operator: str = "stack", **changes: Any) -> tuple[Grown, ModelConfig]:
    """A growth to so many layers, or with other changes, and the model after it."""
    after = ModelConfig.model_validate({**config.model_dump(), "num_hidden_layers": layers, **changes})
    sources = tuple(layer % config.num_hidden_layers for layer in range(layers))
    return Grown(
        operator=operator,
        parameters_before=parameter_count(config),
        parameters=parameter_count(after),
        source_layers=sources if layers > config.num_hidden_layers else (),
    ), after


def notes_on(run_stage: RunStage, folder: Path, config: dict[str, Any], model: ModelConfig, *history: Any) -> list[str]:
    _, metrics = run_stage("stack", config, model=write_base(folder, model, history=history))
    return list(metrics["notes"])


def test_growth_is_judged_from_the_first_size_on(run_stage: RunStage, tmp_path: Path) -> None:
    base = config_of("llama")
    first, middle = grown(base, 12, "stack × 3")
    rounds = (trained(base, 9), first, trained(middle, 9))
    again = "has grown and was trained before: one late growth .* better than several .*2511.04981"
    large, note = notes_on(run_stage, tmp_path / "0", {"factor": 3}, middle, *rounds)
    assert re.search("the model grows 9 times in all: past 4 times, .*2605.13405", large)
    assert re.search(again, note)
    (note,) = notes_on(run_stage, tmp_path / "1", {"num_hidden_layers": 16}, middle, *rounds)
    assert re.search(again, note)
    # Two growths with nothing between are one.
    (large,) = notes_on(run_stage, tmp_path / "2", {"factor": 3}, middle, trained(base, 9), first)
    assert "9 times in all" in large
    wider, wide = grown(base, 4, "width × 3", hidden_size=48, intermediate_size=72)
    (large,) = notes_on(run_stage, tmp_path / "3", {}, wide, trained(base, 9), wider)
    factor = parameter_count(grown(wide, 8)[1]) / parameter_count(base)
    assert f"grows {factor:.3g} times in all" in large


def test_experts_are_no_growth_that_others_count_in(run_stage: RunStage, tmp_path: Path) -> None:
    base = config_of("llama")
    experts = {"architecture": "mixtral", "mlp": "mixture", "num_local_experts": 16, "num_experts_per_tok": 1}
    mixed, mixture = grown(base, 4, "upcycle to 16 experts", **experts)
    assert mixed.parameters > 4 * mixed.parameters_before
    assert notes_on(run_stage, tmp_path / "0", {}, mixture, trained(base, 9), mixed, trained(mixture, 9)) == []
    first, deep = grown(base, 24, "stack × 6")
    history = (trained(base, 9), first, trained(deep, 9))
    assert notes_on(run_stage, tmp_path / "1", METHODS["upcycle"], deep, *history) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block": 2}, "method stack has no use for block; it takes factor, method, num_hidden_layers, optimizer_stat"),
        ({"method": "width", "num_hidden_layers": 8}, "method width has no use for num_hidden_layers"),
        ({"method": "zero", "seed": 3}, "method zero has no use for seed"),
        ({"method": "interleave", "split": "even"}, "method interleave has no use for split"),
        ({"method": "random", "num_local_experts": 4}, "method random has no use for num_local_experts"),
        ({"method": "upcycle", "factor": 2}, "method upcycle has no use for factor"),
        ({"method": "upcycle", "num_local_experts": 4}, "method upcycle needs num_local_experts and num_experts_per"),
        ({"factor": 2, "num_hidden_layers": 8}, "factor and num_hidden_layers say the same; give one of them"),
        ({"method": "overlap", "factor": 1.5, "drop": 1}, "factor and drop say the same"),
        ({"factor": 1}, "greater than 1"),
        ({"factor": float("inf")}, "finite number"),
        ({"method": "learned"}, "'stack'"),
        ({"method": "width", "axes": []}, "at least 1"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(config)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("llama", {"factor": 1.3}, r"factor 1\.3 of 4 layers is 5\.2, no whole number of layers"),
        ("llama", {"num_hidden_layers": 4}, "has 4 layers already"),
        ("llama", {"method": "overlap", "drop": 2}, "two copies of 4 layers that drop 2 each have no more; drop fewer"),
        ("llama", {"method": "overlap", "drop": 5}, "two copies of 4 layers that drop 5 each have no more"),
        ("llama", {"method": "overlap", "factor": 2}, "overlap drops layers of two copies of 4: fewer than 8"),
        ("llama", {"method": "middle", "block": 3}, "block 3 leaves no layer before and behind it"),
        ("llama", {"method": "width", "factor": 1.5}, r"width grows by whole factors, .* not 1\.5"),
        ("gpt2", {"method": "width", "axes": ["hidden_size"]}, "hidden_size alone cannot grow: gpt2 has as many"),
        ("gpt2", METHODS["upcycle"], "gpt2 has a dense MLP"),
        ("mixtral", METHODS["upcycle"], "mixtral has experts already"),
    ],
)
def test_models_that_cannot_grow_so_are_refused_before_anything_runs(
    architecture: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        grown_model(Config.model_validate(config), {"model": config_of(architecture)})
    assert "\n" not in str(refused.value)


def test_sizes_left_out_are_the_usual_ones() -> None:
    def layers(**config: Any) -> int:
        return grown_model(Config.model_validate(config), {"model": config_of("llama")}).num_hidden_layers

    assert layers() == 8
    assert layers(method="overlap") == layers(method="overlap", drop=1) == 6
    assert layers(factor=1.25) == layers(num_hidden_layers=5) == 5
    assert grown_model(Config(method="width"), {"model": config_of("gpt2")}).hidden_size == 32


def test_a_config_comes_back_from_its_record() -> None:
    for config in METHODS.values():
        one = Config.model_validate(config)
        assert Config.model_validate(one.model_dump(mode="json")) == one
