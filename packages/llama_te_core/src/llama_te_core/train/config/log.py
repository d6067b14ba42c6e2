"""The section `log` of a configuration."""

from dataclasses import dataclass

from .bounds import at_least


@dataclass(frozen=True)
class LogConfig:
    """Metrics and statistics. TensorBoard files are written wherever it is installed.

    Attributes:
        interval: Steps between two reports. Each report waits for the GPU.
        wandb_project: The Weights & Biases project to log to; null for none (needs wandb).
        inspect: A YAML file of features of nvdlfw-inspect, which name the statistics of quantized layers' tensors that
            go to `FOLDER/inspect`; null for none.
    """

    interval: int = 10
    wandb_project: str | None = None
    inspect: str | None = None

    def __post_init__(self) -> None:
        at_least("log.interval", self.interval, 1)
