"""The parent's side of the child process that an engine's stages run in."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from artifacts.store import DamagedObject, Store
from common.errors import UserError
from tasks.events import Event, Listener
from tasks.stage import StageInterrupted
from tasks.work import Outcome, Work


class StageFailed(Exception):
    """A stage failed with a traceback, or its process died."""


class EngineProcess:
    """A child process for one engine: started at its first work, kept warm for the next, one work at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._busy = threading.Lock()

    def do(self, work: Work, listener: Listener) -> Outcome:
        """Does a work in the child; `listener` gets its progress events.

        Raises UserError, StageInterrupted, or StageFailed with the child's traceback or how it died.
        """
        with self._busy:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(work.model_dump_json() + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                self._forget()
                raise StageFailed(f"the process of stage '{work.name}' ended ({_ending(process)})") from None
            for event in self._events():
                if event["event"] == "Done":
                    record = Store.open(work.store).find(event["key"])
                    if record is None:
                        raise StageFailed(f"stage '{work.name}' is done, but its record is not in the store")
                    return Outcome(record, event["reused"])
                if event["event"] == "UserError":
                    raise (DamagedObject if event["damaged"] else UserError)(event["message"])
                if event["event"] == "Failed":
                    raise StageFailed(f"stage '{work.name}' failed:\n{event['traceback']}")
                if event["event"] == "Interrupted":
                    raise StageInterrupted(f"stage '{work.name}' was stopped; it goes on from there when run again")
                listener(event)
            self._forget()
            raise StageFailed(f"the process of stage '{work.name}' ended ({_ending(process)})")

    def interrupt(self) -> None:
        """Tells the stage under way to stop, after its checkpoint."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()

    def close(self) -> None:
        """Ends the child; a stage under way writes its checkpoint first."""
        process = self._process
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            self._forget()

    def _forget(self) -> None:
        self._process = None
        self._events_file.close()

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            read_end, write_end = os.pipe()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tasks.child", str(write_end)],
                stdin=subprocess.PIPE,
                stdout=sys.stderr,
                pass_fds=(write_end,),
                text=True,
                # A Ctrl-C reaches it through `interrupt` alone, once.
                start_new_session=True,
                # Threads that spin while they wait for each other take the cores from the threads that work.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            )
            os.close(write_end)
            self._events_file = os.fdopen(read_end)
        return self._process

    def _events(self) -> Iterator[Event]:
        for line in self._events_file:
            yield json.loads(line)


def _ending(process: "subprocess.Popen[str]") -> str:
    code = process.wait()
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


@contextmanager
def engine_process() -> Iterator[EngineProcess]:
    """A child process that is ended with the block."""
    process = EngineProcess()
    try:
        yield process
    finally:
        process.close()
