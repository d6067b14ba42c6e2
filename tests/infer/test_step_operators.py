"""The operators of a decoding step on the CPU: against float64 PyTorch, with bad input, and as torch sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.step_oracle import (
    FP8,
    NAN_BITS,
    LinearCase,
    assert_linear,
    assert_quantized,
    assert_rows_take_scales,
    expected_greedy,
    expected_rms_norm,
    expected_swiglu,
    kinds,
    make_linear,
    run_linear,
)
from llama_te_infer.ops.embed import embed
from llama_te_infer.ops.greedy import greedy
from llama_te_infer.ops.linear import LinearWorkspace, Product, linear, linear_chain, takes_linear
from llama_te_infer.ops.quantize_rows import quantize_rows
from llama_te_infer.ops.rms_norm import rms_norm
from llama_te_infer.ops.swiglu import swiglu

pytest.importorskip("llama_te_infer._extension", reason="the package is used from its source folder")

CPU = torch.device("cpu")
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@st.composite
def linear_cases(draw: st.DrawFn) -> LinearCase:
    dtype = draw(st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]))
    return LinearCase(
        rows=draw(st.integers(1, 40)),
        in_features=64 * draw(st.integers(1, 9)),
        out_features=2 * draw(st.integers(1, 40)),
        dtype=dtype,
        seed=draw(st.integers(0, 2**31)),
        **draw(st.sampled_from([*kinds(fp8=False), *kinds(fp8=True)])),
    )


@settings(deadline=None, max_examples=200)
@given(case=linear_cases())
def test_linear(case: LinearCase) -> None:
    assert_linear(case)


@settings(deadline=None, max_examples=50)
@given(case=linear_cases(), residual=st.booleans(), in_place=st.booleans())
def test_linear_rounds_where_single_operations_would(case: LinearCase, residual: bool, in_place: bool) -> None:
    """Sums of whole numbers are exact, so every bit is known."""
    shape = {name: getattr(case, name) for name in ("rows", "in_features", "out_features", "fp8", "seed")}
    assert_linear(LinearCase(**shape, residual=residual, in_place=residual and in_place, whole_numbers=True))


def test_every_fp8_value() -> None:
    """Rows with a single 1 read out single weights: each but NaN, subnormal ones and both zeros too."""
    bits = torch.tensor([i for i in range(256) if i & NAN_BITS != NAN_BITS], dtype=torch.uint8)
    weight_NK = bits[:, None].repeat(1, 128).view(FP8)
    arguments = make_linear(LinearCase(rows=3, in_features=128, out_features=len(bits), fp8=True))
    one_hot = torch.nn.functional.one_hot(torch.tensor([0, 77, 127]), 128).bfloat16()
    output = run_linear(arguments | {"input": one_hot, "weight": weight_NK, "scale": torch.tensor([0.5])})
    assert torch.equal(output.double(), 0.5 * weight_NK[:, :3].double().T)


def test_a_chain_is_its_products_one_after_the_other() -> None:
    """Each product reads the previous output, and the last product adds to the first output."""
    torch.manual_seed(0)
    first, second = (make_linear(LinearCase(3, 128, 128, seed=seed)) for seed in (1, 2))
    chained, alone = (torch.zeros(2, 3, 128).bfloat16() for _ in range(2))

    def products(memory: torch.Tensor) -> list[Product]:
        return [
            Product(**(first | {"output": memory[0]})),
            Product(**(second | {"input": memory[0], "output": memory[1]})),
            Product(**(first | {"input": memory[1], "output": memory[0], "residual": memory[0]})),
        ]

    linear_chain(products(chained), LinearWorkspace(CPU))
    for product in products(alone):
        linear(workspace=LinearWorkspace(CPU), **product._asdict())
    assert torch.equal(chained, alone)
    assert bool((chained != 0).any())


def test_bad_chains() -> None:
    product = Product(**make_linear(LinearCase(3, 128, 32)), output=torch.empty(3, 32).bfloat16())
    other_rows = product._replace(input=product.input[:2], output=product.output[:2])
    fp8 = Product(**make_linear(LinearCase(3, 128, 32, fp8=True)), output=product.output)
    for products, message in (
        ([], "products has 0 entries: allowed are 1 to 4"),
        ([product] * 5, "products has 5 entries"),
        ([product, other_rows], r"products\[1\] has 2 rows and a weight of bfloat16, products\[0\] 3"),
        ([product, fp8], r"products\[1\] has 3 rows and a weight of float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_chain(products, LinearWorkspace(CPU))


def test_linear_of_no_rows() -> None:
    for kind in kinds(fp8=False):
        case = LinearCase(rows=1, in_features=64, out_features=32, **(kind | {"in_place": False}))
        arguments = make_linear(case)
        cut = {name: arguments[name][:0] for name in ("input", "residual") if arguments[name] is not None}
        assert len(run_linear(arguments | cut)) == 0


def test_what_the_kernel_takes() -> None:
    weight = torch.zeros(64, 256, dtype=torch.bfloat16)
    assert takes_linear(weight)
    assert takes_linear(weight[:16, :64].contiguous())
    assert takes_linear(weight.to(FP8))
    assert not takes_linear(weight.to(FP8)[:, :64].contiguous())
    assert not takes_linear(weight[:, :32].contiguous())
    assert not takes_linear(weight[:24])
    assert not takes_linear(weight[:, :64])
    assert not takes_linear(weight.half())


DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None)
@given(
    rows=st.integers(0, 5), features=st.integers(1, 300), dtype=DTYPES, adds=st.booleans(), seed=st.integers(0, 2**31)
)
def test_rms_norm(rows: int, features: int, dtype: torch.dtype, adds: bool, seed: int) -> None:
    """The sum is rounded before it is normalized."""
    hidden = 3 * randn(rows, features, dtype=dtype, seed=seed)
    addend = randn(rows, features, dtype=dtype, seed=seed + 1) if adds else None
    weight = randn(features, dtype=dtype, seed=seed + 2)
    total = hidden.clone() if addend is None else hidden + addend
    output = torch.full_like(hidden, torch.nan)
    rms_norm(hidden, weight, 1e-5, output, addend=addend)
    assert torch.equal(hidden, total)
    expected, bound = expected_rms_norm(total, weight, 1e-5)
    assert bool(((output.double() - expected).abs() <= bound).all())


@settings(deadline=None)
@given(rows=st.integers(0, 5), features=st.integers(1, 300), dtype=DTYPES, seed=st.integers(0, 2**31))
def test_swiglu(rows: int, features: int, dtype: torch.dtype, seed: int) -> None:
    input = 3 * randn(rows, 2 * features, dtype=dtype, seed=seed)
    output = torch.full((rows, features), torch.nan, dtype=dtype)
    swiglu(input, output)
    expected, bound = expected_swiglu(input)
    assert bool(((output.double() - expected).abs() <= bound).all())


@settings(deadline=None)
@given(
    rows=st.integers(0, 5),
    features=st.integers(1, 300),
    dtype=DTYPES,
    power=st.integers(-20, 3),
    factor=st.sampled_from([None, 0.37]),
    seed=st.integers(0, 2**31),
)
def test_quantize_rows(
    rows: int, features: int, dtype: torch.dtype, power: int, factor: float | None, seed: int
) -> None:
    input = randn(rows, features, dtype=torch.float32, seed=seed) * 2.0**power
    input = torch.where(torch.rand(input.shape) < 0.1, 0.0, input).to(dtype)
    value, scale = torch.empty_like(input, dtype=FP8), torch.full((rows,), torch.nan)
    quantize_rows(input, value, scale, factor=None if factor is None else torch.tensor([factor]))
    assert_quantized(input, value, scale, factor or 1.0)
    for row in range(rows):
        alone_value, alone_scale = torch.empty_like(value[:1]), torch.empty(1)
        quantize_rows(input[row : row + 1], alone_value, alone_scale)
        assert torch.equal(alone_value.view(torch.uint8), value[row : row + 1].view(torch.uint8))


@settings(deadline=None)
@given(rows=st.integers(0, 5), features=st.integers(1, 200), adds=st.booleans(), seed=st.integers(0, 2**31))
def test_outputs_in_fp8_are_those_in_bfloat16_behind_quantize_rows(
    rows: int, features: int, adds: bool, seed: int
) -> None:
    hidden, addend = (randn(rows, features, dtype=torch.bfloat16, seed=seed + part) for part in range(2))
    weight, factor = randn(features, dtype=torch.bfloat16, seed=seed + 2), torch.tensor([0.37])
    gate_up = randn(rows, 2 * features, dtype=torch.bfloat16, seed=seed + 3)

    def norm(output: torch.Tensor, **scales: Any) -> None:
        rms_norm(hidden.clone(), weight, 1e-5, output, addend=addend.clone() if adds else None, **scales)

    def activate(output: torch.Tensor, **scales: Any) -> None:
        swiglu(gate_up, output, **scales)

    for operator in (norm, activate):
        output, value, expected = hidden.clone(), hidden.to(FP8), hidden.to(FP8)
        scale, expected_scale = torch.empty(rows), torch.empty(rows)
        operator(output)
        quantize_rows(output, expected, expected_scale, factor=factor)
        operator(value, scale=scale, factor=factor)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(value.view(torch.uint8), expected.view(torch.uint8))


@settings(deadline=None)
@given(rows=st.integers(0, 5), features=st.integers(1, 200), dtype=DTYPES, seed=st.integers(0, 2**31))
def test_scales_of_an_addend_and_of_a_gate_and_up(rows: int, features: int, dtype: torch.dtype, seed: int) -> None:
    """With powers of two, the results are those of matrices that were multiplied before."""
    hidden, addend = (randn(rows, features, dtype=dtype, seed=seed + part) for part in range(2))
    weight, gate_up = randn(features, dtype=dtype, seed=seed + 2), randn(rows, 2 * features, dtype=dtype, seed=seed + 3)
    scale = torch.ldexp(torch.ones(rows), torch.arange(rows) % 4)
    found, expected = assert_rows_take_scales(hidden, addend, gate_up, weight, scale)
    # PyTorch computes SiLU in vectors where the matrix allows it, and otherwise one by one.
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_rows_without_a_finite_scale() -> None:
    input = torch.zeros(5, 16)
    input[1, 3], input[2, 3], input[2, 4], input[3, 5], input[4, 2] = torch.nan, torch.inf, 1.0, 2.0**-120, -3.0
    value, scale = torch.empty(5, 16, dtype=FP8), torch.empty(5)
    quantize_rows(input, value, scale)
    assert scale.tolist() == [0, 0, torch.inf, 0, pytest.approx(3 / 448)]
    nan = torch.zeros(5, 16, dtype=torch.bool)
    nan[1, 3] = nan[2, 3] = True
    assert torch.equal(value.float().isnan(), nan)
    assert value.float()[~nan].nonzero().numel() == 1 and value[4, 2] == -448


@settings(deadline=None)
@given(data=st.data(), dtype=DTYPES)
def test_embed(data: st.DataObject, dtype: torch.dtype) -> None:
    vocabulary, size = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    token = st.one_of(st.integers(-2, vocabulary + 1), st.sampled_from([-(2**63), 2**63 - 1]))
    tokens = data.draw(st.lists(token, max_size=20))
    table = torch.rand(vocabulary, size).to(dtype) + 1
    output = torch.full((len(tokens), size), torch.nan, dtype=dtype)
    embed(torch.tensor(tokens, dtype=torch.int64), table, output)
    for token_, row in zip(tokens, output, strict=True):
        assert torch.equal(row, table[token_] if 0 <= token_ < vocabulary else torch.zeros(size, dtype=dtype))


@settings(deadline=None)
@given(data=st.data(), dtype=DTYPES)
def test_greedy(data: st.DataObject, dtype: torch.dtype) -> None:
    """Few values, so that there are ties."""
    rows, vocabulary = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 12))
    value = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, torch.inf, -torch.inf, torch.nan])
    row = st.lists(value, min_size=vocabulary, max_size=vocabulary)
    logits = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=dtype).view(rows, vocabulary)
    tokens, lengths = torch.full((rows,), 99), torch.arange(rows, dtype=torch.int32)
    best, tickets = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    counted = data.draw(st.booleans())
    greedy(logits, tokens, lengths if counted else None, best, tickets)
    assert tokens.tolist() == expected_greedy(logits)
    assert lengths.tolist() == [row + 1 if counted and row > 0 else row for row in range(rows)]
    assert not best.any() and not tickets.any()


Change = Callable[[dict[str, Any]], dict[str, Any]]


def replace(**values: Any) -> Change:
    return lambda arguments: {
        name: value(arguments[name]) if callable(value) else value for name, value in values.items()
    }


def gapped(matrix: torch.Tensor) -> torch.Tensor:
    """The same matrix with a gap behind each row."""
    return torch.cat((matrix, matrix), dim=1)[:, : matrix.shape[1]]


BAD_LINEARS: list[tuple[Change, str]] = [
    (replace(input=lambda x: x[0]), r"input has the shape \[64\]; it must be \[any, any\], which is \[B, K\]"),
    (replace(input=gapped), r"input has the strides \(128, 1\): it must be contiguous"),
    (replace(input=lambda x: x.float()), r"weight is bfloat16; it must be float32, as input is, or float8_e4m3fn"),
    (replace(input=lambda x: x[:2]), r"output has the shape \[3, 32\]; it must be \[2, 32\], which is \[B, N\]"),
    (replace(weight=lambda x: x.half()), r"weight is float16; it must be bfloat16, as input is"),
    (replace(weight=lambda x: x.to(FP8)), r"weight is float8_e4m3fn and scale None: pass the factor"),
    (replace(weight=lambda x: x[:, :32]), r"weight has the shape \[32, 32\]; it must be \[any, 64\], which is \[N, K"),
    (replace(weight=lambda x: x[0]), r"weight has the shape \[64\]; it must be \[any, 64\]"),
    (replace(weight=gapped), r"weight has the strides \(128, 1\): it must be contiguous"),
    (replace(scale=torch.ones(1)), r"weight is bfloat16: scale belongs to float8_e4m3fn, pass None"),
    (replace(weight=lambda x: x.to(FP8), scale=torch.ones(1).bfloat16()), r"scale is bfloat16; it must be float32"),
    (replace(weight=lambda x: x.to(FP8), scale=torch.ones(2)), r"scale has the shape \[2\]; it must be \[1\]"),
    (replace(norm_weight=lambda x: x[:63]), r"norm_weight has the shape \[63\]; it must be \[64\], which is \[K\]"),
    (replace(norm_weight=lambda x: x.float()), r"norm_weight is float32; it must be bfloat16"),
    (replace(norm_weight=torch.ones(128).bfloat16()[::2]), r"norm_weight has the strides \(2,\): its last dimension"),
    (replace(residual=lambda x: x[:2]), r"residual has the shape \[2, 32\]; it must be \[3, 32\], which is \[B, N\]"),
    (replace(residual=lambda x: x.float()), r"residual is float32; it must be bfloat16"),
    (replace(residual=gapped), r"residual has the strides \(64, 1\): it must be contiguous"),
    (replace(output=lambda x: x[:, :16]), r"output has the shape \[3, 16\]; it must be \[3, 32\]"),
    (replace(output=lambda x: x.float()), r"output is float32; it must be bfloat16"),
    (replace(output=gapped), r"output has the strides \(64, 1\): it must be contiguous"),
    (replace(swiglu=True), r"residual is given with swiglu=True: add it to the product behind the activation"),
    (replace(swiglu=True, residual=None), r"output has the shape \[3, 32\]; it must be \[3, 16\], which is \[B, N / 2"),
    (replace(swiglu=True, residual=None, weight=lambda x: x[:31]), r"weight has N=31 rows: with swiglu half of"),
    (lambda x: {"input": x["output"].view(3, 32), "weight": x["weight"][:, :32].contiguous(), "norm_weight": None},
     r"input and output share memory: pass tensors that do not overlap"),
    (lambda x: {"output": (both := torch.zeros(4, 32).bfloat16())[:3], "residual": both[1:]},
     r"residual and output share memory: residual must be output itself or apart from it"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_LINEARS, ids=[message for _, message in BAD_LINEARS])
def test_bad_linears(change: Change, message: str) -> None:
    case = LinearCase(rows=3, in_features=64, out_features=32, norm=True, residual=True)
    arguments = make_linear(case) | {"output": torch.ones(3, 32).bfloat16(), "workspace": LinearWorkspace(CPU)}
    arguments |= change(arguments)
    before = arguments["output"].clone()
    with pytest.raises(ValueError, match=message):
        linear(**arguments)
    assert torch.equal(arguments["output"], before), "output was written"


BAD_EMBEDS: list[tuple[Change, str]] = [
    (replace(tokens=lambda x: x.int()), r"tokens is int32; it must be int64"),
    (replace(tokens=lambda x: x[None]), r"tokens has the shape \[1, 3\]; it must be \[any\], which is \[B\]"),
    (replace(table=lambda x: x[0]), r"table has the shape \[4\]; it must be \[any, any\], which is \[V, E\]"),
    (replace(table=gapped), r"table has the strides \(8, 1\): it must be contiguous"),
    (replace(output=lambda x: x[:2]), r"output has the shape \[2, 4\]; it must be \[3, 4\], which is \[B, E\]"),
    (replace(output=lambda x: x.half()), r"output is float16; it must be float32"),
    (replace(output=gapped), r"output has the strides \(8, 1\): it must be contiguous"),
]
BAD_GREEDIES: list[tuple[Change, str]] = [
    (replace(logits=lambda x: x[0]), r"logits has the shape \[4\]; it must be \[any, any\], which is \[B, V\]"),
    (replace(logits=lambda x: x[:, :0]), r"logits has the shape \[3, 0\]: there must be a token to take"),
    (replace(tokens=lambda x: x.int()), r"tokens is int32; it must be int64"),
    (replace(tokens=lambda x: x[:2]), r"tokens has the shape \[2\]; it must be \[3\], which is \[B\]"),
    (replace(lengths=lambda x: x.long()), r"lengths is int64; it must be int32"),
    (replace(lengths=lambda x: x[:2]), r"lengths has the shape \[2\]; it must be \[3\]"),
    (replace(best=lambda x: x.int()), r"best is int32; it must be int64"),
    (replace(best=lambda x: x[:2]), r"best has the shape \[2\]; it must be \[3\]"),
    (replace(tickets=lambda x: x.long()), r"tickets is int64; it must be int32"),
    (replace(tickets=lambda x: x[:2]), r"tickets has the shape \[2\]; it must be \[3\]"),
]


BAD_RMS_NORMS: list[tuple[Change, str]] = [
    (replace(hidden=lambda x: x[0]), r"hidden has the shape \[8\]; it must be \[any, any\], which is \[B, K\]"),
    (replace(hidden=gapped), r"hidden has the strides \(16, 1\): it must be contiguous"),
    (replace(weight=lambda x: x[:7]), r"weight has the shape \[7\]; it must be \[8\], which is \[K\]"),
    (replace(weight=lambda x: x.float()), r"weight is float32; it must be bfloat16"),
    (replace(output=lambda x: x[:2]), r"output has the shape \[2, 8\]; it must be \[3, 8\], which is \[B, K\]"),
    (replace(output=lambda x: x.half()), r"output is float16; it must be bfloat16"),
    (replace(output=gapped), r"output has the strides \(16, 1\): it must be contiguous"),
    (replace(addend=lambda x: x[:2]), r"addend has the shape \[2, 8\]; it must be \[3, 8\], which is \[B, K\]"),
    (replace(addend=lambda x: x.float()), r"addend is float32; it must be bfloat16"),
    (replace(addend=gapped), r"addend has the strides \(16, 1\): it must be contiguous"),
    (lambda x: {"output": x["hidden"]}, r"hidden and output share memory: pass tensors that do not"),
    (lambda x: {"addend": x["hidden"]}, r"hidden and addend share memory: pass tensors that do not"),
    (lambda x: {"addend": (both := torch.zeros(4, 8).bfloat16())[:3], "output": both[1:]},
     r"output and addend share memory: pass tensors that do not"),
]  # fmt: skip
BAD_SWIGLUS: list[tuple[Change, str]] = [
    (replace(input=lambda x: x[0]), r"input has the shape \[16\]; it must be \[any, any\], which is \[B, 2 F\]"),
    (replace(input=lambda x: x[:, :15].contiguous()), r"input has 15 columns: half of them are the gate's, so pass"),
    (replace(input=gapped), r"input has the strides \(32, 1\): it must be contiguous"),
    (replace(output=lambda x: x[:, :7]), r"output has the shape \[3, 7\]; it must be \[3, 8\], which is \[B, F\]"),
    (replace(output=lambda x: x.half()), r"output is float16; it must be bfloat16"),
    (replace(output=gapped), r"output has the strides \(16, 1\): it must be contiguous"),
    (
        lambda x: {"output": x["input"].flatten()[24:].view(3, 8)},
        r"input and output share memory: pass tensors that do not",
    ),
]


BAD_QUANTIZATIONS: list[tuple[Change, str]] = [
    (replace(input=gapped), r"input has the strides \(16, 1\): it must be contiguous"),
    (replace(input=lambda x: x.int()), r"input is int32"),
    (replace(output=lambda x: x.float()), r"output is float32; it must be float8_e4m3fn"),
    (replace(output=lambda x: x[:, :7]), r"output has the shape \[3, 7\]; it must be \[3, 8\], which is \[B, K\]"),
    (replace(scale=lambda x: x[:2]), r"scale has the shape \[2\]; it must be \[3\], which is \[B\]"),
    (replace(scale=lambda x: x.double()), r"scale is float64; it must be float32"),
    (replace(factor=lambda x: x.expand(3)), r"factor has the shape \[3\]; it must be \[1\]"),
    (lambda x: {"factor": x["scale"][:1]}, r"scale and factor share memory"),
]


def rms_norm_arguments() -> dict[str, Any]:
    matrices = {name: randn(3, 8, dtype=torch.bfloat16, seed=1) for name in ("hidden", "addend", "output")}
    return matrices | {"weight": torch.ones(8).bfloat16(), "epsilon": 1e-5}


def swiglu_arguments() -> dict[str, Any]:
    return {"input": randn(3, 16, dtype=torch.bfloat16, seed=1), "output": torch.zeros(3, 8).bfloat16()}


def quantize_rows_arguments() -> dict[str, Any]:
    return {
        "input": randn(3, 8, dtype=torch.bfloat16, seed=1),
        "output": torch.zeros(3, 8).to(FP8),
        "scale": torch.zeros(3),
        "factor": torch.ones(1),
    }


def embed_arguments() -> dict[str, Any]:
    return {"tokens": torch.tensor([1, 0, 2]), "table": torch.rand(5, 4), "output": torch.zeros(3, 4)}


def greedy_arguments() -> dict[str, Any]:
    integers = {name: torch.zeros(3, dtype=torch.int64) for name in ("tokens", "best")}
    return {"logits": torch.rand(3, 4), "lengths": torch.zeros(3).int(), "tickets": torch.zeros(3).int()} | integers


@pytest.mark.parametrize(
    ("function", "make", "change", "message"),
    [(embed, embed_arguments, *bad) for bad in BAD_EMBEDS]
    + [(greedy, greedy_arguments, *bad) for bad in BAD_GREEDIES]
    + [(quantize_rows, quantize_rows_arguments, *bad) for bad in BAD_QUANTIZATIONS]
    + [(rms_norm, rms_norm_arguments, *bad) for bad in BAD_RMS_NORMS]
    + [(swiglu, swiglu_arguments, *bad) for bad in BAD_SWIGLUS],
)
def test_bad_arguments(function: Any, make: Any, change: Change, message: str) -> None:
    arguments = make()
    arguments |= change(arguments)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match=message):
        function(**arguments)
    assert all(torch.equal(arguments[name].double(), tensor.double()) for name, tensor in before.items())


def test_torch_agrees_with_the_schemas() -> None:
    for kind in [*kinds(fp8=False), *kinds(fp8=True)]:
        # For torch, output and residual are two arguments, and the operator writes only one of them.
        case = LinearCase(rows=3, in_features=64, out_features=32, **(kind | {"in_place": False}))
        output, workspace = torch.zeros(3, 16 if case.swiglu else 32).bfloat16(), LinearWorkspace(CPU)
        arguments = (*make_linear(case).values(), output, workspace.partials, workspace.semaphores)
        # The check of written arguments compares tensors, and PyTorch cannot compare FP8 tensors.
        checks = ALL_CHECKS if not case.fp8 else ALL_CHECKS[1:]
        torch.library.opcheck(torch.ops.llama_te.linear.default, arguments, test_utils=checks)
    norm = rms_norm_arguments()
    for addend in (norm["addend"], None):
        arguments = (norm["hidden"], norm["weight"], norm["epsilon"], addend, None, None, norm["output"], None)
        torch.library.opcheck(torch.ops.llama_te.rms_norm.default, arguments)
    activation = swiglu_arguments()
    torch.library.opcheck(
        torch.ops.llama_te.swiglu.default, (activation["input"], None, None, activation["output"], None)
    )
    quantize = quantize_rows_arguments()
    for factor in (quantize["factor"], None):
        arguments = (quantize["input"], factor, quantize["output"], quantize["scale"])
        torch.library.opcheck(torch.ops.llama_te.quantize_rows.default, arguments, test_utils=ALL_CHECKS[1:])
    torch.library.opcheck(torch.ops.llama_te.embed.default, tuple(embed_arguments().values()))
    names = ("logits", "tokens", "lengths", "best", "tickets")
    for lengths in (torch.zeros(3).int(), None):
        arguments = greedy_arguments() | {"lengths": lengths}
        torch.library.opcheck(torch.ops.llama_te.greedy.default, tuple(arguments[name] for name in names))


def test_tensors_without_data() -> None:
    with torch.device("meta"):
        input_BK, weight_NK = torch.empty(3, 64).bfloat16(), torch.empty(32, 64).bfloat16()
        output, workspace = torch.empty(3, 32).bfloat16(), LinearWorkspace(torch.device("meta"))
        assert linear(input_BK, weight_NK, output, workspace) is None
        assert rms_norm(input_BK, torch.empty(64).bfloat16(), 1e-5, input_BK.clone(), addend=input_BK.clone()) is None
        assert swiglu(input_BK, output) is None
        assert quantize_rows(input_BK, torch.empty(3, 64, dtype=FP8), torch.empty(3)) is None
        assert embed(torch.empty(3).long(), torch.empty(5, 4), torch.empty(3, 4)) is None
        tokens, tickets = torch.empty(3).long(), torch.empty(3).int()
        assert greedy(torch.empty(3, 8), tokens, None, tokens, tickets) is None
