"""Cairn installed as a wheel, away from its repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "artifacts", "models", "tasks", "flows")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "deployment", "tests"):
        shutil.copytree(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", built, source], check=True, capture_output=True, text=True)
    [file] = built.iterdir()
    return file


def files_under(root: Path, folders: tuple[str, ...]) -> set[str]:
    found = (path for folder in folders for path in (root / folder).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix() for path in found if "__pycache__" not in path.parts}


def test_it_has_all_that_cairn_consists_of_and_nothing_else(wheel: Path) -> None:
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files_under(ROOT, PACKAGES) | {"deployment/prefect.yaml"}


def test_its_command_works(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    ZipFile(wheel).extractall(installed)
    environment = {**os.environ, "PYTHONPATH": str(installed), "CAIRN_STORE": str(tmp_path / "store")}
    where = ["-c", "import flows.cli, models.growing; print(flows.cli.__file__, models.growing.__file__)"]
    held = f"{installed / 'flows' / 'cli.py'} {installed / 'models' / 'growing' / '__init__.py'}"
    for command, told in ((where, held), (["-m", "flows.cli", "plan", "arithmetic-tiny"], "stacked")):
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert told in done.stdout, done.stdout + done.stderr
