"""Inputs for `decode_attention` on any device, and the results expected from `append_rope` and float64 PyTorch.

Shapes: B rows that take part, R rows of a cache, L places of a row, K key/value heads, G query heads per key/value
head, D size of a head, P positions, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from infer.fp8_cache_oracle import quantized_pages, widened
from infer.operator_oracle import random, table_of
from llama_te_infer.ops.append_rope import append_rope
from llama_te_infer.ops.decode_attention import decode_attention, workspace_size

# The most that a rounding to the dtype changes a number, relative to it. The sums are float32, whose own
# errors were at most 3e-6 of a head's norm.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
FLOAT32_SUMS = 1e-5
CACHES = ("key_cache", "value_cache", "key_scale", "value_scale")


@dataclass(frozen=True)
class DecodeCase:
    """A case of `decode_attention`."""

    before: tuple[int, ...]  # tokens of each row
    page_size: int = 0  # 0: contiguous
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    room: int = 2  # places behind the longest row
    gap: int = 0  # vectors of 16 bytes between rows of qkv, and between heads of the caches
    extra_rows: int = 0  # of the cache
    seed: int = 0
    fp8: bool = False  # the cache; with bfloat16 and pages only


def make_decode(case: DecodeCase) -> dict[str, Any]:
    """The operator's arguments on the CPU. Output and caches are NaN wherever nothing has been written so far.

    In an FP8 cache that is NaN with the scale of NaN.
    """
    generator = torch.Generator().manual_seed(case.seed)
    batch, rows = len(case.before), len(case.before) + case.extra_rows
    longest = max(case.before) + 1 + case.room
    heads = case.kv_heads * (case.group + 2)
    gap = case.gap * 16 // case.dtype.itemsize
    wide = random(generator, case.dtype, batch, heads * case.head_dim + gap)
    angle = torch.rand(longest, case.head_dim // 2, generator=generator) * 6.3
    page_table = None
    places = longest
    blocks: tuple[int, ...] = (rows, longest)
    if case.page_size:
        pages_per_row = -(-longest // case.page_size)
        places = pages_per_row * case.page_size
        page_table = table_of(rows, pages_per_row, generator)
        blocks = (rows * pages_per_row, case.page_size)
    caches = []
    for _ in range(2):
        rows_RLKD = torch.full((rows, places, case.kv_heads, case.head_dim + gap), torch.nan, dtype=case.dtype)
        for row, before in enumerate((*case.before, *[longest] * case.extra_rows)):
            filled = rows_RLKD[row, :before, :, : case.head_dim]
            filled.copy_(random(generator, case.dtype, *filled.shape))
        if page_table is not None:
            pages = torch.empty_like(rows_RLKD).view(*blocks, case.kv_heads, -1)
            pages[page_table.flatten()] = rows_RLKD.view(pages.shape)
            rows_RLKD = pages
        caches.append(rows_RLKD[..., : case.head_dim])
    size = workspace_size(batch, case.kv_heads, case.group, case.head_dim, places)
    scales: dict[str, torch.Tensor] = {}
    if case.fp8:
        for i, name in enumerate(("key_scale", "value_scale")):
            caches[i], scales[name] = quantized_pages(caches[i], case.gap * 16)
    return scales | {
        "qkv": wide[:, : heads * case.head_dim].unflatten(1, (case.kv_heads, case.group + 2, case.head_dim)),
        "cos_sin": torch.cat((angle.cos(), angle.sin()), dim=1),
        "start": torch.tensor((*case.before, *[0] * case.extra_rows), dtype=torch.int32),
        "page_table": page_table,
        "scale": case.head_dim**-0.5,
        "key_cache": caches[0],
        "value_cache": caches[1],
        "output": torch.full((batch, case.kv_heads * case.group, case.head_dim), torch.nan, dtype=case.dtype),
        "workspace": torch.zeros(size, dtype=torch.int32),
    }


def expected_decode(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The caches after `append_rope`, and attention to them in float64."""
    qkv, start, page_table = arguments["qkv"], arguments["start"], arguments["page_table"]
    batch, kv_heads, heads_of_group, head_dim = qkv.shape
    caches = {name: arguments[name].clone() for name in CACHES if name in arguments}
    key, value = caches["key_cache"], caches["value_cache"]
    query = torch.empty_like(arguments["output"])
    cu_new = torch.arange(batch + 1, dtype=torch.int32, device=qkv.device)
    append_rope(qkv, arguments["cos_sin"], cu_new, start, page_table, 1, query, **caches)
    if "key_scale" in caches:
        key, value = widened(key, caches["key_scale"]), widened(value, caches["value_scale"])
    query_BKGD = query.view(batch, kv_heads, heads_of_group - 2, head_dim).double()
    output_BKGD = torch.empty_like(query_BKGD)
    for row, before in enumerate(start[:batch].tolist()):
        row_of = [cache[row] if page_table is None else cache[page_table[row]].flatten(0, 1) for cache in (key, value)]
        key_TKD, value_TKD = (cache[: before + 1].double() for cache in row_of)
        score_KGT = torch.einsum("kgd,tkd->kgt", query_BKGD[row], key_TKD) * arguments["scale"]
        output_BKGD[row] = torch.einsum("kgt,tkd->kgd", score_KGT.softmax(-1), value_TKD)
    return caches | {"output": output_BKGD.flatten(1, 2)}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def assert_output(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare heads by their norm. A single missing or wrong key among thousands changes it by percents.

    The operator rounds the output once. On a GPU it also rounds the weights. This usually changes their sum by no more
    than one rounding; it can change more only where few values cancel.
    """
    roundings = 2 if output.is_cuda else 1
    error = (output.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    worst = float(error.max())
    assert worst <= roundings * ROUNDING[output.dtype] + FLOAT32_SUMS, f"a head is off by {worst:.3g} of its norm"


def assert_decoded(arguments: dict[str, Any]) -> None:
    """Run `decode_attention` and compare; the caches, unchanged places included, must be equal bit by bit."""
    expected = expected_decode(arguments)
    decode_attention(**arguments)
    for name in CACHES:
        if name in expected:
            assert same_bits(arguments[name], expected[name]), f"{name} is not what append_rope makes of it"
    assert_output(arguments["output"], expected["output"])
