"""Where MLX computes."""

import mlx.core as mx


def on_cpu() -> bool:
    """Whether that is a CPU."""
    return mx.default_device() == mx.Device(mx.cpu)
