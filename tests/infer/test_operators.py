"""The compiled operators on the CPU: against float64 PyTorch, with bad input, and as torch sees them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.operator_oracle import (
    CPU_STEPS,
    DTYPES,
    HEAD_DIMS,
    AppendCase,
    ReorderCase,
    assert_appended,
    assert_pages_reordered,
    assert_rows_reordered,
    make_append,
    make_pages,
    make_rows,
)
from llama_te_infer.ops import library
from llama_te_infer.ops.append_rope import append_rope
from llama_te_infer.ops.reorder import reorder_pages, reorder_rows

_extension = pytest.importorskip("llama_te_infer._extension", reason="the package is used from its source folder")


@st.composite
def append_cases(draw: st.DrawFn) -> AppendCase:
    rows = draw(st.integers(1, 6))
    counts = st.lists(st.integers(0, 9), min_size=rows, max_size=rows).map(tuple)
    before = st.lists(st.integers(0, 300), min_size=rows, max_size=rows).map(tuple)
    return AppendCase(
        new=draw(counts),
        before=draw(before),
        padded=draw(st.booleans()),
        extra=draw(st.integers(0, 3)),
        page_size=draw(st.sampled_from([0, 0, 16, 17, 64, 128, 256])),
        kv_heads=draw(st.integers(1, 4)),
        group=draw(st.integers(1, 5)),
        head_dim=draw(st.sampled_from([16, 32, 112, *HEAD_DIMS])),
        dtype=draw(st.sampled_from(DTYPES)),
        gap=draw(st.integers(0, 3)),
        extra_rows=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**31)),
    )


@st.composite
def reorder_cases(draw: st.DrawFn) -> ReorderCase:
    rows = draw(st.one_of(st.integers(1, 8), st.integers(1, 64)))
    page_size = draw(st.sampled_from([16, 17, 64, 256]))
    source_rows = draw(
        st.one_of(
            st.permutations(range(rows)),
            st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows),
            st.just(range(rows)),
        )
    )
    lengths = draw(
        st.one_of(
            st.lists(st.integers(0, 3 * page_size), min_size=rows, max_size=rows),
            st.integers(0, 3 * page_size).map(lambda length: [length] * rows),
        )
    )
    return ReorderCase(
        source_rows=tuple(source_rows),
        lengths=tuple(lengths),
        page_size=page_size,
        caches=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([16, 80])),
        dtype=draw(st.sampled_from(DTYPES)),
        wide=draw(st.booleans()),
        extra_rows=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(deadline=None, max_examples=200)
@given(case=append_cases())
def test_append(case: AppendCase) -> None:
    assert_appended(case, make_append(case), CPU_STEPS[case.dtype])


@settings(deadline=None, max_examples=100)
@given(case=reorder_cases())
def test_reorder_rows(case: ReorderCase) -> None:
    assert_rows_reordered(case, make_rows(case))


@settings(deadline=None, max_examples=100)
@given(case=reorder_cases())
def test_reorder_pages(case: ReorderCase) -> None:
    assert_pages_reordered(case, make_pages(case))


def test_every_half_precision_number_is_read_and_rounded() -> None:
    """All finite float16 numbers, not rotated (cosine 1, sine 0), come back as they are; so do all bfloat16 ones."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        every = torch.where(every.isfinite(), every, 1).view(-1, 1, 1, 64)
        case = AppendCase(new=(len(every),), before=(0,), kv_heads=1, group=1, dtype=dtype)
        arguments = make_append(case)
        arguments["qkv"] = every.expand(-1, 1, 3, -1).contiguous()
        arguments["cos_sin"][:, :32], arguments["cos_sin"][:, 32:] = 1, 0
        append_rope(**arguments)
        assert torch.equal(arguments["query"], every[:, 0])
        assert torch.equal(arguments["key_cache"][0, : len(every)], every[:, 0])


