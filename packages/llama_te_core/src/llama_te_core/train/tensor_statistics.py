"""Statistics of the tensors of quantized layers, by Transformer Engine's "precision debug tools" on nvdlfw-inspect."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from ..compat.transformer_engine import debug_features
from ..files.disk import writing_to
from ..models.causal_lm import NVLlamaForCausalLM
from ..parallel.mesh import process_rank
from .metrics import drop_lines_after


class TensorStatistics:
    """Statistics of each step, in `FOLDER/inspect/statistics.jsonl` and TensorBoard's files.

    It replaces nvdlfw-inspect's own logger, which cuts numbers after the fourth decimal and begins a new file with each
    start. Make it before the model, since layers look for it when they are built, and one at a time in a process. All
    processes have one. Numbers cover all processes, and rank 0 writes them.

    Args:
        features: The YAML file.
        folder: The run's.

    Raises:
        ValueError: nvdlfw-inspect does not take the file.
    """

    def __init__(self, features: str, folder: Path) -> None:
        self.folder = folder
        self._values: dict[str, float] = {}
        self._step = 0
        self._file: Path | None = None
        self._tensorboard: Any = None
        self._api = importlib.import_module("nvdlfw_inspect.api")
        importlib.import_module("nvdlfw_inspect.logging").BaseLogger.register(TensorStatistics)
        try:
            self._api.initialize(
                config_file=features,
                feature_dirs=[str(debug_features())],
                statistics_logger=self,
                log_dir=str(folder / "inspect"),
            )
        except Exception as error:  # a wrong file raises anything: AssertionError, KeyError, YAMLError
            self._api.end_debug()
            raise ValueError(f"log.inspect={features!r}: nvdlfw-inspect does not take it: {error}") from error

    def __enter__(self) -> TensorStatistics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tensorboard is not None:
            with writing_to(self.folder / "tensorboard"):
                self._tensorboard.close()
        self._api.end_debug()

    def begin(self, model: NVLlamaForCausalLM, step: int) -> None:
        """Name the modules of a model like its parameters, but with layers counted from 1, as in TE.

        Args:
            model: Ready for training, since splitting it may replace modules.
            step: The last step before this start. Statistics of later steps are dropped, since the run repeats them.
        """
        self._api.infer_and_assign_layer_names(model.model)
        self._step = step + 1
        self._api.initialize_training_step(self._step)
        if process_rank() != 0:
            return
        self._file = self.folder / "inspect" / "statistics.jsonl"
        with writing_to(self._file):
            drop_lines_after(self._file, step)
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(self.folder / "tensorboard" / "inspect", purge_step=step + 1)

    def end_step(self) -> None:
        """Write the step's statistics, if any; all processes call this together."""
        self._api.step()
        if self._file is None:
            return
        if self._values:
            with writing_to(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self._step, **self._values}) + "\n")
                for name, value in self._values.items() if self._tensorboard is not None else ():
                    self._tensorboard.add_scalar(name, value, self._step)
        self._values = {}
        self._step += 1

    def log_scalar(self, name: str, value: Any, iteration: int, **kwargs: Any) -> None:
        """Take one number of a step, a float or a tensor []. nvdlfw-inspect calls this within `end_step`."""
        if self._file is not None:
            self._values[name] = float(value)
