"""The learning rate of each step."""

from __future__ import annotations

import math

from .config import ScheduleConfig


def learning_rate(step: int, steps: int, largest: float, schedule: ScheduleConfig) -> float:
    """The learning rate of a step.

    Args:
        step: Its number, from 1.
        steps: The last step's.
        largest: What the warm-up leads to: reached at step `warmup_steps`, or the first one without a warm-up.
        schedule: How it goes on from there.
    """
    if step < schedule.warmup_steps:
        return largest * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return largest
    first = max(schedule.warmup_steps, 1)
    progress = (step - first) / max(steps - first, 1)
    left = 1 - progress if schedule.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return largest * (schedule.final_fraction + (1 - schedule.final_fraction) * left)
