"""The learning rate over the steps."""

import math

from models.training.config import ScheduleConfig


def learning_rate_scale(config: ScheduleConfig, step: int, steps: int) -> float:
    """The fraction of the peak learning rates at `step` (from 0) of `steps`.

    Warm-up rises in equal parts and reaches 1 with its last step. Cosine falls from there, WSD stays and falls
    linearly over its last `decay_steps`; both would reach the floor at the step after the last.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        height = (1 + math.cos(math.pi * min(1.0, done))) / 2
    else:
        decay_steps = config.decay_steps or 0
        height = min(1.0, max(0, steps - step) / decay_steps) if decay_steps else 1.0
    return config.floor + (1 - config.floor) * height
