"""The devices of the PyTorch engine: CUDA, Apple's GPU (MPS), and the CPU.

What MPS lacks, and what stands in for it: it has no float64, which nothing here puts on a device; bfloat16 needs
macOS 14, and is refused on older ones; its fused AdamW applied updates that it was told to skip until June 2026
(github.com/pytorch/pytorch/pull/186360), so plain operations take its place (`optimizer.py`); and
`torch.utils.checkpoint` cannot keep its random numbers, so rematerialization with dropout is refused.
"""

import numpy as np
import torch

from common.errors import UserError
from models.engine import Precision
from models.machine import peak_resident_memory


def default_device() -> torch.device:
    """This process's CUDA device where there is one, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps", 0) if torch.backends.mps.is_available() else torch.device("cpu")


def described(device: torch.device, count: int = 1) -> str:
    """A device, or several of its kind, in words for the record."""
    name = f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
    return name if count == 1 else f"{count} × {name}"


def peak_memory(device: torch.device) -> int:
    """As the engine's contract says; Apple's GPU shares the process's memory, and no peak of its own is kept."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_memory()


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
        self._fork = torch.random.fork_rng([] if device.type == "cpu" else [device])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *details: object) -> None:
        self._fork.__exit__(None, None, None)
