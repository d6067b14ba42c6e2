"""The operators with FP8 caches on the GPU: against the format in PyTorch, float64 PyTorch, and the CPU's operators."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from gpu.test_decode_attention import HEAD_DIMS, LENGTHS, assert_semaphores_are_zero, ragged
from infer.decode_attention_oracle import (
    CACHES,
    DecodeCase,
    assert_decoded,
    assert_output,
    expected_decode,
    make_decode,
    same_bits,
)
from infer.fp8_cache_oracle import (
    expected_pages,
    make_fp8_append,
    make_fp8_pages,
    make_widen,
    quantized,
    widened,
)
from infer.operator_oracle import AppendCase, ReorderCase, make_append, on_device
from llama_te_infer.ops.append_rope import append_rope
from llama_te_infer.ops.decode_attention import decode_attention
from llama_te_infer.ops.linear import LinearWorkspace, linear
from llama_te_infer.ops.reorder import reorder_pages
from llama_te_infer.ops.widen_pages import widen_pages

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]


def on_gpu(**fields: Any) -> dict[str, Any]:
    return on_device(make_decode(DecodeCase(dtype=torch.bfloat16, fp8=True, **fields)), "cuda")


# --- append_rope -----------------------------------------------------------------------------------------------------


def assert_appended(case: AppendCase) -> None:
    """The cache is the kernel's own bfloat16 cache, rounded to FP8; all other bytes stay."""
    plain, arguments = on_device(make_append(case), "cuda"), on_device(make_fp8_append(case), "cuda")
    for name in ("key_cache", "value_cache"):
        plain[name].fill_(3.0e38)
    before = {name: arguments[name].clone() for name in CACHES}
    append_rope(**plain)
    append_rope(**arguments)
    assert same_bits(arguments["query"], plain["query"])
    for name in ("key", "value"):
        cache = plain[f"{name}_cache"]
        new = (cache != torch.tensor(3.0e38).bfloat16().cuda()).any(dim=-1)
        codes, scale = quantized(cache)
        old = before[f"{name}_cache"].view(torch.uint8)
        assert same_bits(arguments[f"{name}_cache"], torch.where(new[..., None], codes.view(torch.uint8), old))
        wanted = torch.where(new, scale, before[f"{name}_scale"].transpose(1, 2))
        assert same_bits(arguments[f"{name}_scale"], wanted.transpose(1, 2))


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128, 160, 256])
@pytest.mark.parametrize("tokens", [1, 7, 3000])
def test_append(tokens: int, head_dim: int) -> None:
    """With many tokens a thread takes several heads."""
    for group, padded in ((1, False), (4, True), (5, False)):
        case = AppendCase(
            new=(tokens, 3, 0),
            before=(5, 17, 2),
            padded=padded,
            extra=2,
            page_size=64,
            kv_heads=8 if tokens > 7 else 3,
            group=group,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            gap=1,
        )
        assert_appended(case)


def test_appended_heads_with_nan_or_infinity_are_nan() -> None:
    case = AppendCase(new=(40,), before=(0,), page_size=16, kv_heads=4, head_dim=80, dtype=torch.bfloat16)
    for bad in (torch.nan, torch.inf, -torch.inf):
        arguments = on_device(make_fp8_append(case), "cuda")
        arguments["qkv"][7, 2, case.group :, 33] = bad
        append_rope(**arguments)
        page = arguments["page_table"][0, 0]
        for name in ("key", "value"):
            wide = widened(arguments[f"{name}_cache"], arguments[f"{name}_scale"])[page]
            is_nan = torch.zeros(16, 4, dtype=torch.bool, device="cuda")
            is_nan[7, 2] = True
            assert torch.equal(wide.isnan().all(dim=-1), is_nan)
            assert torch.equal(wide.isnan().any(dim=-1), is_nan)
            assert int(arguments[f"{name}_scale"][page, 2, 7]) == 255


