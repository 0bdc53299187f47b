"""A training stage in several processes on this machine: they are started, told, listened to, and ended together.

This process trains nothing. It holds the stage's lease, and a socket that each process connects to: lines of JSON with
the job for them, events from them. One whose socket closes before it has said how it ended is dead, and one that finds
this end closed ends itself, so that none is ever left behind.
"""

import json
import logging
import os
import selectors
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from artifacts.temporary import remove_abandoned, temporary_folder
from common.errors import StageFailed, UserError
from models.engine import EngineName
from models.processes import Processes, process_count, start_processes
from models.training.loop import Interrupted
from models.training.signals import StopSignals
from tasks.events import ENDINGS, error_of
from tasks.work import Work

logger = logging.getLogger("cairn.tasks")

_ADDRESS_BYTES = 103
"""The longest address of a socket, as macOS has it; Linux has four bytes more."""
_LOOK_SECONDS = 0.1
_LISTEN_SECONDS = 2.0
"""How long the others are listened to after the first trouble: they fail for it too, and may be heard before it."""
_LEAVE_SECONDS = 30.0
"""How long processes may take to end after they have said that they are done."""


def ranks_of(work: Work) -> int:
    """The number of processes that a work is done in; 1 where it is done in this one."""
    if not work.definition.trains:
        return 1
    engine: EngineName = work.config["engine"]
    return process_count(engine, work.runtime.layout)


def run_in_ranks(
    work: Work, count: int, output: Path, logs: Path, report: Callable[[object], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Does a training stage in `count` processes; gives the metrics of process 0, which writes to `output` and `logs`.

    Raises what one of them raised, once: UserError, Interrupted, or StageFailed with its traceback or how it died.
    """
    with _own_folder() as folder, StopSignals() as signals:
        address = folder / "socket"
        with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
            listener.bind(str(address))
            listener.listen(count)
            selector.register(listener, selectors.EVENT_READ)
            # -P: a user's folder may have files of the names that this imports.
            command = [sys.executable, "-P", "-m", "tasks.rank", str(address)]
            processes = start_processes(
                work.config["engine"], [[*command, str(number)] for number in range(count)], {}, folder
            )
            jobs = [_job(work, output, logs, folder, number) for number in range(count)]
            group = _Group(processes, jobs, selector, listener, report)
            try:
                return group.until_done(lambda: signals.received is not None or should_stop())
            finally:
                processes.kill()
                group.close()


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder for the socket and what else the processes share; what killed stages left of theirs is removed.

    Raises UserError where it cannot be made.
    """
    label = f"cairn-{os.getuid()}"
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent / f"{label}.{uuid.uuid4().hex}" / "socket")) > _ADDRESS_BYTES:
        parent = Path("/tmp")
    with ExitStack() as stack:
        try:
            remove_abandoned(parent, label)
            folder = stack.enter_context(temporary_folder(parent, label))
            folder.chmod(0o700)
        except OSError as error:
            raise UserError(
                f"the processes of a stage need a folder in {parent}, which cannot be made ({error.strerror}); "
                f"make room there, or set TMPDIR to a short path that can be written to"
            ) from error
        yield folder


def _job(work: Work, output: Path, logs: Path, folder: Path, number: int) -> bytes:
    """What process `number` is told. All but the first have folders of their own that nobody reads."""
    if number:
        output, logs = (folder / f"{name}-{number}" for name in ("output", "logs"))
        output.mkdir()
        logs.mkdir()
    job = {"work": work.model_dump(mode="json"), "output": str(output), "logs": str(logs)}
    return json.dumps(job).encode() + b"\n"


