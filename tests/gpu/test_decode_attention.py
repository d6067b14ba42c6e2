"""`decode_attention` on the GPU: against `append_rope` and float64 PyTorch, in CUDA graphs, and with bad input."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from infer.decode_attention_oracle import (
    DecodeCase,
    assert_decoded,
    assert_output,
    expected_decode,
    make_decode,
    same_bits,
)
from infer.operator_oracle import on_device
from llama_te_infer.ops.decode_attention import decode_attention, workspace_size
from llama_te_infer.ops.linear import LinearWorkspace, linear

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]

HEAD_DIMS = (64, 80, 96, 128)
DTYPES = (torch.bfloat16, torch.float16)
# Lengths around the borders of tiles, of pages, of the tiles of a warp and of a block, and of two splits.
LENGTHS = (0, 1, 14, 15, 16, 17, 31, 63, 64, 65, 127, 128, 200, 254, 255, 256, 257, 511, 512, 700)


def ragged(rows: int, most: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.choice(LENGTHS) if draw.random() < 0.5 else draw.randint(0, most) for _ in range(rows))


def on_gpu(case: DecodeCase) -> dict[str, Any]:
    return on_device(make_decode(case), "cuda")


def assert_semaphores_are_zero(arguments: dict[str, Any]) -> None:
    semaphores = workspace_size(0, 1, 1, 64, 1)
    assert int(arguments["workspace"][:semaphores].count_nonzero()) == 0


@pytest.mark.parametrize("page_size", [0, 16, 64, 256])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(dtype: torch.dtype, head_dim: int, page_size: int) -> None:
    """Each length alone, and all lengths in one batch, twice with the same workspace."""
    shared: dict[str, Any] = {"page_size": page_size, "head_dim": head_dim, "dtype": dtype, "group": 4}
    for length in LENGTHS:
        assert_decoded(on_gpu(DecodeCase(before=(length,), **shared)))
    arguments = on_gpu(DecodeCase(before=LENGTHS, **shared))
    assert_decoded(arguments)
    assert_semaphores_are_zero(arguments)
    assert_decoded(arguments)


@pytest.mark.parametrize("group", range(1, 17))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(dtype: torch.dtype, group: int) -> None:
    for head_dim in HEAD_DIMS:
        case = DecodeCase(before=(0, 90, 255, 600), group=group, head_dim=head_dim, dtype=dtype, page_size=16)
        assert_decoded(on_gpu(case))


@pytest.mark.parametrize("seed", range(40))
def test_mixed_batches(seed: int) -> None:
    draw = random.Random(seed)
    rows = draw.choice([1, 3, 32, 200])
    case = DecodeCase(
        before=ragged(rows, 3000 if rows < 32 else 600, seed),
        page_size=draw.choice([0, 16, 48, 64, 256]),
        kv_heads=draw.choice([1, 2, 8]),
        group=draw.choice([1, 2, 4, 8, 12]),
        head_dim=draw.choice(HEAD_DIMS),
        dtype=draw.choice(DTYPES),
        room=draw.randint(0, 300),
        gap=draw.randint(0, 3),
        extra_rows=draw.randint(0, 2),
        seed=seed,
    )
    arguments = on_gpu(case)
    assert_decoded(arguments)
    assert_semaphores_are_zero(arguments)


@pytest.mark.parametrize("before", [(8191,), (4095, 5), (4096, 4094), (33_000, 8193, 1), (131_071,)], ids=str)
@pytest.mark.parametrize("page_size", [0, 64])
def test_long_rows(page_size: int, before: tuple[int, ...]) -> None:
    """The largest number of splits, and more tiles per warp than one page lookup covers."""
    arguments = on_gpu(
        DecodeCase(before=before, page_size=page_size, group=4, head_dim=128, dtype=torch.bfloat16, kv_heads=1)
    )
    assert_decoded(arguments)
    assert_semaphores_are_zero(arguments)


def test_more_rows_than_threads_and_all_of_them() -> None:
    for rows in (127, 128, 129, 255, 256):
        case = DecodeCase(before=ragged(rows, 300, rows), kv_heads=1, dtype=torch.bfloat16, page_size=64)
        assert_decoded(on_gpu(case))


@pytest.mark.parametrize("length", [100, 255, 3000])
def test_a_score_that_outweighs_all_others_is_found_at_every_place(length: int) -> None:
    """One key equals the query and the scale is large, so the output is this key's value: a wrong place would show."""
    arguments = on_gpu(DecodeCase(before=(length,), kv_heads=1, group=1, head_dim=64, dtype=torch.float16))
    arguments["cos_sin"][:, :32], arguments["cos_sin"][:, 32:] = 1, 0
    arguments["scale"] = 10.0
    query = arguments["qkv"][0, 0, 0].clone()
    arguments["qkv"][0, 0, 1] = 0
    for place in [*range(0, length, 1 if length < 1000 else 37), length - 1]:
        arguments["key_cache"][0, :length, 0] = 0
        arguments["key_cache"][0, place, 0] = query
        decode_attention(**arguments)
        assert torch.equal(arguments["output"][0, 0], arguments["value_cache"][0, place, 0]), place


