"""Inputs for the operators of a decoding step on any device, and the results expected from float64 PyTorch.

Shapes: B rows, K input features, N output features, F features of the activation, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llama_te_infer.ops.linear import LinearWorkspace, linear
from llama_te_infer.ops.rms_norm import rms_norm
from llama_te_infer.ops.swiglu import swiglu

FP8 = torch.float8_e4m3fn
NAN_BITS = 0x7F  # of FP8, with either sign


@dataclass(frozen=True)
class LinearCase:
    """A case of `linear`."""

    rows: int
    in_features: int
    out_features: int
    fp8: bool = False
    norm: bool = False
    residual: bool = False
    in_place: bool = False  # the residual is the output
    swiglu: bool = False
    dtype: torch.dtype = torch.bfloat16
    whole_numbers: bool = False  # small ones, so that every sum is exact in float32
    seed: int = 0


def kinds(fp8: bool) -> list[dict[str, Any]]:
    """The options of `linear` that a decoder layer uses, and the other combinations."""
    return [
        {"fp8": fp8},
        {"fp8": fp8, "norm": True},
        {"fp8": fp8, "residual": True},
        {"fp8": fp8, "norm": True, "residual": True, "in_place": True},
        {"fp8": fp8, "norm": True, "swiglu": True},
        {"fp8": fp8, "swiglu": True},
    ]


def make_linear(case: LinearCase, device: str = "cpu") -> dict[str, Any]:
    """Return all arguments of `linear` except output and workspace. NaN follows the rows of each matrix in memory."""
    generator = torch.Generator(device).manual_seed(case.seed)
    rows, in_features, out_features = case.rows, case.in_features, case.out_features

    def normal(*shape: int) -> torch.Tensor:
        if case.whole_numbers:
            numbers = torch.randint(-4, 5, shape, generator=generator, device=device)
            return numbers.to(case.dtype)
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    input_BK = normal(rows, in_features)
    scale = None
    if case.fp8 and not case.whole_numbers:  # all there are, subnormal ones and both zeros among them
        bits = torch.randint(0, 256, (out_features, in_features), generator=generator, device=device)
        weight_NK = torch.where(bits & NAN_BITS == NAN_BITS, bits - 1, bits).byte().view(FP8)
    else:
        weight_NK = normal(out_features, in_features)
        if not case.whole_numbers:
            weight_NK *= in_features**-0.5
        weight_NK = weight_NK.to(FP8) if case.fp8 else weight_NK
    if case.fp8:
        size = 0.25 if case.whole_numbers else in_features**-0.5 / 128
        scale = torch.full((1,), size, device=device)
    if not case.whole_numbers:
        input_BK *= torch.logspace(-1, 1, rows, 2, device=device, dtype=case.dtype)[:, None]
    features = out_features // 2 if case.swiglu else out_features
    return {
        "input": before_nan(input_BK),
        "weight": before_nan(weight_NK),
        "scale": scale,
        "norm_weight": normal(in_features).abs() + 0.25 if case.norm else None,
        "epsilon": 1e-5 if case.norm else 0.0,
        "residual": normal(rows, features) if case.residual else None,
        "swiglu": case.swiglu,
    }


def before_nan(matrix: torch.Tensor) -> torch.Tensor:
    """The same rows with eight of NaN behind them in memory."""
    size = matrix.itemsize
    whole = torch.full((len(matrix) + 8, matrix.shape[1] * size), 0xFF, dtype=torch.uint8, device=matrix.device)
    whole[: len(matrix)] = matrix.view(torch.uint8)
    return whole.view(matrix.dtype)[: len(matrix)]


def run_linear(
    arguments: dict[str, Any], workspace: LinearWorkspace | None = None, in_place: bool = False
) -> torch.Tensor:
    """Return the output, whose memory held NaN or the residual. `linear` must not write after its end."""
    input_BK, weight_NK, residual = (arguments[name] for name in ("input", "weight", "residual"))
    features = len(weight_NK) // 2 if arguments["swiglu"] else len(weight_NK)
    whole = input_BK.new_full((len(input_BK) + 2, features), torch.nan)
    output = whole[: len(input_BK)]
    if in_place:
        residual = output.copy_(residual)
    if workspace is None:
        workspace = LinearWorkspace(input_BK.device)
    workspace.partials.fill_(torch.nan)
    linear(output=output, workspace=workspace, **(arguments | {"residual": residual}))
    assert bool(whole[len(input_BK) :].isnan().all()), "something was written behind the output"
    return output


def expected_linear(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float64 result, and the error that `linear` may have.

    `linear` rounds a result before and after the activation or the addition, each time by half a unit in the last
    place, `u`, or, for subnormal numbers, by half of the least number. Float32 sums of up to 14,336 products are off by
    less than 2^-18 of the sum of the products' absolute values (on a CPU 2^-23). RMSNorm's factor and the activation
    are off by less than 2^-16.
    """
    input_BK, scale, norm_weight = arguments["input"], arguments["scale"], arguments["norm_weight"]
    u = torch.finfo(input_BK.dtype).eps / 2
    least = u * torch.finfo(input_BK.dtype).smallest_normal
    factor_B1 = torch.ones_like(input_BK[:, :1], dtype=torch.float64)
    if norm_weight is not None:
        factor_B1 = torch.rsqrt(input_BK.double().square().mean(1, keepdim=True) + arguments["epsilon"])
        input_BK = input_BK * norm_weight
    if scale is not None:
        factor_B1 = factor_B1 * scale.double()
    weight_KN = arguments["weight"].double().T
    product = input_BK.double() @ weight_KN * factor_B1
    size = input_BK.double().abs() @ weight_KN.abs() * factor_B1
    error = u * product.abs() + least + 2**-16 * product.abs() + 2**-18 * size
    if arguments["swiglu"]:
        (gate, up), (gate_error, up_error) = product.chunk(2, dim=1), error.chunk(2, dim=1)
        activation = gate * gate.sigmoid()
        # Nowhere is the activation steeper than 1.1.
        activation_error = 1.1 * gate_error + 2**-16 * activation.abs()
        product = activation * up
        error = activation_error * (up.abs() + up_error) + activation.abs() * up_error
    elif arguments["residual"] is not None:
        product = product + arguments["residual"].double()
    else:
        return product, error
    return product, error + u * (product.abs() + error) + least