def test_results_are_rounded_to_even() -> None:
    """The product of x and the cosine lies between two numbers of 16 bits, for every exponent of float16."""
    for dtype in (torch.float16, torch.bfloat16):
        case = AppendCase(new=(1,), before=(0,), kv_heads=1, group=1, head_dim=128, dtype=dtype)
        arguments = make_append(case)
        arguments["qkv"][..., :64] = 2.0 ** torch.arange(-26, 38).clamp(max=15)
        arguments["qkv"][..., 64:] = 0
        for mantissa in (1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1.999999):
            arguments["cos_sin"][0, :64], arguments["cos_sin"][0, 64:] = mantissa, 0
            append_rope(**arguments)
            product = arguments["qkv"][0, 0, 0, :64].float() * torch.tensor(mantissa)
            assert torch.equal(arguments["query"][0, 0, :64], product.to(dtype))


def test_keys_and_values_may_lie_in_one_tensor() -> None:
    case = AppendCase(new=(3, 0, 1), before=(4, 5, 0), kv_heads=2)
    arguments = make_append(case)
    for both in (
        torch.randn(2, *arguments["key_cache"].shape).unbind(0),
        torch.randn(*arguments["key_cache"].shape[:3], 128).split(64, dim=-1),
        torch.randn(3, *arguments["key_cache"].shape[1:2], 2, 2, 64).unbind(2),
    ):
        assert_appended(case, arguments | {"key_cache": both[0], "value_cache": both[1]}, 1)


def test_nothing_to_do() -> None:
    arguments = make_append(AppendCase(new=(0, 0), before=(3, 4)))
    before = arguments["key_cache"].clone()
    append_rope(**arguments)
    assert torch.equal(arguments["key_cache"], before)
    rows = make_rows(ReorderCase(source_rows=(0,), lengths=(4,)))
    reorder_rows(rows["caches"], rows["source_rows"][:0], rows["lengths"][:0])


def test_more_columns_of_cu_new_than_rows_of_a_padded_batch() -> None:
    """`cu_new` for the largest batch serves a smaller one."""
    case = AppendCase(new=(2, 1), before=(0, 4), padded=True)
    arguments = make_append(case)
    arguments["cu_new"] = torch.cat((arguments["cu_new"], torch.tensor([3, 3], dtype=torch.int32)))
    assert_appended(case, arguments, 1)


Change = Callable[[dict[str, Any]], dict[str, Any]]


def replace(**values: Any) -> Change:
    return lambda arguments: {
        name: value(arguments[name]) if callable(value) else value for name, value in values.items()
    }