def test_large_scores() -> None:
    """A softmax must subtract the greatest score, or it overflows; the greatest comes first, last or in between."""
    for factor in (30.0, -30.0):
        for seed in range(5):
            arguments = on_gpu(DecodeCase(before=(300, 40, 900), group=4, dtype=torch.bfloat16, seed=seed))
            arguments["scale"] *= factor
            assert_decoded(arguments)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """The bits are equal alone, with other rows, and in a repetition."""
    before = ragged(32, 2500, 1)
    for head_dim, dtype in ((64, torch.float16), (128, torch.bfloat16)):
        case = DecodeCase(before=before, kv_heads=8, group=4, head_dim=head_dim, dtype=dtype, page_size=64)
        arguments = on_gpu(case)
        decode_attention(**arguments)
        together = arguments["output"].clone()
        for _ in range(20):
            arguments["output"].fill_(torch.nan)
            decode_attention(**arguments)
            assert same_bits(arguments["output"], together)
        for row in range(0, 32, 3):
            alone = {name: arguments[name][row : row + 1] for name in ("qkv", "start", "page_table", "output")}
            arguments["output"].fill_(torch.nan)
            decode_attention(**(arguments | alone))
            assert same_bits(arguments["output"][row], together[row])


def test_one_workspace_serves_calls_of_different_shapes() -> None:
    cases = [
        DecodeCase(before=(5000,), kv_heads=1, group=16, head_dim=128, dtype=torch.bfloat16),
        DecodeCase(before=ragged(60, 600, 0), kv_heads=8, group=4, head_dim=64, dtype=torch.bfloat16),
        DecodeCase(before=ragged(3, 2000, 1), kv_heads=5, group=3, head_dim=96, dtype=torch.float16, page_size=16),
    ]
    all_arguments = [on_gpu(case) for case in cases]
    workspace = max((arguments["workspace"] for arguments in all_arguments), key=len)
    for _ in range(3):
        for arguments in all_arguments:
            assert_decoded(arguments | {"workspace": workspace})


def test_keys_and_values_may_lie_in_one_tensor() -> None:
    arguments = on_gpu(DecodeCase(before=(30, 300), kv_heads=2, dtype=torch.bfloat16))
    key, value = arguments["key_cache"], arguments["value_cache"]
    for both in (torch.stack((key, value), 1).unbind(1), torch.cat((key, value), -1).split(64, dim=-1)):
        assert_decoded(arguments | {"key_cache": both[0], "value_cache": both[1]})


def test_rows_may_share_pages() -> None:
    """Two rows have their first pages in common."""
    arguments = on_gpu(DecodeCase(before=(300, 270), page_size=16, dtype=torch.bfloat16, group=4))
    arguments["page_table"][1, :16] = arguments["page_table"][0, :16]
    assert_decoded(arguments)


@pytest.mark.parametrize("page_size", [0, 16])
def test_in_a_graph(page_size: int) -> None:
    """Replay with other tokens, lengths and pages. Three layers make one launch follow another."""
    shared: dict[str, Any] = {"page_size": page_size, "kv_heads": 8, "group": 4, "dtype": torch.bfloat16}
    longest = 1200
    layers = [on_gpu(DecodeCase(before=(longest, longest, longest), seed=seed, **shared)) for seed in range(3)]
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
            fresh = on_gpu(DecodeCase(before=(longest, longest, longest), seed=seed + 10 * i, **shared))
            for name in ("qkv", "key_cache", "value_cache"):
                layer[name].copy_(fresh[name].nan_to_num())  # pages move, with their unwritten places
            layer["output"].fill_(torch.nan)
        layers[0]["start"].copy_(torch.tensor(before))
        if page_size:
            layers[0]["page_table"].copy_(layers[0]["page_table"].flip(0).roll(seed, 1))
        expected = [expected_decode(layer) for layer in layers]
        torch.cuda.synchronize()
        graph.replay()
        for layer, wanted in zip(layers, expected, strict=True):
            assert same_bits(layer["key_cache"], wanted["key_cache"])
            assert same_bits(layer["value_cache"], wanted["value_cache"])
            assert_output(layer["output"], wanted["output"])
        assert_semaphores_are_zero(layers[0])


