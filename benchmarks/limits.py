"""The limits of a GPU, measured in the same run as the figures that are compared with them."""

import statistics

import torch

from timing import milliseconds

PRODUCT_SIZE = 8192
PRODUCTS = 10  # one after the other, so that the first launch counts little


def copy_bandwidth() -> float:
    """Measure the bytes per second of a large copy on the device, read plus written.

    The copy is not in a CUDA graph: a graph copies with the copy engine, which is slower than the copy kernel.
    """
    source = torch.randint(0, 2**31, (2**30,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(13)]
    return 2 * source.nbytes / statistics.median(times[3:]) * 1000


def product_rate(dtype: torch.dtype, device: str = "cuda") -> float:
    """Measure the operations per second of a product of two large square matrices.

    Args:
        dtype: Dtype of the matrices: bfloat16, or float8_e4m3fn, which `torch._scaled_mm` multiplies.
        device: Device of the matrices.
    """
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device, dtype=torch.bfloat16).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)

    def run() -> None:
        for _ in range(PRODUCTS):
            if dtype == torch.bfloat16:
                a @ b
            else:
                # The second factor must be column-major. Sums of less precision are the fastest; TE uses them in the
                # forward pass.
                torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    times = [milliseconds(run) for _ in range(10)]
    return PRODUCTS * 2 * PRODUCT_SIZE**3 / statistics.median(times) * 1000
