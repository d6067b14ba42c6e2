"""Inputs for the compiled operators on any device, and the results expected from float64 PyTorch, token by token.

Shapes: N new tokens, B rows that take part, R rows of a cache, L places of a row, K key/value heads, G query heads per
key/value head, D size of a head, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llama_te_infer.ops.append_rope import append_rope
from llama_te_infer.ops.reorder import reorder_pages, reorder_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 80, 96, 128, 256)
# The allowed distance from the rounded float64 result, in neighbouring numbers of the dtype. float32 arithmetic on the
# GPU is off by at most 1.5 units in the last place, so a float32 result can be two numbers away.
CPU_STEPS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 1}
CUDA_STEPS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2}


@dataclass(frozen=True)
class AppendCase:
    """A case of `append_rope`."""

    new: tuple[int, ...]  # tokens of each row
    before: tuple[int, ...]
    padded: bool = False
    extra: int = 0  # packed tokens behind the last row, or columns behind the longest
    page_size: int = 0  # 0: contiguous
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    gap: int = 0  # vectors of 16 bytes between tokens
    extra_rows: int = 0  # of the cache
    seed: int = 0

    @property
    def width(self) -> int:
        return max(*self.new, 1) + self.extra if self.padded else 0

    @property
    def tokens(self) -> int:
        return self.width * len(self.new) if self.padded else sum(self.new) + self.extra

    def token(self, row: int, place: int) -> int:
        return row * self.width + place if self.padded else sum(self.new[:row]) + place


@dataclass(frozen=True)
class ReorderCase:
    """A case of `reorder_rows` and `reorder_pages`."""

    source_rows: tuple[int, ...]
    lengths: tuple[int, ...]
    page_size: int = 16
    caches: int = 3
    kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    wide: bool = True
    extra_rows: int = 0
    seed: int = 0


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def table_of(rows: int, pages_per_row: int, generator: torch.Generator) -> torch.Tensor:
    """int32 [rows, pages_per_row], a page of its own for each entry, and a gap behind each row."""
    pages = torch.randperm(rows * pages_per_row, generator=generator).view(rows, pages_per_row)
    wider = torch.full((rows, pages_per_row + 3), -1, dtype=torch.int32)
    wider[:, :pages_per_row] = pages
    return wider[:, :pages_per_row]


def make_append(case: AppendCase) -> dict[str, Any]:
    """The operator's arguments on the CPU."""
    generator = torch.Generator().manual_seed(case.seed)
    rows = len(case.new) + case.extra_rows
    longest = max(a + b for a, b in zip(case.new, case.before, strict=True)) + 2
    heads = case.kv_heads * (case.group + 2)
    gap = case.gap * 16 // case.dtype.itemsize
    wide = random(generator, case.dtype, case.tokens, heads * case.head_dim + gap)
    qkv = wide[:, : heads * case.head_dim].unflatten(1, (case.kv_heads, case.group + 2, case.head_dim))
    angle = torch.rand(longest, case.head_dim // 2, generator=generator) * 6.3
    page_table = None
    if case.page_size:
        pages_per_row = -(-longest // case.page_size)
        page_table = table_of(rows, pages_per_row, generator)
        blocks = (rows * pages_per_row, case.page_size)
    else:
        blocks = (rows, longest)
    cache = (*blocks, case.kv_heads, case.head_dim)
    return {
        "qkv": qkv,
        "cos_sin": torch.cat((angle.cos(), angle.sin()), dim=1),
        "cu_new": torch.tensor((0, *case.new)).cumsum(0).int(),
        "start": torch.tensor((*case.before, *[0] * case.extra_rows), dtype=torch.int32),
        "page_table": page_table,
        "width": case.width,
        "query": torch.full((case.tokens, case.kv_heads * case.group, case.head_dim), torch.nan, dtype=case.dtype),
        "key_cache": random(generator, case.dtype, *cache),
        "value_cache": random(generator, case.dtype, *cache),
    }


def on_device(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """Copies with the same strides."""

    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        if value.dtype == torch.float8_e4m3fn:
            made.view(torch.uint8).copy_(value.view(torch.uint8))  # torch keeps the bits of NaN only in integers
            return made
        return made.copy_(value)

    return {name: copy(value) for name, value in arguments.items()}


def expected_append(case: AppendCase, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Queries and caches in float64, and where the caches have new tokens."""
    qkv, cos_sin = arguments["qkv"].double(), arguments["cos_sin"].double()
    half = case.head_dim // 2

    def rotate(heads: torch.Tensor, position: int) -> torch.Tensor:
        cosine, sine = cos_sin[position, :half], cos_sin[position, half:]
        first, second = heads[..., :half], heads[..., half:]
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    query = torch.zeros(arguments["query"].shape, dtype=torch.float64)
    key, value = arguments["key_cache"].double(), arguments["value_cache"].double()
    new = torch.zeros(key.shape[:2], dtype=torch.bool)
    for row, (count, before) in enumerate(zip(case.new, case.before, strict=True)):
        for place in range(count):
            token, position = case.token(row, place), before + place
            block, offset = row, position
            if case.page_size:
                block = int(arguments["page_table"][row, position // case.page_size])
                offset = position % case.page_size
            query[token] = rotate(qkv[token, :, : case.group], position).flatten(0, 1)
            key[block, offset] = rotate(qkv[token, :, case.group], position)
            value[block, offset] = qkv[token, :, case.group + 1]
            new[block, offset] = True
    return {"query": query, "key_cache": key, "value_cache": value, "new": new}


def steps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the distance between two tensors' numbers, in neighbouring numbers of their dtype."""
    integer = torch.int32 if one.dtype == torch.float32 else torch.int16

    def ordered(values: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(integer).long()
        return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)

    assert not one.isnan().any(), "a NaN: not written?"
    return (ordered(one) - ordered(other)).abs()


def most(values: torch.Tensor) -> int:
    return int(values.max()) if values.numel() else 0


def assert_appended(case: AppendCase, arguments: dict[str, Any], allowed: int) -> None:
    """Run `append_rope` and compare; copies and unchanged places must be equal bit by bit."""
    expected = expected_append(case, on_device(arguments, "cpu"))
    append_rope(**arguments)
    off = {name: steps(arguments[name].cpu(), expected[name].to(case.dtype)) for name in expected if name != "new"}
    assert most(off["query"]) <= allowed
    assert most(off["key_cache"]) <= allowed
    assert most(off["key_cache"][~expected["new"]]) == 0, "other tokens' keys changed"
    assert most(off["value_cache"]) == 0


def make_rows(case: ReorderCase) -> dict[str, Any]:
    """The arguments of `reorder_rows` on the CPU."""
    generator = torch.Generator().manual_seed(case.seed)
    rows = len(case.source_rows) + case.extra_rows
    shape = (rows, max(case.lengths) + 2, case.kv_heads, case.head_dim)
    return {
        "caches": [random(generator, case.dtype, *shape) for _ in range(case.caches)],
        "source_rows": torch.tensor(case.source_rows, dtype=torch.int64 if case.wide else torch.int32),
        "lengths": torch.tensor(case.lengths, dtype=torch.int32),
    }


def assert_rows_reordered(case: ReorderCase, arguments: dict[str, Any]) -> None:
    """Run `reorder_rows` and compare bit by bit."""
    expected = [cache.cpu().clone() for cache in arguments["caches"]]
    for cache in expected:
        before = cache.clone()
        for row, (source, length) in enumerate(zip(case.source_rows, case.lengths, strict=True)):
            cache[row, :length] = before[source, :length]
    reorder_rows(**arguments)
    for got, wanted in zip(arguments["caches"], expected, strict=True):
        assert torch.equal(got.cpu(), wanted)


def make_pages(case: ReorderCase) -> dict[str, Any]:
    """The arguments of `reorder_pages` on the CPU; the rows share the pages that are full in every row."""
    generator = torch.Generator().manual_seed(case.seed)
    rows = len(case.source_rows) + case.extra_rows
    pages_per_row = max(case.lengths) // case.page_size + 1
    page_table = table_of(rows, pages_per_row, generator)
    page_table[:, : min(case.lengths) // case.page_size] = page_table[:1, : min(case.lengths) // case.page_size].clone()
    shape = (rows * pages_per_row, case.page_size, case.kv_heads, case.head_dim)
    return {
        "caches": [random(generator, case.dtype, *shape) for _ in range(case.caches)],
        "page_table": page_table,
        "source_rows": torch.tensor(case.source_rows, dtype=torch.int64 if case.wide else torch.int32),
        "lengths": torch.tensor(case.lengths, dtype=torch.int32),
        "page_size": case.page_size,
        "ticket": torch.zeros(1, dtype=torch.int32),
    }


def assert_pages_reordered(case: ReorderCase, arguments: dict[str, Any]) -> None:
    """Run `reorder_pages` and compare bit by bit."""
    table_before = arguments["page_table"].cpu()
    table = table_before.clone()
    expected = [cache.cpu().clone() for cache in arguments["caches"]]
    before = [cache.clone() for cache in expected]
    for row, (source, length) in enumerate(zip(case.source_rows, case.lengths, strict=True)):
        full, rest = divmod(length, case.page_size)
        table[row, :full] = table_before[source, :full]
        for cache, cache_before in zip(expected, before, strict=True):
            cache[table_before[row, full], :rest] = cache_before[table_before[source, full], :rest]
    reorder_pages(**arguments)
    assert torch.equal(arguments["page_table"].cpu(), table)
    assert int(arguments["ticket"]) == 0
    for got, wanted in zip(arguments["caches"], expected, strict=True):
        assert torch.equal(got.cpu(), wanted)
