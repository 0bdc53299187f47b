"""What the processes of a run are told: how to meet, and which GPU is whose. They are real ones, that say it."""

import json
import sys
import time
from pathlib import Path

import pytest

from models.engine import EngineName
from models.processes import start_processes

ROOT = Path(__file__).parents[2]
SAYING = """
import json, os, sys
from pathlib import Path
folder, number = Path(sys.argv[1]), sys.argv[2]
(folder / f"{number}.json").write_text(json.dumps(dict(os.environ)))
"""
MEETING = """
import sys
from pathlib import Path
import jax
from models.jax_engine.distributed import join
join()
found = f"{jax.process_index()} {jax.process_count()} {jax.local_device_count()} {jax.device_count()}"
(Path(sys.argv[1]) / sys.argv[2]).write_text(found)
jax.distributed.shutdown()
"""


def run_two(engine: EngineName, code: str, folder: Path) -> None:
    commands = [[sys.executable, "-c", code, str(folder), str(number)] for number in range(2)]
    processes = start_processes(engine, commands, {"PYTHONPATH": str(ROOT)}, folder)
    try:
        until = time.monotonic() + 120
        while processes.running():
            assert time.monotonic() < until
            time.sleep(0.02)
        assert not processes.failed()
    finally:
        processes.kill()


def told(engine: EngineName, folder: Path) -> list[dict[str, str]]:
    run_two(engine, SAYING, folder)
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("4,6,7", ["4", "6"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]), ("5", ["5", "5"]), ("", [""] * 2)],
)
def test_each_of_mlxs_processes_has_a_gpu_where_there_are_enough(
    visible: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = told("mlx", tmp_path)
    assert [own["CUDA_VISIBLE_DEVICES"] for own in found] == expected
    assert [own["MLX_RANK"] for own in found] == ["0", "1"]
    assert len(json.loads(Path(found[0]["MLX_HOSTFILE"]).read_text())) == 2


def test_each_of_jaxs_processes_has_a_gpu(tmp_path: Path) -> None:
    assert [own["JAX_LOCAL_DEVICE_IDS"] for own in told("jax", tmp_path)] == ["0", "1"]


def test_jaxs_processes_meet_on_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    run_two("jax", MEETING, tmp_path)
    assert [(tmp_path / str(number)).read_text() for number in range(2)] == ["0 2 1 2", "1 2 1 2"]
