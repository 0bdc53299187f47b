"""What every test has: settings that keep it from the user's own store and Prefect home."""

import os
from pathlib import Path

import pytest

# Small models gain nothing from more threads, and two test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config: pytest.Config) -> None:
    """JAX compiles seven times faster without optimising, but for the tests of what users are promised in numbers:
    `-m agreement` alone compiles as users do. Whoever sets XLA_FLAGS, be it to nothing, decides by that."""
    if config.option.markexpr != "agreement":
        os.environ.setdefault("XLA_FLAGS", QUICKLY)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAIRN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "cache"))