def expected_whole_numbers(arguments: dict[str, Any]) -> torch.Tensor:
    """Return the exact result of a product of whole numbers, with or without a residual."""
    factor = 1.0 if arguments["scale"] is None else float(arguments["scale"])
    dtype = arguments["input"].dtype
    product = (arguments["input"].double() @ arguments["weight"].double().T * factor).to(dtype)
    return product if arguments["residual"] is None else product + arguments["residual"]


def assert_linear(case: LinearCase, device: str = "cpu", workspace: LinearWorkspace | None = None) -> float:
    """Run `linear` twice and compare. Return the greatest error, relative to the error that is allowed."""
    arguments = make_linear(case, device)
    output = run_linear(arguments, workspace, case.in_place)
    assert torch.equal(run_linear(arguments, workspace, case.in_place), output), f"{case} is not the same twice"
    if case.whole_numbers:
        assert torch.equal(output, expected_whole_numbers(arguments)), case
        return 0.0
    expected, bound = expected_linear(arguments)
    worst = float(((output.double() - expected).abs() / bound.clamp(min=1e-30)).max())
    assert worst <= 1, f"{case} is {worst:.3g} times as far off as it may be"
    return worst


def expected_rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normalized rows, and the error that `rms_norm` may have; `hidden` includes the addend."""
    hidden_BK = hidden.double()
    normed_BK = hidden_BK * torch.rsqrt(hidden_BK.square().mean(1, keepdim=True) + epsilon) * weight.double()
    return normed_BK, _elementwise_bound(normed_BK, hidden.dtype)


def expected_swiglu(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the activation times the up projection, and the error that `swiglu` may have."""
    gate_BF, up_BF = input.double().chunk(2, dim=1)
    product_BF = gate_BF * gate_BF.sigmoid() * up_BF
    return product_BF, _elementwise_bound(product_BF, input.dtype)


def _elementwise_bound(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the error that a result may have.

    The operator rounds once, by half a unit in the last place, or by half a unit of the least normal number. RMSNorm's
    factor, from sums of up to 28,672 squares in float32, and the activation are off by less than 2^-16.
    """
    kind = torch.finfo(dtype)
    return kind.eps / 2 * exact.abs().clamp(min=kind.tiny) + 2**-16 * exact.abs()


def assert_quantized(input: torch.Tensor, value: torch.Tensor, scale: torch.Tensor, factor: float = 1.0) -> None:
    """Rows of finite numbers are within half a unit in the last place of E4M3, and the greatest is 448 or -448."""
    exact_BK, scale_B1 = input.double(), scale.double()[:, None] / factor
    greatest_B1 = exact_BK.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale_B1, greatest_B1 / 448, rtol=3e-7, atol=0.0)
    found_BK = value.double() * scale_B1
    # Half of a step between numbers is 2^-4 of a normal one, and 2^-10 of a subnormal one.
    bound_BK = torch.maximum(exact_BK.abs() * 2**-4, 2**-10 * scale_B1) * (1 + 1e-6)
    assert bool(((found_BK - exact_BK).abs() <= bound_BK).all())
    assert torch.equal(value.double().abs().amax(1), torch.where(greatest_B1[:, 0] > 0, 448.0, 0.0).double())


def assert_rows_take_scales(
    hidden: torch.Tensor, addend: torch.Tensor, gate_up: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` has the bits of an addend that was multiplied before; scales are powers of two.

    Returns:
        What `swiglu` gives with the scales, and what it gives of a matrix that was multiplied before.
    """
    scale_B1 = scale[:, None].to(hidden.dtype)
    total, output, expected = hidden.clone(), torch.empty_like(hidden), torch.empty_like(hidden)
    rms_norm(total, weight, 1e-5, expected, addend=addend * scale_B1)
    rms_norm(hidden, weight, 1e-5, output, addend=addend, addend_scale=scale)
    assert torch.equal(hidden, total) and torch.equal(output, expected)
    swiglu(gate_up * scale_B1, expected)
    swiglu(gate_up, output, input_scale=scale)
    return output, expected


def expected_greedy(logits: torch.Tensor) -> list[int]:
    """The lowest of the tokens with each row's greatest number; -1 where that is infinite, or the row has NaN."""
    vocabulary = logits.shape[1]
    greatest_B = logits.double().nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1)
    token_V = torch.arange(vocabulary, device=logits.device)
    lowest_B = torch.where(logits.double() == greatest_B[:, None], token_V, vocabulary).amin(1)
    return lowest_B.masked_fill(logits.isnan().any(1) | greatest_B.isinf(), -1).tolist()
