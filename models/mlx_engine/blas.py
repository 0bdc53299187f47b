"""A fast BLAS for MLX on Linux, whose wheel for the CPU carries the reference one.

OpenBLAS, where the system has it, is loaded before MLX and with its symbols for all to see, so that MLX's matrix
products in fp32 find them first: that made one of 2,048 × 384 × 1,024 twenty times faster. The OpenBLAS inside
NumPy's and SciPy's wheels, and in `scipy-openblas32`, cannot serve: its symbols have a prefix. On macOS MLX has
Accelerate and Metal.

A PyTorch that is imported later finds those symbols, too, and computes other last bits than without them: what has to
be the same bit for bit belongs in processes of one engine each, as stages are.

As a program, `python -P models/mlx_engine/blas.py` says where the library is missing how to get it.
"""

import ctypes
import functools
import sys

NAMES = ("libopenblas.so.0", "libopenblas.so")
HINT = (
    "hint: libopenblas.so.0 is not on this machine, and matrix products of the engine 'mlx' on the CPU are many times "
    "slower without; on Debian and Ubuntu: apt-get install libopenblas0-pthread"
)


def preload(names: tuple[str, ...] = NAMES) -> str | None:
    """Loads the first of the libraries that is there, and gives its name.

    None where there is none, off Linux, and where MLX has been imported already, which it would come too late for.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    for name in names:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


@functools.cache
def cores() -> int:
    """Threads that OpenBLAS divides a product over when nobody has told it otherwise; 1 where MLX does not have it."""
    symbols = ctypes.CDLL(None)
    return int(symbols.openblas_get_num_threads()) if hasattr(symbols, "openblas_get_num_threads") else 1


def divide_products(parts: int) -> None:
    """Has OpenBLAS divide each product over so many threads from now on, where MLX has it."""
    if cores() > 1:
        ctypes.CDLL(None).openblas_set_num_threads(parts)


if __name__ == "__main__" and sys.platform == "linux" and preload() is None:
    print(HINT)
