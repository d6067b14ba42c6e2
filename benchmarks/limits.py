"""What a GPU can do at best, measured in the run of those that are compared with it."""

import statistics

import torch


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the device, read plus written.

    Not in a graph: there a copy is a node for the copy engine, which is slower than the kernel that runs otherwise.
    """
    source = torch.randint(0, 2**31, (2**30,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = []
    for repeat in range(13):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) / 1000)
    return 2 * source.nbytes / statistics.median(times)
