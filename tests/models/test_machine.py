import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from models.engine import EngineName
from models.machine import ENGINE_ENVIRONMENT, accelerators, default_engine, engine_for, has_tpu, preferred_engine

ALL: list[EngineName] = ["torch", "jax", "mlx"]


def test_each_machine_has_the_engine_that_suits_it() -> None:
    assert preferred_engine("Darwin", "arm64", False, ALL) == "mlx"
    assert preferred_engine("Darwin", "x86_64", False, ALL) == "torch"
    assert preferred_engine("Linux", "x86_64", True, ALL) == "jax"
    assert preferred_engine("Linux", "x86_64", False, ALL) == "torch"
    assert preferred_engine("Linux", "aarch64", False, ALL) == "torch"


def test_of_those_that_are_installed() -> None:
    assert preferred_engine("Darwin", "arm64", False, ["torch"]) == "torch"
    assert preferred_engine("Linux", "x86_64", True, ["torch", "mlx"]) == "torch"
    assert preferred_engine("Linux", "x86_64", False, ["mlx", "jax"]) == "jax"
    # What is missing is named where it is asked for.
    assert preferred_engine("Linux", "x86_64", False, []) == "torch"


def test_a_tpu_is_told_from_what_else_google_makes(tmp_path: Path) -> None:
    for name, vendor, device in (("network", "0x1ae0", "0x0042"), ("gpu", "0x10de", "0x0063")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "device").write_text(f"{device}\n")
    assert not has_tpu(tmp_path)
    (tmp_path / "network" / "device").write_text("0x0063\n")
    assert has_tpu(tmp_path)
    assert not has_tpu(tmp_path / "nothing")


def test_workers_have_the_engine_of_their_hardware() -> None:
    assert [engine_for(kind) for kind in ("cpu", "cuda", "tpu", "apple")] == ["torch", "torch", "jax", "mlx"]


def test_the_devices_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerators("cpu") == ["cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-8932f937")
    assert accelerators("cuda") == ["cuda-2", "cuda-GPU-8932f937"]
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert accelerators("cuda") == []
    for system, found in (("Darwin", ["apple"]), ("Linux", [])):
        monkeypatch.setattr(platform, "system", lambda system=system: system)
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        assert accelerators("apple") == found


def test_this_machine_has_one() -> None:
    assert default_engine() in ALL


_HELD_AND_GIVEN_BACK = """
from models.machine import peak_resident_memory
before = peak_resident_memory()
held = b"x" * (64 << 20)
del held
print(peak_resident_memory() - before)
"""


def test_the_most_memory_that_was_held_is_told_after_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _HELD_AND_GIVEN_BACK], capture_output=True, text=True, check=True)
    assert 60 << 20 < int(done.stdout) < 80 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed, and can be told not to")
def test_what_a_stage_has_freed_goes_back_to_the_system() -> None:
    """As the process of an engine is started, which then does one stage after another."""
    program = """
from pathlib import Path
from models.machine import release_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
blocks = [bytes(100_000) for _ in range(2_000)]
last = bytes(100_000)
del blocks
held = resident()
release_memory()
print(held - resident())
"""
    environment = {**os.environ, **ENGINE_ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150_000_000