def test_it_waits_for_the_projection_ahead() -> None:
    """The kernel starts before the `linear` that writes its qkv ends, and must not read qkv too early."""
    arguments = on_gpu(DecodeCase(before=(200, 700), kv_heads=8, group=4, head_dim=128, dtype=torch.bfloat16))
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


@pytest.mark.parametrize("name", ["start", "page_table", "cos_sin"])
def test_rows_out_of_range_are_left_out_and_harm_nothing(name: str) -> None:
    """Without the debug mode there is no error, the other rows are right, and the kernel writes nothing else."""
    lengths = (20, 700, 300)
    for bad in (99_999, -1, 2**31 - 1, -(2**31)):
        arguments = on_gpu(DecodeCase(before=lengths, page_size=16, kv_heads=2, group=4, dtype=torch.bfloat16))
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
            expected["key_cache"][page, place] = torch.nan
            expected["value_cache"][page, place] = torch.nan
        for cache in ("key_cache", "value_cache"):
            assert same_bits(arguments[cache], expected[cache])


def test_bad_input() -> None:
    arguments = on_gpu(DecodeCase(before=(20, 30), page_size=16, dtype=torch.bfloat16))
    qkv, key = arguments["qkv"], arguments["key_cache"]
    wide = torch.zeros(2, 2, 19, 64, dtype=torch.bfloat16, device="cuda")
    many = torch.zeros(257, 2, 4, 64, dtype=torch.bfloat16, device="cuda")
    changes: list[tuple[dict[str, Any], str]] = [
        (on_gpu(DecodeCase(before=(20, 30))), "qkv is float32 with G=2 and D=64: on a GPU allowed are bfloat16 and"),
        (on_gpu(DecodeCase(before=(20,), page_size=24, dtype=torch.float16)), "and pages of 24: on a GPU allowed"),
        (on_gpu(DecodeCase(before=(20,), head_dim=112, dtype=torch.float16)), "D=112.*D of 64, 80, 96, 128"),
        ({"qkv": wide, "output": torch.empty(2, 34, 64, device="cuda").bfloat16()}, "G=17 .* G up to 16"),
        (
            {
                "qkv": many,
                "output": torch.empty(257, 4, 64, device="cuda").bfloat16(),
                "start": torch.zeros(257, dtype=torch.int32, device="cuda"),
                "page_table": torch.zeros(257, 3, dtype=torch.int32, device="cuda"),
            },
            "qkv has B=257: on a GPU allowed are up to 256",
        ),
        ({"workspace": arguments["workspace"].long()}, "workspace is int64; it must be int32"),
        ({"workspace": arguments["workspace"][:-1]}, r"workspace has \d+ numbers, but \d+ are needed: make one of"),
        (
            {"workspace": torch.cat([arguments["workspace"]] * 2)[1:]},
            "workspace starts at an address that is not a multiple of 16",
        ),
        ({"value_cache": key}, "key_cache and value_cache share memory"),
        ({"output": qkv.flatten()[:512].view(2, 4, 64)}, "qkv and output share memory"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            decode_attention(**(arguments | change))
    for name in ("cos_sin", "start", "page_table", "key_cache", "value_cache", "output", "workspace"):
        with pytest.raises(ValueError, match=f"{name} is on cpu; it must be on cuda:0, as the other tensors"):
            decode_attention(**(arguments | {name: arguments[name].cpu()}))


def test_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_TE_CHECK", "1")
    arguments = on_gpu(DecodeCase(before=(20, 30), page_size=16, dtype=torch.bfloat16))
    assert_decoded(arguments)
    arguments["start"][1] = 900
    with pytest.raises(ValueError, match=r"start\[1\]=900 and 1 new tokens make row 1 901 tokens"):
        decode_attention(**arguments)
    arguments["start"][1] = 30
    arguments["page_table"][0, 1] = 77
    with pytest.raises(ValueError, match=r"page_table\[0, 1\]=77, but the cache has pages"):
        decode_attention(**arguments)


def test_compiled_by_torch() -> None:
    @torch.compile(fullgraph=True)
    def step(arguments: dict[str, Any]) -> torch.Tensor:
        decode_attention(**(arguments | {"qkv": arguments["qkv"] * 2}))
        return arguments["output"] + 0

    case = DecodeCase(before=(20, 300), dtype=torch.bfloat16, page_size=16)
    arguments, doubled = on_gpu(case), on_gpu(case)
    doubled["qkv"] = doubled["qkv"] * 2
    decode_attention(**doubled)
    assert same_bits(step(arguments), doubled["output"])
    assert same_bits(arguments["key_cache"], doubled["key_cache"])
