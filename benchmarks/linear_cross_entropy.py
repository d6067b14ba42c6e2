"""Time the loss with its head, forward and backward, on one GPU: `linear_cross_entropy` beside torch's own functions.

Hidden states, head and gradients are bfloat16, with the sizes of Llama 3. Times are medians over whole passes.

The limit is the time of the three products with the head at the rate of large bfloat16 products, plus two passes over
the logits (one reads, one reads and writes) at the rate of a copy. The same run measures both rates. Memory is the peak
of allocated memory beside hidden states and head; it includes their two gradients.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch.nn import functional as F
from tqdm import tqdm

from limits import copy_bandwidth, product_rate
from shapes import VOCABULARY
from timing import milliseconds

LOADS = {"1B": (16384, 2048), "8B": (8192, 4096)}  # tokens, hidden size
CHUNKS = (1024, 2048, 4096)
WARM_UP, REPEATS = 3, 15

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Figure:
    """One row of the table.

    Attributes:
        what: Model and number of tokens.
        who: The function that computed the loss.
        milliseconds: Time of one forward and backward pass.
        memory: Peak of allocated memory beside hidden states and head, in GB (1e9 bytes).
        limit: Milliseconds; the head of this file defines it.
    """

    what: str
    who: str
    milliseconds: float
    memory: float
    limit: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--loads", nargs="*", choices=LOADS, default=list(LOADS), help="measure with the sizes of these models"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU.")
    import triton

    products, copies = product_rate(torch.bfloat16), copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"bf16 products {products / 1e12:.0f} TFLOP/s, copies {copies / 1e12:.2f} TB/s",
        flush=True,
    )
    print(f"{'':<20} {'':<26} {'ms':>7} {'limit':>7} {'of it':>6} {'GB':>6}", flush=True)
    for load in options.loads:
        for who, loss in losses().items():
            try:
                figure = measure(load, who, loss, products, copies)
            except torch.cuda.OutOfMemoryError:
                print(f"{load:<20} {who:<26} out of memory", flush=True)
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            print(
                f"{figure.what:<20} {figure.who:<26} {figure.milliseconds:7.2f} {figure.limit:7.2f} "
                f"{figure.limit / figure.milliseconds:6.1%} {figure.memory:6.2f}",
                flush=True,
            )


def losses() -> dict[str, Loss]:
    """Return the functions to compare, by name."""
    from llama_te_core import linear_cross_entropy

    module = sys.modules["llama_te_core.loss.linear_cross_entropy"]

    def fused(chunk_tokens: int) -> Loss:
        return lambda *tensors: linear_cross_entropy(*tensors, chunk_tokens=chunk_tokens)

    def without_kernels(*tensors: torch.Tensor) -> torch.Tensor:
        passes = (module._statistics, module._write_gradient)
        with mock.patch.object(module, "_passes", return_value=passes):
            return linear_cross_entropy(*tensors)

    def plain(hidden_TE: torch.Tensor, weight_VE: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden_TE, weight_VE), labels_T)

    return {
        **{f"chunks of {chunk:,}": fused(chunk) for chunk in CHUNKS},
        "without Triton": without_kernels,
        "linear, cross_entropy": plain,
    }


def measure(load: str, who: str, loss: Loss, products: float, copies: float) -> Figure:
    """Time forward and backward passes of one function."""
    tokens, size = LOADS[load]
    torch.manual_seed(0)
    hidden_TE, weight_VE = (
        torch.randn(rows, size, device="cuda", dtype=torch.bfloat16).requires_grad_() for rows in (tokens, VOCABULARY)
    )
    with torch.no_grad():
        weight_VE *= 3 / size**0.5
    labels_T = torch.randint(VOCABULARY, (tokens,), device="cuda")

    def run() -> None:
        loss(hidden_TE, weight_VE, labels_T).backward()
        hidden_TE.grad = weight_VE.grad = None

    for _ in range(WARM_UP):
        run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    passes = tqdm(range(REPEATS), desc=f"{load}, {who}", delay=2, leave=False, disable=None)
    time = statistics.median([milliseconds(run) for _ in passes])
    memory = torch.cuda.max_memory_allocated() - before
    limit = 6 * tokens * VOCABULARY * size / products + 6 * tokens * VOCABULARY / copies
    return Figure(f"{load}, {tokens:,} tokens", who, time, memory / 1e9, limit * 1000)


if __name__ == "__main__":
    main()
