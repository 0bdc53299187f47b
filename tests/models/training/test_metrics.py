"""The logs: whole after a resumption, and nothing in them twice."""

import dataclasses
import io
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.training.events import Progress, Sample, Validation
from models.training.loss_curve import draw_loss_curve
from models.training.metrics import Metrics, read_csv
from models.training.state import TaskScore

ROOT = Path(__file__).parents[3]
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
    metrics.resume(resumed, validated=True)
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


def test_a_validation_that_is_still_to_come_stands_once(tmp_path: Path) -> None:
    for validated in (False, False, True):
        metrics = Metrics(tmp_path)
        metrics.resume(20, validated)
        if not validated:
            metrics.validation(Validation(20, 1.5, None, (Sample("1+1=", "2", "2"),)))
        metrics.close()
    assert read_csv(tmp_path / "validation.csv")["step"] == [20]
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 1


def test_losses_of_the_sources_of_a_blend_have_columns_of_their_own(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((0, (10, 20)), (10, (20, 30))):
        metrics = Metrics(tmp_path, validated=["books", "web"])
        metrics.resume(resumed, validated=True)
        for step in steps:
            metrics.validation(Validation(step, 2.0, None, (), {"books": 1.0 / step, "web": 3.0}))
        metrics.close()
    columns = read_csv(tmp_path / "validation.csv")
    assert columns["step"] == [10, 20, 30]
    assert columns["loss/books"] == [1 / 10, 1 / 20, 1 / 30]
    assert columns["loss/web"] == [3.0] * 3
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [scalar.value for scalar in events.Scalars("validation/loss/web")] == [3.0] * 3


def test_tensorboard_sees_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, range(10, 60, 10))
    # TensorBoard reads files by name: second, process and a count, of which 10 comes before 9.
    time.sleep(1.1)
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


GREEN, PURPLE, AMBER = (0x2A, 0x9D, 0x6F), (0x8E, 0x5E, 0xA2), (0xC9, 0x8A, 0x00)


def rows_of(picture: bytes, color: tuple[int, int, int]) -> set[int]:
    """The rows of pixels in which a picture has a color, but for what stands above the axes."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), np.int16)
    near = (np.abs(pixels - np.array(color)) < 12).all(axis=2)
    below = len(pixels) // 6
    return {int(row) for row in np.flatnonzero(near.any(axis=1)) if row > below}


def test_scores_of_tasks_are_lines_of_the_picture(tmp_path: Path) -> None:
    training = {"step": [10.0, 20.0], "loss": [2.0, 1.0], "learning_rate_scale": [1.0, 0.1]}
    plain = {"step": [10.0, 20.0], "loss": [2.0, 1.5], "exact_match": [math.nan] * 2}
    one = {**plain, "evaluation/copa": [0.55, 0.6], "chance/copa": [0.5, 0.5]}
    both = {**one, "evaluation/arc_easy": [math.nan, 0.3], "chance/arc_easy": [math.nan, 0.25]}
    pictures = [draw_loss_curve(training, columns) for columns in (plain, one, both)]
    assert not rows_of(pictures[0], PURPLE) | rows_of(pictures[0], GREEN)
    purple = rows_of(pictures[1], PURPLE)
    without_chance = rows_of(draw_loss_curve(training, {**one, "chance/copa": [math.nan] * 2}), PURPLE)
    # The line of chance is below the score, which rises from 0.55.
    assert max(purple) > max(without_chance)
    assert not rows_of(pictures[1], AMBER)
    # Of several tasks, chance is left out, and the one score of the second is a mark below the first's.
    assert max(rows_of(pictures[2], PURPLE)) < min(rows_of(pictures[2], AMBER))


def test_scores_of_tasks_have_columns_of_their_own(tmp_path: Path) -> None:
    copa = TaskScore("copa", "acc", 0.55, 0.05, 100, 0.5)
    metrics = Metrics(tmp_path, tasks=["copa", "arc_easy"])
    metrics.resume(0, validated=False)
    metrics.validation(Validation(10, 2.0, None, ()))
    metrics.validation(Validation(20, 1.5, None, (), tasks=(copa,)))
    metrics.close()
    columns = read_csv(tmp_path / "validation.csv")
    assert list(columns) == [
        *("step", "loss", "exact_match"),
        *("evaluation/copa", "evaluation/arc_easy", "chance/copa", "chance/arc_easy"),
    ]
    np.testing.assert_array_equal(columns["evaluation/copa"], [math.nan, 0.55])
    np.testing.assert_array_equal(columns["chance/copa"], [math.nan, 0.5])
    np.testing.assert_array_equal(columns["evaluation/arc_easy"], [math.nan] * 2)


WANDB = """
import sys
import time
from pathlib import Path
from models.training.events import Validation
from models.training.metrics import Metrics
for step in (5, 10):
    metrics = Metrics(Path(sys.argv[1]), title="base", config={"steps": 10})
    metrics.resume(step - 5, validated=True)
    metrics.validation(Validation(step, 1.5, 0.25, ()))
    metrics.close()
"""


@pytest.mark.parametrize("mode", ["offline", None])
def test_wandb_keeps_a_run_where_it_is_set_up(tmp_path: Path, mode: str | None) -> None:
    pytest.importorskip("wandb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    if mode is not None:
        environment["WANDB_MODE"] = mode
    # In a process of its own, since it starts a service beside it.
    command = [sys.executable, "-c", WANDB, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    if mode is None:
        assert not files
        return
    assert len(files) == 2
    assert files[0].name == files[1].name  # the second start goes on with the first one's run
    assert all(b"validation/loss" in file.read_bytes() for file in files)
