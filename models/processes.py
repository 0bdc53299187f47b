"""Starting the processes that train one model together on this machine, each told by variables how to meet the others.

PyTorch's are started through torchrun's own interface; those of JAX and MLX need nothing but their variables.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

from models.engine import EngineName, Layout

_HOST = "127.0.0.1"


class Processes(Protocol):
    """Processes by their number. Each is the first of a session of its own, so that no Ctrl-C reaches it."""

    @property
    def pids(self) -> Sequence[int]:
        """Their process ids, by number."""
        ...

    def failed(self) -> Mapping[int, int]:
        """The exit codes of those that ended with another code than 0, by number; negative ones are signals."""
        ...

    def running(self) -> bool:
        """Whether one is left."""
        ...

    def kill(self) -> None:
        """Ends those that are left, with all that they started, and waits until they are gone."""
        ...


def process_count(engine: EngineName, layout: Layout) -> int:
    """How many processes a stage of an engine starts: what the layout says, else one for each CUDA device with
    PyTorch, which then is imported, and one with the others, which drive several devices from one process."""
    if layout.processes is not None:
        return layout.processes
    if engine != "torch":
        return 1
    count: int = importlib.import_module("models.torch_engine.processes").device_count()
    return count


def start_processes(
    engine: EngineName, commands: Sequence[Sequence[str]], environment: Mapping[str, str], folder: Path
) -> Processes:
    """Starts one process for each command, with this process's variables and those of `environment`.

    `folder`, which the processes read too, takes what they find each other by; it has to outlive them.
    """
    if engine == "torch":
        started: Processes = importlib.import_module("models.torch_engine.processes").start(
            commands, environment, folder
        )
        return started
    variables = _jax(len(commands)) if engine == "jax" else _mlx(len(commands), folder)
    return _Plain(commands, [{**environment, **own} for own in variables])


def _jax(count: int) -> list[dict[str, str]]:
    """What `jax.distributed.initialize` needs, and for each process a GPU of its own where there are some."""
    shared = {"JAX_COORDINATOR_ADDRESS": f"{_HOST}:{_free_ports(1)[0]}", "JAX_NUM_PROCESSES": str(count)}
    return [{**shared, "JAX_PROCESS_ID": str(number), "JAX_LOCAL_DEVICE_IDS": str(number)} for number in range(count)]


def _mlx(count: int, folder: Path) -> list[dict[str, str]]:
    """What MLX's ring needs, every process's address in a file, and for each a GPU of its own where there are some."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"{_HOST}:{port}"] for port in _free_ports(count)]))
    devices = _cuda_devices()
    own = [{"CUDA_VISIBLE_DEVICES": device} for device in devices] if len(devices) >= count else [{}] * count
    return [{"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(number), **own[number]} for number in range(count)]


def _cuda_devices() -> list[str]:
    """The CUDA devices that this process sees, as CUDA_VISIBLE_DEVICES names them; no library is asked."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip()]
    found = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(found.iterdir())] if found.is_dir() else []


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now: all of them are taken before the first is let go."""
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind((_HOST, 0))
            found.append(int(listener.getsockname()[1]))
        return found


class _Plain:
    """Processes that need nothing but their variables."""

    def __init__(self, commands: Sequence[Sequence[str]], variables: Sequence[Mapping[str, str]]) -> None:
        self._all: list[subprocess.Popen[bytes]] = []
        try:
            for command, own in zip(commands, variables, strict=True):
                self._all.append(
                    subprocess.Popen(
                        list(command),
                        env={**os.environ, **own},
                        stdin=subprocess.DEVNULL,
                        stdout=2,
                        start_new_session=True,
                    )
                )
        except BaseException:
            self.kill()
            raise

    @property
    def pids(self) -> Sequence[int]:
        return [process.pid for process in self._all]

    def failed(self) -> Mapping[int, int]:
        codes = {number: process.poll() for number, process in enumerate(self._all)}
        return {number: code for number, code in codes.items() if code}

    def running(self) -> bool:
        return any(process.poll() is None for process in self._all)

    def kill(self) -> None:
        for process in self._all:
            if process.poll() is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self._all:
            process.wait()
