"""What a record says about the code, the packages and the machine."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "cairn", "torch", "jax", "flax", "optax", "mlx", "numpy", "pyarrow", "safetensors", "tokenizers", "transformers",
    "datasets", "orjson", "rensa", "sentencepiece", "gigatoken", "tiktoken", "ray",
)  # fmt: skip
_ROOT = Path(__file__).parent.parent


def packages() -> dict[str, str]:
    """The versions of the packages that an output may depend on, Python's own included."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """The machine's processor, cores and memory."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        # The order of sums, and so the last bits of a result, depend on the number of threads.
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def git_state() -> tuple[str | None, bool | None]:
    """The commit of Cairn's checkout and whether it has changes; without git, the commit that CAIRN_COMMIT names, as
    images do, or nothing."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return os.environ.get("CAIRN_COMMIT") or None, None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    # Git refuses another user's checkout, such as a service's, but to who says that it is known.
    command = ["git", "-c", f"safe.directory={_ROOT}", "-C", str(_ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
