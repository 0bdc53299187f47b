"""Checkpoints: the newest intact one is used, whatever has happened to the others."""

import errno
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from common.errors import UserError
from common.files import canonical_json, sha256_bytes
from models.training.checkpoint import Checkpoint, Checkpoints
from models.training.config import CheckpointConfig
from models.weights import Array


def checkpoint(step: int, score: float | None = None, engine: str = "torch", fingerprint: str = "f") -> Checkpoint:
    weights = {"a.weight": np.full((3, 2), step, np.float32), "b": np.zeros(0, np.float32)}
    optimizer: dict[str, Array] = {
        "exp_avg:a.weight": np.full((3, 2), -step, np.float32),
        "updates": np.array(step, np.int64),
    }
    return Checkpoint(
        step, tuple(engine.split("-")), fingerprint, weights, optimizer, {"step": step, "third": 1 / 3}, score
    )


def open_at(root: Path, filesystem: AbstractFileSystem | None = None, **config: Any) -> Checkpoints:
    return Checkpoints(filesystem or LocalFileSystem(), str(root), CheckpointConfig(**config))


def write(checkpoints: Checkpoints, *found: Checkpoint) -> None:
    for one in found:
        checkpoints.save(one)
    checkpoints.wait()


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def memory() -> AbstractFileSystem:
    filesystem = MemoryFileSystem(skip_instance_cache=True)
    filesystem.store, filesystem.pseudo_dirs = {}, [""]
    return filesystem


def test_what_is_written_is_read(tmp_path: Path, memory: AbstractFileSystem) -> None:
    for filesystem, root in ((LocalFileSystem(), tmp_path / "run"), (memory, Path("/bucket/run"))):
        write(open_at(root, filesystem), checkpoint(7, 0.5))
        found = open_at(root, filesystem).load("torch", "f")
        assert found is not None
        assert (found.step, found.state, found.score) == (7, {"step": 7, "third": 1 / 3}, 0.5)
        for ours, theirs in ((found.weights, checkpoint(7).weights), (found.optimizer, checkpoint(7).optimizer)):
            assert ours.keys() == theirs.keys()
            for name, array in ours.items():
                assert array.dtype == theirs[name].dtype
                assert array.shape == theirs[name].shape
                assert array.tobytes() == theirs[name].tobytes()
                assert array.flags.writeable


