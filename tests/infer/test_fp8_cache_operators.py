"""The operators with FP8 caches on the CPU: against the format in PyTorch, with bad input, and as torch sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.decode_attention_oracle import DecodeCase, assert_decoded, make_decode, same_bits
from infer.fp8_cache_oracle import (
    FP8,
    expected_pages,
    filled,
    make_fp8_append,
    make_fp8_pages,
    make_widen,
    quantized,
    widened,
)
from infer.operator_oracle import AppendCase, ReorderCase, make_append
from llama_te_infer.ops import library
from llama_te_infer.ops.append_rope import append_rope
from llama_te_infer.ops.decode_attention import decode_attention
from llama_te_infer.ops.reorder import reorder_pages, takes_reorder
from llama_te_infer.ops.widen_pages import widen_pages

pytest.importorskip("llama_te_infer._extension", reason="the package is used from its source folder")

Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]
WRITTEN = ("query", "output", "key_cache", "value_cache", "key_scale", "value_scale", "target")


def append_heads(heads: torch.Tensor) -> Arguments:
    """Append tokens of one head, bfloat16 [N, D], as keys that are not rotated and as values; pages of 16 in order."""
    tokens, head_dim = heads.shape
    arguments = make_fp8_append(AppendCase((tokens,), (0,), page_size=16, kv_heads=1, group=1, dtype=torch.bfloat16))
    pages = -(-tokens // 16)
    arguments |= {
        "qkv": heads[:, None, None].expand(-1, 1, 3, -1).contiguous(),
        "cos_sin": torch.cat((torch.ones(tokens, head_dim // 2), torch.zeros(tokens, head_dim // 2)), dim=1),
        "page_table": torch.arange(pages, dtype=torch.int32)[None],
        "query": torch.empty(tokens, 1, head_dim, dtype=torch.bfloat16),
    }
    for name in ("key", "value"):
        arguments[f"{name}_cache"] = filled(pages, 16, 1, head_dim).view(FP8)
        arguments[f"{name}_scale"] = filled(pages, 1, 16)
    append_rope(**arguments)
    return arguments


def assert_cached(arguments: Arguments, heads: torch.Tensor) -> None:
    codes, scale = quantized(heads)
    for name in ("key", "value"):
        got, wanted = arguments[f"{name}_cache"].flatten(0, 2)[: len(heads)].view(torch.uint8), codes.view(torch.uint8)
        if name == "key":  # the rotation adds a zero of some sign
            got, wanted = (torch.where(byte == 0x80, 0, byte) for byte in (got, wanted))
        assert torch.equal(got, wanted), f"{name}s are rounded otherwise"
        assert torch.equal(arguments[f"{name}_scale"].flatten()[: len(heads)], scale)


# --- the format ------------------------------------------------------------------------------------------------------


def test_every_number_is_rounded_to_the_nearest_fp8() -> None:
    """All finite bfloat16 numbers, each beside a head's greatest number, for scales across the range."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    for exponent in (-140, -126, -118, -110, -60, -8, 0, 8, 60, 127):
        greatest = torch.tensor(2.0, dtype=torch.float64).pow(exponent) * 1.5
        small = torch.where(every.double().abs() <= greatest, every, greatest.bfloat16())
        heads = torch.cat((small, small[: -len(small) % 60])).view(-1, 60)
        heads = torch.cat((heads, greatest.bfloat16().expand(len(heads), 4)), dim=1)
        assert_cached(append_heads(heads), heads)


def test_the_scale_of_every_greatest_number() -> None:
    magnitudes = torch.arange(2**15).to(torch.int16).view(torch.bfloat16)
    heads = torch.zeros(2**15, 16, dtype=torch.bfloat16)
    heads[:, 3] = -magnitudes
    heads[:, 12] = magnitudes / 2
    arguments = append_heads(heads)
    assert_cached(arguments, heads)
    scale = arguments["key_scale"].flatten().long()
    finite = magnitudes.isfinite()
    assert bool((scale[~finite] == 255).all())
    assert int(scale[0]) == 127, "zeros have the scale of 1"
    assert int(scale[1]) == 10
    power = torch.ldexp(torch.ones(2**15, dtype=torch.float64), scale - 127)
    assert int(scale[finite].max()) == 246
    fits = (magnitudes.double() <= 448 * power) | (scale == 246)
    is_least = (magnitudes.double() > 224 * power) | (scale == 10)
    assert bool((fits & is_least)[finite][1:].all())
    wide = widened(arguments["key_cache"], arguments["key_scale"]).flatten(0, 2)[finite]
    assert bool(((wide == 0) | (wide.double().abs() >= 2.0**-126)).all()), "a number is subnormal"


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_head_with_nan_or_infinity_becomes_nan(bad: float) -> None:
    heads = torch.ones(3, 16, dtype=torch.bfloat16)
    heads[1, 5] = bad
    arguments = append_heads(heads)
    wide = widened(arguments["key_cache"], arguments["key_scale"]).flatten(0, 2)[:3]
    assert torch.equal(wide.isnan().all(dim=1), torch.tensor([False, True, False]))
    assert torch.equal(wide.isnan().any(dim=1), torch.tensor([False, True, False]))
    assert_cached(arguments, heads)


