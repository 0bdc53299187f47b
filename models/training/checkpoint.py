"""Checkpoints: written in the background, complete or absent, verified by digest when read.

`<root>/step-00001000-torch/` holds `model.safetensors`, `optimizer.safetensors`, and `state.json`, which is written
last and removed first: a folder without it is what is left of an interrupted write. A folder's name has the engines
that took its steps, `step-00001000-torch-mlx`, so that none is overwritten by one that was made in another way; older
checkpoints, each of one engine, have the step alone.
"""

import functools
import logging
import os
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, ValidationError

from common.config import FrozenModel
from common.errors import UserError
from common.files import canonical_json, fsync_file, sha256_bytes
from models.training.config import CheckpointConfig
from models.training.tensor_file import read_stream, write_stream
from models.weights import Array

log = logging.getLogger("cairn.training")
_FOLDER = re.compile(r"step-(\d{8,})(?:-([a-z-]+))?")
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps."""

    step: int
    """Steps done."""
    engines: tuple[str, ...]
    """The engines that took its steps, in the order in which they came."""
    fingerprint: str
    """What was trained how on what: only a run with the same one goes on from here."""
    weights: Mapping[str, Array]
    optimizer: Mapping[str, Array]
    state: dict[str, Any]
    """Whatever else the loop needs to go on exactly, as JSON values."""
    score: float | None = None
    """The validation loss at this step, where it was measured."""
    maker: str = ""
    """What tells it from others of its step, where it was read."""


def named(engines: Sequence[str]) -> str:
    """Engines as a sentence has them: "engine 'torch'", "engines 'torch' and 'jax'"; nothing for none."""
    names = " and ".join(f"'{engine}'" for engine in engines)
    return names and f"engine{'s' if len(engines) > 1 else ''} {names}"


class _Key(NamedTuple):
    """What a checkpoint's folder is named by. Those of a step come in a fixed order."""

    step: int
    maker: str
    """Its engines; empty for one of an older version."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "_Key":
        return cls(checkpoint.step, "-".join(checkpoint.engines))


class _File(FrozenModel):
    sha256: str
    size: int = Field(ge=0)


class _Manifest(FrozenModel):
    """`state.json`."""

    format: Literal[1] = 1
    step: int
    engine: str = ""
    """Only in checkpoints of older versions: their one engine."""
    engines: tuple[str, ...] = ()
    fingerprint: str
    score: float | None
    files: dict[str, _File]
    state: dict[str, Any]
    sha256: str = ""
    """Of everything else here."""

    def digest(self) -> str:
        return sha256_bytes(canonical_json(self.model_dump(exclude={"sha256", *self._absent})))

    @property
    def made_by(self) -> tuple[str, ...]:
        return self.engines or (self.engine,)

    @property
    def _absent(self) -> set[str]:
        return {"engine"} if self.engines else {"engines"}

    def to_json(self) -> bytes:
        return canonical_json(self.model_dump(exclude=self._absent))


class _Unusable(Exception):
    """Why a checkpoint cannot be used now: it cannot be read, which may pass."""


class _Damaged(_Unusable):
    """Why a checkpoint can never be used."""


class Checkpoints:
    """The checkpoints of one run below a folder of any file system. One process writes at a time."""

    def __init__(self, filesystem: AbstractFileSystem, root: str, config: CheckpointConfig) -> None:
        """`root` is a folder of `filesystem`; it comes into being with the first checkpoint."""
        self.config = config
        self._filesystem = filesystem
        self._root = filesystem._strip_protocol(root).rstrip("/")
        self._local = isinstance(filesystem, LocalFileSystem)
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        self._manifests: dict[_Key, _Manifest] = {}
        self._damaged: set[_Key] = set()
        self._intact: _Key | None = None
        self._mine: Callable[[_Manifest], bool] = lambda manifest: True

    @property
    def busy(self) -> bool:
        """Whether a write is going on."""
        return self._writing is not None and self._writing.is_alive()

    def save(self, checkpoint: Checkpoint) -> None:
        """Begins to write a checkpoint, after the one before it is done; its arrays must not change any more.

        Raises what the write before it raised, as `check` does.
        """
        self.wait()
        self._writing = threading.Thread(target=self._write_safely, args=(checkpoint,), name="checkpoint", daemon=True)
        self._writing.start()

    def check(self) -> None:
        """Raises what a write in the background raised: UserError that names the place where it was an OSError."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Waits until no write is going on, then does as `check`."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        self.check()

    def close(self) -> None:
        """Waits until no write is going on; an error of it is only logged, as nothing depends on it any more."""
        try:
            self.wait()
        except UserError as error:
            log.warning("%s", error)
        except Exception:
            log.exception("the last checkpoint was not written")

    def load(self, engine: str, fingerprint: str, continue_on: bool = False) -> Checkpoint | None:
        """The newest intact checkpoint of this run, or None; says which ones are not used, and why.

        One that another engine took a step of is used only with `continue_on`. What interrupted writes left is removed.
        """

        def mine(manifest: _Manifest) -> bool:
            return manifest.fingerprint == fingerprint and (continue_on or set(manifest.made_by) == {engine})

        self._mine = mine
        # Of one step, that which this engine made alone comes first.
        for key in sorted(self._keys(), key=lambda key: (key.step, key.maker == engine), reverse=True):
            try:
                manifest = self._manifest(key)
                if not mine(manifest):
                    self._say_foreign(key, manifest, fingerprint)
                    continue
                found = self._read(key, manifest)
                self._intact = key
                return found
            except _Unusable as reason:
                log.warning("checkpoint %s is not used: %s", self._folder(key), reason)
                if isinstance(reason, _Damaged):
                    self._damaged.add(key)
        return None

    def makers(self, step: int) -> list[str]:
        """What the checkpoints of a step are told apart by, in a fixed order."""
        return [key.maker for key in self._keys() if key.step == step]

    def read(self, step: int, maker: str) -> Checkpoint:
        """One of the checkpoints of a step, verified. Raises UserError where it is missing or damaged."""
        key = _Key(step, maker)
        try:
            return self._read(key, self._manifest(key))
        except _Unusable as reason:
            raise UserError(f"checkpoint {self._folder(key)} cannot be used: {reason}") from reason

    def _say_foreign(self, key: _Key, manifest: _Manifest, fingerprint: str) -> None:
        if manifest.fingerprint != fingerprint:
            reason = "it belongs to another config or other data"
        else:
            reason = f"{named(manifest.made_by)} made it, and another goes on from it only with `--continue-on`"
        log.warning("checkpoint %s is not used: %s", self._folder(key), reason)

    def _folder(self, key: _Key) -> str:
        return f"{self._root}/step-{key.step:08d}" + (f"-{key.maker}" if key.maker else "")

    def _keys(self) -> list[_Key]:
        self._filesystem.invalidate_cache(self._root)
        try:
            names = [str(name).rstrip("/").rpartition("/")[2] for name in self._filesystem.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(_Key(int(found[1]), found[2] or "") for name in names if (found := _FOLDER.fullmatch(name)))

    def _manifest(self, key: _Key) -> _Manifest:
        if key not in self._manifests:
            try:
                manifest = _Manifest.model_validate_json(self._filesystem.cat_file(f"{self._folder(key)}/{_STATE}"))
            except FileNotFoundError:
                raise _Damaged(f"it was not written to its end (there is no {_STATE})") from None
            except OSError as error:
                raise _Unusable(f"its {_STATE} cannot be read ({error})") from error
            except ValidationError as error:
                raise _Damaged(f"its {_STATE} is damaged ({str(error).splitlines()[0]})") from error
            if manifest.digest() != manifest.sha256:
                raise _Damaged(f"its {_STATE} is damaged (its SHA-256 is not the recorded one)")
            if (manifest.step, "-".join(manifest.engines)) != key or set(manifest.files) != {_MODEL, _OPTIMIZER}:
                raise _Damaged(f"its {_STATE} is of another checkpoint")
            self._manifests[key] = manifest
        return self._manifests[key]

    def _read(self, key: _Key, manifest: _Manifest) -> Checkpoint:
        weights, optimizer = (self._read_arrays(key, name, manifest.files[name]) for name in (_MODEL, _OPTIMIZER))
        return Checkpoint(
            manifest.step,
            manifest.made_by,
            manifest.fingerprint,
            weights,
            optimizer,
            manifest.state,
            manifest.score,
            key.maker,
        )

    def _read_arrays(self, key: _Key, name: str, expected: _File) -> dict[str, Array]:
        path = f"{self._folder(key)}/{name}"
        try:
            size = self._filesystem.size(path)
            if size != expected.size:
                raise ValueError(f"{size} bytes instead of {expected.size}")
            with self._filesystem.open(path, "rb") as file:
                arrays, digest = read_stream(file, expected.size)
        except (FileNotFoundError, ValueError) as error:
            raise _Damaged(f"its {name} is damaged ({error})") from error
        except OSError as error:
            raise _Unusable(f"its {name} cannot be read ({error})") from error
        if digest != expected.sha256:
            raise _Damaged(f"its {name} is damaged (its SHA-256 is not the recorded one)")
        return arrays

    def _write_safely(self, checkpoint: Checkpoint) -> None:
        try:
            self._write(checkpoint)
        except OSError as error:
            key = _Key.of(checkpoint)
            folder = self._folder(key)
            self._error = UserError(
                f"checkpoint {folder} cannot be written ({error.strerror or error}); "
                f"make room or mend the place, then start again: the run goes on from the checkpoint before it"
            )
            self._error.__cause__ = error
            if key != self._intact:
                self._remove_if_possible(key)
            return
        except BaseException as error:  # it is raised in the loop
            self._error = error
            return
        try:
            self._prune(_Key.of(checkpoint))
        except OSError as error:
            log.warning("old checkpoints in %s cannot be removed (%s)", self._root, error)

    def _write(self, checkpoint: Checkpoint) -> None:
        key = _Key.of(checkpoint)
        folder = self._folder(key)
        if key == self._intact:
            # Only the state is new, as after a validation: taking the arrays away first would put them at risk.
            files = self._manifests[key].files
        else:
            self._remove(key)
            self._filesystem.makedirs(folder, exist_ok=True)
            if self._local:
                fsync_file(Path(self._root))
            files = self._write_arrays(folder, checkpoint)
        manifest = _Manifest(
            step=checkpoint.step,
            engines=checkpoint.engines,
            fingerprint=checkpoint.fingerprint,
            score=checkpoint.score,
            files=files,
            state=checkpoint.state,
        )
        manifest = manifest.model_copy(update={"sha256": manifest.digest()})
        text = manifest.to_json()
        self._write_file(f"{folder}/{_STATE}", lambda file: file.write(text))
        self._manifests[key] = manifest
        self._intact = key

    def _write_arrays(self, folder: str, checkpoint: Checkpoint) -> dict[str, _File]:
        files = {}
        for name, arrays in ((_MODEL, checkpoint.weights), (_OPTIMIZER, checkpoint.optimizer)):
            written = self._write_file(f"{folder}/{name}", functools.partial(write_stream, arrays=arrays))
            files[name] = _File(sha256=written.sha256, size=written.size)
        return files

    def _write_file(self, path: str, write: Callable[[BinaryIO], Result]) -> Result:
        if not self._local:
            with self._filesystem.open(path, "wb") as file:
                return write(file)
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        with temporary.open("wb") as file:
            result = write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        fsync_file(target.parent)
        return result

    def _prune(self, written: _Key) -> None:
        """Removes what is damaged, and of this run's checkpoints all but the newest and the best."""
        mine: dict[_Key, _Manifest] = {}
        for key in self._keys():
            try:
                manifest = self._manifest(key)
                if key in self._damaged:
                    raise _Damaged
            except _Unusable as reason:
                if isinstance(reason, _Damaged):
                    self._remove(key)
                continue
            if self._mine(manifest):
                mine[key] = manifest
        scored = sorted((manifest.score, key) for key, manifest in mine.items() if manifest.score is not None)
        kept = {written, *sorted(mine)[-self.config.keep_last :]}
        kept.update(key for _, key in scored[: self.config.keep_best])
        for key in mine:
            if key not in kept:
                self._remove(key)

    def _remove(self, key: _Key) -> None:
        self._manifests.pop(key, None)
        folder = self._folder(key)
        state = f"{folder}/{_STATE}"
        if self._filesystem.exists(state):
            self._filesystem.rm_file(state)
        if self._filesystem.exists(folder):
            self._filesystem.rm(folder, recursive=True)
        self._damaged.discard(key)

    def _remove_if_possible(self, key: _Key) -> None:
        try:
            self._remove(key)
        except OSError:
            log.warning("%s is left of an interrupted write; the next checkpoint removes it", self._folder(key))
