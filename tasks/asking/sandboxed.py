"""What runs inside the sandbox of tasks.asking.sandbox: it fences itself in, then takes a program and runs it.

Run as a file of its own, so it imports nothing of Cairn. It writes `fenced` or `refused: why` in a
line, reads a job as JSON up to the end of standard input, and writes the results as JSON.
"""

import builtins
import ctypes
import errno
import importlib
import io
import json
import os
import platform
import random
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

MEMORY_BYTES = 512 << 20
CPU_SECONDS = 3
LIFE_SECONDS = 60
"""After which the process ends by itself, where whoever started it is no longer there to end it."""
OUTPUT_BYTES = 64 << 10
"""What the results may have, and what the program may print."""
NAME = "<answer>"
FENCED, REFUSED = "fenced", "refused: "

MODULES = (
    *("__future__", "abc", "array", "bisect", "calendar", "cmath", "collections", "collections.abc", "contextlib"),
    *("copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "heapq", "itertools", "json"),
    *("keyword", "math", "numbers", "operator", "pprint", "random", "re", "statistics", "string", "textwrap", "time"),
    *("types", "typing", "unicodedata"),
)
"""What a program may import: pure modules, which are loaded before the fence stands, for no file can be read after."""
_BENEATH = ("_strptime", "encodings.ascii", "encodings.latin_1", "encodings.utf_16", "encodings.utf_32")
"""What those import when they are used."""

EVENTS = frozenset(
    {
        *("compile", "exec", "builtins.id", "object.__getattr__", "array.__new__", "time.sleep"),
        *("sys._getframe", "sys._getframemodulename", "sys.unraisablehook"),
    }
)
"""The audit events of harmless programs; any other ends the process."""

# Linux's numbers of what a program that computes needs: reading and writing what is open, memory, time and its own end.
# Nothing of signals, which would let it put off its end.
_CALLS: dict[str, tuple[int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        # read write close fstat lseek mmap mprotect munmap brk rt_sigreturn sched_yield mremap madvise nanosleep getpid
        # exit gettimeofday gettid time futex restart_syscall clock_gettime clock_getres clock_nanosleep exit_group
        # getrandom
        (
            *(0, 1, 3, 5, 8, 9, 10, 11, 12, 15, 24, 25, 28, 35, 39),
            *(60, 96, 186, 201, 202, 219, 228, 229, 230, 231, 318),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        # the same in the same order, without time, which it has not
        (
            *(63, 64, 57, 80, 62, 222, 226, 215, 214, 139, 124, 216, 233, 101, 172),
            *(93, 169, 178, 98, 128, 113, 114, 115, 94, 278),
        ),
    ),
}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_RET_KILL_PROCESS, _RET_ERRNO, _RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4


class Refused(Exception):
    """Why no fence can be put up here."""


def limit() -> None:
    """Limits what the process may take: memory, time, files of no size, no processes, no core."""
    # Whoever starts a process hands on what it ignores and holds back itself.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.alarm(LIFE_SECONDS)
    for what, most in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _at_most(what, most)
    if sys.platform != "darwin":  # which has no such limit: there, whoever started the process watches it
        _at_most(resource.RLIMIT_AS, MEMORY_BYTES)


def _at_most(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def fence() -> None:
    """Leaves the process nothing of the system but computing, for good, and tries whether that is so.

    Raises Refused where the system has no means to it.
    """
    if sys.platform == "linux":
        _filter_calls()
    elif sys.platform == "darwin":
        _enter_seatbelt()
    else:
        raise Refused(f"there is no sandbox for {sys.platform}")
    try:
        os.close(os.open(os.sep, os.O_RDONLY))
    except OSError as error:
        if error.errno != errno.EPERM:
            raise Refused(f"the fence does not answer as it should: {error}") from None
    else:
        raise Refused("the fence does not hold: a folder could be opened")


def _filter_calls() -> None:
    """A seccomp filter (Drewry 2012; the kernel's Documentation/userspace-api/seccomp_filter.rst): every call of the
    kernel but those of `_CALLS` fails with EPERM."""
    machine = platform.machine()
    if machine not in _CALLS or sys.maxsize < 1 << 32:
        raise Refused(f"there is no sandbox for Linux on {machine}")
    architecture, calls = _CALLS[machine]
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        # Each jumps over those behind it and the refusal.
        *((_JUMP_IF_EQUAL, len(calls) - place, 0, call) for place, call in enumerate(calls)),
        (_RETURN, 0, 0, _RET_ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _RET_ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0
    ):
        raise Refused(f"the kernel takes no seccomp filter: {os.strerror(ctypes.get_errno())}")


def _enter_seatbelt() -> None:
    """macOS's sandbox with a profile that denies everything, entered from within, as Chromium's renderers do.

    Not by `sandbox-exec`, whose profile would have to let Python start, and so read files and execute.
    """
    enter = ctypes.CDLL(None).sandbox_init
    enter.argtypes = (ctypes.c_char_p, ctypes.c_uint64, ctypes.POINTER(ctypes.c_char_p))
    said = ctypes.c_char_p()
    if enter(b"(version 1)(deny default)", 0, ctypes.byref(said)):
        raise Refused(f"macOS's sandbox cannot be entered: {(said.value or b'').decode(errors='replace')}")


def watch() -> None:
    """The second fence: any audit event (PEP 578) that a harmless program has no need of ends the process.

    It cannot be taken away, but whoever can write to the process's memory gets around it, as PEP 578 says.
    """
    end, harmless = os._exit, EVENTS

    def hook(event: str, arguments: Sequence[object]) -> None:
        # A syntax error looks for its line in a file of the program's name, which the other fence lets it not find.
        harmless_too = {"object.__setattr__": arguments[1:2] != ("__code__",), "open": arguments[:1] == (NAME,)}
        if event not in harmless and not harmless_too.get(event):
            end(1)

    sys.addaudithook(hook)


class Printed(io.TextIOBase):
    """Where what the program prints is lost; too much of it ends the process."""

    def __init__(self) -> None:
        self._left = OUTPUT_BYTES

    def write(self, text: str) -> int:
        """Counts what is printed."""
        self._left -= len(text)
        if self._left < 0:
            os._exit(1)
        return len(text)


def run(program: str, function: str, cases: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What the function of a program returns for each case, as JSON texts under `values`, or `error` where it, or one
    of its calls, fails or returns no JSON."""
    module = types.ModuleType("answer")
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _importing(builtins.__import__)}
    sys.modules["answer"] = module  # where dataclasses look up the names of types
    try:
        exec(compile(program, NAME, "exec", dont_inherit=True), module.__dict__)
        called = module.__dict__[function]
        return {"values": [json.dumps(called(*arguments), allow_nan=False) for arguments in cases]}
    except BaseException as error:  # SystemExit too
        return {"error": type(error).__name__}


def _importing(load: Callable[..., object]) -> Callable[..., object]:
    """`__import__` of what a program may import; what it uses may import what is beneath in its name."""
    allowed = frozenset((*MODULES, *_BENEATH))

    def importing(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> object:
        if level or name not in allowed:
            raise ImportError(f"{name!r} is not to be had in the sandbox")
        return load(name, globals, locals, fromlist, level)

    return importing


def main() -> None:
    """Fences the process in, reads a job, and writes what came of it. Does not return."""
    try:
        limit()
        for name in (*MODULES, *_BENEATH):
            importlib.import_module(name)
        random.seed(0)  # the same program gives the same results
        fence()
    except Exception as error:
        why = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        _write(f"{REFUSED}{why}".replace("\n", " ").encode() + b"\n")
        os._exit(1)
    sys.stdout = sys.stderr = Printed()
    for name in ("ctypes", "_ctypes", "__main__"):
        del sys.modules[name]
    watch()
    _write(FENCED.encode() + b"\n")
    job = json.loads(sys.stdin.buffer.read())
    result = json.dumps(run(**job)).encode()
    _write(result if len(result) <= OUTPUT_BYTES else json.dumps({"error": "OutputTooLong"}).encode())
    os._exit(0)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()
