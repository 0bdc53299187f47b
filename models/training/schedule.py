"""The learning rate over the steps."""

import math

from models.training.config import ScheduleConfig


def learning_rate_scale(config: ScheduleConfig, step: int, steps: int) -> float:
    """The fraction of the peak learning rates at `step` (from 0) of `steps`.

    With w = `warmup_steps`, d = `decay_steps` and f = `floor` it is

        (step + 1) / w            in the warm-up, step < w, which reaches 1 with its last step
        f + (1 - f) · height      after it

    and height falls from 1, reaching 0 at the step after the last:

        cosine           (1 + cos(π · (step - w) / (steps - w))) / 2
        wsd, linear      r = min(1, (steps - step) / d), and 1 where d is 0
        wsd, cosine      (1 - cos(π · r)) / 2
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        height = (1 + math.cos(math.pi * min(1.0, done))) / 2
    else:
        decay_steps = config.decay_steps or 0
        height = min(1.0, max(0, steps - step) / decay_steps) if decay_steps else 1.0
        if config.decay == "cosine":
            height = (1 - math.cos(math.pi * height)) / 2
    return config.floor + (1 - config.floor) * height
