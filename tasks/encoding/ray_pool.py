"""Units encoded by the machines of a Ray cluster.

The bytes of a shard go out through Ray's object store, and its token shards come back the same way, so that machines
need share no disk and no credentials: 32 MiB of text are about 12 MB of Parquet and 16 MB of ids, which a network
moves in a fraction of the time that all but the fastest encoder takes for them. What a machine that dies was doing is
done again on another one, by Ray itself: a unit depends on nothing but its arguments.
"""

import logging
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import StageFailed, StageInterrupted, UserError
from models.tokenizer import tokenizer_files
from tasks.encoding.encoders import text_of
from tasks.encoding.reply import Reply
from tasks.encoding.units import EncodedUnit, Encoders, Job, Unit, encode_unit
from tasks.encoding.worker import Order

UNITS_PER_CORE = 2
"""Units that are under way for each core of the cluster: one at work, one on its way there."""
MEMORY_SHARE = 0.5
"""The share of the smallest object store in the cluster that units under way, and what they become, may fill."""
RETRIES = 10
"""How often Ray begins a unit again after a machine has died under it."""
_LOOK_SECONDS = 0.5
_KNOCK_SECONDS = 10.0

Files = tuple[tuple[str, bytes], ...]


def encode_over_ray(
    units: Sequence[Unit], order: Order, address: str, should_stop: Callable[[], bool]
) -> Iterator[tuple[Unit, EncodedUnit]]:
    """The units as they are done, in any order; their token shards are then in the order's `output` here.

    Raises UserError where Ray is not installed or no cluster answers, StageInterrupted, StageFailed where Ray gives a
    unit up, and what `Reply.result` raises.
    """
    with _connection(address) as ray:
        encode = ray.remote(num_cpus=1, max_retries=RETRIES)(_encode)
        files: Files = tuple((path.name, path.read_bytes()) for path in tokenizer_files(order.tokenizer))
        tokenizer = ray.put(files)
        under_way: dict[Any, Unit] = {}
        waiting = list(reversed(units))
        try:
            while waiting or under_way:
                while waiting and _has_room(ray, waiting[-1], under_way.values()):
                    unit = waiting.pop()
                    data = np.fromfile(order.documents / unit.name, np.uint8)
                    under_way[encode.remote(unit, order.job, tokenizer, data)] = unit
                done, _ = ray.wait(list(under_way), timeout=_LOOK_SECONDS)
                if should_stop():
                    raise StageInterrupted("the tokens were stopped")
                for reference in done:
                    unit = under_way.pop(reference)
                    yield unit, _received(ray, reference, unit, order.output)
        finally:
            for reference in under_way:
                with suppress(Exception):  # a cluster that is gone does nothing any more
                    ray.cancel(reference, force=True)


@contextmanager
def _connection(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster; a connection that this process already has is used, and left as it is."""
    try:
        import ray
    except ImportError as error:
        raise UserError("ray: the package is not installed; pip install 'cairn[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"ray: no cluster answers at {address!r} ({text_of(error)}); start one with `ray start --head`, correct "
            "the address, or leave `ray` out"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError where nothing listens at `host:port`: Ray itself would try for ten minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), _KNOCK_SECONDS).close()


def _has_room(ray: Any, unit: Unit, under_way: Any) -> bool:
    """Whether one more unit may be under way."""
    together = list(under_way)
    if not together:
        return True
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores: float = sum(resources.get("CPU", 0) for resources in nodes)
    memory: float = min((resources.get("object_store_memory", 0) for resources in nodes), default=0)
    # Its Parquet file and its ids are both smaller than its text, together about as large.
    return (
        len(together) < UNITS_PER_CORE * cores and sum(one.bytes for one in [*together, unit]) <= MEMORY_SHARE * memory
    )


def _received(ray: Any, reference: Any, unit: Unit, folder: Path) -> EncodedUnit:
    """Writes the token shards that have come back."""
    try:
        reply_json, shards = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise StageFailed(f"Ray gave up documents {unit.name}: {text_of(error)}") from error
    encoded = Reply.model_validate_json(reply_json).result(unit)
    for shard, data in zip(encoded.shards, shards, strict=True):
        temporary = folder / f".{shard.name}.tmp"
        with temporary.open("wb") as file:
            file.write(data.data)
        temporary.replace(folder / shard.name)
    return encoded


def _encode(unit: Unit, job: Job, tokenizer: Files, data: NDArray[np.uint8]) -> tuple[str, list[NDArray[np.uint8]]]:
    """What runs on the cluster: the reply as JSON, and the bytes of the token shards."""
    import pyarrow as pa

    with tempfile.TemporaryDirectory(prefix="cairn-tokens-") as name:
        reply = Reply.to(lambda: encode_unit(unit, pa.py_buffer(data), job, _encoders(job, tokenizer), Path(name)))
        shards = reply.encoded.shards if reply.encoded is not None else ()
        return reply.model_dump_json(), [np.fromfile(Path(name) / shard.name, np.uint8) for shard in shards]


@lru_cache(maxsize=1)
def _encoders(job: Job, tokenizer: Files) -> Encoders:
    """The libraries of a job: a process of Ray's keeps them from one unit to the next."""
    with tempfile.TemporaryDirectory(prefix="cairn-tokenizer-") as name:
        for file, content in tokenizer:
            (Path(name) / file).write_bytes(content)
        return Encoders.load(job, Path(name), parallel=False)
