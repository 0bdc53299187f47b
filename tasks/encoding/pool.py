"""Units encoded by processes of this machine, one per core."""

import os
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from common.errors import StageFailed, StageInterrupted
from tasks.encoding.reply import Reply
from tasks.encoding.units import EncodedUnit, Unit
from tasks.encoding.worker import Order

WORTH_A_PROCESS_BYTES = 8 << 20
"""Text for which another process is started; it takes half a second."""
_LOOK_SECONDS = 0.2
_FRUGAL = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""Arrow's own allocator keeps what it has had, and glibc learns to keep large buffers: a process would grow from one
unit to the next."""


def encode_in_processes(
    units: Sequence[Unit], order: Order, processes: int, should_stop: Callable[[], bool]
) -> Iterator[tuple[Unit, EncodedUnit]]:
    """The units as they are done, in any order. No process is left when this ends, however it does.

    Raises StageInterrupted where `should_stop` says so, StageFailed where a process dies, and what `Reply.result`
    raises. Not `multiprocessing`: its children import the parent's main module again, and outlive a parent that is
    killed.
    """
    waiting = deque(units)
    workers: list[_Worker] = []
    with selectors.DefaultSelector() as selector:
        try:
            for _ in range(min(processes, len(units))):
                worker = _Worker(order)
                workers.append(worker)
                selector.register(worker.replies, selectors.EVENT_READ, worker)
                worker.give(waiting.popleft())
            left = len(units)
            while left:
                if should_stop():
                    raise StageInterrupted("the tokens were stopped")
                for key, _ in selector.select(_LOOK_SECONDS):
                    done = key.data.reply()
                    if done is None:
                        continue
                    left -= 1
                    if waiting:
                        key.data.give(waiting.popleft())
                    else:
                        # It has done its part: what becomes of it now is no matter.
                        selector.unregister(key.fileobj)
                    unit, reply = done
                    yield unit, reply.result(unit)
        finally:
            for worker in workers:
                worker.end()


class _Worker:
    """One process and the unit that it has."""

    def __init__(self, order: Order) -> None:
        self.replies, write_end = os.pipe()
        self._process = subprocess.Popen(
            # -P: a user's folder may have files of the names that this imports.
            [sys.executable, "-P", "-m", "tasks.encoding.worker", str(write_end)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            pass_fds=(write_end,),
            # A Ctrl-C reaches the stage alone, which ends its processes.
            start_new_session=True,
            env={**_FRUGAL, **os.environ},
        )
        os.close(write_end)
        self._unit: Unit | None = None
        self._read = b""
        self._send(order.model_dump_json())

    def give(self, unit: Unit) -> None:
        """Hands it a unit."""
        self._unit = unit
        self._send(unit.model_dump_json())

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            """It has died, which `reply` says."""

    def reply(self) -> tuple[Unit, Reply] | None:
        """Its reply, once it is there whole. Raises StageFailed where the process has died."""
        assert self._unit is not None
        chunk = os.read(self.replies, 1 << 20)
        if not chunk:
            code = self._process.wait()
            ending = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            raise StageFailed(f"the process that encoded {self._unit.name} ended ({ending})")
        self._read += chunk
        line, newline, self._read = self._read.partition(b"\n")
        if not newline:
            self._read = line
            return None
        return self._unit, Reply.model_validate_json(line)

    def end(self) -> None:
        """Kills it: what it has not finished is of no use."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        os.close(self.replies)
