"""The section `schedule` of a configuration."""

from dataclasses import dataclass
from typing import Literal

from .bounds import at_least


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run.

    Attributes:
        kind: constant; or a fall from the largest rate to final_fraction of it at the last step, linear or cosine.
        warmup_steps: The number of first steps over which the rate rises linearly; a shorter run takes all its steps.
        final_fraction: The last rate as a fraction of the largest one.
    """

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        at_least("schedule.warmup_steps", self.warmup_steps, 0)
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"schedule.final_fraction={self.final_fraction!r}: it must be from 0 to 1.")
