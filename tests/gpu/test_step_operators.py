"""The operators of a decoding step on the GPU: against float64 PyTorch, overlapping, in CUDA graphs, with bad input."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from infer.step_oracle import (
    FP8,
    NAN_BITS,
    LinearCase,
    assert_linear,
    assert_quantized,
    assert_rows_take_scales,
    before_nan,
    expected_greedy,
    expected_rms_norm,
    expected_swiglu,
    expected_whole_numbers,
    kinds,
    make_linear,
    run_linear,
)
from llama_te_infer.decode.fused import multiply_many
from llama_te_infer.ops.embed import embed
from llama_te_infer.ops.greedy import NO_TOKEN, greedy
from llama_te_infer.ops.linear import LinearWorkspace, Product, linear, linear_chain
from llama_te_infer.ops.quantize_rows import quantize_rows
from llama_te_infer.ops.rms_norm import rms_norm
from llama_te_infer.ops.swiglu import swiglu

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]

MAX_LINEAR_ROWS = 32
MAX_PRODUCTS = 4
# Values around the row counts of a tensor core product, 8 and 16, and the maximum.
ROWS = (1, 2, 7, 8, 9, 16, 17, 31, 32)
# [N, K]: projections of models of 135M, 1B and 8B parameters, and one with tiles and stages that are mostly empty.
SHAPES = (
    (960, 576),
    (576, 576),
    (3072, 576),
    (576, 1536),
    (3072, 2048),
    (2048, 8192),
    (6144, 4096),
    (4096, 14336),
    (28672, 4096),
    (1040, 64),
)
SHAPES_FP8 = tuple((out_features, in_features) for out_features, in_features in SHAPES if in_features % 128 == 0)
SHAPES_AND_FORMATS = [(*shape, False) for shape in SHAPES] + [(*shape, True) for shape in SHAPES_FP8]


@pytest.fixture
def workspace() -> LinearWorkspace:
    return LinearWorkspace(torch.device("cuda"))


def assert_nothing_is_left(workspace: LinearWorkspace) -> None:
    assert int(workspace.semaphores.count_nonzero()) == 0


@pytest.mark.parametrize(("out_features", "in_features", "fp8"), SHAPES_AND_FORMATS)
def test_linear(
    out_features: int, in_features: int, fp8: bool, workspace: LinearWorkspace, measured: Callable[..., None]
) -> None:
    worst = 0.0
    for rows in ROWS:
        for seed, kind in enumerate(kinds(fp8)):
            case = LinearCase(rows, in_features, out_features, seed=seed, **kind)
            worst = max(worst, assert_linear(case, "cuda", workspace))
    assert_nothing_is_left(workspace)
    measured("error, as a part of what roundings allow", worst, 1.0)


@pytest.mark.parametrize(("out_features", "in_features", "fp8"), SHAPES_AND_FORMATS)
def test_linear_rounds_where_single_operations_would(
    out_features: int, in_features: int, fp8: bool, workspace: LinearWorkspace
) -> None:
    """Sums of whole numbers are exact, so the test knows every bit, and a missing or repeated product shows."""
    for rows in ROWS:
        for residual, in_place in ((False, False), (True, False), (True, True)):
            case = LinearCase(rows, in_features, out_features, fp8, False, residual, in_place, whole_numbers=True)
            assert_linear(case, "cuda", workspace)


@pytest.mark.parametrize("fp8", [False, True])
def test_every_number_of_features(fp8: bool, workspace: LinearWorkspace) -> None:
    """Partly filled tiles and stages, and every division of the columns."""
    draw = random.Random(0)
    box = 128 if fp8 else 64
    for out_features in [*range(16, 600, 16), 2096, 2128, 4240, 8464]:
        rows, in_features = draw.randint(1, MAX_LINEAR_ROWS), box * draw.randint(1, 40)
        case = LinearCase(rows, in_features, out_features, fp8, whole_numbers=True, residual=draw.random() < 0.5)
        assert_linear(case, "cuda", workspace)
        assert_linear(LinearCase(rows, in_features, out_features, fp8, norm=True, swiglu=True), "cuda", workspace)
    assert_nothing_is_left(workspace)


@pytest.mark.parametrize("rows", [1, 9, 32])
def test_every_fp8_value(rows: int, workspace: LinearWorkspace) -> None:
    """Rows with a single 1 read out single weights: each but NaN, subnormal ones and both zeros too."""
    bits = torch.tensor([i for i in range(256) if i & NAN_BITS != NAN_BITS] + [0, 0], dtype=torch.uint8, device="cuda")
    weight_NK = bits[:, None].repeat(1, 128)
    weight_NK[-1] = torch.arange(128, device="cuda") - torch.arange(128, device="cuda") // 127  # no NaN
    column_B = torch.randperm(128, device="cuda")[:rows]
    arguments = make_linear(LinearCase(rows, 128, len(bits), fp8=True), "cuda") | {
        "input": before_nan(torch.nn.functional.one_hot(column_B, 128).bfloat16()),
        "weight": before_nan(weight_NK.view(FP8)),
        "scale": torch.tensor([0.5], device="cuda"),
    }
    output = run_linear(arguments, workspace)
    assert torch.equal(output.double(), 0.5 * weight_NK.view(FP8).double()[:, column_B].T)


@pytest.mark.parametrize("fp8", [False, True])
def test_large_and_small_rows(fp8: bool, workspace: LinearWorkspace) -> None:
    """A power of two as a factor of a whole row appears in the result, bit by bit; a norm removes it."""
    arguments = make_linear(LinearCase(9, 1024, 64, fp8, whole_numbers=True), "cuda")
    exact = expected_whole_numbers(arguments)
    norm = {"norm_weight": torch.ones(1024, device="cuda").bfloat16(), "epsilon": 0.0}
    normed = run_linear(arguments | norm, workspace)
    for power in (-40, -3, 3, 40):
        scaled = arguments | {"input": arguments["input"] * 2.0**power}
        assert torch.equal(run_linear(scaled, workspace), exact * 2.0**power)
        assert torch.equal(run_linear(scaled | norm, workspace), normed)


# --- launches that overlap -------------------------------------------------------------------------------------------


def run(products: list[dict[str, Any]], workspace: LinearWorkspace) -> None:
    for product in products:
        linear(workspace=workspace, **product)


def run_chained(products: list[dict[str, Any]], workspace: LinearWorkspace) -> None:
    """Launches of one to four products."""
    left = [Product(**product) for product in products]
    while left:
        size = len(left) % MAX_PRODUCTS + 1
        linear_chain(left[:size], workspace)
        left = left[size:]


def run_one_by_one(products: list[dict[str, Any]], workspace: LinearWorkspace) -> None:
    for product in products:
        linear(workspace=workspace, **product)
        torch.cuda.synchronize()


class Chain:
    """Dependent products of changing sizes. Each reads the previous output.

    Two buffers for each size alternate, so a product soon overwrites the input of an earlier product. Residuals are in
    place.
    """

    def __init__(self, rows: int, fp8: bool, length: int, seed: int) -> None:
        draw = random.Random(seed)
        sizes = [128, 256, 640, 1536, 2048, 4096, 8192] if fp8 else [128, 256, 576, 960, 2048, 3072, 8192]
        self.memories: dict[tuple[int, int], torch.Tensor] = {}
        self.products: list[dict[str, Any]] = []
        in_features = draw.choice(sizes)
        self.first = self.last = self.memory(rows, in_features, 0)
        for step in range(length):
            kind = draw.choice(kinds(fp8))
            features = draw.choice(sizes)
            out_features = 2 * features if kind.get("swiglu") else features
            product = make_linear(LinearCase(1, in_features, out_features, seed=step, **kind), "cuda")
            product["input"] = self.last
            self.last = product["output"] = self.memory(rows, features, (step + 1) % 2)
            if product["residual"] is not None:
                product["residual"] = product["output"]
            if product["norm_weight"] is None:  # so that nothing grows over the chain
                product |= {"norm_weight": torch.ones(in_features, device="cuda").bfloat16(), "epsilon": 1e-5}
            self.products.append(product)
            in_features = features

    def memory(self, rows: int, features: int, which: int) -> torch.Tensor:
        if (features, which) not in self.memories:
            self.memories[features, which] = torch.zeros(rows, features, device="cuda").bfloat16()
        return self.memories[features, which]

    def begin(self, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        for memory in self.memories.values():
            memory.normal_(generator=generator)

    def contents(self) -> list[torch.Tensor]:
        return [memory.clone() for memory in self.memories.values()]


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Return a graph of `run`, after one run that loads the kernels."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def assert_same(contents: list[torch.Tensor], expected: list[torch.Tensor], what: object) -> None:
    for one, other in zip(contents, expected, strict=True):
        assert bool(other.isfinite().all())
        assert torch.equal(one, other), what


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 13, 32])
@pytest.mark.parametrize("launch", [run, run_chained])
def test_a_chain_in_a_graph(
    launch: Callable[[list[dict[str, Any]], LinearWorkspace], None], rows: int, fp8: bool, workspace: LinearWorkspace
) -> None:
    """Forty overlapping products give the same results as products one by one."""
    chain = Chain(rows, fp8, 40, seed=rows)
    graph = captured(lambda: launch(chain.products, workspace))
    for seed in range(50):
        chain.begin(seed)
        run_one_by_one(chain.products, workspace)
        expected = chain.contents()
        chain.begin(seed)
        graph.replay()
        assert_same(chain.contents(), expected, seed)
    assert_nothing_is_left(workspace)


def test_chains_of_different_rows_without_a_graph(workspace: LinearWorkspace) -> None:
    """Products of all kinds follow each other at once with one workspace; the host is ahead of the GPU."""
    chains = [Chain(rows, fp8, 12, seed=rows) for rows in (1, 5, 12, 20, 32) for fp8 in (False, True)]
    for seed in range(5):
        for chain in chains:
            chain.begin(seed)
            run_one_by_one(chain.products, workspace)
        expected = [chain.contents() for chain in chains]
        for chain in chains:
            chain.begin(seed)
        torch.cuda._sleep(40_000_000)
        for chain in chains:
            run(chain.products, workspace)
        for chain, contents in zip(chains, expected, strict=True):
            assert_same(chain.contents(), contents, seed)
    assert_nothing_is_left(workspace)


def test_chains_on_two_streams(workspace: LinearWorkspace) -> None:
    """Launches whose blocks wait for each other end with right results, even from two streams."""
    chains = [Chain(32, False, 12, seed=seed) for seed in (1, 2)]
    workspaces, streams = [workspace, LinearWorkspace(torch.device("cuda"))], [torch.cuda.Stream() for _ in range(2)]
    for chain in chains:
        chain.begin(0)
        run_one_by_one(chain.products, workspace)
    expected = [chain.contents() for chain in chains]
    for _ in range(20):
        for chain in chains:
            chain.begin(0)
        torch.cuda.synchronize()
        first, second = chains
        for index in range(0, len(first.products), MAX_PRODUCTS):
            for chain, own, stream in zip((first, second), workspaces, streams, strict=True):
                with torch.cuda.stream(stream):
                    linear_chain([Product(**product) for product in chain.products[index : index + MAX_PRODUCTS]], own)
        torch.cuda.synchronize()
        for chain, contents in zip(chains, expected, strict=True):
            assert_same(chain.contents(), contents, "two streams")


def large_products() -> list[dict[str, Any]]:
    """Make two products with more tiles than blocks, which run long enough to overlap."""
    product = make_linear(LinearCase(rows=1, in_features=8192, out_features=28672), "cuda")
    return [product | {"output": torch.empty(1, 28672, device="cuda").bfloat16()} for _ in range(2)]


def small_products(count: int) -> list[dict[str, Any]]:
    """Make products of a single tile each."""
    product = make_linear(LinearCase(rows=1, in_features=64, out_features=16), "cuda")
    return [product | {"output": torch.empty(1, 16, device="cuda").bfloat16()} for _ in range(count)]


@pytest.mark.parametrize("between", [0, 1, 62, 63, 64, 127])
def test_small_products_between_large_ones(between: int, workspace: LinearWorkspace) -> None:
    """The small ones leave room on the GPU, so the second large one may begin while the first has much to do."""
    first, second = large_products()
    products = [first, *small_products(between), second]
    run_one_by_one(products, workspace)
    expected = [product["output"].clone() for product in products]
    graph = captured(lambda: run(products, workspace))
    for _ in range(20):
        for product in products:
            product["output"].fill_(torch.nan)
        graph.replay()
        assert_same([product["output"] for product in products], expected, between)
        assert_nothing_is_left(workspace)


@pytest.mark.parametrize("between", [0, 1, 62, 63, 64])
def test_workspaces_of_two_streams(between: int, workspace: LinearWorkspace) -> None:
    """Launches on another stream at the same time, with their own workspace, change nothing."""
    products, small = large_products(), small_products(between)
    others, stream = LinearWorkspace(torch.device("cuda")), torch.cuda.Stream()
    run_one_by_one(products, workspace)
    expected = [product["output"].clone() for product in products]
    for _ in range(5):
        for product in products:
            product["output"].fill_(torch.nan)
        torch.cuda.synchronize()
        torch.cuda._sleep(40_000_000)  # until all has been launched
        run(products[:1], workspace)
        with torch.cuda.stream(stream):
            run(small, others)
        run(products[1:], workspace)
        torch.cuda.synchronize()
        assert_same([product["output"] for product in products], expected, between)
        assert_nothing_is_left(workspace)


@pytest.mark.parametrize("rows", [1, 11, 32])
def test_steps_in_a_graph(rows: int, workspace: LinearWorkspace) -> None:
    """Each step starts from the previous step's tokens: embedding, a chain, the head, the most likely token."""
    vocabulary = 4096
    chain = Chain(rows, False, 10, seed=rows)
    logits = torch.empty(rows, vocabulary, device="cuda").bfloat16()
    head = make_linear(LinearCase(1, chain.last.shape[1], vocabulary, norm=True), "cuda")
    head |= {"input": chain.last, "output": logits}
    table = torch.randn(vocabulary, chain.first.shape[1], device="cuda").bfloat16()
    take = Greedy(rows)

    def step(products: Callable[[list[dict[str, Any]], LinearWorkspace], None] = run) -> None:
        embed(take.tokens, table, chain.first)
        products([*chain.products, head], workspace)
        greedy(logits, take.tokens, take.lengths, take.best, take.tickets)

    def begin() -> None:
        chain.begin(0)
        take.tokens.copy_(torch.arange(rows))
        take.lengths.copy_(torch.arange(rows))  # the first row fills up the batch

    graph = captured(step)
    begin()
    expected = []
    for _ in range(50):
        step(run_one_by_one)
        expected.append((logits.clone(), take.tokens.clone()))
    assert len({tuple(tokens.tolist()) for _, tokens in expected}) > 5, "the tokens hardly change"
    begin()
    for number, wanted in enumerate(expected, start=1):
        graph.replay()
        assert_same([logits], [wanted[0]], number)
        assert torch.equal(take.tokens, wanted[1])
        assert take.lengths.tolist() == [0, *range(number + 1, number + rows)]
    assert_nothing_is_left(workspace)


