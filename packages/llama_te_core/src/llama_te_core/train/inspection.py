"""Statistics of the tensors of quantized layers: Transformer Engine's "precision debug tools", on nvdlfw-inspect."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from ..models.modeling_nvllama import NVLlamaForCausalLM
from ..parallel.mesh import process_rank
from ..precision.plan import transformer_engine
from .metrics import drop_behind


class Inspection:
    """What the features of a file tell of each step, in `FOLDER/inspect/statistics.jsonl` and TensorBoard's files.

    It is nvdlfw-inspect's logger in place of that package's own, which cuts numbers off behind the fourth decimal and
    begins its file anew with each start. Made before the model, whose layers ask whether there is one when they are
    built; one at a time in a process. All processes have one; numbers are of all together, and rank 0 writes them.

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
        importlib.import_module("nvdlfw_inspect.logging").BaseLogger.register(Inspection)
        try:
            self._api.initialize(
                config_file=features,
                feature_dirs=[str(Path(transformer_engine().__file__).parents[1] / "debug" / "features")],
                statistics_logger=self,
                log_dir=str(folder / "inspect"),
            )
        except Exception as error:  # what is wrong in a file may show as anything: AssertionError, KeyError, YAMLError
            self._api.end_debug()
            raise ValueError(f"log.inspect={features!r}: nvdlfw-inspect does not take it: {error}") from error

    def __enter__(self) -> Inspection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._api.end_debug()

    def begin(self, model: NVLlamaForCausalLM, step: int) -> None:
        """Name the modules of a model as its parameters are named, but with layers counted from 1, as TE does.

        Args:
            model: As it will be trained, since splitting it may replace modules.
            step: The one that the run goes on from. Statistics of later ones, which are computed anew, are dropped.
        """
        self._api.infer_and_assign_layer_names(model.model)
        self._step = step + 1
        self._api.initialize_training_step(self._step)
        if process_rank() != 0:
            return
        self._file = self.folder / "inspect" / "statistics.jsonl"
        drop_behind(self._file, step)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self.folder / "tensorboard" / "inspect", purge_step=step + 1)

    def end_step(self) -> None:
        """Write what the step has told, if anything; all processes call this together."""
        self._api.step()
        if self._file is None:
            return
        if self._values:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self._step, **self._values}) + "\n")
            for name, value in self._values.items() if self._tensorboard is not None else ():
                self._tensorboard.add_scalar(name, value, self._step)
        self._values = {}
        self._step += 1

    def log_scalar(self, name: str, value: Any, iteration: int, **kwargs: Any) -> None:
        """What nvdlfw-inspect calls with each number of a step, a float or a tensor [], within `end_step`."""
        if self._file is not None:
            self._values[name] = float(value)
