"""What goes wrong around a run: it is said in a line, nothing is lost, and the same command goes on afterwards."""

import csv
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from artifacts.record import Record
from artifacts.store import DamagedObject, Store
from flows import run
from flows.plan import plan
from flows.recipe import load_recipe
from tests.flows.conftest import DATA, RECIPE, STAGES, Cairn, Made, Start, after, assert_one_line, published, spoil
from tests.flows.processes import checkpoints, descendants, kill, stage_process, wait_for_checkpoints

EVERY_STEP = tuple(
    part for stage in ("base", "refined") for part in ("--set", f"stages.{stage}.checkpoints.every_seconds=0")
)
Mount = Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own in memory, of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def record_of(stage: str) -> Record:
    return Store.open().resolve(f"models/{RECIPE}@{stage}")


def forget(store: Path, *stages: str) -> None:
    """Removes the records of stages, so that a run has to make them again."""
    for stage in stages:
        (store / "records" / f"{record_of(stage).key}.json").unlink()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("missing.yaml",), ["there is no recipe file missing.yaml"]),
        (("broken.yaml",), ["recipe broken.yaml cannot be read: ", "line 1"]),
        ((RECIPE, "--set", "stages.base.training.stepz=1"), ["stages.base.training.stepz", "did you mean 'steps'?"]),
    ],
)
def test_a_recipe_that_cannot_be_run(
    arguments: tuple[str, ...], parts: list[str], cairn: Cairn, tmp_path: Path
) -> None:
    (tmp_path / "broken.yaml").write_text("stages: [")
    code, output = cairn("run", *arguments)
    assert code == 1
    assert_one_line(output, *parts)
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_again_and_again(disk: Path, made: Made, cairn: Cairn, tmp_path: Path) -> None:
    store = disk / "store"
    stopped_in = {"12k": "expressions", "120k": "tokens", "400k": "base", "1100k": "refined"}
    for size, stage in stopped_in.items():
        remount(disk, f"size={size}")
        code, output = cairn("run", RECIPE, *EVERY_STEP, CAIRN_STORE=str(store))
        assert code == 1, output
        # A checkpoint may be what finds no place, or another file of the stage: either says what is to be done.
        what_to_do = (
            "then start again: the run goes on" if "error: checkpoint" in output else "run again; nothing was lost"
        )
        assert_one_line(output, str(store), "o space left", what_to_do)
        assert not list((store / "tmp").iterdir())
        done = {name.partition("@")[2] for name in Store.open(str(store)).names()}
        assert stage not in done
        assert done >= set(STAGES[: STAGES.index(stage)]) - {"tokenizer"}
    remount(disk, "size=4m")
    code, output = cairn("run", RECIPE, *EVERY_STEP, CAIRN_STORE=str(store))
    assert code == 0, output
    assert published(tmp_path) == made.digest
    assert Store.open(str(store)).verify().damages == ()


def test_a_store_that_may_only_be_read(disk: Path, made: Made, cairn: Cairn, tmp_path: Path) -> None:
    store = disk / "store"
    shutil.copytree(made.store, store)
    remount(disk, "ro")
    # What is there serves: a run that makes nothing writes nothing.
    code, output = cairn("run", RECIPE, CAIRN_STORE=str(store))
    assert code == 0, output
    assert published(tmp_path) == made.digest
    code, output = cairn("run", RECIPE, "--set", "stages.base.training.steps=41", CAIRN_STORE=str(store))
    assert code == 1
    assert_one_line(output, f"no access to {store}", "read-only file system", "set CAIRN_STORE to another place")