def test_the_scale_of_every_greatest_number() -> None:
    magnitudes = torch.arange(2**15).to(torch.int16).view(torch.bfloat16).cuda()
    heads = torch.zeros(2**15, 64, dtype=torch.bfloat16, device="cuda")
    heads[:, 3], heads[:, 60] = -magnitudes, magnitudes / 2
    arguments = on_device(
        make_fp8_append(AppendCase((2**15,), (0,), page_size=16, kv_heads=1, group=1, dtype=torch.bfloat16)), "cuda"
    )
    arguments["qkv"] = heads[:, None, None].expand(-1, 1, 3, -1).contiguous()
    append_rope(**arguments)
    codes, scale = quantized(heads)
    pages = arguments["page_table"][0, : 2**15 // 16].long()
    assert same_bits(arguments["value_cache"][pages].flatten(0, 2), codes)
    assert torch.equal(arguments["value_scale"][pages].flatten(), scale)


# --- decode_attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_lengths(head_dim: int, page_size: int) -> None:
    """Each length alone, and all lengths in one batch, twice with the same workspace."""
    shared: dict[str, Any] = {"page_size": page_size, "head_dim": head_dim, "group": 4}
    for length in LENGTHS:
        assert_decoded(on_gpu(before=(length,), **shared))
    arguments = on_gpu(before=LENGTHS, **shared)
    assert_decoded(arguments)
    assert_semaphores_are_zero(arguments)
    assert_decoded(arguments)


@pytest.mark.parametrize("group", range(1, 17))
def test_groups(group: int) -> None:
    for head_dim in HEAD_DIMS:
        assert_decoded(on_gpu(before=(0, 90, 255, 600), group=group, head_dim=head_dim, page_size=16))


@pytest.mark.parametrize("seed", range(40))
def test_mixed_batches(seed: int) -> None:
    draw = random.Random(seed)
    rows = draw.choice([1, 3, 32, 200])
    arguments = on_gpu(
        before=ragged(rows, 3000 if rows < 32 else 600, seed),
        page_size=draw.choice([16, 48, 64, 256]),
        kv_heads=draw.choice([1, 2, 8]),
        group=draw.choice([1, 2, 4, 8, 12]),
        head_dim=draw.choice(HEAD_DIMS),
        room=draw.randint(0, 300),
        gap=draw.randint(0, 3),
        extra_rows=draw.randint(0, 2),
        seed=seed,
    )
    assert_decoded(arguments)
    assert_semaphores_are_zero(arguments)


@pytest.mark.parametrize("before", [(8191,), (4096, 4094), (33_000, 8193, 1), (131_071,)], ids=str)
def test_long_rows(before: tuple[int, ...]) -> None:
    arguments = on_gpu(before=before, page_size=64, group=4, head_dim=128, kv_heads=1)
    assert_decoded(arguments)
    assert_semaphores_are_zero(arguments)


@pytest.mark.parametrize("exponent", [-40, -20, 20, 40])
def test_keys_and_values_of_any_size(exponent: int) -> None:
    """Scales far from that of usual numbers. The scores keep their size, so that all tokens count."""
    arguments = on_gpu(before=(300, 40, 900), group=4, head_dim=128, page_size=64)
    arguments["qkv"][:, :, 4:] *= 2.0**exponent
    for name in ("key_scale", "value_scale"):
        finite = arguments[name] != 255
        arguments[name] += (finite * exponent).to(torch.uint8)
    arguments["scale"] *= 2.0**-exponent
    assert_decoded(arguments)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_new_token_is_seen_as_the_cache_holds_it(head_dim: int) -> None:
    """A row of one token has its value as the output, bit by bit; a bfloat16 value would show."""
    arguments = on_gpu(before=(0,) * 32, kv_heads=8, group=4, head_dim=head_dim, page_size=16)
    decode_attention(**arguments)
    value = widened(arguments["value_cache"], arguments["value_scale"])[arguments["page_table"][:, 0].long(), 0]
    assert torch.equal(arguments["output"].view(32, 8, 4, head_dim), value[:, :, None].expand(-1, -1, 4, -1))
    assert not torch.equal(value, arguments["qkv"][:, :, 5])


def test_a_score_that_outweighs_all_others_is_found_at_every_place() -> None:
    """One key equals the query and the scale is large, so the output is this key's value: a wrong place would show."""
    for head_dim in HEAD_DIMS:
        arguments = on_gpu(before=(300,), kv_heads=1, group=1, head_dim=head_dim, page_size=16)
        half = head_dim // 2
        arguments["cos_sin"][:, :half], arguments["cos_sin"][:, half:] = 1, 0
        arguments["scale"] = 10.0
        codes, scale = quantized(arguments["qkv"][0, 0, 0])
        arguments["qkv"][0, 0, 1] = 0
        values = widened(arguments["value_cache"], arguments["value_scale"])
        for place in range(300):
            page = arguments["page_table"][0, place // 16]
            arguments["key_cache"].view(torch.uint8).zero_()
            arguments["key_scale"].fill_(127)
            arguments["key_cache"].view(torch.uint8)[page, place % 16, 0] = codes.view(torch.uint8)
            arguments["key_scale"][page, 0, place % 16] = scale
            decode_attention(**arguments)
            assert torch.equal(arguments["output"][0, 0], values[page, place % 16, 0]), (head_dim, place)


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("place", [0, 17, 255, 300])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_visible(which: str, place: int, bad: float) -> None:
    """A head that is NaN, in the cache or new, makes its query heads' output NaN, and no other one's."""
    arguments = on_gpu(before=(300, 20), kv_heads=3, group=2, page_size=16)
    if place == 300:
        arguments["qkv"][0, 1, 2 if which == "key" else 3, 5] = bad
    else:
        page = arguments["page_table"][0, place // 16]
        arguments[f"{which}_scale"][page, 1, place % 16] = 255
        arguments[f"{which}_cache"].view(torch.uint8)[page, place % 16, 1] = 0x7F
    decode_attention(**arguments)
    is_nan = torch.zeros(2, 6, dtype=torch.bool, device="cuda")
    is_nan[0, 2:4] = True
    assert torch.equal(arguments["output"].isnan().all(dim=-1), is_nan)
    assert torch.equal(arguments["output"].isnan().any(dim=-1), is_nan)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """The bits are equal alone, with other rows, and in a repetition."""
    for head_dim in HEAD_DIMS:
        arguments = on_gpu(before=ragged(32, 2500, 1), kv_heads=8, group=4, head_dim=head_dim, page_size=64)
        decode_attention(**arguments)
        together = arguments["output"].clone()
        for _ in range(10):
            arguments["output"].fill_(torch.nan)
            decode_attention(**arguments)
            assert same_bits(arguments["output"], together)
        for row in range(0, 32, 3):
            alone = {name: arguments[name][row : row + 1] for name in ("qkv", "start", "page_table", "output")}
            arguments["output"].fill_(torch.nan)
            decode_attention(**(arguments | alone))
            assert same_bits(arguments["output"][row], together[row])


def test_one_workspace_serves_both_types_of_caches() -> None:
    fp8 = on_gpu(before=(700, 5), kv_heads=8, group=4, head_dim=128, page_size=64)
    case = DecodeCase(before=(700, 5), kv_heads=8, group=4, head_dim=128, page_size=64, dtype=torch.bfloat16)
    wide = on_device(make_decode(case), "cuda") | {"workspace": fp8["workspace"]}
    for arguments in (fp8, wide, fp8):
        assert_decoded(arguments)


def test_in_a_graph() -> None:
    """Replay with other tokens, lengths and pages. Three layers make one launch follow another."""
    shared: dict[str, Any] = {"page_size": 16, "kv_heads": 8, "group": 4}
    longest = 1200
    layers = [on_gpu(before=(longest,) * 3, seed=seed, **shared) for seed in range(3)]
    for layer in layers[1:]:
        layer |= {name: layers[0][name] for name in ("start", "page_table", "workspace")}

    def run() -> None:
        for layer in layers:
            decode_attention(**layer)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed, before in enumerate([(0, 1, 2), (15, 16, 17), (255, 256, longest), (900, 0, 31), (longest,) * 3]):
        for i, layer in enumerate(layers, start=1):
            fresh = on_gpu(before=(longest,) * 3, seed=seed + 10 * i, **shared)
            layer["qkv"].copy_(fresh["qkv"])
            for name in CACHES:
                layer[name].view(torch.uint8).copy_(fresh[name].view(torch.uint8))
            # Pages move, with their unwritten places, which must not be NaN then.
            for name in ("key", "value"):
                layer[f"{name}_cache"].view(torch.uint8)[layer[f"{name}_scale"].transpose(1, 2) == 255] = 0
                layer[f"{name}_scale"][layer[f"{name}_scale"] == 255] = 127
            layer["output"].fill_(torch.nan)
        layers[0]["start"].copy_(torch.tensor(before))
        layers[0]["page_table"].copy_(layers[0]["page_table"].flip(0).roll(seed, 1))
        expected = [expected_decode(layer) for layer in layers]
        torch.cuda.synchronize()
        graph.replay()
        for layer, wanted in zip(layers, expected, strict=True):
            for name in CACHES:
                assert same_bits(layer[name], wanted[name])
            assert_output(layer["output"], wanted["output"])
        assert_semaphores_are_zero(layers[0])


def test_it_waits_for_the_projection_ahead() -> None:
    """The kernel starts before the `linear` that writes its qkv ends, and must not read qkv too early."""
    arguments = on_gpu(before=(200, 700), kv_heads=8, group=4, head_dim=128, page_size=64)
    shape = arguments["qkv"].shape
    input_BE = torch.randn(2, 8192, device="cuda").bfloat16()
    weight = torch.randn(shape[1:].numel(), 8192, device="cuda").bfloat16() / 90
    projected, workspace = torch.empty(2, len(weight), device="cuda").bfloat16(), LinearWorkspace(input_BE.device)
    arguments["qkv"] = projected.view(shape)
    linear(input_BE, weight, projected, workspace)
    expected = expected_decode(arguments)
    for _ in range(20):
        projected.fill_(torch.nan)
        arguments["output"].fill_(torch.nan)
        linear(input_BE, weight, projected, workspace)
        decode_attention(**arguments)
        assert_output(arguments["output"], expected["output"])
        for name in CACHES:
            assert same_bits(arguments[name], expected[name])


@pytest.mark.parametrize("name", ["start", "page_table", "cos_sin"])
def test_rows_out_of_range_are_left_out_and_harm_nothing(name: str) -> None:
    for bad in (99_999, -1, 2**31 - 1, -(2**31)):
        arguments = on_gpu(before=(20, 700, 300), page_size=16, kv_heads=2, group=4)
        before = {cache: arguments[cache].clone() for cache in CACHES}
        expected = expected_decode(arguments)
        if name == "start":
            arguments["start"][1] = bad
        elif name == "page_table":
            arguments["page_table"][1, 20] = bad
        else:
            arguments["cos_sin"] = arguments["cos_sin"][:700]  # no position for row 1's token
        decode_attention(**arguments)
        rest = torch.tensor([0, 2], device="cuda")
        assert_output(arguments["output"][rest], expected["output"][rest])
        assert int(arguments["output"][1].count_nonzero()) == 0
        assert_semaphores_are_zero(arguments)
        if name != "page_table":
            page, place = arguments["page_table"][1, 700 // 16], 700 % 16
            for cache in ("key", "value"):
                wanted, old = expected[f"{cache}_cache"].view(torch.uint8), before[f"{cache}_cache"].view(torch.uint8)
                wanted[page, place] = old[page, place]
                expected[f"{cache}_scale"][page, :, place] = before[f"{cache}_scale"][page, :, place]
        for cache in CACHES:
            assert same_bits(arguments[cache], expected[cache])


def test_bad_input() -> None:
    arguments = on_gpu(before=(20, 30), page_size=16)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"key_scale": None}, "key_scale is None, but key_cache is float8_e4m3fn: pass its scales"),
        ({"page_table": None}, "page_table is None, but key_cache is float8_e4m3fn"),
        ({"value_scale": arguments["key_scale"]}, "key_scale and value_scale share memory"),
        ({"key_scale": arguments["key_scale"].cpu()}, "key_scale is on cpu; it must be on cuda:0"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            decode_attention(**(arguments | change))


def test_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_TE_CHECK", "1")
    arguments = on_gpu(before=(20, 30), page_size=16)
    assert_decoded(arguments)
    arguments["page_table"][0, 1] = 77
    with pytest.raises(ValueError, match=r"page_table\[0, 1\]=77, but the cache has pages"):
        decode_attention(**arguments)
    pages = on_device(make_widen(), "cuda")
    widen_pages(**pages)
    pages["length_B"][1] = 999
    with pytest.raises(ValueError, match=r"length_B\[1\]=999, but a row of page_table_BP has room for 0 to"):
        widen_pages(**pages)


def test_compiled_by_torch() -> None:
    @torch.compile(fullgraph=True)
    def step(arguments: dict[str, Any]) -> torch.Tensor:
        decode_attention(**(arguments | {"qkv": arguments["qkv"] * 2}))
        return arguments["output"] + 0

    arguments, doubled = (on_gpu(before=(20, 300), page_size=16) for _ in range(2))
    doubled["qkv"] = doubled["qkv"] * 2
    decode_attention(**doubled)
    assert same_bits(step(arguments), doubled["output"])
    for name in CACHES:
        assert same_bits(arguments[name], doubled[name])


# --- widen_pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("page_size", [1, 16, 17, 64, 256])
def test_widen_pages(page_size: int, head_dim: int) -> None:
    for lengths in ((1,), (0, 0), (20, 0, 33), (700, 1, 5000, 64), tuple(range(100))):
        for kv_heads, gap in ((1, 0), (8, 1), (3, 0)):
            arguments = on_device(make_widen(lengths, page_size, kv_heads, head_dim, gap=gap), "cuda")
            expected = expected_pages(arguments)
            widen_pages(**arguments)
            assert same_bits(arguments["target"], expected)


def test_widened_pages_equal_those_of_the_cpu() -> None:
    """All bytes with all scales that caches have, NaN included."""
    arguments = make_widen(lengths=(256 * 16,), kv_heads=1, head_dim=256, extra=0)
    every = torch.arange(256, dtype=torch.uint8)
    arguments["source"].view(torch.uint8)[:] = every
    scale = arguments["scale"].flatten()
    scale[:] = (torch.arange(len(scale)) % 246 + 10).to(torch.uint8)
    scale[scale > 246] = 255
    on_a_gpu = on_device(arguments, "cuda")
    widen_pages(**arguments)
    widen_pages(**on_a_gpu)
    got = on_a_gpu["target"].cpu()
    assert torch.equal(got.isnan(), arguments["target"].isnan())
    assert same_bits(got.nan_to_num(), arguments["target"].nan_to_num())


def test_pages_out_of_range_are_left_out_and_harm_nothing() -> None:
    for bad in (99_999, -1, 2**31 - 1, -(2**31)):
        for name in ("page_table_BP", "length_B"):
            arguments = on_device(make_widen(lengths=(40, 700, 90)), "cuda")
            expected = expected_pages(arguments)
            pages = arguments["page_table_BP"].shape[1]
            if name == "length_B":
                arguments["length_B"][1] = bad
                expected[pages : 2 * pages] = 7
            else:
                arguments["page_table_BP"][1, 20] = bad
                expected[pages + 20] = 7
            widen_pages(**arguments)
            assert same_bits(arguments["target"], expected)


# --- reorder_pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 16, 17, 32, 33, 64])
def test_reorder_pages(rows: int) -> None:
    """Rows with the kernel equal rows with the CPU's operator, of FP8 caches with their scales."""
    draw = random.Random(rows)
    for page_size, layers in ((16, 1), (64, 3), (64, 32)):
        length = draw.randint(1, 3 * page_size)
        order = tuple(draw.randrange(rows) for _ in range(rows))
        case = ReorderCase(order, (length,) * rows, page_size, kv_heads=2, head_dim=32, seed=rows)
        arguments = make_fp8_pages(case, layers)
        on_a_gpu = on_device(arguments, "cuda")
        reorder_pages(**arguments)
        reorder_pages(**on_a_gpu)
        assert torch.equal(on_a_gpu["page_table"].cpu(), arguments["page_table"])
        assert int(on_a_gpu["ticket"]) == 0
        for got, wanted in zip(on_a_gpu["caches"], arguments["caches"], strict=True):
            assert same_bits(got.cpu(), wanted)