# --- append_rope -----------------------------------------------------------------------------------------------------


@st.composite
def append_cases(draw: st.DrawFn) -> AppendCase:
    rows = draw(st.integers(1, 5))
    counts = st.lists(st.integers(0, 9), min_size=rows, max_size=rows).map(tuple)
    before = st.lists(st.integers(0, 100), min_size=rows, max_size=rows).map(tuple)
    return AppendCase(
        new=draw(counts),
        before=draw(before),
        padded=draw(st.booleans()),
        extra=draw(st.integers(0, 3)),
        page_size=draw(st.sampled_from([16, 17, 64])),
        kv_heads=draw(st.integers(1, 4)),
        group=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([16, 48, 64, 80, 96, 112, 128, 256])),
        dtype=torch.bfloat16,
        gap=draw(st.integers(0, 2)),
        extra_rows=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(deadline=None, max_examples=100)
@given(case=append_cases())
def test_append(case: AppendCase) -> None:
    """The cache is that of bfloat16 rounded to FP8; other places and the padding of pages stay as they are."""
    plain, arguments = make_append(case), make_fp8_append(case)
    untouched = torch.full_like(plain["key_cache"], 3.0e38)
    plain |= {"key_cache": untouched.clone(), "value_cache": untouched.clone()}
    append_rope(**plain)
    append_rope(**arguments)
    assert same_bits(arguments["query"], plain["query"])
    for name in ("key", "value"):
        new = (plain[f"{name}_cache"] != untouched).any(dim=-1)
        codes, scale = quantized(plain[f"{name}_cache"])
        old = filled(*codes.shape)
        assert same_bits(arguments[f"{name}_cache"], torch.where(new[..., None], codes.view(torch.uint8), old))
        expected = torch.where(new, scale, filled(*scale.shape)).transpose(1, 2)
        assert same_bits(arguments[f"{name}_scale"], expected)


# --- widen_pages -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=4).map(tuple),
    page_size=st.sampled_from([1, 16, 17, 64]),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 80, 128]),
    extra=st.integers(0, 2),
    seed=st.integers(0, 2**31),
    gap=st.integers(0, 2),
)
def test_widen_pages(**case: Any) -> None:
    arguments = make_widen(**case)
    expected = expected_pages(arguments)
    widen_pages(**arguments)
    assert same_bits(arguments["target"], expected)


def test_widened_numbers_keep_nan_and_zeros() -> None:
    arguments = make_widen()
    arguments["scale"][:, 0, ::2] = 255
    arguments["source"].view(torch.uint8)[:, ::2, 0] = 0x7F
    arguments["source"].view(torch.uint8)[:, 1] = 0x80
    arguments["scale"][:, :, 1] = 0  # as in cleared memory
    expected = expected_pages(arguments)
    widen_pages(**arguments)
    assert torch.equal(arguments["target"].isnan(), expected.isnan())
    assert bool(expected.isnan().any())
    assert torch.equal(arguments["target"].nan_to_num(), expected.nan_to_num())


def test_nothing_to_widen() -> None:
    arguments = make_widen()
    for change in ({"length_B": arguments["length_B"][:0]}, {"length_B": arguments["length_B"] * 0}):
        widen_pages(**(arguments | change))
    empty = {name: arguments[name][:, :0] for name in ("source", "target")} | {"scale": arguments["scale"][..., :0]}
    widen_pages(**(arguments | empty | {"length_B": arguments["length_B"] * 0}))
    assert bool((arguments["target"] == 7).all())


def replace(**values: Any) -> Change:
    return lambda arguments: {
        name: value(arguments[name]) if callable(value) else value for name, value in values.items()
    }