def test_safetensors_opens_the_files(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    write(open_at(tmp_path), checkpoint(7))
    found = load_file(tmp_path / "step-00000007-torch" / "optimizer.safetensors")
    assert found["updates"] == 7
    assert found["updates"].shape == ()


def test_where_there_is_none_none_is_found(tmp_path: Path) -> None:
    assert open_at(tmp_path / "nothing").load("torch", "f") is None


def damages() -> list[tuple[str, str]]:
    files = ["model.safetensors", "optimizer.safetensors", "state.json"]
    return [(file, how) for file in files for how in ("gone", "cut", "flipped", "empty")]


@pytest.mark.parametrize(("file", "how"), damages())
def test_the_one_before_a_damaged_one_is_used(
    tmp_path: Path, file: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(open_at(tmp_path), checkpoint(10), checkpoint(20))
    path = tmp_path / "step-00000020-torch" / file
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0x80
        path.write_bytes({"cut": bytes(content[:-1]), "flipped": bytes(content), "empty": b""}[how])
    again = open_at(tmp_path)
    with caplog.at_level(logging.WARNING, "cairn.training"):
        found = again.load("torch", "f")
    assert found is not None
    assert found.step == 10
    assert len(caplog.messages) == 1
    assert "step-00000020-torch is not used" in caplog.messages[0]
    # The damaged one goes when there is a newer intact one, and counts as nothing before.
    write(again, checkpoint(15))
    assert folders(tmp_path) == ["step-00000010-torch", "step-00000015-torch"]


def test_a_state_that_was_changed_is_damaged(tmp_path: Path) -> None:
    write(open_at(tmp_path), checkpoint(10), checkpoint(20))
    path = tmp_path / "step-00000020-torch" / "state.json"
    path.write_text(path.read_text().replace("0.333", "0.334"))
    found = open_at(tmp_path).load("torch", "f")
    assert found is not None
    assert found.step == 10


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = open_at(tmp_path, keep_last=2, keep_best=2)
    scores = [(10, 0.9), (20, 0.1), (30, None), (40, 0.2), (50, 0.3), (60, None), (70, 0.4)]
    write(checkpoints, *(checkpoint(step, score) for step, score in scores))
    assert folders(tmp_path) == [f"step-{step:08d}-torch" for step in (20, 40, 60, 70)]
    assert open_at(tmp_path).read(20, "torch").score == 0.1
    with pytest.raises(UserError, match="step-00000030-torch cannot be used"):
        open_at(tmp_path).read(30, "torch")


def test_another_engines_checkpoint_is_used_only_when_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(open_at(tmp_path), checkpoint(10), checkpoint(20, engine="jax"))
    found = open_at(tmp_path).load("torch", "f")
    assert found is not None
    assert found.step == 10
    assert "engine 'jax' made it" in caplog.messages[0]
    other = open_at(tmp_path).load("torch", "f", continue_on=True)
    assert other is not None
    assert (other.step, other.engines) == (20, ("jax",))


def test_what_another_engine_has_a_part_in_is_used_only_when_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(open_at(tmp_path), checkpoint(10, engine="jax"), checkpoint(20, engine="torch-jax"))
    found = open_at(tmp_path).load("jax", "f")
    assert found is not None
    assert found.step == 10
    assert "engines 'torch' and 'jax' made it" in caplog.messages[0]
    other = open_at(tmp_path).load("mlx", "f", continue_on=True)
    assert other is not None
    assert (other.step, other.engines) == (20, ("torch", "jax"))


def test_no_engine_overwrites_what_another_made(tmp_path: Path) -> None:
    for engine in ("torch", "jax", "torch-jax"):
        checkpoints = open_at(tmp_path)
        checkpoints.load(engine, "f")
        write(checkpoints, checkpoint(10, engine=engine))
    assert open_at(tmp_path).makers(10) == ["jax", "torch", "torch-jax"]
    for engine in ("torch", "jax"):
        # Its own one comes first, whatever else may be used.
        for continue_on in (False, True):
            found = open_at(tmp_path).load(engine, "f", continue_on)
            assert found is not None
            assert (found.engines, found.maker) == ((engine,), engine)
    assert open_at(tmp_path).read(10, "torch-jax").engines == ("torch", "jax")


def test_checkpoints_of_older_versions_are_read_and_go(tmp_path: Path) -> None:
    write(open_at(tmp_path), checkpoint(10))
    folder = tmp_path / "step-00000010-torch"
    content = json.loads((folder / "state.json").read_text())
    del content["sha256"], content["engines"]
    content["engine"] = "torch"
    content["sha256"] = sha256_bytes(canonical_json(content))
    (folder / "state.json").write_bytes(canonical_json(content))
    folder.rename(tmp_path / "step-00000010")
    assert open_at(tmp_path).load("jax", "f") is None
    again = open_at(tmp_path, keep_last=2, keep_best=0)
    found = again.load("torch", "f")
    assert found is not None
    assert (found.step, found.engines, found.maker) == (10, ("torch",), "")
    write(again, checkpoint(10, 0.5), checkpoint(20))
    assert folders(tmp_path) == ["step-00000010-torch", "step-00000020-torch"]


def test_foreign_checkpoints_neither_count_nor_go(tmp_path: Path) -> None:
    foreign = [checkpoint(90, engine="jax"), checkpoint(95, engine="jax"), checkpoint(99, 0.0, fingerprint="g")]
    write(open_at(tmp_path, keep_last=5), *foreign)
    again = open_at(tmp_path, keep_last=2)
    assert again.load("torch", "f") is None
    write(again, checkpoint(10), checkpoint(20), checkpoint(30))
    kept = [(20, "torch"), (30, "torch"), (90, "jax"), (95, "jax"), (99, "torch")]
    assert folders(tmp_path) == [f"step-{step:08d}-{engine}" for step, engine in kept]


def test_a_new_state_leaves_the_arrays_of_its_step(tmp_path: Path) -> None:
    checkpoints = open_at(tmp_path)
    write(checkpoints, checkpoint(10))
    before = (tmp_path / "step-00000010-torch" / "model.safetensors").stat().st_mtime_ns
    write(checkpoints, checkpoint(10, 0.5))
    assert (tmp_path / "step-00000010-torch" / "model.safetensors").stat().st_mtime_ns == before
    found = open_at(tmp_path).load("torch", "f")
    assert found is not None
    assert found.score == 0.5


def test_a_full_disk_is_named_and_the_one_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = open_at(tmp_path)
    write(checkpoints, checkpoint(10))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    checkpoints.save(checkpoint(20))
    with pytest.raises(UserError, match=r"step-00000020-torch cannot be written \(No space left on device\)"):
        checkpoints.wait()
    monkeypatch.undo()
    assert folders(tmp_path) == ["step-00000010-torch"]
    found = open_at(tmp_path).load("torch", "f")
    assert found is not None
    assert found.step == 10


def test_what_cannot_be_read_now_is_not_removed(tmp_path: Path) -> None:
    class Failing(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
        def size(self, path: str) -> int:
            if "step-00000020-torch" in path:
                raise OSError(errno.EIO, "no connection")
            return int(super().size(path))

    write(open_at(tmp_path), checkpoint(10), checkpoint(20))
    again = open_at(tmp_path, Failing(skip_instance_cache=True))
    found = again.load("torch", "f")
    assert found is not None
    assert found.step == 10
    write(again, checkpoint(15))
    assert "step-00000020-torch" in folders(tmp_path)
    assert "step-00000015-torch" in folders(tmp_path)


def test_one_write_is_in_flight_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, flush = 0, 0, os.fsync
    lock = threading.Lock()

    def counted(descriptor: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        flush(descriptor)
        with lock:
            running -= 1

    monkeypatch.setattr(os, "fsync", counted)
    checkpoints = open_at(tmp_path)
    for step in range(1, 6):
        checkpoints.save(checkpoint(step))
    assert checkpoints.busy in (True, False)
    checkpoints.wait()
    assert not checkpoints.busy
    assert most == 1


def test_an_array_that_no_file_can_hold_is_a_defect(tmp_path: Path) -> None:
    checkpoints = open_at(tmp_path)
    checkpoints.save(Checkpoint(1, ("torch",), "f", {"a": np.array(["x"])}, {}, {}))
    with pytest.raises(ValueError, match="which safetensors files do not hold"):
        checkpoints.wait()
