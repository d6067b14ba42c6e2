"""Traces of some steps: what the time goes to, and the memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..compat.torch import start_memory_recording, stop_memory_recording
from .config import ProfileConfig


class Profiler:
    """Records the steps that the configuration names.

    Args:
        config: Which steps.
        folder: Where to; each process writes a file of its own.
        rank: This process's number.
    """

    def __init__(self, config: ProfileConfig, folder: Path, rank: int) -> None:
        self.config = config
        self.folder = folder
        self.rank = rank
        self._trace: profile | None = None
        self._trace_ends = self._memory_ends = -1

    def before(self, step: int) -> None:
        """Begin what begins with this step."""
        if step == self.config.trace_at:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._trace, self._trace_ends = profile(activities=activities), step + self.config.trace_steps - 1
            self._trace.start()
        if step == self.config.memory_at:
            start_memory_recording()
            self._memory_ends = step + self.config.memory_steps - 1

    def after(self, step: int, last: bool) -> None:
        """End what ends with this step, or with the run."""
        if self._trace is not None and (last or step >= self._trace_ends):
            self._trace.stop()
            self._trace.export_chrome_trace(str(self._file("trace", "json")))
            self._trace = None
        if self._memory_ends >= 0 and (last or step >= self._memory_ends):
            stop_memory_recording(str(self._file("memory", "pickle")))
            self._memory_ends = -1

    def _file(self, kind: str, suffix: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{kind}-rank-{self.rank}.{suffix}"