BAD_WIDENS: list[tuple[Change, str]] = [
    (replace(source=lambda x: x.bfloat16()), r"source is bfloat16; it must be float8_e4m3fn"),
    (replace(source=lambda x: x[0]), r"source has the shape \[16, 2, 16\]; it must be \[any, any, any, any\]"),
    (replace(source=lambda x: torch.cat((x, x), 3)[..., :24]), r"source has heads of size D=24: allowed are mult"),
    (replace(source=lambda x: gapped(x, 8)), r"source has a stride of 520 bytes"),
    (replace(scale=lambda x: x.int()), r"scale is int32; it must be uint8"),
    (replace(scale=lambda x: x[:, :1]), r"scale has the shape \[16, 1, 16\]; it must be \[16, 2, 16\], .* page size"),
    (replace(scale=lambda x: torch.cat((x, x), 2)[..., ::2]), r"scale has the strides .* last dimension must be"),
    (replace(page_table_BP=lambda x: x.long()), r"page_table_BP is int64; it must be int32"),
    (replace(page_table_BP=lambda x: x[:2]), r"length_B has B=3 rows, but page_table_BP has 2"),
    (replace(page_table_BP=lambda x: x * 0 + 16), r"page_table_BP\[0, 0\]=16, but the cache has pages 0 to 15"),
    (replace(page_table_BP=lambda x: x - 16), r"page_table_BP\[0, 0\]=-\d+, but the cache has pages 0 to 15"),
    (replace(length_B=lambda x: x.long()), r"length_B is int64; it must be int32"),
    (replace(length_B=lambda x: x + 99), r"length_B\[0\]=119, but a row of page_table_BP has room for 0 to 64"),
    (replace(length_B=lambda x: x - 21), r"length_B\[0\]=-1, but a row of page_table_BP has room for 0 to 64"),
    (replace(target=lambda x: x.float()), r"target is float32; it must be bfloat16"),
    (replace(target=lambda x: x[:11]), r"target has 11 pages, but B=3 rows of 4 need 12"),
    (replace(target=lambda x: x[:, :8]), r"target has the shape \[13, 8, 2, 16\]; it must be \[any, 16, 2, 16\]"),
    (replace(target=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)), r"target has the strides .* contiguous"),
    (replace(target=lambda x: x.requires_grad_()), r"target requires a gradient, which widen_pages does not have"),
    (lambda a: {"target": torch.cat((a["target"].flatten(), a["target"].flatten()))[1:6657].view(13, 16, 2, 16)},
     r"target starts at an address that is not a multiple of 16"),
    (lambda a: {"length_B": a["target"].flatten()[:6].view(torch.int32) * 0 + 1, "scale": in_target(a)},
     r"scale and target share memory"),
]  # fmt: skip


def gapped(tensor: torch.Tensor, gap: int) -> torch.Tensor:
    flat = tensor.view(torch.uint8).flatten(1)
    wide = torch.cat((flat, flat[:, :gap]), dim=1).view(tensor.dtype)
    return wide[:, : flat.shape[1]].unflatten(1, tensor.shape[1:])


def in_target(arguments: Arguments) -> torch.Tensor:
    scale: torch.Tensor = arguments["target"].view(torch.uint8).flatten()[: arguments["scale"].numel()]
    return scale.view(arguments["scale"].shape)


@pytest.mark.parametrize(("change", "message"), BAD_WIDENS, ids=[message for _, message in BAD_WIDENS])
def test_bad_widens(change: Change, message: str) -> None:
    assert_refused(widen_pages, make_widen(), change, message)


def test_pages_without_a_table() -> None:
    for function in (widen_pages, torch.ops.llama_te.widen_pages):
        with pytest.raises((TypeError, RuntimeError), match=r"page_table_BP"):
            function(**(make_widen() | {"page_table_BP": None}))


def assert_refused(function: Any, arguments: Arguments, change: Change, message: str) -> None:
    arguments |= change(arguments)
    before = {name: arguments[name].detach().clone() for name in WRITTEN if arguments.get(name) is not None}
    with pytest.raises(ValueError, match=message):
        function(**arguments)
    for name, tensor in before.items():
        assert same_bits(arguments[name].detach(), tensor), f"{name} was written"


# --- decode_attention ------------------------------------------------------------------------------------------------


@st.composite
def decode_cases(draw: st.DrawFn) -> DecodeCase:
    before = st.one_of(st.integers(0, 40), st.integers(0, 300))
    return DecodeCase(
        before=tuple(draw(st.lists(before, min_size=1, max_size=4))),
        page_size=draw(st.sampled_from([16, 17, 64])),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([16, 64, 80, 96, 128, 256])),
        dtype=torch.bfloat16,
        room=draw(st.integers(0, 20)),
        gap=draw(st.integers(0, 2)),
        extra_rows=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**31)),
        fp8=True,
    )