BAD_APPENDS: list[tuple[Change, str]] = [
    (replace(qkv=lambda x: x.double()), r"qkv is float64: allowed are bfloat16, float16, float32"),
    (replace(qkv=lambda x: x[0]), r"qkv has the shape \[2, 4, 64\]; it must be \[N, K, G \+ 2, D\]"),
    (replace(qkv=lambda x: x[:, :, :2]), r"qkv has the shape \[6, 2, 2, 64\]"),
    (replace(qkv=lambda x: x[..., :40]), r"heads of size D=40: allowed are multiples of 16 up to 256"),
    (replace(qkv=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), r"qkv has the strides .*all but the first"),
    (replace(qkv=lambda x: torch.cat((x, x), -1)[..., :64]), r"qkv has the strides"),
    (
        replace(qkv=lambda x: torch.randn(6 * 514)[1:].as_strided(x.shape, (513, 256, 64, 1))),
        r"qkv starts at an address",
    ),
    (replace(qkv=lambda x: torch.randn(6, 514)[:, :512].unflatten(1, (2, 4, 64))), r"qkv has a stride of 2056 bytes"),
    (replace(qkv=lambda x: x.clone().requires_grad_()), r"qkv requires a gradient, which append_rope does not have"),
    (replace(cos_sin=lambda x: x.bfloat16()), r"cos_sin is bfloat16; it must be float32"),
    (
        replace(cos_sin=lambda x: x[:, :32]),
        r"cos_sin has the shape \[\d+, 32\]; it must be \[any, 64\], which is \[P, D\]",
    ),
    (
        replace(cos_sin=lambda x: x[:3]),
        r"start\[0\]=3 and 2 new tokens make row 0 5 tokens long, but cos_sin has 3 pos",
    ),
    (replace(cu_new=lambda x: x.long()), r"cu_new is int64; it must be int32"),
    (replace(cu_new=lambda x: x[:0]), r"cu_new is empty"),
    (replace(cu_new=lambda x: x + 1), r"cu_new\[0\]=1: a running sum of new tokens starts with 0"),
    (
        replace(cu_new=lambda x: x.flip(0) * 0 + torch.tensor([0, 4, 2, 6]).int()),
        r"cu_new\[2\]=2 is less than cu_new\[1\]=4",
    ),
    (replace(cu_new=lambda x: x + torch.tensor([0, 0, 0, 1]).int()), r"cu_new\[3\]=7, but qkv has only 6 tokens"),
    (replace(start=lambda x: x[:2]), r"start has 2 rows, but there are B=3 rows"),
    (replace(start=lambda x: x * 0 - 1), r"start\[0\]=-1: a row cannot have had fewer than 0 tokens"),
    (
        replace(start=lambda x: x * 0 + 80, cos_sin=torch.ones(99, 64)),
        r"row 0 82 tokens long, but a row of the cache has",
    ),
    (replace(page_table=lambda x: x.long()), r"page_table is int64; it must be int32"),
    (replace(page_table=lambda x: x[:2]), r"page_table has 2 rows, but there are B=3"),
    (
        replace(page_table=torch.zeros(2, 3, dtype=torch.int32).t()),
        r"page_table has the strides .* last dimension must be cont",
    ),
    (replace(page_table=lambda x: x * 0 + 99), r"page_table\[0, 0\]=99, but the cache has pages 0 to 2"),
    (replace(page_table=lambda x: x * 0 - 1), r"page_table\[0, 0\]=-1, but the cache has pages 0 to 2"),
    (replace(page_table=None, key_cache=lambda x: x[:2], value_cache=lambda x: x[:2]), r"key_cache has 2 rows, but"),
    (replace(width=-1), r"width=-1 does not fit the N=6 tokens"),
    (replace(width=4), r"width=4 does not fit the N=6 tokens"),
    (replace(width=1), r"width=1 makes 6 rows of the N=6 tokens of qkv, but cu_new has 3"),
    (replace(width=2), r"cu_new gives row 2 3 new tokens, but the batch has width=2 columns"),
    (
        replace(query=lambda x: x[:5]),
        r"query has the shape \[5, 4, 64\]; it must be \[6, 4, 64\], which is \[N, K \* G, D\]",
    ),
    (replace(query=lambda x: x.half()), r"query is float16; it must be float32"),
    (replace(query=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)), r"query has the strides .*contiguous"),
    (replace(key_cache=lambda x: x[:, :, :1]), r"key_cache has the shape \[3, 16, 1, 64\]"),
    (
        replace(value_cache=lambda x: x[:, :8]),
        r"value_cache has the shape \[3, 8, 2, 64\]; it must be \[3, 16, 2, 64\]",
    ),
    (replace(key_cache=lambda x: x.bfloat16()), r"key_cache is bfloat16; it must be float32"),
    (
        replace(key_cache=lambda x: torch.zeros(3, 16, 2, 66)[..., :64]),
        r"key_cache has a stride of 264 bytes; all but the last dimension's must be multiples of 16 bytes",
    ),
    (lambda arguments: {"value_cache": arguments["key_cache"]}, r"key_cache and value_cache share memory"),
    (lambda arguments: {"qkv": arguments["key_cache"].view(-1)[:3072].view(6, 2, 4, 64)}, r"qkv and key_cache share"),
    (lambda arguments: {"query": arguments["qkv"].view(-1)[:1536].view(6, 4, 64)}, r"qkv and query share memory"),
]