def test_other_work_between(workspace: LinearWorkspace) -> None:
    """PyTorch's kernels write the input of a product and read its output, on the same stream."""
    product = make_linear(LinearCase(4, 2048, 2048, norm=True), "cuda")
    product["output"] = torch.empty(4, 2048, device="cuda").bfloat16()
    start = product["input"].clone()

    def steps(products: Callable[[list[dict[str, Any]], LinearWorkspace], None] = run) -> None:
        product["input"].copy_(start)
        for _ in range(20):
            products([product], workspace)
            product["input"].copy_(product["output"].roll(1, 1) + start)

    steps(run_one_by_one)
    expected = product["input"].clone()
    for replay in (steps, captured(steps).replay):
        for _ in range(10):
            product["output"].fill_(torch.nan)
            replay()
            assert_same([product["input"]], [expected], replay)


# --- between the products of many rows ------------------------------------------------------------------------------

# Fewer features than one vector for each thread, as many as a block holds (8,192), more, and odd remainders.
FEATURES = (8, 64, 576, 2048, 4096, 8192, 8200, 14336, 28672)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").bfloat16()


def between_nan(rows: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for rows, and the whole buffer, with two rows of NaN before and after the rows."""
    whole = torch.full((rows + 4, features), torch.nan, device="cuda").bfloat16()
    return whole[2:-2], whole


def assert_nothing_about_it_was_written(whole: torch.Tensor) -> None:
    assert bool(whole[:2].isnan().all()) and bool(whole[-2:].isnan().all())


def run_rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, addend: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum and the normalized rows of one call."""
    total, whole_total = between_nan(*hidden.shape)
    output, whole_output = between_nan(*hidden.shape)
    total.copy_(hidden)
    rms_norm(total, weight, epsilon, output, addend=addend)
    assert_nothing_about_it_was_written(whole_total)
    assert_nothing_about_it_was_written(whole_output)
    return total, output


def run_swiglu(input: torch.Tensor) -> torch.Tensor:
    output, whole = between_nan(len(input), input.shape[1] // 2)
    swiglu(input, output)
    assert_nothing_about_it_was_written(whole)
    return output


def assert_within(output: torch.Tensor, expected_and_bound: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the greatest error, relative to the error that is allowed."""
    expected, bound = expected_and_bound
    worst = float(((output.double() - expected).abs() / bound).max())
    assert worst <= 1
    return worst


def assert_neighbours(output: torch.Tensor, on_cpu: torch.Tensor) -> None:
    """Nearly all results equal PyTorch's bit by bit, and the others are the next bfloat16 number."""
    steps = (output.cpu().view(torch.int16).int() - on_cpu.view(torch.int16).int()).abs()
    assert int(steps.max()) <= 1
    assert int(steps.count_nonzero()) <= 1 + steps.numel() // 100


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("adds", [False, True])
def test_rms_norm(features: int, adds: bool, measured: Callable[..., None]) -> None:
    worst = 0.0
    for rows in (1, 33, 256, 300):
        scale_B1 = torch.logspace(-1, 1, rows, 2, device="cuda")[:, None]
        hidden = before_nan((randn(rows, features, seed=1) * scale_B1).bfloat16())
        addend = before_nan(randn(rows, features, seed=2)) if adds else None
        weight = before_nan(randn(1, features, seed=3))[0]
        total, output = run_rms_norm(hidden, weight, 1e-5, addend)
        assert torch.equal(total, hidden if addend is None else hidden + addend)
        worst = max(worst, assert_within(output, expected_rms_norm(total, weight, 1e-5)))
        on_cpu = torch.empty(rows, features).bfloat16()
        rms_norm(hidden.cpu(), weight.cpu(), 1e-5, on_cpu, addend=None if addend is None else addend.cpu())
        assert_neighbours(output, on_cpu)
        again = run_rms_norm(hidden, weight, 1e-5, addend)
        assert torch.equal(again[0], total) and torch.equal(again[1], output)
        alone = run_rms_norm(hidden[-1:], weight, 1e-5, None if addend is None else addend[-1:])
        assert torch.equal(alone[1], output[-1:]), "a row depends on the other ones"
    measured("error, as a part of what roundings allow", worst, 1.0)


@pytest.mark.parametrize("features", FEATURES)
def test_swiglu(features: int, measured: Callable[..., None]) -> None:
    worst = 0.0
    for rows in (1, 33, 256, 300):
        input = before_nan(3 * randn(rows, 2 * features, seed=rows))
        output = run_swiglu(input)
        worst = max(worst, assert_within(output, expected_swiglu(input)))
        on_cpu = torch.empty(rows, features).bfloat16()
        swiglu(input.cpu(), on_cpu)
        assert_neighbours(output, on_cpu)
        assert torch.equal(run_swiglu(input), output)
    measured("error, as a part of what roundings allow", worst, 1.0)


def run_in_fp8(
    features: int, operator: Callable[..., None], input: torch.Tensor, *arguments: Any, **options: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows in FP8 and their scales that an operator writes; nothing about them is written."""
    whole = torch.full((len(input) + 4, features), NAN_BITS, dtype=torch.uint8, device="cuda").view(FP8)
    whole_scale = torch.full((len(input) + 4,), torch.nan, device="cuda")
    operator(input, *arguments, output=whole[2:-2], scale=whole_scale[2:-2], **options)
    for memory in (whole.float(), whole_scale):
        assert bool(memory[:2].isnan().all()) and bool(memory[-2:].isnan().all())
    return whole[2:-2], whole_scale[2:-2]


def assert_same_bits(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(found[0].view(torch.uint8).cpu(), expected[0].view(torch.uint8).cpu())
    assert torch.equal(found[1].cpu(), expected[1].cpu())


@pytest.mark.parametrize("features", [16, 576, 4096, 14336, 16400, 28672])
def test_quantize_rows(features: int) -> None:
    factor = torch.tensor([0.37], device="cuda")
    for rows in (1, 33, 300):
        input = before_nan(
            (randn(rows, features, seed=rows) * torch.logspace(-9, 2, rows, 2, device="cuda")[:, None]).bfloat16()
        )
        found = run_in_fp8(features, quantize_rows, input)
        assert_quantized(input, *found)
        on_cpu = torch.empty(rows, features, dtype=FP8), torch.empty(rows)
        quantize_rows(input.cpu(), *on_cpu)
        assert_same_bits(found, on_cpu)
        scaled = run_in_fp8(features, quantize_rows, input, factor=factor)
        assert_same_bits(scaled, (found[0], found[1] * factor))


def test_rows_without_a_finite_scale() -> None:
    input = torch.zeros(5, 576, device="cuda").bfloat16()
    input[1, 3], input[2, 300], input[2, 4] = torch.nan, torch.inf, 1.0
    input[3, 5], input[4, 575] = 2.0**-120, -3.0
    found = run_in_fp8(576, quantize_rows, input)
    on_cpu = torch.empty(5, 576, dtype=FP8), torch.empty(5)
    quantize_rows(input.cpu(), *on_cpu)
    assert torch.equal(found[1].cpu(), on_cpu[1])
    values, expected = found[0].float().cpu(), on_cpu[0].float()
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("features", [16, 576, 4096, 8208, 14336, 16400])
def test_outputs_in_fp8_are_those_in_bfloat16_behind_quantize_rows(features: int) -> None:
    factor, weight = torch.tensor([0.37], device="cuda"), randn(features, seed=3)
    for rows in (1, 33, 300):
        gate_up, hidden, addend = (
            randn(rows, 2 * features, seed=4),
            randn(rows, features),
            randn(rows, features, seed=1),
        )
        total, also_total, output = hidden.clone(), hidden.clone(), torch.empty_like(hidden)
        rms_norm(total, weight, 1e-5, output, addend=addend)
        normed = run_in_fp8(features, rms_norm, also_total, weight, 1e-5, addend=addend, factor=factor)
        assert torch.equal(also_total, total)
        assert_same_bits(normed, run_in_fp8(features, quantize_rows, output, factor=factor))
        rms_norm(hidden, weight, 1e-5, output)
        normed = run_in_fp8(features, rms_norm, hidden, weight, 1e-5, factor=factor)
        assert_same_bits(normed, run_in_fp8(features, quantize_rows, output, factor=factor))
        swiglu(gate_up, output)
        activated = run_in_fp8(features, swiglu, gate_up, factor=factor)
        assert_same_bits(activated, run_in_fp8(features, quantize_rows, output, factor=factor))


@pytest.mark.parametrize("features", [16, 4096, 8208, 16400])
def test_scales_of_an_addend_and_of_a_gate_and_up(features: int) -> None:
    """With powers of two, the results are those of matrices that were multiplied before, bit by bit."""
    weight = randn(features, seed=3)
    for rows in (1, 33, 300):
        hidden, addend, gate_up = (randn(rows, part * features, seed=part) for part in (1, 1, 2))
        scale = torch.logspace(-9, 9, rows, 2, device="cuda").log2().round().exp2()
        output, expected = assert_rows_take_scales(hidden, addend, gate_up, weight, scale)
        assert torch.equal(output, expected)
        found = run_in_fp8(features, swiglu, gate_up, input_scale=scale)
        assert_same_bits(found, run_in_fp8(features, quantize_rows, expected))


@pytest.mark.parametrize(("out_features", "in_features"), [(4096, 4096), (6144, 4096), (4096, 14336)])
@pytest.mark.parametrize("rows", [17, 33, 256, 1000])
def test_many_rows_with_fp8_weights(rows: int, out_features: int, in_features: int) -> None:
    """Products of rounded rows and weights are exact in float64, and the tensor cores' sums are near.

    Product and addition are each rounded to bfloat16. Sums of FP8 products have fewer bits than float32 on Hopper; TE's
    forward passes use them, too. Measured: 0.0040 for 14,336 features.
    """
    input, scale = randn(rows, in_features), torch.tensor([0.02], device="cuda")
    weight = randn(out_features, in_features, seed=1).to(FP8)
    residual, output = randn(rows, out_features, seed=2), torch.empty(rows, out_features, device="cuda").bfloat16()
    multiply_many([Product(input, weight, output, scale, residual=residual)])
    value, row_scale = run_in_fp8(in_features, quantize_rows, input)
    product = (value.double() * row_scale.double()[:, None]) @ (weight.double() * 0.02).T
    distance_B = (output.double() - residual.double() - product).norm(dim=1) / product.norm(dim=1)
    assert float(distance_B.max()) < (2**-8 if in_features < 8192 else 1.2 * 2**-8)


def test_rms_norm_of_large_and_small_rows() -> None:
    """The norm removes a power of two as a factor of a row, bit by bit; zeros stay zeros."""
    hidden, weight = randn(40, 4096), randn(4096, seed=1)
    normed = run_rms_norm(hidden, weight, 0.0, None)[1]
    for power in (-40, -3, 3, 40):
        assert torch.equal(run_rms_norm(hidden * 2.0**power, weight, 0.0, None)[1], normed)
    zeros = torch.zeros_like(hidden)
    assert int(run_rms_norm(zeros, weight, 1e-5, zeros.clone())[1].count_nonzero()) == 0


def test_a_row_with_nan_or_infinity_is_on_its_own() -> None:
    hidden, weight = randn(40, 576), randn(576, seed=1)
    normed = run_rms_norm(hidden, weight, 1e-5, None)[1]
    hidden[3, 5], hidden[8, 571] = torch.nan, torch.inf
    output = run_rms_norm(hidden, weight, 1e-5, None)[1]
    others = torch.ones(40, dtype=torch.bool, device="cuda")
    others[[3, 8]] = False
    assert torch.equal(output[others], normed[others])
    assert bool(output[3].isnan().all()) and bool(output[8, 571].isnan())


def test_swiglu_of_every_gate() -> None:
    """All numbers of bfloat16: infinities and NaN as in PyTorch, and numbers next to 0 stay next to 0."""
    gate = torch.arange(2**16, device="cuda").short().view(torch.bfloat16).view(32, 2048)
    for up in (1.0, -0.5):
        output = run_swiglu(torch.cat((gate, torch.full_like(gate, up)), dim=1))
        expected = torch.nn.functional.silu(gate.double()) * up
        torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=2**-100, equal_nan=True)


def test_of_no_rows() -> None:
    nothing = torch.empty(0, 64, device="cuda").bfloat16()
    rms_norm(nothing, randn(64), 1e-5, nothing.clone(), addend=nothing.clone())
    swiglu(torch.empty(0, 128, device="cuda").bfloat16(), nothing)


@pytest.mark.parametrize("rows", [8, 32, 256])
def test_layers_in_a_graph(rows: int, workspace: LinearWorkspace) -> None:
    """Overlapping kernels, with PyTorch's and `linear` among them, give the same results as kernels one by one."""
    size, features, vocabulary = 1024, 2048, 4096
    table, tokens = randn(vocabulary, size), torch.randint(0, vocabulary, (rows,), device="cuda")
    hidden, normed, product = (torch.zeros(rows, size, device="cuda").bfloat16() for _ in range(3))
    gate_up = torch.zeros(rows, 2 * features, device="cuda").bfloat16()
    activation = torch.zeros(rows, features, device="cuda").bfloat16()
    norm_weight = randn(size, seed=1)
    fc1, fc2 = randn(2 * features, size, seed=2) * size**-0.5, randn(size, features, seed=3) * features**-0.5

    def multiply(input: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, layer: int) -> None:
        if rows <= MAX_LINEAR_ROWS and layer % 2:
            linear(input, weight, output, workspace)
        else:
            torch.mm(input, weight.T, out=output)

    def step(after: Callable[[], None] = lambda: None) -> None:
        embed(tokens, table, hidden)
        after()
        for layer in range(20):
            rms_norm(hidden, norm_weight, 1e-5, normed, addend=product if layer else None)
            after()
            multiply(normed, fc1, gate_up, layer)
            after()
            swiglu(gate_up, activation)
            after()
            multiply(activation, fc2, product, layer)
            after()

    def contents() -> list[torch.Tensor]:
        return [memory.clone() for memory in (hidden, normed, gate_up, activation, product)]

    graph = captured(step)
    for seed in range(20):
        tokens.copy_(torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed)))
        step(torch.cuda.synchronize)
        expected = contents()
        for replay in (graph.replay, step):
            for memory in (hidden, normed, gate_up, activation, product):
                memory.fill_(torch.nan)
            replay()
            assert_same(contents(), expected, seed)


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [8, 64, 576, 4096, 8200])
def test_embed(size: int, dtype: torch.dtype) -> None:
    """Tokens outside the table give zeros, and the kernel reads and writes nothing out of bounds."""
    table = before_nan(torch.randn(100, size, device="cuda").to(dtype))
    known = [99, 0, 1, 57, 57]
    unknown = [-1, 100, 101, 2**31, 2**40, -(2**40), 2**63 - 1, -(2**63)]
    tokens = torch.tensor([*known, *unknown], device="cuda")
    whole = torch.full((len(tokens) + 2, size), torch.nan, device="cuda", dtype=dtype)
    embed(tokens, table, whole[: len(tokens)])
    assert torch.equal(whole[: len(known)], table[tokens[: len(known)]])
    assert int(whole[len(known) : len(tokens)].count_nonzero()) == 0
    assert bool(whole[len(tokens) :].isnan().all())
    embed(tokens[:0], table, whole[:0])


class Greedy:
    """`greedy` with its workspace. Each call checks the workspace afterwards."""

    def __init__(self, rows: int) -> None:
        self.tokens = torch.full((rows,), 99, device="cuda")
        self.lengths = torch.arange(rows, dtype=torch.int32, device="cuda")
        self.best = torch.zeros(rows, dtype=torch.int64, device="cuda")
        self.tickets = torch.zeros(rows, dtype=torch.int32, device="cuda")

    def __call__(self, logits: torch.Tensor, counted: bool = True) -> torch.Tensor:
        before = self.lengths.clone()
        greedy(logits, self.tokens, self.lengths if counted else None, self.best, self.tickets)
        assert torch.equal(self.lengths, before + (before > 0) if counted else before)
        assert int(self.best.count_nonzero()) == 0 and int(self.tickets.count_nonzero()) == 0
        return self.tokens


@pytest.mark.parametrize("vocabulary", [8, 16, 1024, 32000, 49152, 128256])
def test_greedy(vocabulary: int) -> None:
    """Few values, so that there are many ties, some of them of zeros of both signs; rows with gaps between them."""
    generator = torch.Generator("cuda").manual_seed(vocabulary)
    for rows in (1, 3, 32):
        whole = torch.randint(-3, 4, (rows, vocabulary + 16), generator=generator, device="cuda").bfloat16()
        whole[torch.rand(whole.shape, generator=generator, device="cuda") < 0.3] = -0.0
        whole[:, vocabulary:] = torch.inf
        logits, take = whole[:, :vocabulary], Greedy(rows)
        for _ in range(5):
            expected = expected_greedy(logits)
            assert take(logits).tolist() == expected
            assert take(logits, counted=False).tolist() == expected
            # Next time it is a token with the next lower logit.
            greatest = logits.gather(1, take.tokens.clamp(min=0)[:, None])  # a row without any stays as it is
            logits.masked_fill_(logits == greatest, -torch.inf)


def test_greedy_finds_every_token() -> None:
    vocabulary = 8192
    for fill in (-torch.inf, -1.0):
        logits = torch.full((vocabulary, vocabulary), fill, device="cuda").bfloat16()
        logits.fill_diagonal_(-0.5)
        assert torch.equal(Greedy(vocabulary)(logits), torch.arange(vocabulary, device="cuda"))


def test_greedy_finds_every_nan() -> None:
    """One NaN, of either sign, wherever it is; the same for an infinite logit."""
    vocabulary = 8192
    for bad in (torch.nan, -torch.nan, torch.inf):
        logits = torch.full((vocabulary, vocabulary), 1.0, device="cuda").bfloat16()
        logits.fill_diagonal_(bad)
        assert torch.equal(Greedy(vocabulary)(logits), torch.full((vocabulary,), NO_TOKEN, device="cuda"))


def test_greedy_of_what_has_no_best() -> None:
    nan, inf, most = torch.nan, torch.inf, 3.38e38
    rows = [[nan] * 8, [-inf] * 8, [inf] * 8, [nan, -inf] * 4, [nan, inf] * 4, [nan] * 7 + [-most]]
    rows += [[-0.0, 0.0] * 4, [-inf] * 7 + [-most], [-inf, most] * 4]
    logits = torch.tensor(rows, device="cuda").bfloat16()
    assert logits[-1, 1].isfinite()
    assert Greedy(len(rows))(logits).tolist() == [*[NO_TOKEN] * 6, 0, 7, 1] == expected_greedy(logits.cpu())
    assert Greedy(0)(logits[:0]).tolist() == []


# --- bad input, torch.compile ----------------------------------------------------------------------------------------


def test_bad_linears(workspace: LinearWorkspace) -> None:
    case = LinearCase(rows=3, in_features=64, out_features=32, norm=True, residual=True)
    arguments = make_linear(case, "cuda") | {"output": torch.empty(3, 32, device="cuda").bfloat16()}
    arguments["workspace"] = workspace
    many, wide = torch.zeros(33, 64, device="cuda"), torch.zeros(4, 64, device="cuda")
    uneven = torch.zeros(25 * 64, device="cuda").bfloat16()
    changes: list[tuple[dict[str, Any], str]] = [
        (
            {name: arguments[name].half() for name in ("input", "weight", "norm_weight", "residual", "output")},
            "input is float16: on a GPU it must be bfloat16",
        ),
        (
            {"input": many.bfloat16(), "output": many[:, :32].bfloat16().contiguous(), "residual": None},
            "input has B=33 rows: on a GPU allowed are up to 32. Split them over more calls",
        ),
        (
            {"weight": uneven.view(25, 64)[:24], "output": wide[:3, :24].bfloat16().contiguous(), "residual": None},
            r"weight is bfloat16 \[24, 64\]: on a GPU allowed are .*N a multiple of 16",
        ),
        (
            {"weight": arguments["weight"].to(FP8), "scale": torch.ones(1, device="cuda")},
            r"weight is float8_e4m3fn \[32, 64\]: on a GPU allowed are .*rows of a multiple of 128 bytes",
        ),
        ({"norm_weight": uneven[1:65]}, r"norm_weight starts at an address that is not a multiple of 16 bytes"),
        ({"input": uneven[4:196].view(3, 64)}, r"input starts at an address that is not a multiple of 16 bytes"),
        ({"residual": uneven[2:98].view(3, 32)}, r"residual starts at an address that is not a multiple of 16 bytes"),
        ({"workspace": LinearWorkspace(torch.device("cpu"))}, r"workspace.partials is on cpu: make a LinearWorkspace"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            linear(**(arguments | change))
    for name in ("weight", "norm_weight", "residual", "output"):
        with pytest.raises(ValueError, match=f"{name} is on cpu; it must be on cuda:0, as the other tensors"):
            linear(**(arguments | {name: arguments[name].cpu()}))


def test_bad_embeds_and_greedies() -> None:
    tokens, table = torch.zeros(3, dtype=torch.int64, device="cuda"), torch.zeros(5, 12, device="cuda").bfloat16()
    with pytest.raises(ValueError, match="table has rows of 24 bytes: on a GPU allowed are multiples of 16"):
        embed(tokens, table, table[:3].clone())
    with pytest.raises(ValueError, match="tokens is on cpu; it must be on cuda:0"):
        embed(tokens.cpu(), table, table[:3].clone())
    with pytest.raises(ValueError, match=r"output starts at an address that is not a multiple of 16 bytes"):
        embed(tokens, torch.zeros(5, 8, device="cuda"), torch.zeros(25, device="cuda")[1:].view(3, 8))
    arguments = {"tokens": tokens, "lengths": None, "best": tokens.clone(), "tickets": tokens.int()}
    logits = torch.zeros(3, 32, device="cuda").bfloat16()
    for bad in (logits.float(), logits[:, :12], torch.zeros(3, 36, device="cuda").bfloat16()[:, :32]):
        with pytest.raises(ValueError, match=r"logits is .* V and the rows' stride multiples of 8"):
            greedy(bad, **arguments)
    with pytest.raises(ValueError, match=r"logits starts at an address that is not a multiple of 16 bytes"):
        greedy(logits[:, 4:12], **arguments)
    with pytest.raises(ValueError, match="tickets is on cpu; it must be on cuda:0"):
        greedy(logits, **(arguments | {"tickets": tokens.int().cpu()}))


def test_bad_rms_norms_and_swiglus() -> None:
    matrix, weight, uneven = randn(3, 64), randn(64), randn(25 * 64)
    arguments = {"hidden": matrix, "weight": weight, "epsilon": 1e-5, "addend": randn(3, 64), "output": randn(3, 64)}
    half = {name: value.half() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    narrow = {name: randn(3, 12) for name in ("hidden", "addend", "output")} | {"weight": randn(12)}
    changes: list[tuple[dict[str, Any], str]] = [
        (half, r"hidden is float16 \[3, 64\]: on a GPU allowed are bfloat16 and K a multiple of 8"),
        (narrow, r"hidden is bfloat16 \[3, 12\]: on a GPU allowed are bfloat16 and K a multiple of 8"),
        *(
            ({name: uneven[4:196].view(3, 64)}, rf"{name} starts at an address that is not a multiple of 16 bytes")
            for name in ("hidden", "addend", "output")
        ),
        ({"weight": uneven[1:65]}, r"weight starts at an address that is not a multiple of 16 bytes"),
        *(
            ({name: arguments[name].cpu()}, f"{name} is on cpu; it must be on cuda:0, as the other tensors")
            for name in ("weight", "addend", "output")
        ),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            rms_norm(**(arguments | change))
    with pytest.raises(ValueError, match=r"input is float16 \[3, 64\]: on a GPU allowed are bfloat16 and F a"):
        swiglu(matrix.half(), matrix[:, :32].half())
    with pytest.raises(ValueError, match=r"input is bfloat16 \[3, 24\]: on a GPU allowed are bfloat16 and F a"):
        swiglu(randn(3, 24), randn(3, 12))
    with pytest.raises(ValueError, match=r"input starts at an address that is not a multiple of 16 bytes"):
        swiglu(uneven[4:196].view(3, 64), randn(3, 32))
    with pytest.raises(ValueError, match="output is on cpu; it must be on cuda:0"):
        swiglu(matrix, torch.zeros(3, 32).bfloat16())


def test_compiled_by_torch(workspace: LinearWorkspace) -> None:
    arguments = make_linear(LinearCase(3, 64, 32, norm=True, residual=True), "cuda")
    output = torch.empty(3, 32, device="cuda").bfloat16()

    @torch.compile(fullgraph=True)
    def step(input: torch.Tensor) -> torch.Tensor:
        linear(output=output, workspace=workspace, **(arguments | {"input": input * 2}))
        return output + 0

    doubled = run_linear(arguments | {"input": arguments["input"] * 2})
    assert torch.equal(step(arguments["input"]), doubled)