@settings(deadline=None, max_examples=60)
@given(case=decode_cases())
def test_decode_attention(case: DecodeCase) -> None:
    assert_decoded(make_decode(case))


@settings(deadline=None, max_examples=40)
@given(case=decode_cases())
def test_attention_equals_that_over_the_widened_cache(case: DecodeCase) -> None:
    """Bit by bit, where the new keys and values are FP8 numbers and so both caches hold the same."""
    arguments = make_decode(case)
    half = case.head_dim // 2
    arguments["cos_sin"][:, :half], arguments["cos_sin"][:, half:] = 1, 0
    new = arguments["qkv"][:, :, case.group :]
    codes, scale = quantized(new)
    new.copy_(torch.ldexp(codes.double(), scale.int()[..., None] - 127))
    plain = {name: value for name, value in arguments.items() if name not in ("key_scale", "value_scale")}
    for name in ("key", "value"):
        plain[f"{name}_cache"] = widened(arguments[f"{name}_cache"], arguments[f"{name}_scale"])
    plain["output"] = arguments["output"].clone()
    decode_attention(**plain)
    decode_attention(**arguments)
    assert same_bits(arguments["output"], plain["output"])
    for name in ("key", "value"):
        cache = widened(arguments[f"{name}_cache"], arguments[f"{name}_scale"])
        assert torch.equal(cache.nan_to_num(), plain[f"{name}_cache"].nan_to_num())


def test_a_later_step_sees_the_new_token_as_this_one_does() -> None:
    """The same query attends to the same keys and values: once with the last one new, once with it in the cache."""
    arguments = make_decode(DecodeCase(before=(20,), page_size=16, dtype=torch.bfloat16, fp8=True, group=1))
    arguments["cos_sin"][:, :32], arguments["cos_sin"][:, 32:] = 1, 0
    decode_attention(**arguments)
    first = arguments["output"].clone()
    # A second new token whose key has the score -inf in float32 does not count.
    arguments["start"] += 1
    query = arguments["qkv"][:, :, 0]
    arguments["qkv"][:, :, 1] = -query.sign() * 2.0**100
    decode_attention(**arguments)
    assert torch.allclose(arguments["output"].float(), first.float(), rtol=0, atol=0)


def test_no_rows() -> None:
    arguments = make_decode(DecodeCase(before=(3, 4), page_size=16, dtype=torch.bfloat16, fp8=True))
    arguments |= {"qkv": arguments["qkv"][:0], "output": arguments["output"][:0]}
    before = arguments["key_scale"].clone()
    decode_attention(**arguments)
    assert same_bits(arguments["key_scale"], before)


# --- bad arguments of append_rope and decode_attention ---------------------------------------------------------------

BAD_CACHES: list[tuple[Change, str]] = [
    (replace(key_scale=None, value_scale=None), r"key_scale is None, but key_cache is float8_e4m3fn: pass its scales"),
    (replace(value_scale=None), r"value_scale is None, but value_cache is float8_e4m3fn: pass its scales"),
    (replace(key_cache=lambda x: x.bfloat16(), value_cache=lambda x: x.bfloat16()),
     r"key_scale is given, but key_cache is bfloat16, which has no scales: pass None"),
    (replace(page_table=None), r"page_table is None, but key_cache is float8_e4m3fn: only paged caches can be FP8"),
    (replace(value_cache=lambda x: x.bfloat16()), r"value_cache is bfloat16; it must be float8_e4m3fn"),
    (replace(key_cache=lambda x: x.bfloat16()), r"value_cache is float8_e4m3fn; it must be bfloat16"),
    (replace(key_cache=lambda x: x.to(torch.float8_e5m2)), r"key_cache is float8_e5m2; it must be bfloat16"),
    (replace(key_cache=lambda x: x[:, :, :1]), r"key_cache has the shape \[\d+, 16, 1, 64\]"),
    (replace(key_scale=lambda x: x.int()), r"key_scale is int32; it must be uint8"),
    (replace(value_scale=lambda x: x[..., :8]), r"value_scale has the shape \[(\d+), 2, 8\]; it must be \[\1, 2, 16\]"),
    (replace(value_scale=lambda x: x.transpose(1, 2)), r"value_scale has the shape \[(\d+), 16, 2\]; it must be \[\1"),
    (replace(key_scale=lambda x: torch.cat((x, x), 2)[..., ::2]), r"key_scale has the strides .* last dimension"),
    (replace(key_scale=lambda x: x[:1].expand(len(x), -1, -1)), r"key_scale .* elements share memory"),
    (lambda a: {"value_scale": a["key_scale"]}, r"key_scale and value_scale share memory"),
    (lambda a: {"key_scale": a["value_cache"].view(torch.uint8).flatten()[: a["key_scale"].numel()]
                .view(a["key_scale"].shape)}, r"value_cache and key_scale share memory"),
    (lambda a: {"start": a["key_scale"].flatten()[:12].zero_().view(torch.int32)}, r"start and key_scale share memory"),
]  # fmt: skip
DTYPES = [
    (replace(qkv=lambda x: x.half()), r"key_cache is float8_e4m3fn; it must be float16"),
    (replace(qkv=lambda x: x.float()), r"key_cache is float8_e4m3fn; it must be float32"),
]


