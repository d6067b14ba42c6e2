"""The learning rate of each step."""

from __future__ import annotations

import math

from .config import ScheduleConfig


def learning_rate(step: int, steps: int, largest: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of a step.

    Args:
        step: Its number, from 1.
        steps: The number of the last step.
        largest: The rate at the last step of the warm-up, or at the first step without a warm-up. The warm-up has
            `warmup_steps` steps, but not more than the run.
        schedule: The course of the rate after that.
    """
    warmup_steps = min(schedule.warmup_steps, steps)
    if step < warmup_steps:
        return largest * step / warmup_steps
    if schedule.kind == "constant":
        return largest
    first = max(warmup_steps, 1)
    progress = (step - first) / max(steps - first, 1)
    left = 1 - progress if schedule.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return largest * (schedule.final_fraction + (1 - schedule.final_fraction) * left)
