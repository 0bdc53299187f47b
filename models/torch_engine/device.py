"""The devices of the PyTorch engine: CUDA, Apple's GPU (MPS), and the CPU.

What MPS lacks, and what stands in for it here: it has no float64, which nothing on the device uses; bfloat16 needs
macOS 14, and is refused before; there is no fused AdamW whose skipping of updates is documented, so the plain one
takes its place (`optimizer.py`); `fork_rng` does not know its generator, so `seeded` keeps it by itself; attention
repeats the heads of a group, because its kernels do not all know grouped queries; `torch.utils.checkpoint` cannot keep
its random numbers, so rematerialization with dropout is refused.
"""

from types import TracebackType

import numpy as np
import torch

from common.errors import UserError
from models.engine import Precision


def default_device() -> torch.device:
    """This process's CUDA device where there is one, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps", 0) if torch.backends.mps.is_available() else torch.device("cpu")


def described(device: torch.device, count: int = 1) -> str:
    """A device, or several of its kind, in words for the record."""
    name = f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
    return name if count == 1 else f"{count} × {name}"


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; weights stay fp32. UserError where the device does not have it."""
    if precision != "bfloat16":
        return torch.float32
    if device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise UserError("bfloat16 on Apple's GPU needs macOS 14 or newer; update it, or set precision: float32")
    return torch.bfloat16


class seeded:
    """A context in which PyTorch's generators are freshly seeded, and after which they are as before."""

    def __init__(self, numbers: tuple[int, ...], device: torch.device) -> None:
        """`numbers`, none negative, make the seed together."""
        # The CPU's generator heeds the lower 32 bits alone, so every number has to reach those.
        self._seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
        self._device = device
        self._fork = torch.random.fork_rng([device] if device.type == "cuda" else [])

    def __enter__(self) -> None:
        self._before = torch.mps.get_rng_state() if self._device.type == "mps" else None
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._fork.__exit__(kind, error, traceback)
        if self._before is not None:
            torch.mps.set_rng_state(self._before)
