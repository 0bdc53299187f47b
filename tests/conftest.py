"""What every test has: settings that keep it from the user's own store and Prefect home."""

import os
from pathlib import Path

import pytest

# Small models gain nothing from more threads, and two test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAIRN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "cache"))
