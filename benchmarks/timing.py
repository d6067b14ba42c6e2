"""Time of the GPU."""

from collections.abc import Callable

import torch


def milliseconds(run: Callable[[], object]) -> float:
    """Return the GPU's milliseconds from the first launch of `run` to the end of the last; waits for the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
