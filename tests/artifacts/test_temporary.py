"""Folders that live as long as their process."""

import subprocess
import sys
from pathlib import Path

from artifacts.temporary import remove_abandoned, temporary_folder

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from artifacts.temporary import temporary_folder
with temporary_folder(Path(sys.argv[1]), "key") as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_folder_goes_with_its_block(tmp_path: Path) -> None:
    with temporary_folder(tmp_path, "key") as folder:
        (folder / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process, temporary_folder(tmp_path, "key") as own, temporary_folder(tmp_path, "other"):
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        remove_abandoned(tmp_path, "key")
        assert own.exists()
        assert theirs.exists()
        process.kill()
        process.wait()
        remove_abandoned(tmp_path, "key")
        assert own.exists()
        assert not theirs.exists()
        assert len(list(tmp_path.iterdir())) == 2
