"""What things are called: keys, digests and the names of files, each checked before it becomes a path."""

import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints

from common.config import FrozenModel
from common.errors import UserError
from common.files import canonical_json, sha256_bytes, sha256_file

DIGEST_PATTERN = r"^[0-9a-f]{64}$"
_NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]*")
_MAX_NAME_BYTES = 200


def check_digest(value: str) -> str:
    """Returns a key or digest that is 64 lower-case hexadecimal digits; raises UserError otherwise."""
    if not re.fullmatch(DIGEST_PATTERN, value):
        raise UserError(f"{value!r} is no key or digest: those are 64 lower-case hexadecimal digits")
    return value


def check_name(name: str) -> str:
    """Returns a name that may stand under `refs/`; raises UserError for one that may not."""
    parts = name.split("/")
    legal = all(_NAME_PART.fullmatch(part) and ".." not in part for part in parts)
    if not legal or len(name) > _MAX_NAME_BYTES:
        raise UserError(
            f"{name!r} is no name: use letters, digits and ._-@ in parts divided by /, "
            f"no part starting with a dot and no '..', {_MAX_NAME_BYTES} characters at most"
        )
    return name


def check_file_name(name: str) -> str:
    """Returns a relative POSIX file name that cannot leave its folder; raises UserError for any other."""
    if not name or "\\" in name or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name):
        raise UserError(f"file name {name!r} is not allowed: it is empty or has backslashes or control characters")
    if any(0xD800 <= ord(c) < 0xE000 for c in name):
        raise UserError(f"file name {name!r} is not allowed: it is not valid Unicode")
    if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        raise UserError(f"file name {name!r} is not allowed: it must be relative, without '.' and '..' parts")
    if any(len(part.encode()) > 255 for part in name.split("/")):
        raise UserError(f"file name {name!r} is not allowed: a part is longer than 255 bytes")
    return name


def _as_value_error(name: str) -> str:
    try:
        return check_file_name(name)
    except UserError as error:
        # pydantic collects ValueErrors only, and a record from elsewhere must fail as a whole.
        raise ValueError(str(error)) from error


Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]
FileName = Annotated[str, AfterValidator(_as_value_error)]


class FileEntry(FrozenModel):
    """One file of an artifact."""

    sha256: Digest
    """The SHA-256 of the file's bytes."""
    size: int = Field(ge=0)
    """The file's size in bytes."""


def stage_key(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The key of a stage's work: the SHA-256 of the canonical JSON of all that its output depends on.

    `inputs` maps each input's name to its content digest. Raises ValueError for anything that is not a plain
    JSON literal (NaN, a set, a path, a number as a mapping's key), because its text could change by itself.
    """
    for digest in inputs.values():
        check_digest(digest)
    value = {"stage": stage, "version": version, "config": dict(config), "inputs": dict(inputs)}
    _require_literals(value, "config")
    return sha256_bytes(canonical_json(value))


def _require_literals(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for name, part in value.items():
            if type(name) is not str:
                raise ValueError(f"{where} has the key {name!r}, which is no string")
            _require_literals(part, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            _require_literals(part, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON cannot hold")
    elif value is not None and type(value) not in (str, int, bool):
        # Subclasses too: an Enum or a numpy number writes itself differently from release to release.
        raise ValueError(f"{where} is {value!r}, which is no plain JSON value")


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Hashes every file below `folder`, by POSIX name relative to it, in sorted order.

    Empty folders do not count. Raises UserError for links, devices and the names that `check_file_name` refuses.
    """
    return {
        name: FileEntry(sha256=sha256_file(folder / name), size=(folder / name).stat().st_size)
        for name in list_files(folder)
    }


def list_files(folder: Path) -> list[str]:
    """The sorted POSIX names of the files below `folder`; raises UserError as `describe_files` does."""
    names: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        for name in folders + files:
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{path} is a link or a special file, which an artifact cannot hold: copy its content")
        names += [check_file_name(PurePosixPath(parent, name).relative_to(folder).as_posix()) for name in files]
    return sorted(names)


def _raise(error: OSError) -> None:
    raise error


def content_digest(files: Mapping[str, FileEntry]) -> str:
    """The digest of an artifact: the SHA-256 over its sorted file names and their SHA-256s."""
    return sha256_bytes(canonical_json({name: entry.sha256 for name, entry in files.items()}))
