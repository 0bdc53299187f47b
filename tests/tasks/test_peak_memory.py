"""The memory that a record says a training took."""

import os
from pathlib import Path

import numpy as np
import pytest

from artifacts.store import Store
from models.machine import peak_resident_memory
from tasks.produce import produce
from tests.tasks.test_ranks import Training

pytest.importorskip("torch")

MEASURED_ANEW = os.access("/proc/self/clear_refs", os.W_OK)


@pytest.mark.skipif(not MEASURED_ANEW, reason="only Linux measures a process's memory anew")
def test_a_record_has_the_memory_of_its_own_training(tmp_path: Path) -> None:
    training = Training(str(tmp_path / "store"), steps=2)
    block = np.ones(1 << 29, np.uint8)
    before = peak_resident_memory()
    assert before > block.nbytes
    del block
    made = produce(Store.open(training.store), training.work(processes=1), lambda event: None).record
    most = made.metrics["peak_memory_bytes"]
    assert isinstance(most, int)
    assert most < before - (1 << 28)
