"""The section `checkpoint` of a configuration."""

from dataclasses import dataclass

from .bounds import at_least


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in `FOLDER/checkpoints`; a run goes on from the last one by itself.

    Attributes:
        interval: Steps between two checkpoints; the last step and SIGTERM save too; null never saves.
        keep: The number of checkpoints that stay.
        asynchronous: Write in the background.
    """

    interval: int | None = 500
    keep: int = 3
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.interval is not None:
            at_least("checkpoint.interval", self.interval, 1)
        at_least("checkpoint.keep", self.keep, 1)
