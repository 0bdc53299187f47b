"""Several processes, on one machine or on many, through `jax.distributed`."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from common.errors import UserError
from models.machine import peak_resident_memory

_ADDRESS, _COUNT, _NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join() -> None:
    """Joins the other processes of a run, where the environment says that there are some; once in a process.

    JAX_COORDINATOR_ADDRESS (`host:port` of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it anywhere; the
    hosts of a TPU slice know of each other without. Raises UserError where one of the three is missing or odd.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ.get(name) for name in (_ADDRESS, _COUNT, _NUMBER)}
    if given[_ADDRESS] is None:
        if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
            jax.distributed.initialize()
        return
    numbers = [value or "" for value in (given[_COUNT], given[_NUMBER])]
    if not all(value.isdecimal() for value in numbers) or not int(numbers[1]) < int(numbers[0]):
        raise UserError(
            f"{_ADDRESS} is set, so {_COUNT} and {_NUMBER} have to be numbers, the second below the first, "
            f"not {given[_COUNT]!r} and {given[_NUMBER]!r}: set all three, or none"
        )
    jax.distributed.initialize(given[_ADDRESS], int(numbers[0]), int(numbers[1]))


def largest_word(word: int) -> int:
    """The largest of the words of all processes; collective."""
    if jax.process_count() == 1:
        return word
    # Without 64-bit numbers on the device, a word travels as two halves.
    halves = np.array([word], np.int64).view(np.uint32)
    found = np.asarray(multihost_utils.process_allgather(halves)).reshape(-1, 2)
    return int(np.ascontiguousarray(found).view(np.int64).max())


def peak_memory(mesh: Mesh) -> int:
    """As the engine's contract says, of that of this process's devices which held the most."""
    held = [device.memory_stats() for device in mesh.local_devices]
    found = [int(statistics["peak_bytes_in_use"]) for statistics in held if statistics]
    return max(found) if found else peak_resident_memory()


def described(mesh: Mesh) -> str:
    """The devices of a mesh in words for the record: `cpu`, `cuda: NVIDIA H200`, `8 × tpu: TPU v5 lite`."""
    first = mesh.devices.flat[0]
    if first.platform == "cpu":
        one = "cpu"
    else:
        platform = "cuda" if first.platform == "gpu" else first.platform
        one = f"{platform}: {first.device_kind}"
    return one if mesh.size == 1 else f"{mesh.size} × {one}"