class _Rank:
    """One process, as it is heard."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.number: int | None = None
        self._rest = b""

    def read(self) -> list[dict[str, Any]] | None:
        """What it has said since; None where it has closed its end."""
        try:
            chunk = self.connection.recv(1 << 16)
        except OSError:
            chunk = b""
        if not chunk:
            return None
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [json.loads(line) for line in lines]


class _Group:
    """The processes of one stage."""

    def __init__(
        self,
        processes: Processes,
        jobs: list[bytes],
        selector: selectors.BaseSelector,
        listener: socket.socket,
        report: Callable[[object], None],
    ) -> None:
        self._processes, self._jobs, self._report = processes, jobs, report
        self._selector, self._listener = selector, listener
        self._ranks: list[_Rank] = []
        self._endings: dict[int, dict[str, Any]] = {}
        """How each process said that it ended, in the order in which it was heard."""
        self._dead: list[int] = []
        """Those that ended without a word."""
        self._stopping = False

    def until_done(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        """Listens until all have ended, or one has failed; gives the metrics of process 0."""
        deadline: float | None = None
        while len(self._endings) < len(self._jobs):
            self._listen()
            self._find_dead()
            troubled = self._dead or any(end["event"] in ("UserError", "Failed") for end in self._endings.values())
            if troubled:
                deadline = deadline or time.monotonic() + _LISTEN_SECONDS
                if time.monotonic() > deadline:
                    break
            elif not self._stopping and should_stop():
                self._stop()
        self._raise()
        self._see_off()
        metrics: dict[str, Any] = self._endings[0]["metrics"]
        return metrics

    def close(self) -> None:
        """Lets go of the sockets, at which processes end; that of process 0, which JAX's others ask for, the last."""
        for rank in sorted(self._ranks, key=lambda rank: rank.number or 0, reverse=True):
            rank.connection.close()

    def _listen(self) -> None:
        for key, _ in self._selector.select(_LOOK_SECONDS):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                self._ranks.append(_Rank(connection))
                self._selector.register(connection, selectors.EVENT_READ, self._ranks[-1])
                continue
            rank: _Rank = key.data
            events = rank.read()
            if events is None:
                self._selector.unregister(rank.connection)
                if rank.number is None:
                    # Nobody knows which one it was: `_find_dead` looks at all of them.
                    rank.connection.close()
                    self._ranks.remove(rank)
                elif rank.number not in self._endings:
                    self._dead.append(rank.number)
                continue
            for event in events:
                self._hear(rank, event)

    def _hear(self, rank: _Rank, event: dict[str, Any]) -> None:
        if event["event"] == "Here":
            rank.number = event["number"]
            self._say(rank, self._jobs[event["number"]])
            if self._stopping:
                self._say(rank, b"stop\n")
        elif event["event"] in ENDINGS:
            assert rank.number is not None
            self._endings[rank.number] = event
        elif event["event"] == "Log":
            logger.log(logging.getLevelNamesMapping()[event["level"]], "%s", event["message"])
        else:
            self._report(event)

    def _find_dead(self) -> None:
        """Those that died before they said a word; of others the socket tells, without waiting for the rest to end."""
        if len(self._ranks) == len(self._jobs):
            return
        for number in self._processes.failed():
            if number not in self._endings and number not in self._dead:
                self._dead.append(number)

    def _stop(self) -> None:
        self._stopping = True
        for rank in self._ranks:
            self._say(rank, b"stop\n")

    def _say(self, rank: _Rank, line: bytes) -> None:
        try:
            rank.connection.sendall(line)
        except OSError:
            logger.debug("process %s is gone", rank.number)  # it is heard of when its socket is read

    def _raise(self) -> None:
        """Raises the cause of the trouble, if there was one: others have failed because a process was missing."""
        endings = list(self._endings.items())
        for _, ending in endings:
            if ending["event"] == "UserError":
                raise error_of(ending)
        if self._dead:
            self._processes.kill()
            number = self._dead[0]
            code = self._processes.failed().get(number, 0)
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            raise StageFailed(f"process {number} of {len(self._jobs)} ended ({how})")
        for number, ending in endings:
            if ending["event"] == "Failed":
                raise StageFailed(f"process {number} of {len(self._jobs)}:\n{ending['traceback']}")
        for _, ending in endings:
            if ending["event"] == "Interrupted":
                self._see_off()
                raise Interrupted(ending["step"])

    def _see_off(self) -> None:
        """Lets the processes go, all of which have said how they ended, and gives them time to."""
        self.close()
        until = time.monotonic() + _LEAVE_SECONDS
        while self._processes.running() and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS / 10)