@pytest.mark.parametrize(("change", "message"), [*BAD_CACHES, *DTYPES])
def test_bad_appends(change: Change, message: str) -> None:
    case = AppendCase(new=(2, 1, 3), before=(3, 0, 5), page_size=16, dtype=torch.bfloat16)
    if "it must be float" in message and "key_cache is float8" in message:
        dtype = torch.float16 if "16" in message.split("must be")[1] else torch.float32
        query = make_append(case)["query"].to(dtype)
        assert_refused(append_rope, make_fp8_append(case) | {"query": query}, change, message)
        return
    assert_refused(append_rope, make_fp8_append(case), change, message)


def decode_case() -> Arguments:
    return make_decode(DecodeCase(before=(3, 0, 5), page_size=16, dtype=torch.bfloat16, fp8=True))


@pytest.mark.parametrize(("change", "message"), BAD_CACHES)
def test_bad_decodes(change: Change, message: str) -> None:
    assert_refused(decode_attention, decode_case(), change, message)


@pytest.mark.parametrize(("change", "message"), [
    (lambda a: {"key_scale": scales_with_gap(a["key_scale"], 8)}, r"key_scale has a stride of 40 bytes; all but"),
    (lambda a: {"value_scale": torch.cat((a["value_scale"],) * 2).flatten()[8:][: a["value_scale"].numel()]
                .view(a["value_scale"].shape)}, r"value_scale starts at an address that is not a multiple of 16"),
    (lambda a: {"key_scale": a["key_scale"].to("meta")}, r"key_scale is on meta; it must be on cpu, as the other"),
])  # fmt: skip
def test_bad_input_for_the_kernel(change: Change, message: str) -> None:
    library.extension().decode_attention_check(**decode_case())
    arguments = decode_case()
    with pytest.raises(ValueError, match=message):
        library.extension().decode_attention_check(**(arguments | change(arguments)))


def test_the_workspace_is_apart_from_the_scales() -> None:
    arguments = decode_case()
    memory = torch.zeros(2**20, dtype=torch.int32)
    shape = arguments["key_scale"].shape
    scale = memory.view(torch.uint8)[: arguments["key_scale"].numel()].view(shape)
    with pytest.raises(ValueError, match="workspace and key_scale share memory"):
        library.extension().decode_attention_check(**(arguments | {"workspace": memory, "key_scale": scale}))


def scales_with_gap(scale: torch.Tensor, gap: int) -> torch.Tensor:
    flat = scale.flatten(1)
    return torch.cat((flat, flat[:, :gap]), dim=1)[:, : flat.shape[1]].unflatten(1, scale.shape[1:])


# --- reorder_pages ---------------------------------------------------------------------------------------------------


def rows_of(arguments: Arguments, case: ReorderCase, rows: Any) -> list[list[torch.Tensor]]:
    """The tokens of rows in each cache, as bytes; scales have the places of a page last."""
    found = []
    for cache in arguments["caches"]:
        places_first = cache.view(torch.uint8) if cache.dim() == 4 else cache.transpose(1, 2)
        by_row = [places_first[arguments["page_table"][row].long()].flatten(0, 1) for row in rows]
        found.append([tokens[:length].clone() for tokens, length in zip(by_row, case.lengths, strict=True)])
    return found


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_reorder_pages(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 6))
    order = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
    page_size = data.draw(st.sampled_from([16, 64]))
    length = data.draw(st.integers(0, 3 * page_size))
    case = ReorderCase(tuple(order), (length,) * rows, page_size, kv_heads=data.draw(st.integers(1, 3)))
    arguments = make_fp8_pages(case)
    expected = rows_of(arguments, case, order)
    reorder_pages(**arguments)
    for cache, wanted in zip(rows_of(arguments, case, range(rows)), expected, strict=True):
        assert all(map(torch.equal, cache, wanted))


