"""The parent's side of the child process that an engine's stages run in."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

from artifacts.store import Store
from common.errors import StageFailed, StageInterrupted, UserError
from models.machine import ENGINE_ENVIRONMENT
from tasks.events import ENDINGS, Event, Listener, error_of
from tasks.work import Outcome, Work

logger = logging.getLogger("cairn.tasks")


class EngineProcess:
    """A child process for one engine: started at its first work, kept warm for the next, one work at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._busy = threading.Lock()
        self._stopping = False
        self.locks: tuple[int, ...] = ()
        """Descriptors of locks that the child holds too, so that they last until it has ended, whatever befalls this
        process."""

    def do(
        self,
        work: Work,
        listener: Listener,
        turn: AbstractContextManager[object] = nullcontext(),  # noqa: B008
    ) -> Outcome:
        """Does a work in the child; `listener` gets its progress events, `turn` is entered when others' are done.

        Raises UserError, StageInterrupted, or StageFailed with the child's traceback or how it died.
        """
        if work.store.startswith("memory:"):
            raise UserError("a memory:// store is seen by one process alone, and training has its own; use a folder")
        with self._busy, turn:
            self._refuse_if_stopping(work)
            process = self._running()
            try:
                assert process.stdin is not None
                process.stdin.write(work.model_dump_json() + "\n")
                process.stdin.flush()
                if self._stopping:  # it came while the process was being started
                    process.terminate()
                for event in self._events():
                    if event["event"] in ENDINGS:
                        if event["event"] == "Interrupted":
                            # It is the end of the process, too, which the next work must not be given to.
                            self._forget()
                            process.wait()
                        return _outcome(work, event)
                    _tell(listener, event)
            except (BrokenPipeError, json.JSONDecodeError):
                process.kill()
            self._forget()
            ending = _ending(process)
            self._refuse_if_stopping(work)
            raise StageFailed(f"the process of stage '{work.name}' ended ({ending})")

    def interrupt(self) -> None:
        """Tells the stage under way to stop, after its checkpoint, and refuses all that would come after it."""
        self._stopping = True
        self.stop_stage()

    def stop_stage(self) -> None:
        """Tells the stage under way alone to stop, after its checkpoint."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()

    def close(self) -> None:
        """Ends the child; a stage under way writes its checkpoint first."""
        process = self._process
        if process is not None:
            self._forget()
            process.wait()

    def _refuse_if_stopping(self, work: Work) -> None:
        if self._stopping:
            raise StageInterrupted(f"stage '{work.name}' was stopped; it goes on from there when run again")

    def _forget(self) -> None:
        """Closes the pipes, at which the child ends."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
        self._events_file.close()

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is not None:
            self._forget()
        if self._process is None:
            read_end, write_end = os.pipe()
            self._process = subprocess.Popen(
                # -P: a user's folder may have files of the names that this imports.
                [sys.executable, "-P", "-m", "tasks.child", str(write_end)],
                stdin=subprocess.PIPE,
                stdout=sys.stderr,
                pass_fds=(write_end, *self.locks),
                text=True,
                # A Ctrl-C reaches it through `interrupt` alone, once.
                start_new_session=True,
                env={**ENGINE_ENVIRONMENT, **os.environ},
            )
            os.close(write_end)
            self._events_file = os.fdopen(read_end)
        return self._process

    def _events(self) -> Iterator[Event]:
        for line in self._events_file:
            yield json.loads(line)


def _outcome(work: Work, event: Event) -> Outcome:
    """What the last event of a work says: a record, or the error to raise."""
    if event["event"] == "UserError":
        raise error_of(event)
    if event["event"] == "Interrupted":
        raise StageInterrupted(f"stage '{work.name}' was stopped; it goes on from there when run again")
    if event["event"] == "Failed":
        raise StageFailed(f"stage '{work.name}' failed:\n{event['traceback']}")
    record = Store.open(work.store).find(work.key) if event["key"] == work.key else None
    if record is None:
        raise StageFailed(f"stage '{work.name}' is done, but its record {work.key[:8]} is not in the store")
    return Outcome(record, event["reused"])


def _tell(listener: Listener, event: Event) -> None:
    try:
        listener(event)
    except Exception as error:  # whoever watches a run does not decide how it ends
        logger.warning("a progress event could not be shown: %s", error)


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
