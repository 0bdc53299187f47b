"""The processes of a run in PyTorch, started through torchrun's interface for one machine.

`start_processes` alone of it, not its agent: that one would start failed processes again, which a stage does by itself
from its checkpoint, and gives those that are told to stop no more than half a minute.
"""

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]  # where torchrun has it from too

_HOST = "127.0.0.1"


def device_count() -> int:
    """Processes for all devices of this machine: one for each CUDA device, else one."""
    return max(1, torch.cuda.device_count())


def start(commands: Sequence[Sequence[str]], environment: Mapping[str, str], folder: Path) -> "TorchProcesses":
    """As `models.processes.start_processes`: RANK, WORLD_SIZE and the rest are as torchrun sets them."""
    # This process keeps the store in which they find each other, as torchrun's agent does: no port is taken twice.
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(len(commands)),
        "LOCAL_WORLD_SIZE": str(len(commands)),
        **environment,
    }
    if not torch.cuda.is_available():
        # On one core each they do not wait for each other's threads.
        shared.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(_cores() // len(commands) or 1)))
    # It says what this does with a failure before this has done it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for name in ("api", "redirects", "subprocess_handler.subprocess_handler"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    # In the main thread, the interface would take this process's signals, and a stop that came meanwhile would leave
    # what it has started in nobody's hands.
    with ThreadPoolExecutor(1) as thread:
        context = thread.submit(
            start_processes,
            name="rank",
            entrypoint=commands[0][0],
            args={number: tuple(command[1:]) for number, command in enumerate(commands)},
            envs={
                number: {**shared, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(len(commands))
            },
            logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        ).result()
    assert isinstance(context, SubprocessContext)  # for the type checker: it is one wherever a command is started
    return TorchProcesses(context, store)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TorchProcesses:
    """`models.processes.Processes`, as torchrun's interface holds them."""

    def __init__(self, context: SubprocessContext, store: TCPStore) -> None:
        self._context, self._store = context, store
        self.pids = [pid for _, pid in sorted(context.pids().items())]
        self._codes: dict[int, int] = {}
        self._ended = False

    def failed(self) -> Mapping[int, int]:
        """As the protocol says; where one has failed, the others are ended before this returns."""
        if not self._ended:
            self._look()
            result = self._context.wait(0)
            if result is not None:
                self._ended = True
                # One that failed since that look; what is ended for the failure of another comes after it.
                first = dict(list(result.failures.items())[:1])
                self._codes = self._codes or {number: failure.exitcode for number, failure in first.items()}
        return self._codes

    def running(self) -> bool:
        self.failed()
        return not self._ended

    def kill(self) -> None:
        self._look()
        self._context.close(signal.SIGKILL)

    def _look(self) -> None:
        """Keeps the codes of those that failed by themselves, before the others are ended for it."""
        if not self._codes:
            codes = {number: handler.proc.poll() for number, handler in self._context.subprocess_handlers.items()}
            self._codes = {number: code for number, code in codes.items() if code}
