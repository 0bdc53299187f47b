"""Whole runs of the loop that go on with another engine, or on another number of devices: the same batches and losses.

A run's checkpoints are in a folder on disk, as a stage's are.
"""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from models.engine import EngineName, Layout, is_installed
from tests.models.agreement import HERE, pairs_of, several_engines, tell
from tests.models.loop_run import OPTIMIZERS, Found, elsewhere, go, settings, write_data

pytestmark = [pytest.mark.agreement, pytest.mark.slow]
BARS = {"adamw": 1e-5, "muon": 1e-4}
"""Of one engine on other devices."""
LEARNT = {"adamw": 0.1, "muon": 0.1}
"""How much lower the loss is at the end at least: a model that learns nothing agrees with any other."""


def difference(parts: list[Found], whole: Found) -> float:
    """The largest of all steps and validations; the batches have to be the same, and in the same order."""
    assert [digest for part in parts for digest in part.batches] == whole.batches
    assert len(set(whole.batches)) == len(whole.batches)
    losses = [loss for part in parts for loss in part.losses] + parts[-1].validations
    assert len(losses) == len(whole.losses + whole.validations)
    return float(np.abs(np.array(losses) - np.array(whole.losses + whole.validations)).max())


def whole_runs(variant: str, optimizer: str, folder: Path) -> dict[EngineName, Found]:
    """A run of a hundred steps on each engine, which have to lose alike."""
    write_data(folder)
    whole = {name: go(name, variant, settings(optimizer, 100), folder, f"whole-{name}") for name in HERE}
    for names, one, other in pairs_of(whole):
        found = difference([one], other)
        tell("100 steps:", names, found)
        assert found <= 1e-3, names
    assert np.mean(whole[HERE[0]].losses[-10:]) < np.mean(whole[HERE[0]].losses[:10]) - LEARNT[optimizer]
    return whole


@several_engines
@pytest.mark.parametrize(
    ("variant", "optimizer"), [("gpt2", "muon"), ("llama", "adamw"), ("mtlm2", "adamw"), ("mtlm2", "muon")]
)
def test_a_hundred_steps_lose_alike_on_all_engines(variant: str, optimizer: str, tmp_path: Path) -> None:
    whole_runs(variant, optimizer, tmp_path)


@several_engines
@pytest.mark.parametrize(("variant", "optimizer"), [("gpt2", "adamw"), ("llama", "muon")])
def test_a_run_goes_on_with_any_other_engine(variant: str, optimizer: str, tmp_path: Path) -> None:
    """In the middle, from the checkpoint that the first engine has left; bit for bit where it is the same engine."""
    whole, config = whole_runs(variant, optimizer, tmp_path), settings(optimizer, 100)
    first = {name: go(name, variant, config, tmp_path, f"half-{name}", stop=50) for name in HERE}
    assert all(len(one.losses) == 50 and not one.validations for one in first.values())
    for origin, target in itertools.product(HERE, HERE):
        checkpoints = f"{origin}-{target}"
        shutil.copytree(tmp_path / f"half-{origin}", tmp_path / checkpoints)
        second = go(target, variant, config, tmp_path, checkpoints)
        foreign = "" if origin == target else f", made by engine '{origin}'; engine '{target}' goes on"
        assert second.notes == [f"going on from the checkpoint of step 50{foreign}"]
        found = max(difference([first[origin], second], whole[name]) for name in (origin, target))
        tell(f"{origin}, then {target}:", found)
        assert found <= (0 if origin == target else 1e-3), f"{origin}, then {target}"
        assert origin != target or second.state == whole[origin].state


PLACES: list[tuple[EngineName, Layout, int, int, str]] = [
    ("torch", Layout(fsdp=2), 2, 1, "2 × cpu"),
    ("jax", Layout(data=2, fsdp=4), 1, 8, "8 × cpu"),
    ("mlx", Layout(), 2, 1, "2 × cpu"),
]


@pytest.mark.parametrize(
    ("engine", "layout", "processes", "devices", "words"), PLACES, ids=[place[0] for place in PLACES]
)
def test_a_run_goes_on_with_other_devices_and_comes_back(
    engine: EngineName, layout: Layout, processes: int, devices: int, words: str, tmp_path: Path
) -> None:
    if not is_installed(engine):
        pytest.skip(f"{engine} is not installed")
    folder, parts = write_data(tmp_path), {}
    for optimizer in OPTIMIZERS:
        parts[optimizer] = [go(engine, "llama", settings(optimizer, 30), folder, optimizer, stop=7)]
    there = elsewhere(engine, {"steps": 30, "stop": 10}, folder, layout, processes, devices)
    for optimizer, bar in BARS.items():
        config = settings(optimizer, 30)
        parts[optimizer] += [there[optimizer], go(engine, "llama", config, folder, optimizer)]
        assert [part.device for part in parts[optimizer]] == ["cpu", words, "cpu"]
        notes = [part.notes for part in parts[optimizer]]
        assert notes == [[], *[[f"going on from the checkpoint of step {step}"] for step in (7, 17)]]
        whole = go(engine, "llama", config, folder, f"whole-{optimizer}")
        found = difference(parts[optimizer], whole)
        tell(engine, optimizer, found)
        assert found <= bar
