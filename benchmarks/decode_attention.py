"""Time decode attention on a GPU, against the copy bandwidth and against `append_rope` with PyTorch's attention.

Every figure is the median over replays of a CUDA graph of many launches. The launches use enough caches in turn that
the L2 cache never holds the next one. "of copy" is the rate of reading keys and values, as a share of the rate of a
large copy. FP8 caches are timed beside bfloat16 ones: half the bytes and a scale for each head must move.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama_te_infer.ops.append_rope import append_rope
from llama_te_infer.ops.decode_attention import decode_attention, workspace_size
from operators import DTYPE, Figure, Run, int32, microseconds, random, report

KV_HEADS, GROUP = 8, 4
MODELS = {"1B": 64, "8B": 128}  # size of a head
CONTEXTS = ((1, 128), (1, 1024), (1, 8192), (1, 32768), (32, 128), (32, 1024), (32, 8192))
PAGE_SIZE = 64
FP8 = torch.float8_e4m3fn


class Layout(NamedTuple):
    """How a cache lies in memory."""

    page_size: int = 0  # 0: without pages
    heads_apart: bool = False  # a page stores the tokens of each head together
    dtype: torch.dtype = DTYPE

    @property
    def head_scale_bytes(self) -> int:
        return 1 if self.dtype == FP8 else 0


LAYOUTS = {
    "rows": Layout(),
    f"pages of {PAGE_SIZE}": Layout(PAGE_SIZE),
    "pages, heads apart": Layout(PAGE_SIZE, heads_apart=True),
    f"FP8 pages of {PAGE_SIZE}": Layout(PAGE_SIZE, dtype=FP8),
}
L2_BYTES = 256 * 2**20  # more than any GPU's


def arguments_of_layers(rows: int, tokens: int, head_dim: int, layout: Layout) -> list[dict[str, Any]]:
    """Make arguments for several layers: rows of `tokens`, the new one included; only the caches differ."""
    capacity = -(-(tokens + 1) // 256) * 256
    blocks, page_table = (rows, capacity), None
    page_size = layout.page_size
    if page_size:
        pages = rows * capacity // page_size
        blocks, page_table = (pages, page_size), torch.randperm(pages, device="cuda").int().view(rows, -1)
    angle = torch.rand(capacity, head_dim // 2, device="cuda") * 6.3
    size = workspace_size(rows, KV_HEADS, GROUP, head_dim, capacity)
    shared: dict[str, Any] = {
        "qkv": random(rows, KV_HEADS, GROUP + 2, head_dim),
        "cos_sin": torch.cat((angle.cos(), angle.sin()), dim=1),
        "start": int32([tokens - 1] * rows),
        "page_table": page_table,
        "scale": head_dim**-0.5,
        "output": random(rows, KV_HEADS * GROUP, head_dim),
        "workspace": torch.zeros(size, dtype=torch.int32, device="cuda"),
    }
    layers = max(2, int(L2_BYTES // (cached_megabytes(rows, tokens, head_dim, layout) * 1e6)))

    def cache() -> torch.Tensor:
        if layout.heads_apart:
            return random(blocks[0], KV_HEADS, blocks[1], head_dim).transpose(1, 2)
        return random(*blocks, KV_HEADS, head_dim).to(layout.dtype)

    def scales() -> dict[str, torch.Tensor]:
        shape = (blocks[0], KV_HEADS, blocks[1])
        names = ("key_scale", "value_scale") if layout.dtype == FP8 else ()
        return {name: torch.full(shape, 127, dtype=torch.uint8, device="cuda") for name in names}

    return [shared | {"key_cache": cache(), "value_cache": cache()} | scales() for _ in range(min(layers, 512))]


def cached_megabytes(rows: int, tokens: int, head_dim: int, layout: Layout) -> float:
    head_bytes = head_dim * layout.dtype.itemsize + layout.head_scale_bytes
    return rows * tokens * 2 * KV_HEADS * head_bytes / 1e6


def torch_run(arguments: dict[str, Any], rows: int, tokens: int) -> Run:
    """Make a run of `append_rope` and PyTorch's attention over a contiguous cache with rows of one length."""
    query = torch.empty_like(arguments["output"])
    cu_new = int32(range(rows + 1))
    key, value = (arguments[name][:rows, :tokens].transpose(1, 2) for name in ("key_cache", "value_cache"))

    def run() -> None:
        append_rope(
            arguments["qkv"],
            arguments["cos_sin"],
            cu_new,
            arguments["start"],
            None,
            1,
            query,
            arguments["key_cache"],
            arguments["value_cache"],
        )
        torch.nn.functional.scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)

    return run


def figure(model: str, rows: int, tokens: int, name: str, with_baseline: bool) -> Figure:
    layout = LAYOUTS[name]
    layers = arguments_of_layers(rows, tokens, MODELS[model], layout)
    runs = [lambda arguments=arguments: decode_attention(**arguments) for arguments in layers]
    time = microseconds(runs)
    baseline = None
    if with_baseline and not layout.page_size:
        baseline = microseconds([torch_run(arguments, rows, tokens) for arguments in layers])
    what = f"{model} heads, {rows} x {tokens} tokens, {name}"
    against = "append_rope + PyTorch" if baseline is not None else ""
    return Figure(what, time, cached_megabytes(rows, tokens, MODELS[model], layout), against, baseline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--baseline", action="store_true", help="also time append_rope with PyTorch's attention")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")

    def measure() -> list[Figure]:
        figures = []
        for model in MODELS:
            for rows, tokens in CONTEXTS:
                for name in LAYOUTS:
                    figures.append(figure(model, rows, tokens, name, arguments.baseline))
                    torch.cuda.empty_cache()
        return figures

    report(measure, arguments.json)


if __name__ == "__main__":
    main()
