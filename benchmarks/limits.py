"""What a GPU can do at best, measured in the run of those that are compared with it."""

import statistics

import torch

from timing import milliseconds

PRODUCT_SIZE = 8192
PRODUCTS = 10  # in a row, so that the first one's launch counts little


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the device, read plus written.

    Not in a graph: there a copy is a node for the copy engine, which is slower than the kernel that runs otherwise.
    """
    source = torch.randint(0, 2**31, (2**30,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(13)]
    return 2 * source.nbytes / statistics.median(times[3:]) * 1000


def product_rate(dtype: torch.dtype, device: str = "cuda") -> float:
    """Operations per second of a product of two large square matrices.

    Args:
        dtype: Of the matrices: bfloat16, or float8_e4m3fn, which `torch._scaled_mm` multiplies.
        device: Where they are.
    """
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device, dtype=torch.bfloat16).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)

    def run() -> None:
        for _ in range(PRODUCTS):
            if dtype == torch.bfloat16:
                a @ b
            else:
                # It takes a second factor by columns only. Sums of less precision are the fastest there are; TE has
                # them in the forward pass.
                torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    times = [milliseconds(run) for _ in range(10)]
    return PRODUCTS * 2 * PRODUCT_SIZE**3 / statistics.median(times) * 1000