@pytest.mark.parametrize(("change", "message"), BAD_APPENDS, ids=[message for _, message in BAD_APPENDS])
def test_bad_appends(change: Change, message: str) -> None:
    arguments = make_append(AppendCase(new=(2, 1, 3), before=(3, 0, 5), page_size=16))
    arguments |= change(arguments)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match=message):
        append_rope(**arguments)
    for name in ("query", "key_cache", "value_cache"):
        assert torch.equal(arguments[name].nan_to_num(), before[name].nan_to_num()), f"{name} was written"


BAD_REORDERS: list[tuple[Change, str]] = [
    (replace(caches=[]), r"caches has 0 tensors: allowed are 1 to 480"),
    (replace(caches=lambda x: x * 170), r"caches has 510 tensors: allowed are 1 to 480"),
    (
        replace(caches=lambda x: [x[0], x[1].half()]),
        r"caches\[1\] is float16 .* but caches\[0\] is float32 .*must be alike",
    ),
    (replace(caches=lambda x: [x[0], x[1][:, :3]]), r"caches\[1\] is float32 .* all must be alike"),
    (replace(caches=lambda x: [x[0].transpose(0, 1)]), r"caches\[0\] has the strides .* it must be contiguous"),
    (replace(caches=lambda x: [x[0], x[1], x[0]]), r"caches\[0\] and caches\[2\] share memory"),
    (replace(caches=lambda x: [x[0][:, 0, 0]]), r"caches\[0\] has the shape .* it must be \[R, L, K, D\]"),
    (replace(caches=lambda x: [x[0][..., :1, :3].contiguous()]), r"caches\[0\] has 12 bytes per token"),
    (replace(source_rows=lambda x: x.float()), r"source_rows is float32: allowed are int32 and int64"),
    (replace(source_rows=torch.tensor([0, 3, 1])), r"source_rows\[1\]=3, but there are rows 0 to 2"),
    (replace(source_rows=torch.tensor([0, 1, -1])), r"source_rows\[2\]=-1, but there are rows 0 to 2"),
    (replace(source_rows=torch.zeros(65).int(), lengths=torch.zeros(65).int()), r"B=65 rows: allowed are up to 64"),
    (
        replace(source_rows=torch.zeros(4).int(), lengths=torch.zeros(4).int()),
        r"B=4 rows, but (caches\[0\]|page_table) has 3",
    ),
    (replace(lengths=lambda x: x.long()), r"lengths is int64; it must be int32"),
    (replace(lengths=lambda x: x[:2]), r"lengths has the shape \[2\]; it must be \[3\], which is \[B\]"),
    (replace(lengths=lambda x: x - 99), r"lengths\[0\]=-\d+, but a row of the caches has room for 0 to"),
    (replace(lengths=lambda x: x + 99), r"lengths\[0\]=\d+, but a row of the caches has room for 0 to"),
]
BAD_PAGES: list[tuple[Change, str]] = [
    (replace(page_table=lambda x: x.long()), r"page_table is int64; it must be int32"),
    (replace(page_table=lambda x: x * 0 + 99), r"page_table\[0, 1\]=99, but the cache has pages 0 to 5"),
    (replace(page_size=8), r"page_size=8, but the pages of caches\[0\], \[6, 16, 2, 16\], have 16"),
    (replace(ticket=lambda x: x.long()), r"ticket is int64; it must be int32"),
]


@pytest.mark.parametrize(
    ("make", "function", "change", "message"),
    [(make_rows, reorder_rows, *bad) for bad in BAD_REORDERS]
    + [(make_pages, reorder_pages, *bad) for bad in BAD_REORDERS + BAD_PAGES],
)
def test_bad_reorders(make: Any, function: Any, change: Change, message: str) -> None:
    arguments = make(ReorderCase(source_rows=(1, 2, 0), lengths=(17, 20, 18)))
    arguments |= change(arguments)
    before = [cache.clone() for cache in arguments["caches"]]
    with pytest.raises(ValueError, match=message):
        function(**arguments)
    assert all(torch.equal(*pair) for pair in zip(arguments["caches"], before, strict=True))


