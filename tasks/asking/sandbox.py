"""Runs programs that nobody trusts, one function and some calls of it at a time, in a process of their own.

What it is proof against: a program that loops, sleeps, allocates, recurses or prints without end, that reads or writes
files, opens connections, starts processes or threads, sends signals, imports what is installed here, ends the process,
or replaces what is built in. The process (tasks.asking.sandboxed) has nothing of the user's in its environment and its
folder, and gives up nearly all calls of the kernel before it is handed the program: by a seccomp filter on Linux
(x86_64 and aarch64), by Seatbelt on macOS. Time, memory and output are limited. What is expected never enters it, and
what comes out is read as JSON and compared here, so that a program which forges its results has to know the right ones.

What it is not proof against: a hole in the kernel behind one of the few calls that are left (memory, clocks, reading
and writing open pipes), and side channels such as timing. A hole in Python alone lets a program go around the audit
hook, which is the second fence, and not around the first. On macOS, memory is looked at every tenth of a second, and
more than the limit may be taken for that long.
"""

import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from common.errors import UserError
from tasks.asking import sandboxed

WALL_SECONDS = 5.0
"""Seconds that a program may take, from when it is handed over."""
_START_SECONDS = 60.0
"""Seconds within which Python has to start, on a machine however busy."""
_LOOK_SECONDS = 0.1
# No packages of the user's (-s) or of others (-S), no modules from where it lies (-P), no files written (-B).
_OPTIONS = ("-s", "-S", "-P", "-B")
# Sets have the same order every time, which -I, for all that it leaves out, could not be told.
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,79}")
_WATCHES_MEMORY = sys.platform == "darwin"


class Outcome(NamedTuple):
    """What came of a program."""

    values: list[JsonValue] | None
    """What the calls returned; None where one of them, or the program itself, failed."""
    problem: str | None
    """Why there is none: the name of an exception, or a few words; None where there are values."""


def check_sandbox() -> None:
    """Raises UserError where programs cannot be fenced in on this machine."""
    if run("def one():\n    return 1", "one", [[]]).values != [1]:
        raise UserError("answers in Python cannot be run here: the sandbox fails at the simplest program")


def run(program: str, function: str, cases: Sequence[Sequence[JsonValue]]) -> Outcome:
    """What a function that a program defines returns for the arguments of each case.

    Raises UserError where the program cannot be fenced in on this machine; it is not run then.
    """
    command = [sys.executable, *_OPTIONS, str(Path(sandboxed.__file__).absolute())]
    with (
        tempfile.TemporaryDirectory(prefix="cairn-sandbox-") as folder,
        subprocess.Popen(
            command,
            bufsize=0,
            env=_ENVIRONMENT,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process,
    ):
        try:
            _wait_until_fenced(process)
            return _run_inside(
                process, {"program": program, "function": function, "cases": [list(case) for case in cases]}
            )
        finally:
            # macOS says PermissionError of a group that has ended.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait_until_fenced(process: subprocess.Popen[bytes]) -> None:
    said = _read(process, _START_SECONDS, end=b"\n").text
    if said == f"{sandboxed.FENCED}\n":
        return
    why = said.removeprefix(sandboxed.REFUSED).strip() if said else "the sandbox does not start"
    raise UserError(f"answers in Python cannot be run safely here ({why}); leave out the categories of the kind code")


def _run_inside(process: subprocess.Popen[bytes], job: dict[str, JsonValue]) -> Outcome:
    assert process.stdin is not None
    given = memoryview(json.dumps(job).encode())
    with suppress(BrokenPipeError):
        while given:
            given = given[process.stdin.write(given) :]
        process.stdin.close()
    said = _read(process, WALL_SECONDS)
    if said.problem is not None:
        return Outcome(None, said.problem)
    try:
        result = json.loads(said.text)
        if "values" in result:
            return Outcome([json.loads(value) for value in result["values"]], None)
        error = result["error"]
        # A name, and not what a program likes to be shown or kept.
        return Outcome(None, error if _NAME.fullmatch(error) else "no results")
    except (ValueError, TypeError, KeyError, RecursionError):  # a program that ended itself, or wrote what it liked
        return Outcome(None, "no results")


class _Said(NamedTuple):
    """What a process wrote."""

    text: str
    problem: str | None = None
    """What came before its end; None where it came to it."""


def _read(process: subprocess.Popen[bytes], seconds: float, end: bytes | None = None) -> _Said:
    """What a process writes up to `end`, or to the end of its output."""
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    found = b""
    problem: str | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while end is None or end not in found:
            left = deadline - time.monotonic()
            if left <= 0:
                problem = "too slow"
            elif len(found) > sandboxed.OUTPUT_BYTES:
                problem = "too much output"
            elif _WATCHES_MEMORY and resident_bytes(process.pid) > sandboxed.MEMORY_BYTES:
                problem = "too much memory"
            if problem is not None:
                break
            if selector.select(min(left, _LOOK_SECONDS) if _WATCHES_MEMORY else left):
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    break
                found += chunk
    return _Said(found.decode(errors="replace"), problem)


def resident_bytes(process: int) -> int:
    """The memory that a process holds; 0 where it is gone."""
    found = subprocess.run(["/bin/ps", "-o", "rss=", "-p", str(process)], capture_output=True, check=False)
    return int(found.stdout or 0) << 10


def same(found: JsonValue, wanted: JsonValue) -> bool:
    """Whether two values are equal: numbers to 1e-9 of the larger where one is a float; True is no 1."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        if isinstance(found, int) and isinstance(wanted, int):
            return found == wanted
        try:
            return math.isclose(found, wanted, rel_tol=1e-9)
        except OverflowError:  # of an integer that no float is near
            return False
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(value, wanted[key]) for key, value in found.items())
    return type(found) is type(wanted) and found == wanted
