"""The record: what made an artifact, from what, with what. Its presence means that the artifact is complete."""

import json
import math
from datetime import UTC, datetime
from typing import Annotated, Any, NotRequired, Required, Self, TypedDict

from pydantic import AwareDatetime, BeforeValidator, Field, JsonValue, ValidationError, model_validator

from artifacts.identity import Digest, FileEntry, FileName, content_digest
from common.config import FrozenModel
from common.files import canonical_json, sha256_bytes


def _without_nonfinite(value: Any) -> Any:
    """NaN and infinity as null: a run that diverged must still be recordable, and JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _without_nonfinite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(part) for part in value]
    return value


Measurements = Annotated[dict[str, JsonValue], BeforeValidator(_without_nonfinite)]


class InputReference(FrozenModel):
    """One input of a stage: its content, and where that came from."""

    digest: Digest
    """The digest of the input's content, which is part of the key."""
    key: Digest
    """The key of the record that was used; the lineage follows it."""


class Record(FrozenModel):
    """What made an artifact. A pure description: nothing here reads or writes files."""

    key: Digest
    """The key of the work: the SHA-256 of stage, version, config and the inputs' digests."""
    stage: str = Field(min_length=1)
    """The kind of stage, such as `pretrain`."""
    version: int = Field(ge=0)
    """The stage's version, which its author raises when its output changes."""
    name: str = Field(min_length=1)
    """The stage's name in its recipe."""
    config: dict[str, JsonValue]
    """The stage's config as it was part of the key."""
    inputs: dict[str, InputReference] = Field(default_factory=dict)
    """The inputs by name."""
    output: Digest
    """The digest of the artifact's content."""
    files: dict[FileName, FileEntry]
    """The artifact's files by name."""
    metrics: Measurements = Field(default_factory=dict)
    """What was measured; NaN and infinity are kept as null."""
    engine: str | None = None
    """The engine that did the work, or null for a stage without one."""
    hardware: Measurements = Field(default_factory=dict)
    """The machine: host, processor, accelerators."""
    packages: dict[str, str] = Field(default_factory=dict)
    """The versions of the packages that matter."""
    git_commit: str | None = None
    """The commit of the code, or null outside a checkout."""
    git_dirty: bool | None = None
    """Whether the working tree had changes, or null outside a checkout."""
    started: AwareDatetime
    """When the work began."""
    ended: AwareDatetime
    """When the work ended."""
    flow_run_id: str | None = None
    """The id of the Prefect run, or null where there was none."""
    notes: list[str] = Field(default_factory=list)
    """What a reader ought to know, such as that the run went on from another engine's checkpoint."""

    @model_validator(mode="after")
    def _files_make_the_output(self) -> Self:
        if not self.files:
            raise ValueError("an artifact needs at least one file")
        if content_digest(self.files) != self.output:
            raise ValueError("the output's digest is not that of its files")
        return self

    @property
    def summary(self) -> str:
        """What was made in a few words: the metric of that name; empty where there is none."""
        said = self.metrics.get("summary")
        return said if isinstance(said, str) else ""

    @property
    def size(self) -> int:
        """The artifact's size in bytes."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> bytes:
        """The record's file: indented JSON with a checksum, so that a damaged record is told from a whole one."""
        return _text(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Reads what `to_json` wrote; raises ValueError for anything else, even if one bit differs."""
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        fields.pop("checksum", None)
        try:
            whole = _text(fields) == data
        except ValueError:
            whole = False
        if not whole:
            raise ValueError("its checksum or its layout is wrong")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where or 'the record'}: {first['msg']}") from error


def _text(fields: dict[str, Any]) -> bytes:
    whole = {**fields, "checksum": sha256_bytes(canonical_json(fields))}
    return json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


class RecordFields(TypedDict, total=False):
    """The fields of a Record that its maker knows; the store adds the output and its files."""

    key: Required[str]
    stage: Required[str]
    version: Required[int]
    name: Required[str]
    config: Required[dict[str, Any]]
    inputs: Required[dict[str, InputReference]]
    started: Required[datetime]
    ended: NotRequired[datetime]
    metrics: NotRequired[dict[str, Any]]
    engine: NotRequired[str | None]
    hardware: NotRequired[dict[str, Any]]
    packages: NotRequired[dict[str, str]]
    git_commit: NotRequired[str | None]
    git_dirty: NotRequired[bool | None]
    flow_run_id: NotRequired[str | None]
    notes: NotRequired[list[str]]


def make_record(output: str, files: dict[str, FileEntry], fields: RecordFields) -> Record:
    """The record of an output that is now in the store; `ended` is now where the fields do not say."""
    return Record.model_validate({"ended": datetime.now(UTC), **fields, "output": output, "files": files})
