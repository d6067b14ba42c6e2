"""The section `profile` of a configuration."""

from dataclasses import dataclass

from .bounds import at_least


@dataclass(frozen=True)
class ProfileConfig:
    """Traces and memory recordings of some steps, in `FOLDER/profile`.

    Attributes:
        trace_at: First step of a trace of torch.profiler, for chrome://tracing or Perfetto; null for none.
        trace_steps: Steps of the trace.
        memory_at: First step of a recording of the GPU's memory, for pytorch.org/memory_viz; null for none.
        memory_steps: Steps of the recording.
    """

    trace_at: int | None = None
    trace_steps: int = 3
    memory_at: int | None = None
    memory_steps: int = 2

    def __post_init__(self) -> None:
        for name in ("trace_at", "trace_steps", "memory_at", "memory_steps"):
            if getattr(self, name) is not None:
                at_least(f"profile.{name}", getattr(self, name), 1)
