"""Schedule, decisions of the state, and the count of FLOPs."""

import itertools
import json
import math

import pytest
from pydantic import ValidationError

from models.config import ModelConfig
from models.training.config import EarlyStoppingConfig, ScheduleConfig
from models.training.flops import (
    forward_flops_per_token,
    matmul_parameters,
    peak_flops_per_second,
    training_flops_per_token,
)
from models.training.schedule import learning_rate_scale
from models.training.state import RunState, ValidationRecord
from models.weights import parameters


def scales(steps: int, **config: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(config)
    return [learning_rate_scale(schedule, step, steps) for step in range(steps)]


def test_cosine_rises_in_equal_parts_and_falls_towards_its_floor() -> None:
    found = scales(12, warmup_steps=4, floor=0.1)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[8] == pytest.approx(0.55)
    assert sorted(found[4:], reverse=True) == found[4:]
    assert 0.1 < found[-1] < 0.2


def test_wsd_stays_and_falls_linearly() -> None:
    assert scales(10, name="wsd", warmup_steps=2, decay_steps=4) == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert scales(3, name="wsd", decay_steps=0) == [1, 1, 1]
    assert scales(4, name="wsd", decay_steps=2, floor=0.5) == [1, 1, 1, 0.75]


def test_wsd_falls_as_half_a_cosine_where_it_is_told_to() -> None:
    found = scales(12, name="wsd", warmup_steps=2, decay_steps=8, decay="cosine", floor=0.2)
    assert found[:5] == [0.5, 1, 1, 1, 1]
    assert found[8] == pytest.approx(0.6), "half of the way in half of the steps"
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * done / 8)) / 2 for done in range(8)]
    assert found[4:] == pytest.approx(expected)
    schedule = ScheduleConfig(name="wsd", warmup_steps=2, decay_steps=8, decay="cosine", floor=0.2)
    assert learning_rate_scale(schedule, 12, 12) == pytest.approx(0.2)
    assert scales(3, name="wsd", decay_steps=0, decay="cosine") == [1, 1, 1]
    # The whole run after the warm-up makes it the schedule `cosine`.
    assert scales(9, name="wsd", warmup_steps=1, decay_steps=8, decay="cosine", floor=0.1) == pytest.approx(
        scales(9, warmup_steps=1, floor=0.1)
    )
    # No step is far from the one before it.
    long = scales(1000, name="wsd", warmup_steps=100, decay_steps=500, decay="cosine")
    assert max(abs(after - before) for before, after in itertools.pairwise(long)) <= 0.01 + 1e-12


def test_only_wsd_has_a_shape_of_its_decay() -> None:
    with pytest.raises(ValidationError, match="decay belongs to wsd"):
        ScheduleConfig(decay="cosine")
    # Keys of what was trained before there was a choice stay.
    assert "decay" not in ScheduleConfig(name="wsd", decay_steps=1).model_dump()
    assert ScheduleConfig(name="wsd", decay_steps=1, decay="cosine").model_dump()["decay"] == "cosine"


def test_there_is_always_a_rate() -> None:
    for steps in (1, 2, 3):
        for warmup in range(steps + 1):
            assert all(0 < scale <= 1 for scale in scales(steps, warmup_steps=warmup))


def state(*losses: float) -> RunState:
    records = tuple(ValidationRecord(step=step, loss=loss) for step, loss in enumerate(losses, 1))
    return RunState(step=len(losses), validations=records)


def test_early_stopping_counts_validations_without_improvement() -> None:
    patient = EarlyStoppingConfig(patience=2)
    assert not state().stops_early(patient)
    assert not state(1.0, 1.1).stops_early(patient)
    assert state(1.0, 1.1, 1.0).stops_early(patient)
    assert not state(1.0, 1.1, 0.9).stops_early(patient)
    assert state(math.nan, math.inf).stops_early(patient)
    assert not state(math.nan, 1.0, math.nan).stops_early(patient)
    assert state(1.0, 0.95, 0.91).stops_early(EarlyStoppingConfig(patience=2, minimum_improvement=0.1))
    assert not state(1.0, 0.95, 0.89).stops_early(EarlyStoppingConfig(patience=2, minimum_improvement=0.1))
    assert not state(1.0, 2.0, 3.0).stops_early(None)


def test_the_best_validations_are_known() -> None:
    assert state().best is None
    assert state(math.nan).best is None
    found = state(2.0, 1.0, 3.0, 1.0)
    assert found.best == ValidationRecord(step=2, loss=1.0)
    assert not found.is_among_best(1)
    assert found.is_among_best(2)
    assert not found.is_among_best(0)
    assert not state(1.0, math.nan).is_among_best(5)
    assert state(1.0).score == 1.0
    assert state(math.inf).score is None


def test_what_came_in_is_no_result_of_training() -> None:
    came_in = ValidationRecord(step=0, loss=0.5)

    def refined(*losses: float) -> RunState:
        return state(*losses).model_copy(update={"validations": (came_in, *state(*losses).validations)})

    patient = EarlyStoppingConfig(patience=2)
    assert not refined(1.0, 0.9).stops_early(patient)
    assert refined(1.0, 1.0, 1.1).stops_early(patient)
    assert refined().best == refined(1.0).best == came_in
    assert refined().validated
    assert refined().score is None
    assert not refined().is_among_best(1)
    assert refined(1.0).is_among_best(1)


def test_a_state_survives_json() -> None:
    whole = state(1 / 3, math.inf, -math.inf).model_copy(update={"seconds": 0.1, "skipped": 3})
    assert RunState.model_validate(json.loads(json.dumps(whole.to_json(), allow_nan=False))) == whole
    odd = RunState.model_validate(state(math.nan).to_json())
    assert math.isnan(odd.validations[0].loss)


def model(**changes: object) -> ModelConfig:
    values = {
        "architecture": "llama",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return ModelConfig.model_validate({**values, **changes})


def test_flops_are_six_for_each_active_parameter_and_those_of_attention() -> None:
    untied = model()
    matrices = sum(
        math.prod(parameter.shape)
        for parameter in parameters(untied)
        if len(parameter.shape) > 1 and "embed" not in parameter.name
    )
    assert matmul_parameters(untied) == matrices
    attention = 12 * 3 * 32 * 64 / 2
    assert training_flops_per_token(untied, 64) == 6 * matrices + attention
    assert forward_flops_per_token(untied, 64) == pytest.approx(training_flops_per_token(untied, 64) / 3)
    assert training_flops_per_token(untied, 64, reference=True) == 4 * forward_flops_per_token(untied, 64)
    assert matmul_parameters(model(tie_word_embeddings=True)) == matrices


def test_only_the_chosen_experts_count() -> None:
    mixture = {"architecture": "mixtral", "num_experts_per_tok": 2}
    few = matmul_parameters(model(**mixture, num_local_experts=4))
    many = matmul_parameters(model(**mixture, num_local_experts=8))
    assert many - few == 3 * 4 * 32  # more columns of the routers, and nothing else


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("cuda: NVIDIA H200", 989.4e12),
        ("cuda: NVIDIA H100 80GB HBM3", 989.4e12),
        ("cuda: NVIDIA H100 PCIe", 756e12),
        ("cuda: NVIDIA A100-SXM4-40GB", 312e12),
        ("cuda: NVIDIA L4", 121e12),
        ("cuda: NVIDIA L40S", 362e12),
        ("cuda: Tesla T4", 65e12),
        ("cuda: NVIDIA GeForce RTX 4090", 165.2e12),
        ("cuda: NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_device(device: str, peak: float | None) -> None:
    assert peak_flops_per_second(device) == peak
