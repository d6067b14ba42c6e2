"""The compiled operators on the GPU: against float64 PyTorch, against the CPU, in CUDA graphs, and with bad input."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from infer.operator_oracle import (
    CUDA_STEPS,
    DTYPES,
    HEAD_DIMS,
    AppendCase,
    ReorderCase,
    assert_appended,
    assert_pages_reordered,
    assert_rows_reordered,
    expected_append,
    make_append,
    make_pages,
    make_rows,
    most,
    on_device,
    steps,
)
from llama_te_infer import _extension
from llama_te_infer.ops.append_rope import append_rope
from llama_te_infer.ops.reorder import reorder_pages, reorder_rows

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]


def random_append(seed: int) -> AppendCase:
    draw = random.Random(seed)
    rows = draw.choice([1, 2, 5, 31, 32, 33, 70])
    most_new = draw.choice([1, 1, 4, 9] if rows > 5 else [1, 9, 60])
    return AppendCase(
        new=tuple(draw.randint(0, most_new) for _ in range(rows)),
        before=tuple(draw.randint(0, 90) for _ in range(rows)),
        padded=draw.random() < 0.5,
        extra=draw.randint(0, 3),
        page_size=draw.choice([0, 0, 16, 17, 64, 256]),
        kv_heads=draw.randint(1, 8),
        group=draw.randint(1, 8),
        head_dim=draw.choice([16, 112, *HEAD_DIMS]),
        dtype=draw.choice(DTYPES),
        gap=draw.randint(0, 3),
        extra_rows=draw.randint(0, 2),
        seed=seed,
    )


def random_reorder(seed: int, rows: int) -> ReorderCase:
    draw = random.Random(seed)
    page_size = draw.choice([16, 17, 64, 256])
    length = draw.randint(1, 3 * page_size)
    ragged = draw.random() < 0.5
    rest = draw.sample(range(rows), rows)
    kinds = [rest, [draw.randrange(rows) for _ in range(rows)], list(range(rows)), [0] * rows]
    return ReorderCase(
        source_rows=tuple(kinds[seed % 4]),
        lengths=tuple(draw.randint(0, 3 * page_size) if ragged else length for _ in range(rows)),
        page_size=page_size,
        caches=draw.choice([1, 3, 16]),
        kv_heads=draw.randint(1, 4),
        head_dim=draw.choice([16, 80, 128]),
        dtype=draw.choice(DTYPES),
        wide=draw.random() < 0.5,
        extra_rows=draw.randint(0, 2),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(80))
def test_append(seed: int) -> None:
    case = random_append(seed)
    arguments = on_device(make_append(case), "cuda")
    assert_appended(case, arguments, CUDA_STEPS[case.dtype])


@pytest.mark.parametrize("page_size", [0, 64])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_of_a_prompt(dtype: torch.dtype, head_dim: int, page_size: int) -> None:
    """Enough tokens for the kernel with several heads per thread, also if a block does not have all heads."""
    for kv_heads, group, padded in ((8, 4, False), (3, 1, True), (40, 3, False)):
        case = AppendCase(
            new=(700, 0, 251, 1),
            before=(3, 5, 0, 900),
            padded=padded,
            extra=5,
            page_size=page_size,
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            dtype=dtype,
            gap=1,
        )
        assert_append_like_cpu(case)


def test_append_to_more_rows_than_one_round_of_the_search_takes() -> None:
    draw = random.Random(0)
    for rows in (1024, 1025, 3000):
        case = AppendCase(
            new=tuple(draw.choice([0, 1, 1, 2]) for _ in range(rows)),
            before=tuple(draw.randint(0, 9) for _ in range(rows)),
            extra=7,
            kv_heads=1,
            group=1,
        )
        assert_append_like_cpu(case)


def assert_append_like_cpu(case: AppendCase) -> None:
    on_cpu = make_append(case)
    on_gpu = on_device(on_cpu, "cuda")
    append_rope(**on_cpu)
    append_rope(**on_gpu)
    assert most(steps(on_gpu["query"].cpu(), on_cpu["query"])) <= CUDA_STEPS[case.dtype]
    assert most(steps(on_gpu["key_cache"].cpu(), on_cpu["key_cache"])) <= CUDA_STEPS[case.dtype]
    assert torch.equal(on_gpu["value_cache"].cpu(), on_cpu["value_cache"])


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 13, 16, 17, 32, 33, 64])
def test_reorder_rows(rows: int, seed: int) -> None:
    case = random_reorder(seed, rows)
    assert_rows_reordered(case, on_device(make_rows(case), "cuda"))


@pytest.mark.parametrize("length", [40, 43, 46, 64, 85, 300])
def test_reorder_rows_of_a_whole_model(length: int) -> None:
    """Three prompts of four beams in 60 caches: more pieces than blocks at once, and rows of different lengths."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        beams = torch.randint(0, 4, (3, 4), generator=generator) + 4 * torch.arange(3)[:, None]
        lengths = [length - 1] * 4 + [length - 2] * 4 + [length] * 4
        case = ReorderCase(
            source_rows=tuple(beams.flatten().tolist()),
            lengths=tuple(lengths),
            caches=60,
            kv_heads=3,
            head_dim=64,
            dtype=torch.bfloat16,
            seed=seed,
        )
        assert_rows_reordered(case, on_device(make_rows(case), "cuda"))


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 13, 16, 17, 32, 33, 64])
def test_reorder_pages(rows: int, seed: int) -> None:
    case = random_reorder(seed, rows)
    assert_pages_reordered(case, on_device(make_pages(case), "cuda"))


