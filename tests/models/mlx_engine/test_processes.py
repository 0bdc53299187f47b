"""Training in two processes is training in one: MLX's ring over sockets of this machine."""

from pathlib import Path

import numpy as np
import pytest

from models.engine import Layout
from tests.models.tiny import COMPOSITIONS, Arrays

pytest.importorskip("models.mlx_engine")

from models.mlx_engine.processes import Processes  # only where MLX is
from tests.models.mlx_engine import ring
from tests.models.several import Found

WORKS = [f"{name}:{optimizer}:0" for name in COMPOSITIONS for optimizer in ("adamw", "muon")]
WORKS += ["gpt2:adamw:0.2", "mixtral:muon:0.2", "gpt2:lora:0.2"]
PAIRS = ["pairs:gpt2:0", "pairs:mixtral:0.3"]
HALF = 10


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    """What one process comes to."""
    return {name: ring.train(name) for name in WORKS}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What two come to, started once."""
    return ring.together(tmp_path_factory.mktemp("ring") / "two", [*WORKS, *PAIRS])


def assert_same_training(found: Found, expected: Found, name: str, first: int = 0) -> None:
    bar = 1e-4 if ":muon:" in name else 1e-5
    (told, arrays), (told_alone, arrays_alone) = found, expected
    np.testing.assert_allclose(told["losses"], told_alone["losses"][first:], atol=bar, rtol=0)
    np.testing.assert_allclose(told["norms"], told_alone["norms"][first:], rtol=10 * bar)
    assert told["loss"] == pytest.approx(told_alone["loss"], rel=bar)
    assert_close(arrays, arrays_alone, bar)


def assert_close(arrays: Arrays, others: Arrays, bar: float) -> None:
    assert arrays.keys() == others.keys()
    assert int(arrays["updates"]) == ring.STEPS
    for name, array in arrays.items():
        if name.startswith("gradient "):
            scale = max(float(np.linalg.norm(other)) for part, other in others.items() if part.startswith("gradient "))
            assert np.linalg.norm(array - others[name]) < 10 * bar * scale, name


@pytest.mark.parametrize("name", WORKS)
def test_losses_are_those_of_one_process(name: str, found: dict[str, Found], alone: dict[str, Found]) -> None:
    assert_same_training(found[name], alone[name], name)
    # Every step counts: with dropout, another mask would be seen at once.
    assert found[name][0]["agreed"] == 2**40 + 3
    assert found[name][0]["device"] == "2 × cpu"
    assert alone[name][0]["agreed"] == 3


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_preferred_as_by_one_process(name: str, found: dict[str, Found]) -> None:
    (told, arrays), (told_alone, arrays_alone) = found[name], ring.do(name)
    for key, values in told_alone.items():
        np.testing.assert_allclose(told[key], values, atol=1e-4, err_msg=key)
    scale = max(float(np.linalg.norm(array)) for array in arrays_alone.values())
    for part, array in arrays_alone.items():
        assert np.linalg.norm(arrays[part] - array) < 1e-4 * scale, part


@pytest.mark.parametrize("name", ["llama:adamw:0", "mixtral:muon:0.2"])
def test_a_run_goes_on_in_another_number_of_processes(
    name: str, alone: dict[str, Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(ring, "STEPS", HALF)
        _, arrays = ring.train(name)
    state = tmp_path / "half.npz"
    np.savez(state, **{part: array for part, array in arrays.items() if not part.startswith("gradient ")})  # type: ignore[arg-type]  # no array is called allow_pickle
    later = f"{name}:{state}:{HALF}"
    assert_same_training(ring.together(tmp_path / "two", [later])[later], alone[name], name, HALF)
    assert_same_training(ring.train(later), alone[name], name, HALF)


def test_a_process_alone_needs_no_variables() -> None:
    one = Processes.joined(Layout(data=1), {})
    assert (one.rank, one.count, one.largest(5)) == (0, 1, 5)
