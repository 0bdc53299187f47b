"""The same steps on one device, on eight, and in two processes."""

import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import weights

pytest.importorskip("jax")

from tests.models.jax_engine.training_run import run

TOLERANCES = {"adamw": 1e-5, "muon": 1e-4}
LAYOUTS: dict[str, dict[str, int]] = {
    "data 2 × fsdp 4": {"data": 2, "fsdp": 4},
    "data 4 × tensor 2": {"data": 4, "tensor": 2},
    "data 2 × fsdp 2 × tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}


def job(optimizer: str, model: str = "llama", **more: Any) -> dict[str, Any]:
    return {"model": model, "layout": {}, "optimizer": optimizer, **more}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What one device loses with an optimizer, and the folder where it has left what it came to, as `saved`."""

    @cache
    def trained(optimizer: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("alone")
        return {**run(job(optimizer, save=str(folder)), folder), "saved": folder}

    return trained


def assert_close(found: dict[str, Any], expected: dict[str, Any], optimizer: str) -> None:
    assert found["batches"] == expected["batches"]
    assert len(found["losses"]) == len(expected["losses"]) > 0
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=TOLERANCES[optimizer])
    assert found["loss"][1] == expected["loss"][1]
    assert found["loss"][0] / found["loss"][1] == pytest.approx(
        expected["loss"][0] / expected["loss"][1], abs=TOLERANCES[optimizer]
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.mark.agreement
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", list(TOLERANCES))
def test_eight_devices_lose_as_one(optimizer: str, alone: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    expected = alone(optimizer)
    assert expected["device"] == "cpu"
    assert expected["losses"][-1] < expected["losses"][0]
    for layout in LAYOUTS.values():
        several = run(job(optimizer, layout=layout), tmp_path, devices=8)
        assert several["device"] == "8 × cpu"
        assert_close(several, expected, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"documents": True}], ids=["dropout", "documents"])
@pytest.mark.parametrize("model", ["gpt2", "mixtral", "custom"])
def test_other_models_do_so_too(model: str, changes: dict[str, Any], tmp_path: Path) -> None:
    more = {"documents": True} if "documents" in changes else {"changes": changes}
    alone = run(job("adamw", model, **more), tmp_path)
    layout = LAYOUTS["data 2 × fsdp 2 × tensor 2"]
    assert_close(run(job("adamw", model, layout=layout, **more), tmp_path, devices=8), alone, "adamw")


@pytest.mark.slow
def test_adapters_do_so_too(tmp_path: Path) -> None:
    """Every device has them whole, over weights that are divided."""
    lora = {"rank": 3, "alpha": 6}
    alone = run(job("adamw", save=str(tmp_path / "alone"), lora=lora), tmp_path)
    layout = LAYOUTS["data 2 × fsdp 2 × tensor 2"]
    divided = run(job("adamw", layout=layout, save=str(tmp_path / "divided"), lora=lora), tmp_path, devices=8)
    assert_close(divided, alone, "adamw")
    one, other = (weights.read_arrays(tmp_path / name / "weights.safetensors") for name in ("alone", "divided"))
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array.astype(float), other[name].astype(float), atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"data": 8}, LAYOUTS["data 2 × fsdp 2 × tensor 2"]], ids=str)
def test_pairs_are_preferred_as_on_one_device(layout: dict[str, int], tmp_path: Path) -> None:
    pairs = job("adamw", "mixtral", pairs=True)
    alone, several = run(pairs, tmp_path), run(pairs | {"layout": layout}, tmp_path, devices=8)
    for key, values in alone.items():
        np.testing.assert_allclose(several[key], values, atol=1e-4, err_msg=key)


@pytest.mark.agreement
@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"fsdp": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_two_processes_lose_as_one(
    layout: dict[str, int], alone: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    devices = 2 if layout.get("tensor") else 1
    expected = alone("adamw")
    together = run(
        job("adamw", layout=layout, save=str(tmp_path / "together")),
        tmp_path,
        devices=devices,
        processes=2,
        port=free_port(),
    )
    assert together["device"] == f"{2 * devices} × cpu"
    assert_close(together, expected, "adamw")
    assert together["agreed"] == [8, 0]
    assert expected["agreed"] == [7, 0]
    for state in ("weights", "optimizer"):
        one, other = (
            weights.read_arrays(folder / f"{state}.safetensors")
            for folder in (expected["saved"], tmp_path / "together")
        )
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_allclose(array.astype(float), other[name].astype(float), atol=1e-4, err_msg=name)
