"""Which engine suits this machine, found out without importing one, and the memory of a process on it."""

import ctypes
import os
import platform
import resource
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

from models.engine import EngineName, is_installed

ENGINE_ENVIRONMENT = {
    # Threads that spin while they wait for each other take the cores from the threads that work.
    "OMP_WAIT_POLICY": "PASSIVE",
    # glibc keeps what is freed: the kernel clears each page that it gives anew, up to 6% of a step's processor time.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    # What is never kept, as the largest buffers of JAX's threads, comes in pages of 2 MB: 12% of a step.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # Libraries' bars garble the lines of a run.
    "TQDM_DISABLE": "1",
    # lm-eval would fork a process that has an engine's threads.
    "DISABLE_MULTIPROC": "1",
}
"""What the process of an engine is started with; variables that a user has set go before."""

Hardware = Literal["cpu", "cuda", "tpu", "apple"]
"""What a worker's machine computes with."""

_DEVICES = Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"
_TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
"""PCI devices of Google's that are TPUs, as JAX tells them (`jax/_src/hardware_utils.py`); it makes others too."""


def default_engine() -> EngineName:
    """The engine of a recipe that names none: of those installed, the one that suits this machine."""
    installed = [engine for engine in get_args(EngineName) if is_installed(engine)]
    return preferred_engine(platform.system(), platform.machine(), has_tpu(_DEVICES), installed)


def preferred_engine(system: str, machine: str, tpu: bool, installed: Collection[EngineName]) -> EngineName:
    """MLX on Apple Silicon, JAX where a TPU is, else PyTorch; PyTorch too where nothing is installed.

    `system` and `machine` as `platform` gives them.
    """
    order: list[EngineName] = ["torch", "jax", "mlx"]
    if (system, machine) == ("Darwin", "arm64"):
        order.insert(0, "mlx")
    elif tpu:
        order.insert(0, "jax")
    return next((engine for engine in order if engine in installed), "torch")


def engine_for(hardware: Hardware) -> EngineName:
    """The engine of a stage that names none and runs on a worker with such hardware."""
    engines: dict[Hardware, EngineName] = {"cpu": "torch", "cuda": "torch", "tpu": "jax", "apple": "mlx"}
    return engines[hardware]


def accelerators(hardware: Hardware) -> list[str]:
    """The devices of a kind that this machine has, by names that do not change; none where it has none.

    The processor is one device. Of NVIDIA's GPUs only those in CUDA_VISIBLE_DEVICES count, where that is set.
    """
    if hardware == "cpu":
        return ["cpu"]
    if hardware == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            return [f"cuda-{name}" for name in visible.replace(" ", "").split(",") if name and name != "-1"]
        found = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
        return [f"cuda-{number}" for number in sorted(found, key=int)]
    if hardware == "tpu":
        return ["tpu"] if has_tpu(_DEVICES) else []
    return ["apple"] if (platform.system(), platform.machine()) == ("Darwin", "arm64") else []


def peak_resident_memory() -> int:
    """The most bytes of memory that this process has held so far."""
    with suppress(OSError, StopIteration):
        # Linux's `ru_maxrss` may be that of the process which started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def has_tpu(devices: Path) -> bool:
    """Whether one of the PCI devices, a folder each as Linux shows them, is a TPU."""
    for vendor in devices.glob("*/vendor"):
        with suppress(OSError):
            if vendor.read_text().strip() == _GOOGLE and vendor.with_name("device").read_text().strip() in _TPUS:
                return True
    return False


def release_memory() -> None:
    """Gives what this process has freed back to the system, where the C library keeps it (see ENGINE_ENVIRONMENT)."""
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
