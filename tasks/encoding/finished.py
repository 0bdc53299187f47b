"""Units that are done, kept where the stage goes on after a kill: their token shards, and a JSON file that says so.

Shards are made in a folder of this machine. Where the stage's scratch is elsewhere, they are also put there, so that
another machine may go on; where it is a folder here, it is the same.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from common.errors import UserError
from common.files import sha256_file, write_atomically
from tasks.documents import shard_name
from tasks.encoding.units import EncodedUnit, Unit
from tasks.encoding.writer import TokenShard

_FOLDER = "units"


class FinishedUnits:
    """The finished units of one stage."""

    def __init__(self, scratch: tuple[AbstractFileSystem, str], local_scratch: Path) -> None:
        """`scratch` and `local_scratch` are those of `tasks.stage.Context`."""
        self._filesystem, place = scratch
        self._remote = f"{place.rstrip('/')}/{_FOLDER}"
        self._is_local = isinstance(self._filesystem, LocalFileSystem)
        self.folder = Path(place) / _FOLDER if self._is_local else local_scratch / _FOLDER
        """Where token shards are made."""
        self.damaged: list[str] = []
        """Units that were said to be finished and whose shards were not whole."""

    def find(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, EncodedUnit]]:
        """The units that are finished and whose shards are whole; they lie in `folder` then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for unit in units:
            encoded = self._description(unit)
            if encoded is None:
                continue
            if all(self._is_whole(shard) for shard in encoded.shards):
                yield unit, encoded
            else:
                self.damaged.append(unit.name)

    def _description(self, unit: Unit) -> EncodedUnit | None:
        try:
            return EncodedUnit.model_validate_json(self._filesystem.cat_file(f"{self._remote}/{unit.key}.json"))
        except FileNotFoundError:
            return None
        except ValidationError:
            self.damaged.append(unit.name)
            return None

    def _is_whole(self, shard: TokenShard) -> bool:
        path = self.folder / shard.name
        if _matches(path, shard):
            return True
        if self._is_local:
            return False
        with suppress(FileNotFoundError):
            self._filesystem.get_file(f"{self._remote}/{shard.name}", str(path))
        return _matches(path, shard)

    def keep(self, unit: Unit, encoded: EncodedUnit) -> None:
        """Says that a unit is finished whose shards lie in `folder`."""
        description = encoded.model_dump_json().encode()
        if self._is_local:
            write_atomically(self.folder / f"{unit.key}.json", description)
            return
        self._filesystem.makedirs(self._remote, exist_ok=True)
        for shard in encoded.shards:
            self._filesystem.put_file(str(self.folder / shard.name), f"{self._remote}/{shard.name}")
        # Last, because it says that all the others are there.
        self._filesystem.pipe_file(f"{self._remote}/{unit.key}.json", description)

    def put_together(self, units: Sequence[tuple[Unit, EncodedUnit]], output: Path) -> dict[str, list[TokenShard]]:
        """Puts all shards into `output` as `<split>-<n>.safetensors`; gives those of each split, by their new names.

        They are linked to and not moved, so that a kill costs none. Raises UserError for more shards than have names.
        """
        shards: dict[str, list[TokenShard]] = {}
        for unit, encoded in units:
            of_split = shards.setdefault(unit.split, [])
            for shard in encoded.shards:
                name = shard_name(unit.split, len(of_split), "safetensors")
                if len(name) != len(shard_name(unit.split, 0, "safetensors")):
                    raise UserError(f"the split {unit.split} has more than {len(of_split):,} shards: make them larger")
                try:
                    os.link(self.folder / shard.name, output / name)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(self.folder / shard.name, output / name)
                of_split.append(shard.model_copy(update={"name": name}))
        return shards


def _matches(path: Path, shard: TokenShard) -> bool:
    try:
        return path.stat().st_size == shard.size and sha256_file(path) == shard.sha256
    except FileNotFoundError:
        return False
