"""Conditional writes on object stores: the one thing on which locks between machines can be built."""

import threading
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import quote

from fsspec.asyn import sync

from common.files import sha256_bytes

_REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409")


class ConditionalWrites(Protocol):
    """Small objects with versions: a write succeeds only on the version that the writer saw."""

    wrong_version: str
    """A version that no object has, but of a form that the server accepts."""

    def read(self, path: str) -> tuple[bytes, str] | None:
        """An object's bytes and version, or None where there is none."""

    def write(self, path: str, data: bytes, version: str | None) -> str | None:
        """Writes over `version`, or only where there is no object if it is None.

        Returns the new version, or None where the condition did not hold and nothing was written.
        """


def conditional_writes(filesystem: Any) -> ConditionalWrites | None:
    """The conditional writes that an fsspec filesystem's protocol has, untried; None where it has none."""
    protocols = filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)
    kinds: dict[str, Callable[[Any], ConditionalWrites]]
    kinds = {"s3": S3Writes, "gs": GcsWrites, "memory": MemoryWrites}
    return next((kind(filesystem) for protocol, kind in kinds.items() if protocol in protocols), None)


def conditions_hold(writes: ConditionalWrites, path: str) -> bool:
    """Tries on a fresh `path` whether the server really refuses; some ignore conditions and would let two in."""
    if writes.write(path, b"first", None) is None:
        return False
    refused = writes.write(path, b"second", None) is None
    return refused and writes.write(path, b"third", writes.wrong_version) is None


class S3Writes:
    """`If-None-Match` and `If-Match` on S3; the version is the ETag."""

    wrong_version = '"00000000000000000000000000000000"'

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def read(self, path: str) -> tuple[bytes, str] | None:
        bucket, key, _ = self._filesystem.split_path(path)

        async def get() -> tuple[bytes, str]:
            # One request, so that the bytes and the version belong together.
            answer = await self._filesystem._call_s3("get_object", Bucket=bucket, Key=key)
            async with answer["Body"] as body:
                return await body.read(), str(answer["ETag"])

        try:
            found: tuple[bytes, str] = sync(self._filesystem.loop, get)
        except FileNotFoundError:
            return None
        return found

    def write(self, path: str, data: bytes, version: str | None) -> str | None:
        bucket, key, _ = self._filesystem.split_path(path)
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            answer = self._filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as error:
            response = getattr(error.__cause__, "response", None) or {}
            if str(response.get("Error", {}).get("Code")) in _REFUSED:
                return None
            raise
        return str(answer["ETag"])


class GcsWrites:
    """`ifGenerationMatch` on Google Cloud Storage; the version is the object's generation, 0 for none."""

    wrong_version = "1"

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def read(self, path: str) -> tuple[bytes, str] | None:
        try:
            headers, data = self._filesystem.call("GET", self._filesystem.url(path))
        except FileNotFoundError:
            return None
        return data, str(headers["X-Goog-Generation"])

    def write(self, path: str, data: bytes, version: str | None) -> str | None:
        bucket, key, _ = self._filesystem.split_path(path)
        url = f"{self._filesystem._location}/upload/storage/v1/b/{quote(bucket)}/o"
        condition = {"uploadType": "media", "name": key, "ifGenerationMatch": version or "0"}
        try:
            answer = self._filesystem.call("POST", url, data=data, json_out=True, **condition)
        except FileExistsError:
            # What gcsfs makes of every status 412.
            return None
        return str(answer["generation"])


class MemoryWrites:
    """The same for fsspec's `memory://`, which lives in one process; the version is the content's digest."""

    wrong_version = "0" * 64
    _lock = threading.Lock()

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def read(self, path: str) -> tuple[bytes, str] | None:
        try:
            data: bytes = self._filesystem.cat_file(path)
        except FileNotFoundError:
            return None
        return data, sha256_bytes(data)

    def write(self, path: str, data: bytes, version: str | None) -> str | None:
        with self._lock:
            found = self.read(path)
            if (found[1] if found else None) != version:
                return None
            self._filesystem.pipe_file(path, data)
            return sha256_bytes(data)
