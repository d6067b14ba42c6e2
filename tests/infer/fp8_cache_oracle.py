"""The format of FP8 caches by PyTorch's operations, and inputs for the operators on any device.

Shapes: K key/value heads, D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from infer.operator_oracle import AppendCase, ReorderCase, make_append, make_pages, table_of

Arguments = dict[str, Any]
FP8 = torch.float8_e4m3fn


def quantized(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round heads to FP8.

    Args:
        heads: bfloat16 [..., D].

    Returns:
        float8_e4m3fn [..., D], and the scales uint8 [...].
    """
    value = heads.double()
    finite = value.isfinite().all(dim=-1)
    greatest = value.abs().amax(dim=-1)
    # The smallest power of two that is at least greatest / 448. This quotient is exact where it is a power of two.
    mantissa, exponent = torch.frexp(torch.where(finite & (greatest > 0), greatest / 448, 1.0))
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-117, 119)
    scaled = torch.where(finite[..., None], torch.ldexp(value, -exponent[..., None]), torch.nan)
    codes = scaled.float().clamp(-448, 448).to(FP8)
    codes = torch.where(finite[..., None], codes.view(torch.uint8), 0x7F).view(FP8)
    return codes, torch.where(finite, exponent + 127, 255).to(torch.uint8)


def widened(cache: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return pages as bfloat16, exactly.

    Args:
        cache: float8_e4m3fn [pages, page size, K, D].
        scale: uint8 [pages, K, page size].
    """
    exponent = scale.transpose(1, 2).int() - 127
    wide = torch.ldexp(cache.double(), exponent[..., None])
    narrow = wide.bfloat16()
    assert torch.equal(narrow.double().nan_to_num(), wide.nan_to_num()), "a number is no bfloat16 number"
    return narrow


def quantized_pages(pages: torch.Tensor, gap: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Round pages, bfloat16 [pages, page size, K, D], to FP8 pages with a gap behind each head, and their scales."""
    codes, scale = quantized(pages)
    wide = torch.full((*codes.shape[:3], codes.shape[3] + gap), 0x7F, dtype=torch.uint8)
    wide[..., : codes.shape[3]] = codes.view(torch.uint8)
    return wide.view(FP8)[..., : codes.shape[3]], scale.transpose(1, 2).contiguous()


def filled(*shape: int) -> torch.Tensor:
    """Memory that is not cleared, of bytes."""
    return torch.full(shape, 0xA5, dtype=torch.uint8)


def make_fp8_append(case: AppendCase) -> Arguments:
    """The arguments of `append_rope` with a bfloat16 cache, and an FP8 cache in its place."""
    arguments = make_append(case)
    pages, page_size, kv_heads, head_dim = arguments["key_cache"].shape
    for name in ("key", "value"):
        arguments[f"{name}_cache"] = filled(pages, page_size, kv_heads, head_dim).view(FP8)
        arguments[f"{name}_scale"] = filled(pages, kv_heads, page_size)
    return arguments


def make_widen(
    lengths: tuple[int, ...] = (20, 0, 33),
    page_size: int = 16,
    kv_heads: int = 2,
    head_dim: int = 16,
    extra: int = 1,
    seed: int = 0,
    gap: int = 0,
) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    pages_per_row = max(1, -(-max(lengths) // page_size) + extra)
    rows = len(lengths) + extra
    pages = torch.randn(rows * pages_per_row, page_size, kv_heads, head_dim, generator=generator)
    exponent = torch.randint(-130, 120, pages.shape[:3], generator=generator)
    source, scale = quantized_pages(torch.ldexp(pages, exponent[..., None]).bfloat16(), gap * 16)
    return {
        "source": source,
        "scale": scale,
        "page_table_BP": table_of(rows, pages_per_row, generator),
        "length_B": torch.tensor(lengths, dtype=torch.int32),
        "target": torch.full((len(lengths) * pages_per_row + extra, *pages.shape[1:]), 7.0, dtype=torch.bfloat16),
    }


def expected_pages(arguments: Arguments) -> torch.Tensor:
    wide = widened(arguments["source"], arguments["scale"])
    target = arguments["target"].clone()
    pages_per_row = arguments["page_table_BP"].shape[1]
    for row, length in enumerate(arguments["length_B"].tolist()):
        for page in range(-(-length // wide.shape[1])):
            target[row * pages_per_row + page] = wide[arguments["page_table_BP"][row, page]]
    return target


def make_fp8_pages(case: ReorderCase, layers: int = 2) -> Arguments:
    """The arguments of `reorder_pages` with keys, values and both scales of some layers."""
    arguments = make_pages(case)
    pages, page_size, kv_heads, head_dim = arguments["caches"][0].shape
    generator = torch.Generator().manual_seed(case.seed)
    arguments["caches"] = []
    for _ in range(layers):
        for shape in ((pages, page_size, kv_heads, head_dim), (pages, kv_heads, page_size)):
            for _ in range(2):
                bytes_of = torch.randint(0, 127, shape, generator=generator, dtype=torch.uint8)
                arguments["caches"].append(bytes_of.view(FP8) if len(shape) == 4 else bytes_of)
    return arguments