BAD_REORDERS: list[tuple[Change, str]] = [
    (replace(caches=lambda x: [x[2], x[0]]), r"caches\[1\] is float8_e4m3fn .* but caches\[0\] is uint8 .* alike, but"),
    (replace(caches=lambda x: [x[0], x[2][:, :1]]), r"caches\[1\] is uint8 \[6, 1, 16\] on cpu, but caches\[0\] is fl"),
    (replace(caches=lambda x: [x[0], x[2].view(torch.int8)]), r"caches\[1\] is int8 .* must be alike"),
    (replace(caches=lambda x: [x[0].bfloat16(), x[2]]), r"caches\[1\] is uint8 .* but caches\[0\] is bfloat16"),
    (replace(caches=lambda x: [x[0], x[2], x[2]]), r"caches\[1\] and caches\[2\] share memory"),
    (replace(caches=lambda x: [x[0], torch.cat((x[2], x[2]), 1)[:, :2]]), r"caches\[1\] has the strides .* contiguous"),
    (replace(lengths=lambda x: x * 0 + 4, caches=lambda x: [x[0][:, :8].contiguous(), x[2][..., :8].contiguous()],
             page_size=8), r"caches\[1\] has a stride of 8 bytes"),
    (lambda a: {"ticket": a["caches"][3].flatten()[:4].view(torch.int32)}, r"ticket and caches\[3\] share memory"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_REORDERS)
def test_bad_reorders(change: Change, message: str) -> None:
    arguments = make_fp8_pages(ReorderCase(source_rows=(1, 2, 0), lengths=(17, 20, 18)))
    arguments |= change(arguments)
    before = [cache.clone() for cache in arguments["caches"]]
    with pytest.raises(ValueError, match=message):
        reorder_pages(**arguments)
    assert all(map(same_bits, arguments["caches"], before))


def test_contiguous_caches_have_no_scales() -> None:
    caches = make_fp8_pages(ReorderCase(source_rows=(1, 0), lengths=(17, 17)))["caches"]
    source_rows, lengths = torch.tensor([1, 0]), torch.tensor([3, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"caches\[1\] is uint8 .* must be alike"):
        torch.ops.llama_te.reorder_rows([caches[0], caches[2]], source_rows, lengths)


def test_what_a_reorder_takes() -> None:
    caches = make_fp8_pages(ReorderCase(source_rows=(1, 0), lengths=(17, 17)))["caches"]
    assert takes_reorder(caches, 64)
    assert takes_reorder(caches[:2], 64)
    assert not takes_reorder([*caches[:2], caches[2][:, :1]], 64)
    assert not takes_reorder([cache[:, :8] if cache.dim() == 4 else cache[..., :8] for cache in caches], 64)
    assert not takes_reorder(caches * 61, 64)


# --- as torch sees them ----------------------------------------------------------------------------------------------


# torch's check of the schema has no comparison of FP8 tensors.
OPCHECKS = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")


def test_torch_agrees_with_the_schemas() -> None:
    append = make_fp8_append(AppendCase(new=(2, 1), before=(3, 0), page_size=16, dtype=torch.bfloat16))
    append["query"].zero_()
    torch.library.opcheck(torch.ops.llama_te.append_rope.default, tuple(append.values()), test_utils=OPCHECKS)
    decode = decode_case()
    for name in ("key_cache", "value_cache"):
        decode[name] = torch.zeros(decode[name].shape, dtype=torch.uint8).view(FP8)
    decode["output"].zero_()
    scales = {name: decode.pop(name) for name in ("key_scale", "value_scale")}
    torch.library.opcheck(
        torch.ops.llama_te.decode_attention.default, tuple(decode.values()), scales, test_utils=OPCHECKS
    )
    torch.library.opcheck(torch.ops.llama_te.widen_pages.default, tuple(make_widen().values()), test_utils=OPCHECKS)
    pages = make_fp8_pages(ReorderCase(source_rows=(1, 0), lengths=(17, 17)))
    torch.library.opcheck(torch.ops.llama_te.reorder_pages.default, tuple(pages.values()), test_utils=OPCHECKS)
