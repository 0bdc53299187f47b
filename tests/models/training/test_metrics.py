"""The logs: whole after a resumption, and nothing in them twice."""

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from models.training.events import Progress, Sample, Validation
from models.training.loss_curve import draw_loss_curve
from models.training.metrics import Metrics, read_csv

PROGRESS = Progress(
    step=0,
    steps=100,
    loss=2.5,
    gradient_norm=1.0,
    learning_rate_scale=0.5,
    tokens_per_second=1e6,
    flops_per_second=1e12,
    mfu=None,
    eta_seconds=3.0,
    elapsed_seconds=4.0,
    skipped=0,
)


def write(folder: Path, resumed: int, steps: range) -> None:
    metrics = Metrics(folder, "a run")
    metrics.resume(resumed)
    for step in steps:
        metrics.training(dataclasses.replace(PROGRESS, step=step, loss=1 / step))
        if step % 20 == 0:
            metrics.validation(Validation(step, 2 / step, None, (Sample("1+1=", "2", "2"),)))
    metrics.close()


def test_rows_past_the_step_that_a_run_goes_on_from_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, range(10, 60, 10))
    with (tmp_path / "training.csv").open("a") as file:
        file.write("60,0.1")  # what a kill cut off
    write(tmp_path, 25, range(30, 80, 10))
    assert read_csv(tmp_path / "training.csv")["step"] == [10, 20, 30, 40, 50, 60, 70]
    assert read_csv(tmp_path / "validation.csv")["step"] == [20, 40, 60]
    assert (tmp_path / "samples.jsonl").read_text().count('"expected": "2"') == 3


def test_tensorboard_sees_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, range(10, 60, 10))
    write(tmp_path, 25, range(30, 80, 10))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("training/loss")
    assert [scalar.step for scalar in scalars] == [10, 20, 30, 40, 50, 60, 70]
    assert scalars[-1].value == pytest.approx(1 / 70)


def test_the_loss_curve_is_a_picture_of_any_number_of_rows(tmp_path: Path) -> None:
    write(tmp_path, 0, range(10, 60, 10))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert draw_loss_curve({}, {}).startswith(b"\x89PNG")
    nothing_finite = {"step": [1.0], "loss": [float("nan")], "learning_rate_scale": [1.0]}
    assert draw_loss_curve(nothing_finite, {}).startswith(b"\x89PNG")


def test_wandb_is_used_where_it_is_installed_and_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    identities: list[str] = []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: None, define_metric=lambda *_, **__: None)

    def init(**options: Any) -> Any:
        identities.append(options["id"])
        return run

    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]  # all that find_spec looks for
    module.init = init  # type: ignore[attr-defined]  # a stand-in
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    write(tmp_path, 0, range(10, 30, 10))
    assert not logged
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, 10, range(20, 50, 10))
    write(tmp_path, 40, range(50, 60, 10))
    assert [row["step"] for row in logged] == [20, 20, 30, 40, 40, 50]
    assert identities[0] == identities[1]
