"""What one process of a stage and the stage's own say to each other, and how they part."""

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from artifacts.store import Store
from common.errors import StageFailed, UserError
from models.processes import start_processes
from tasks.rank import _ending, _Line
from tasks.ranks import _Group, _own_folder
from tasks.work import Work
from tests.tasks.test_ranks import Training

ROOT = Path(__file__).parents[2]
SILENT = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1]); sys.exit(3)"
PATIENT = """
import socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect(sys.argv[1])
line.sendall(b'{"event": "Here", "number": 0}\\n')
while line.recv(100):
    pass
"""
AT_WORK = """
import sys, time
from tasks.rank import _Line
line = _Line(sys.argv[1])
if line.job()["ends"]:
    line.end({"event": "Done"})
line.send({"event": "Note"})
time.sleep(600)
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with _own_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(2)
        yield listener


def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program, *arguments], cwd=ROOT)


@pytest.mark.parametrize(("ends", "code"), [(True, 0), (False, 1)])
def test_a_process_stays_until_it_is_let_go(listener: socket.socket, ends: bool, code: int) -> None:
    with start(AT_WORK, listener.getsockname()) as process:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            connection.sendall(json.dumps({"ends": ends}).encode() + b"\n")
            assert json.loads(lines.readline())["event"] == ("Done" if ends else "Note")
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
        assert process.wait(30) == code


def test_one_that_dies_before_it_says_a_word_is_noticed(listener: socket.socket, tmp_path: Path) -> None:
    address: str = listener.getsockname()
    commands = [[sys.executable, "-c", program, address] for program in (PATIENT, SILENT)]
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        processes = start_processes("mlx", commands, {}, tmp_path)
        group = _Group(processes, [b"{}\n"] * 2, selector, listener, lambda event: None)
        try:
            with pytest.raises(StageFailed, match=r"^process 1 of 2 ended \(exit code 3\)$"):
                group.until_done(lambda: False)
        finally:
            processes.kill()
            group.close()


def ended(listener: socket.socket, work: Work, output: Path, number: int) -> tuple[dict[str, Any], Sequence[str]]:
    """How process `number` would end a work, done in this one, and the events before."""
    line = _Line(listener.getsockname())
    connection, _ = listener.accept()
    logs = output.with_name(f"logs-{number}")
    for folder in (output, logs):
        folder.mkdir(exist_ok=True)
    job = {"work": work.model_dump(mode="json"), "output": str(output), "logs": str(logs)}
    ending = _ending(job, line, number)
    line._lines.close()
    line._socket.close()
    with connection:
        lines: BinaryIO = connection.makefile("rb")
        return ending, [json.loads(said)["event"] for said in lines]


def test_what_every_process_would_say_process_0_says(listener: socket.socket, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    work = Training(str(tmp_path / "store"), steps=2).work(processes=1)
    ending, events = ended(listener, work, tmp_path / "output-1", 1)
    assert (ending, events) == ({"event": "Done", "metrics": {}}, [])
    ending, events = ended(listener, work, tmp_path / "output-0", 0)
    assert ending["metrics"]["steps"] == 2
    assert "Note" in events  # it goes on from the checkpoints of the other


def test_a_full_disk_is_a_line(listener: socket.socket, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "documents.json").symlink_to("/dev/full")
    source = {"kind": "arithmetic", "operands": 2, "maximum": 9, "train": 20, "validation": 4, "test": 4}
    work = Work(name="numbers", stage="documents", config={"source": source}, inputs={}, store=Store.open().url)
    ending, _ = ended(listener, work, output, 0)
    assert ending["event"] == "UserError"
    assert ending["message"].startswith(f"no space left at {output}")


def test_sockets_have_short_addresses_and_killed_stages_leave_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = "import os; from tasks.ranks import _own_folder\nwith _own_folder() as folder:\n print(folder); os.abort()"
    for parent in (tmp_path, tmp_path / ("x" * 100)):
        parent.mkdir(exist_ok=True)
        environment = {**os.environ, "TMPDIR": str(parent)}
        ended = subprocess.run([sys.executable, "-uc", left], cwd=ROOT, env=environment, capture_output=True, text=True)
        abandoned = Path(ended.stdout.strip())
        assert abandoned.is_dir()
        monkeypatch.setattr(tempfile, "tempdir", str(parent))
        with _own_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
            assert not abandoned.exists()
            assert folder.parent == abandoned.parent
            assert folder.stat().st_mode & 0o77 == 0


def test_where_no_folder_can_be_made_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", os.devnull)
    with pytest.raises(UserError, match="or set TMPDIR to a short path"), _own_folder():
        pass
