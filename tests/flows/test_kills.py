"""A run that is killed at any moment and started again publishes, bit for bit, what one publishes that never was."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flows.conftest import Start, published
from tests.flows.processes import descendants, files, kill, stage_process, wait_for_checkpoints, wait_until_gone

# A checkpoint after every step: most moments of training are then in the middle of writing one.
RUN = (
    "run",
    "arithmetic-tiny",
    "--set",
    "stages.base.checkpoints.every_seconds=0",
    "--set",
    "stages.refined.checkpoints.every_seconds=0",
    "--set",
    "stages.base.training.steps=80",
)
# Dropout has random numbers to repeat; without it, the rows of a batch go through several threads.
WITH_DROPOUT = (*RUN, "--set", "stages.base.model.dropout=0.1")
THREADS = {"OMP_NUM_THREADS": "2"}
KILLS = 6
Reference = Callable[[tuple[str, ...]], tuple[str, float]]


@pytest.fixture(scope="module")
def undisturbed() -> dict[tuple[str, ...], tuple[str, float]]:
    return {}


@pytest.fixture
def reference(undisturbed: dict[tuple[str, ...], tuple[str, float]], start_cairn: Start, tmp_path: Path) -> Reference:
    """What an undisturbed run of a command publishes, and how long it takes."""

    def run(command: tuple[str, ...]) -> tuple[str, float]:
        if command not in undisturbed:
            started = time.monotonic()
            process = start_cairn(*command, **THREADS, CAIRN_STORE=str(tmp_path / "reference"))
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
            undisturbed[command] = published(tmp_path), time.monotonic() - started
        return undisturbed[command]

    return run


def finish(cairn: Callable[..., tuple[int, str]], tmp_path: Path, digest: str, command: tuple[str, ...] = RUN) -> str:
    code, output = cairn(*command, **THREADS)
    assert code == 0, output
    assert published(tmp_path) == digest
    return output


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment(
    number: int,
    reference: Reference,
    start_cairn: Start,
    cairn: Callable[..., tuple[int, str]],
    tmp_path: Path,
) -> None:
    command = WITH_DROPOUT if number % 3 == 0 else RUN
    digest, seconds = reference(command)
    choice = random.Random(number)
    process = start_cairn(*command, **THREADS)
    # Every run has its own part of the time, so that together they reach every stage.
    time.sleep(seconds * (number + choice.random()) / KILLS)
    everything = [process.pid, *descendants(process.pid)]
    kill(*(everything if number % 2 else [process.pid]))
    process.communicate()
    # A child whose parent is gone writes its checkpoint and ends; the next run waits for it.
    finish(cairn, tmp_path, digest, command)
    assert all(wait_until_gone(pid) for pid in everything)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_checkpoint_write(
    reference: Reference, start_cairn: Start, cairn: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    digest, _ = reference(RUN)
    for _ in range(20):
        process = start_cairn(*RUN, **THREADS)
        while process.poll() is None and not unfinished_checkpoints(tmp_path / "store"):
            pass
        kill(process.pid, *descendants(process.pid))
        process.communicate()
        if unfinished_checkpoints(tmp_path / "store"):
            break
    else:
        pytest.fail("no kill came in the middle of a checkpoint write")
    finish(cairn, tmp_path, digest)


def unfinished_checkpoints(store: Path) -> set[Path]:
    """Folders of checkpoints that were begun and not finished."""
    present = files(store / "checkpoints")
    return {path.parent for path in present} - {path.parent for path in present if path.name == "state.json"}


@pytest.mark.slow
def test_killed_in_the_middle_of_an_artifact_write(
    reference: Reference, start_cairn: Start, cairn: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    digest, _ = reference(RUN)
    process = start_cairn(*RUN, **THREADS)
    while process.poll() is None and not unfinished_models(tmp_path / "store"):
        pass
    kill(process.pid, *descendants(process.pid))
    process.communicate()
    assert unfinished_models(tmp_path / "store")
    finish(cairn, tmp_path, digest)


def unfinished_models(store: Path) -> list[Path]:
    """Weights that lie in the store without a record: half-written artifacts."""
    recorded = "".join(path.read_text() for path in files(store / "records") if path.suffix == ".json")
    weights = [*files(store / "tmp"), *(path for path in files(store / "objects") if path.parent.name not in recorded)]
    return [path for path in weights if path.name == "model.safetensors"]


@pytest.mark.slow
def test_a_killed_stage_process_is_started_again_by_the_run_itself(
    reference: Reference, start_cairn: Start, tmp_path: Path
) -> None:
    digest, _ = reference(RUN)
    process = start_cairn(*RUN, **THREADS)
    wait_for_checkpoints(process, tmp_path / "store")
    child = stage_process(process.pid)
    assert child is not None
    kill(child)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "going on from the checkpoint of step" in output
    assert published(tmp_path) == digest


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_writes_a_checkpoint_and_goes_on(
    number: signal.Signals,
    reference: Reference,
    start_cairn: Start,
    cairn: Callable[..., tuple[int, str]],
    tmp_path: Path,
) -> None:
    digest, _ = reference(RUN)
    process = start_cairn(*RUN, **THREADS)
    wait_for_checkpoints(process, tmp_path / "store")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to go on" in output
    assert "Traceback" not in output
    assert "going on from the checkpoint of step" in finish(cairn, tmp_path, digest)
