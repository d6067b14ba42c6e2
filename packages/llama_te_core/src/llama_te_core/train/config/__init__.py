"""The configuration of a training run: typed, and checked before anything is loaded.

`TrainConfig` is the whole, with one dataclass for each section of the YAML file. Each checks itself when it is made;
`machine.check_machine` checks it against the machine. Importing this package imports neither torch nor transformers.

The modules of the sections do without `from __future__ import annotations`: to resolve such annotations, jsonargparse
would import everything that `TYPE_CHECKING` guards.
"""

from .checkpoint import CheckpointConfig
from .data import DataConfig
from .export import ExportConfig
from .log import LogConfig
from .model import ModelConfig, ShapeConfig
from .optimizer import OptimizerConfig
from .parallel import ParallelConfig
from .precision import PrecisionConfig
from .profile import ProfileConfig
from .run import TrainConfig
from .schedule import ScheduleConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "ExportConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ProfileConfig",
    "ScheduleConfig",
    "ShapeConfig",
    "TrainConfig",
]