@pytest.mark.parametrize("function", [reorder_pages, torch.ops.llama_te.reorder_pages])
def test_pages_without_a_table(function: Any) -> None:
    arguments = make_pages(ReorderCase(source_rows=(1, 2, 0), lengths=(17, 20, 18)))
    with pytest.raises(TypeError, match=r"page_table is None: it must be a torch.Tensor"):
        function(**(arguments | {"page_table": None}))


def test_caches_that_are_no_list() -> None:
    arguments = make_rows(ReorderCase(source_rows=(1, 0), lengths=(3, 3)))
    for caches in (range(10**9), None, "text"):
        with pytest.raises(TypeError, match=r"caches is a \w+: it must be a list or a tuple of tensors"):
            reorder_rows(**(arguments | {"caches": caches}))


def test_torch_agrees_with_the_schemas() -> None:
    append = make_append(AppendCase(new=(2, 1), before=(3, 0), page_size=16))
    append["query"].zero_()
    torch.library.opcheck(torch.ops.llama_te.append_rope.default, tuple(append.values()))
    case = ReorderCase(source_rows=(1, 0), lengths=(17, 17))
    torch.library.opcheck(torch.ops.llama_te.reorder_rows.default, tuple(make_rows(case).values()))
    torch.library.opcheck(torch.ops.llama_te.reorder_pages.default, tuple(make_pages(case).values()))


@pytest.mark.skipif(_extension.build_info()["cuda"] is not None, reason="the extension was built with CUDA")
def test_cuda_without_cuda() -> None:
    with pytest.raises(RuntimeError, match="built without CUDA, so its operators take CPU tensors only: reinstall"):
        library.cuda_function("reorder_rows_cuda")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Clear the caches of `available` and `limits` before and after a test."""
    found = (library.available, library.limits)
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


@pytest.mark.skipif(_extension.build_info()["cuda"] is not None, reason="the extension was built with CUDA")
def test_a_gpu_without_kernels_warns_once(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    """One line says how to get the kernels where torch sees a GPU and the extension has none for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    message = "built without CUDA, so generation is slow: reinstall .*nvcc is on PATH .*llama_te_infer.info"
    with pytest.warns(UserWarning, match=message) as caught:
        answers = [library.available("cuda") for _ in range(2)]
    assert answers == [False, False] and len(caught) == 1


def test_no_warning_without_a_gpu(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.available("cpu")
        library.available("cuda")


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    """Nothing is available, and `limits` raises an error with the reason."""
    monkeypatch.setitem(sys.modules, "llama_te_infer._extension", None)
    monkeypatch.delattr("llama_te_infer._extension", raising=False)
    assert not library.available("cpu")
    with pytest.raises(RuntimeError, match="compiled extension does not import .*install the package with pip"):
        library.limits()


def test_limits_are_those_of_the_docstrings() -> None:
    limits = library.limits()
    assert (limits.head_dim_multiple, limits.max_head_dim, limits.vector_bytes) == (16, 256, 16)
    assert (limits.max_reorder_rows, limits.max_reorder_caches) == (64, 480)
    assert (limits.max_decode_rows, limits.max_decode_group, limits.max_decode_kv_heads) == (256, 16, 64)
    assert limits.max_grid_rows == 65535
    assert limits.decode_head_dims == (64, 80, 96, 128)
    assert tuple(limits.element_types) == DTYPES
    assert tuple(limits.weight_types) == (torch.bfloat16, torch.float8_e4m3fn)


OPERATORS = (
    "append_rope", "decode_attention", "embed", "greedy", "linear", "quantize_rows", "reorder_pages", "reorder_rows",
    "rms_norm", "swiglu", "widen_pages",
)  # fmt: skip


def test_importing_ops_registers_every_operator() -> None:
    code = f"import llama_te_infer.ops, torch; print(*(hasattr(torch.ops.llama_te, name) for name in {OPERATORS}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * len(OPERATORS)
