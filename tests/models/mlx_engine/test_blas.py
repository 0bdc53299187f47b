"""OpenBLAS in MLX's place of the reference BLAS: taken where it is there, done without where it is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("models.mlx_engine")

from models.mlx_engine import blas


def run(program: str) -> dict[str, object]:
    """What a program of its own process printed as JSON."""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    found: dict[str, object] = json.loads(output)
    return found


# blas.py by its path: importing its package would load what there is first.
LOAD = f"""
import ctypes, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("blas", {blas.__file__!r})
blas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(blas)
loaded = blas.preload(NAMES)
import mlx.core as mx
import numpy as np
one, other = (np.random.default_rng(seed).standard_normal((70, 70), np.float32) for seed in (0, 1))
error = float(abs(np.array(mx.array(one) @ mx.array(other)) - one @ other).max())
symbols = hasattr(ctypes.CDLL(None), "openblas_get_num_threads")
threads = [blas.cores()]
blas.divide_products(1)
threads += [blas.cores(), ctypes.CDLL(None).openblas_get_num_threads() if symbols else 1]
print(json.dumps(
    {{"loaded": loaded, "error": error, "symbols": symbols, "again": blas.preload(), "threads": threads}}
))
"""


def test_without_the_library_products_are_those_of_the_wheel() -> None:
    found = run(LOAD.replace("NAMES", '("libno-such-blas.so.0",)'))
    assert found["loaded"] is None
    assert not found["symbols"]
    assert found["threads"] == [1, 1, 1]
    assert isinstance(found["error"], float)
    assert found["error"] < 1e-4


def test_the_library_is_there_for_mlx_to_find_and_not_loaded_too_late() -> None:
    found = run(LOAD.replace("NAMES", "blas.NAMES"))
    if found["loaded"] is None:
        pytest.skip("the system has no OpenBLAS; apt-get install libopenblas0-pthread")
    assert found["symbols"]
    assert isinstance(found["threads"], list)
    assert found["threads"][0] == found["threads"][1]
    assert found["threads"][2] == 1
    assert isinstance(found["error"], float)
    assert found["error"] < 1e-4
    assert found["again"] is None


def test_where_it_is_missing_set_up_says_how_to_get_it() -> None:
    def said(source: str) -> str:
        command = [sys.executable, "-P", "-c", source]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    source = Path(blas.__file__).read_text()
    missing = said(source.replace("libopenblas", "libno-such-blas"))
    if sys.platform == "linux":
        assert missing.count("\n") == 1
        assert "apt-get install" in missing
    assert said(source) == ("" if run(LOAD.replace("NAMES", "blas.NAMES"))["loaded"] else blas.HINT + "\n")


def test_the_first_library_that_is_there_is_taken() -> None:
    found = run(LOAD.replace("NAMES", '("libno-such-blas.so.0", "libm.so.6")'))
    assert found["loaded"] == "libm.so.6"


def test_the_engine_loads_neither_pytorch_nor_jax() -> None:
    program = "import json, sys, models.mlx_engine; print(json.dumps({'modules': list(sys.modules)}))"
    modules = run(program)["modules"]
    assert isinstance(modules, list)
    assert "mlx.core" in modules
    assert not {"torch", "jax", "flax", "optax", "transformers"} & set(modules)