def test_reorder_pages_with_long_tables_and_many_caches() -> None:
    """The table takes several rounds, all blocks count at the semaphore, and the semaphore serves the next call."""
    for seed in range(3):
        case = ReorderCase(
            source_rows=(1, 2, 3, 3, 0, 4),
            lengths=(70_000, 69_999, 50_001, 70_000, 69_990, 50_000),
            caches=2,
            kv_heads=1,
            seed=seed,
        )
        arguments = on_device(make_pages(case), "cuda")
        assert_pages_reordered(case, arguments)
        assert_pages_reordered(case, arguments)
    case = ReorderCase(source_rows=(1, 0, 0, 2), lengths=(300,) * 4, page_size=256, caches=64, kv_heads=8, head_dim=64)
    assert_pages_reordered(case, on_device(make_pages(case), "cuda"))


def captured(run: Any) -> torch.cuda.CUDAGraph:
    """Return a graph of `run`, after one run that loads the kernels."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("page_size", [0, 16])
def test_append_in_a_graph(page_size: int, padded: bool) -> None:
    """Replay with other tokens, lengths and pages. Two layers make one launch follow another."""
    shared: dict[str, Any] = {"padded": padded, "page_size": page_size, "kv_heads": 8, "dtype": torch.bfloat16}
    first = AppendCase(new=(2, 0, 3), before=(30, 40, 0), extra=0 if padded else 1, **shared)
    arguments = on_device(make_append(first), "cuda")
    second_layer = {name: arguments[name].clone() for name in ("query", "key_cache", "value_cache")}

    def run() -> None:
        append_rope(**arguments)
        append_rope(**(arguments | second_layer))

    graph = captured(run)
    for seed, (new, before) in enumerate([((1, 2, 3), (5, 17, 31)), ((3, 3, 0), (16, 0, 40)), ((0, 0, 0), (1, 1, 1))]):
        case = AppendCase(
            new=new, before=before, extra=3 - max(*new, 1) if padded else 6 - sum(new), seed=seed + 1, **shared
        )
        fresh = make_append(case)
        cos_sin = arguments["cos_sin"].cpu()
        fresh = {**fresh, "cos_sin": cos_sin}
        for name in ("key_cache", "value_cache"):
            fresh[name] = arguments[name].cpu()
        if page_size:
            table = arguments["page_table"]
            fresh["page_table"] = table.cpu().flip(0).roll(seed, 1)
            table.copy_(fresh["page_table"])
        for name in ("qkv", "cu_new", "start"):
            arguments[name].copy_(fresh[name])
        for tensors in (arguments, second_layer):
            for name in ("key_cache", "value_cache"):
                tensors[name].copy_(fresh[name])
            tensors["query"].fill_(torch.nan)
        expected = expected_append(case, fresh)
        graph.replay()
        for tensors in (arguments, second_layer):
            for name in ("query", "key_cache", "value_cache"):
                assert most(steps(tensors[name].cpu(), expected[name].to(case.dtype))) <= CUDA_STEPS[case.dtype]


def test_reorders_in_a_graph() -> None:
    """Replay with other rows, lengths and pages."""
    first = ReorderCase(source_rows=(0, 0, 1, 2), lengths=(70, 70, 70, 70), wide=True)
    rows, pages = (on_device(make(first), "cuda") for make in (make_rows, make_pages))
    rows_graph = captured(lambda: reorder_rows(**rows))
    pages_graph = captured(lambda: reorder_pages(**pages))
    for source_rows, lengths in [
        ((3, 2, 1, 0), (1, 2, 3, 70)),
        ((0, 1, 2, 3), (9,) * 4),
        ((1, 1, 3, 1), (33, 0, 48, 47)),
    ]:
        for arguments, graph, function in (
            (rows, rows_graph, reorder_rows),
            (pages, pages_graph, reorder_pages),
        ):
            arguments["source_rows"].copy_(torch.tensor(source_rows))
            arguments["lengths"].copy_(torch.tensor(lengths))
            if "page_table" in arguments:  # each row has its own pages again
                table = arguments["page_table"]
                table.copy_(torch.randperm(table.numel(), device="cuda").view(table.shape))
            expected = on_device(arguments, "cpu")
            function(**expected)
            graph.replay()
            for got, wanted in zip(arguments["caches"], expected["caches"], strict=True):
                assert torch.equal(got.cpu(), wanted)
            if "page_table" in arguments:
                assert torch.equal(arguments["page_table"].cpu(), expected["page_table"])
                assert int(arguments["ticket"]) == 0


@pytest.mark.parametrize("tokens", [2, 900])
def test_tokens_out_of_range_are_left_out_and_harm_nothing(tokens: int) -> None:
    """Without the debug mode there is no error, but the kernel writes nothing outside the cache."""
    case = AppendCase(new=(tokens, tokens), before=(0, 0), page_size=16, kv_heads=8, group=4)
    for name, bad in (("start", 5000), ("start", -5000), ("page_table", 99_999), ("page_table", -1)):
        arguments = on_device(make_append(case), "cuda")
        arguments[name][1] = bad
        before = arguments["key_cache"].clone()
        append_rope(**arguments)
        assert int(arguments["query"][tokens:].count_nonzero()) == 0
        pages = arguments["page_table"][0].long()
        before[pages] = arguments["key_cache"][pages]
        assert torch.equal(before, arguments["key_cache"])


def test_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_TE_CHECK", "1")
    case = AppendCase(new=(2, 1), before=(0, 0), page_size=16)
    for change, message in (
        ({"start": torch.tensor([0, 50], dtype=torch.int32)}, r"start\[1\]=50 and 1 new tokens make row 1 51 tokens"),
        ({"page_table": torch.tensor([[0], [7]], dtype=torch.int32)}, r"page_table\[1, 0\]=7, but the cache has pages"),
    ):
        with pytest.raises(ValueError, match=message):
            append_rope(**on_device(make_append(case) | change, "cuda"))
    reorder = ReorderCase(source_rows=(1, 2), lengths=(17, 17))
    for make, function in ((make_rows, reorder_rows), (make_pages, reorder_pages)):
        with pytest.raises(ValueError, match=r"source_rows\[1\]=2, but there are rows 0 to 1"):
            function(**on_device(make(reorder), "cuda"))
    arguments = on_device(make_append(case), "cuda")
    assert_appended(case, arguments, 2)
    with pytest.warns(UserWarning, match="values are not checked while a CUDA graph is captured"):
        captured(lambda: append_rope(**arguments))


def freed(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


BAD_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "None": lambda tensor: None,
    "an address": lambda tensor: tensor.data_ptr(),
    "on the CPU": lambda tensor: tensor.cpu(),
    "without data": lambda tensor: tensor.to("meta"),
    "freed": freed,
    "sparse": lambda tensor: tensor.to_sparse(),
    "of another dtype": lambda tensor: tensor.to(torch.uint8),
    "of no rows": lambda tensor: tensor[:0],
    "of too many dimensions": lambda tensor: tensor[(None,) * 9],
    "of a subclass": lambda tensor: tensor.as_subclass(type("Subclass", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_no_tensor_crashes(kind: str) -> None:
    """Every tensor of every operator becomes one that it cannot be. The GPU still works after the errors."""
    calls = (
        (_extension.append_rope_cuda, append_rope, make_append(AppendCase(new=(2, 1), before=(3, 0), page_size=16))),
        (_extension.reorder_rows_cuda, reorder_rows, make_rows(ReorderCase(source_rows=(1, 0), lengths=(7, 9)))),
        (_extension.reorder_pages_cuda, reorder_pages, make_pages(ReorderCase(source_rows=(1, 0), lengths=(7, 9)))),
    )
    for kernel, operator, on_cpu in calls:
        for name, value in on_cpu.items():
            # Without a table the cache is contiguous. Without positions the kernel skips all tokens.
            is_good = (name, kind) in (("page_table", "None"), ("cos_sin", "of no rows")) and operator is append_rope
            if isinstance(value, int) or is_good:
                continue
            arguments = on_device(on_cpu, "cuda")
            bad = BAD_TENSORS[kind](arguments[name][0] if name == "caches" else arguments[name])
            arguments[name] = [*arguments["caches"][1:], bad] if name == "caches" else bad
            with pytest.raises((TypeError, ValueError), match="|".join(on_cpu)):
                kernel(**arguments)
            # torch itself refuses some tensors, and names the operator then.
            named = "|".join((*on_cpu, "llama_te::", "tensors are on"))
            with pytest.raises((TypeError, ValueError, RuntimeError), match=named):
                operator(**arguments)
    torch.cuda.synchronize()
    case = AppendCase(new=(2, 1), before=(3, 0), page_size=16)
    assert_appended(case, on_device(make_append(case), "cuda"), CUDA_STEPS[case.dtype])


def test_a_stream_and_no_address_reach_the_kernel() -> None:
    """The extension takes the stream from torch: a launch on another stream waits for that one alone."""
    case = AppendCase(new=(2, 1), before=(3, 0), page_size=16)
    arguments = on_device(make_append(case), "cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        _extension.append_rope_cuda(**arguments)
        torch.cuda.current_stream().synchronize()
        assert most(steps(arguments["query"].cpu(), expected_append(case, make_append(case))["query"].float())) <= 2


def test_devices_do_not_mix() -> None:
    for name in ("cos_sin", "cu_new", "start", "page_table", "query", "key_cache", "value_cache"):
        on_cpu = make_append(AppendCase(new=(2,), before=(0,), page_size=16))
        with pytest.raises(ValueError, match=f"{name} is on cpu; it must be on cuda:0, as the other tensors"):
            append_rope(**(on_device(on_cpu, "cuda") | {name: on_cpu[name]}))
    on_cpu = make_rows(ReorderCase(source_rows=(1, 0), lengths=(3, 3)))
    for name in ("source_rows", "lengths"):
        with pytest.raises(ValueError, match=f"{name} is on cpu; it must be on cuda:0, as the other tensors"):
            reorder_rows(**(on_device(on_cpu, "cuda") | {name: on_cpu[name]}))


def test_other_streams_are_followed() -> None:
    """The kernel runs after the earlier work on the current stream."""
    case = AppendCase(new=(1, 1), before=(4, 9), dtype=torch.bfloat16)
    arguments = on_device(make_append(case), "cuda")
    qkv = arguments["qkv"].clone()
    arguments["qkv"].fill_(torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        arguments["qkv"].copy_(qkv)
        append_rope(**arguments)
    torch.cuda.synchronize()
    assert not bool(arguments["query"].isnan().any())


def test_compiled_by_torch() -> None:
    case = AppendCase(new=(2, 1), before=(3, 0), dtype=torch.bfloat16)

    @torch.compile(fullgraph=True)
    def step(arguments: dict[str, Any]) -> torch.Tensor:
        append_rope(**(arguments | {"qkv": arguments["qkv"] * 2}))
        return arguments["query"] + 0

    arguments = on_device(make_append(case), "cuda")
    doubled = on_device(make_append(case), "cuda")
    doubled["qkv"] = doubled["qkv"] * 2
    append_rope(**doubled)
    assert torch.equal(step(arguments), doubled["query"])
    assert torch.equal(arguments["key_cache"], doubled["key_cache"])
    caches = on_device(make_rows(ReorderCase(source_rows=(1, 0), lengths=(3, 3))), "cuda")
    swapped = on_device(caches, "cuda")
    reorder_rows(**swapped)
    torch.compile(reorder_rows, fullgraph=True)(**caches)
    for got, wanted in zip(caches["caches"], swapped["caches"], strict=True):
        assert torch.equal(got, wanted)