def test_a_store_that_is_a_file(cairn: Cairn, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = cairn("run", RECIPE, CAIRN_STORE=str(tmp_path / "file"))
    assert code == 1
    assert_one_line(output, str(tmp_path / "file"), "is a file, not a folder", "set CAIRN_STORE to another place")


def test_a_place_for_publications_that_is_a_file(own_store: Path, cairn: Cairn, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = cairn("run", RECIPE, "--published", "file")
    assert code == 1
    assert_one_line(output, f"file/{RECIPE} cannot be written", "give --published another place")


@pytest.mark.slow
def test_damaged_artifacts_are_made_anew_at_their_use(
    made: Made, own_store: Path, cairn: Cairn, tmp_path: Path
) -> None:
    tokens, base = record_of("tokens"), record_of("base")
    forget(own_store, *after("base"))
    # Only making the second anew uses the first; one is read in the run's own process, one in the stage's.
    spoil(own_store / "objects" / tokens.output / "train-00000.safetensors")
    spoil(own_store / "objects" / base.output / "model.safetensors")
    assert [step.verdict for step in plan(load_recipe(RECIPE), Store.open())][:4] == ["reused"] * 4
    code, output = cairn("run", RECIPE)
    assert code == 0, output
    for record, name in ((tokens, "train-00000.safetensors"), (base, "model.safetensors")):
        path = own_store / "objects" / record.output / name
        assert f"{path} is damaged: run the recipe again, which makes the artifact anew; going through" in output
        assert (own_store / "damaged" / record.output / name).is_file()
    assert published(tmp_path) == made.digest
    assert Store.open().verify().damages == ()
    assert (record_of("tokens").output, record_of("base").output) == (tokens.output, base.output)


def test_a_damaged_publication_is_made_anew(made: Made, own_store: Path, cairn: Cairn, tmp_path: Path) -> None:
    spoil(own_store / "objects" / record_of("published").output / "README.md")
    code, output = cairn("run", RECIPE)
    assert code == 0, output
    assert "README.md is damaged" in output
    assert published(tmp_path) == made.digest


def test_a_disk_that_damages_all_that_is_written_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rounds = []

    def damaged(*arguments: object) -> None:
        rounds.append(arguments)
        raise DamagedObject("it is damaged")

    monkeypatch.setattr(run, "prefect_server", nullcontext)
    monkeypatch.setattr(run, "_run_once", damaged)
    with pytest.raises(DamagedObject):
        run.run_recipe(load_recipe(RECIPE), [], Store.open(), tmp_path, Console())
    assert len(rounds) == len(STAGES) + 1


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    made: Made, own_store: Path, start_cairn: Start, cairn: Cairn, tmp_path: Path
) -> None:
    key = record_of("base").key
    forget(own_store, "base", *after("base"))
    shutil.rmtree(own_store / "checkpoints")
    process = start_cairn("run", RECIPE, *EVERY_STEP)
    wait_for_checkpoints(process, own_store, 2)
    kill(process.pid, *descendants(process.pid))
    process.communicate()
    *_, intact, newest = checkpoints(own_store)
    spoil(newest / "model.safetensors")
    code, output = cairn("run", RECIPE, *EVERY_STEP)
    assert code == 0, output
    assert f"checkpoint {newest} is not used: its model.safetensors is damaged" in output
    assert f"going on from the checkpoint of step {int(intact.name.split('-')[1])}" in output
    assert published(tmp_path) == made.digest
    assert record_of("base").key == key


@pytest.mark.slow
def test_two_runs_at_once_train_once(made: Made, start_cairn: Start, tmp_path: Path) -> None:
    processes = [start_cairn("run", RECIPE, *EVERY_STEP) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert published(tmp_path) == made.digest
    for stage in STAGES:
        marks = sorted(
            line[0]
            for output in outputs
            for line in output.splitlines()
            if line.split()[1:2] == [stage] and line[0] in "=✓"
        )
        assert marks == ["=", "✓"], (stage, outputs)
    assert any("is being made by" in output for output in outputs)
    store = Store.open()
    assert len(list(store.records())) == len(STAGES)
    for stage in ("base", "refined"):
        with Path(store.attachments(record_of(stage).key)["training.csv"]).open() as file:
            steps = [int(row["step"]) for row in csv.DictReader(file)]
        assert steps == sorted(set(steps))
        assert steps[-1] == 40
    assert [path.name for path in (tmp_path / "published").iterdir()] == [RECIPE]


@pytest.mark.slow
def test_a_stage_process_that_dies_again_and_again(start_cairn: Start, cairn: Cairn, tmp_path: Path) -> None:
    once_more = ("--set", "stages.base.retries=1", "--set", "stages.base.retry_delay_seconds=0")
    process = start_cairn("run", RECIPE, *once_more)
    killed = set()
    while process.poll() is None:
        child = stage_process(process.pid)
        if child is not None:
            killed.add(child)
            kill(child)
        time.sleep(0.01)
    output, _ = process.communicate()
    assert process.returncode == 1
    assert len(killed) == 2
    assert output.splitlines()[-1] == "the process of stage 'base' ended (killed by signal 9)"
    assert "Traceback" not in output
    assert {name.partition("@")[2] for name in Store.open().names()} == DATA


@pytest.mark.slow
def test_a_store_on_s3(made: Made, s3_url: str, cairn: Cairn, tmp_path: Path) -> None:
    code, output = cairn("run", RECIPE, "--store", s3_url)
    assert code == 0, output
    assert published(tmp_path) == made.digest
    shutil.rmtree(tmp_path / "published")
    # Another machine's first run: its cache is empty.
    code, output = cairn("run", RECIPE, "--store", s3_url, CAIRN_CACHE=str(tmp_path / "other-cache"))
    assert code == 0, output
    assert output.count("reused") == len(STAGES)
    assert published(tmp_path) == made.digest
    attached = Store.open(s3_url).attachments(Store.open(s3_url).resolve(f"models/{RECIPE}@base").key)
    assert {"loss.png", "training.csv", "validation.csv"} <= set(attached)
