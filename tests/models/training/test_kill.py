"""A run that is killed at any moment and started again ends as one that never was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def outcome(folder: Path, kills: int, seed: int, engine: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "error", "-m", "tests.models.training.killed_runs"]
    arguments = [str(folder), str(kills), str(seed), engine]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_run_killed_at_any_moment_ends_as_one_that_never_was(tmp_path: Path) -> None:
    expected = outcome(tmp_path / "whole", 0, 0, "bigrams")
    assert expected.pop("killed") == 0
    assert expected["early"]
    assert expected["state"]["skipped"] == 3
    assert len(expected["state"]["validations"]) > 5
    assert expected["state"]["validations"][0]["step"] == 0
    assert all(bool(one["tasks"]) == (one["step"] % 10 == 0) for one in expected["state"]["validations"])
    total = 0
    # How many kills come before a run has ended depends on the machine.
    for seed in range(1, 10):
        found = outcome(tmp_path / str(seed), 16, seed, "bigrams")
        total += found.pop("killed")
        assert found == expected
        if total >= 20:
            return
    raise AssertionError(f"only {total} kills came before their run had ended")


@pytest.mark.parametrize("engine", ["torch", "torch-lora", "torch-pairs", "torch-lora-pairs"])
def test_the_torch_engine_too(tmp_path: Path, engine: str) -> None:
    """In preference tuning, the reference is still the model that came in."""
    expected = outcome(tmp_path / "whole", 0, 0, engine)
    found = outcome(tmp_path / "killed", 3, 3, engine)
    assert found.pop("killed") == 3
    assert expected.pop("killed") == 0
    assert found == expected
