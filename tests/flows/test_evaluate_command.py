"""`cairn evaluate --tasks` as a user gives it, in processes of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from artifacts.store import Store
from tests.tasks.harness.against_hf import random_model

pytestmark = pytest.mark.skipif("CAIRN_HUB" not in os.environ, reason="CAIRN_HUB names no folder with data sets")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a published model and a store that nothing was done in."""
    folder = tmp_path_factory.mktemp("evaluate")
    random_model(folder, "llama")
    return folder


def command(place: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CAIRN_STORE": str(place / "store"),
        "CAIRN_CACHE": str(place / "cache"),
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "flows.cli", *arguments],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def said(place: Path, *arguments: str, code: int = 0) -> str:
    process = command(place, *arguments)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == code, text
    return text


def test_a_killed_evaluation_goes_on_at_the_task_where_it_was_and_nothing_is_done_twice(place: Path) -> None:
    tasks = ("--tasks", "copa,truthfulqa_mc2,wsc273", "--limit", "30")
    with command(place, "evaluate", "./published", *tasks) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "✓ copa" in line:
                break
        os.killpg(process.pid, signal.SIGKILL)
    store = Store.open(str(place / "store"))
    done = {record.name for record in store.records() if record.stage == "benchmark"}
    assert done == {"copa"}

    text = said(place, "evaluate", "./published", *tasks)
    assert "= copa" in text
    assert "✓ truthfulqa_mc2" in text
    assert "✓ wsc273" in text
    records = {record.key for record in store.records()}

    again = said(place, "evaluate", "./published", *tasks)
    assert again.count("reused") == 3
    assert "✓" not in again
    assert {record.key for record in store.records()} == records
    # What was measured is what an evaluation in one go measures.
    fresh = place / "fresh"
    fresh.mkdir()
    (fresh / "published").symlink_to(place / "published")
    alone = said(fresh, "evaluate", "./published", *tasks)
    assert [line for line in alone.splitlines() if " acc " in line and "±" in line and "✓" not in line] == [
        line for line in again.splitlines() if " acc " in line and "±" in line and "=" not in line
    ]


def test_ctrl_c_ends_it_in_a_line(place: Path) -> None:
    process = command(place, "evaluate", "./published", "--tasks", "hellaswag", "--limit", "2000")
    assert process.stdout is not None
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in text


def test_samples_are_shown(place: Path) -> None:
    said(place, "evaluate", "./published", "--tasks", "copa", "--limit", "30")
    name = f"evaluations/{place.name}/published"
    text = said(place, "show", name, "--samples", "copa", "--wrong", "--count", "2")
    assert "2 of " in text
    assert "wrong samples of copa" in text
    text = said(place, "show", name, "--samples", "copo", code=1)
    assert "has no samples of 'copo'; did you mean 'copa'?" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("./published", "--tasks", "arc_eazy"), "has no task 'arc_eazy'; the nearest names are: "),
        (("./nowhere", "--tasks", "copa"), "nowhere"),
        (("./published", "--tasks", "piqa"), "piqa: dataset 'baber/piqa' was not found: not below CAIRN_HUB="),
        (("./published", "--tasks", "gsm8k", "--limit", "1"), "answers of up to 256 tokens, and the model has 64"),
    ],
)
def test_bad_input_is_told_in_a_line(place: Path, arguments: tuple[str, ...], message: str) -> None:
    text = said(place, "evaluate", *arguments, code=1)
    assert message in text
    assert "Traceback" not in text
