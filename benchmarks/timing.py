"""How long the GPU takes."""

from collections.abc import Callable

import torch


def milliseconds(run: Callable[[], object]) -> float:
    """What the GPU takes for what `run` launches, from the first launch to the end; it is waited for."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
