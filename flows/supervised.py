"""A Python module that runs as a program in a process of its own, and is told to end when its parent has gone.

`python -m flows.supervised PIPE MODULE ARGUMENTS…` runs the module; at the end of the pipe it takes SIGTERM.
"""

import os
import runpy
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

_COPY_SECONDS = 1.0


class Supervised:
    """Such a process, as its parent has it. Its pipe is open as long as the parent lives, however that ends."""

    def __init__(self, module: str, *arguments: str, folder: Path, environment: Mapping[str, str]) -> None:
        read_end, self._write_end = os.pipe()
        self.process = subprocess.Popen(
            # -P: a folder may have files of the names that this imports.
            [sys.executable, "-P", "-m", "flows.supervised", str(read_end), module, *arguments],
            pass_fds=(read_end,),
            cwd=folder,
            env=dict(environment),
            # What a terminal sends to all of its processes comes by way of the parent alone, once.
            start_new_session=True,
        )
        os.close(read_end)
        self.told_to_end = False

    def wait_passing_signals_on(self) -> int:
        """Waits for its end, and meanwhile gives it this process's SIGTERM and SIGINT, as SIGTERM; gives the exit code,
        as a shell has it for one that a signal killed."""
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = self.process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        os.close(self._write_end)
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.terminate()

    def terminate(self) -> None:
        """Sends it SIGTERM."""
        self.told_to_end = True
        self.process.terminate()
        # At the pipe's end it would take a second one, which may not wait for anything.
        with suppress(OSError):
            os.write(self._write_end, b".")


def main(arguments: list[str]) -> None:
    """Runs a module until it is done."""
    read_end, module, *rest = arguments
    # A shell that starts its parent in the background has both ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_the_parent, args=(int(read_end),), daemon=True).start()
    sys.argv = [module, *rest]
    with _outliving(1), _outliving(2):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_the_parent(read_end: int) -> None:
    told = b""
    with suppress(OSError):
        told = os.read(read_end, 1)
    if not told:
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _outliving(output: int) -> Iterator[None]:
    """Within the block, an output that is a pipe takes everything even when its reader has gone: what is printed while
    a checkpoint is written, here or in a process that inherits it, would else be an error."""
    if not stat.S_ISFIFO(os.fstat(output).st_mode):
        yield
        return
    outside = os.dup(output)
    read_end, write_end = os.pipe()
    os.dup2(write_end, output)
    os.close(write_end)
    copying = threading.Thread(target=_copy, args=(read_end, outside), daemon=True)
    copying.start()
    try:
        yield
    finally:
        with suppress(ValueError):  # closed already
            (sys.stdout if output == 1 else sys.stderr).flush()
        os.dup2(outside, output)
        # It ends when no other process has the pipe open.
        copying.join(_COPY_SECONDS)


def _copy(read_end: int, outside: int) -> None:
    while chunk := os.read(read_end, 1 << 16):
        with suppress(OSError):
            os.write(outside, chunk)


if __name__ == "__main__":
    main(sys.argv[1:])
