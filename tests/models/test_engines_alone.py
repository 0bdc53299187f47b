"""One engine at work loads nothing of the others, and none is needed that is not used: each in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

from models.engine import EngineName
from tests.models.test_engines import engine_name

__all__ = ["engine_name"]  # the fixture

ROOT = Path(__file__).parents[2]
PACKAGES: dict[EngineName, list[str]] = {
    "torch": ["torch"],
    "jax": ["jax", "jaxlib", "flax", "optax"],
    "mlx": ["mlx"],
}

_AT_WORK = """
import sys
from common.errors import UserError
from models import weights
from models.engine import training_engine
from models.generation import generate
from models.optimizer import OptimizerConfig
from models.sampling import SamplingConfig
from tests.models.tiny import batch, pieces, tiny

def work(name):
    config = tiny("llama")
    engine = training_engine(name, config, OptimizerConfig(name="muon", learning_rate=1e-3), "float32")
    engine.restore("weights", pieces(dict(weights.initial_weights(config, 1))))
    loss = float(engine.step([batch()], 1.0, 0).loss)
    assert float(engine.step([batch()], 1.0, 1).loss) < loss
    assert len(generate(engine.inference(), [[1, 2]], SamplingConfig(max_new_tokens=3), ())[0]) == 3

engine, *others = sys.argv[1:]
work(engine)
print(*[name for name in others if name in sys.modules])
# What `sys.modules` has as None can be neither imported nor found, as if it were not installed.
sys.modules.update(dict.fromkeys(others))
for name in ("torch", "jax", "mlx"):
    try:
        work(name)
        print(name, "works")
    except UserError as error:
        print(error)
"""
_MODULES = """
import importlib, sys
own, foreign = (words.split() for words in sys.argv[1:])
for name in own:
    importlib.import_module(name)
print(*[name for name in foreign if name in sys.modules])
"""


def said(program: str, *arguments: str) -> list[str]:
    """The lines that a program prints, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def others(engine: EngineName) -> list[str]:
    return [package for name, packages in PACKAGES.items() if name != engine for package in packages]


def test_an_engine_at_work_loads_no_other_and_needs_none(engine_name: EngineName) -> None:
    """Those that are not there are refused by the name of the extra that brings them."""
    modules = [f"models.{name}_engine" for name in PACKAGES if name != engine_name]
    loaded, *answers = said(_AT_WORK, engine_name, *others(engine_name), *modules, "transformers")
    assert loaded == ""
    assert answers == [
        f"{name} works"
        if name == engine_name
        else f"engine '{name}' is not installed; run: pip install 'cairn[{name}]'"
        for name in PACKAGES
    ]


def test_what_is_common_to_the_engines_loads_none() -> None:
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "models").rglob("*.py")]
    # What is published beside weights is written out, and imported by nobody here.
    paths = [path for path in paths if not path.parts[1].endswith("_engine") and path.parts[1] != "published"]
    own = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    assert {"models.engine", "models.training.loop", "models.processes"} <= set(own)
    packages = [package for packages in PACKAGES.values() for package in packages]
    assert said(_MODULES, " ".join(own), " ".join([*packages, "transformers"])) == [""]


@pytest.mark.parametrize("package", ["jax", "flax", "optax"])
def test_an_engine_that_lacks_one_package_is_not_installed(package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None\nfrom models.engine import is_installed\n"
    assert said(program + "print(is_installed('jax'))") == ["False"]
