"""The fused decoding step against the model's own forward pass, on the CPU, where its kernels are PyTorch."""

from __future__ import annotations

from itertools import combinations, compress
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_infer.decode import fused as fused_decode
from llama_te_infer.decode import weights as weights_module
from llama_te_infer.decode.backend import decode_problem
from llama_te_infer.decode.fused import FusedDecode, multiply_many, takes_fused_decode
from llama_te_infer.decode.layers import LayersDecode
from llama_te_infer.decode.weights import Weight, layer_weights
from llama_te_infer.kv_cache.engine_cache import EngineCache
from llama_te_infer.ops.linear import Product
from llama_te_infer.ops.rms_norm import rms_norm
from llama_te_infer.runner.state import DecodeState

ROWS, STEPS, PAGE_SIZE = 5, 20, 16


def make_model(**fields: Any) -> NVLlamaForCausalLM:
    torch.manual_seed(0)
    config = NVLlamaConfig(
        **{
            "vocab_size": 320,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 64,
            "initializer_range": 0.1,
            "layer_implementation": "reference",
            **fields,
        }
    )
    model = NVLlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def make_cache(model: NVLlamaForCausalLM, rows: int = ROWS, is_fp8: bool = False) -> EngineCache:
    sizes = {"max_sequence_length": 64, "total_num_pages": 4 * rows, "page_size": PAGE_SIZE}
    return EngineCache(model, rows=rows, is_fp8=is_fp8, **sizes)


def logits_of(model: NVLlamaForCausalLM, fused: bool, most_rows: int = ROWS, is_fp8: bool = False) -> torch.Tensor:
    """Logits [STEPS, most_rows, V] of rows that begin at five different steps, whose pages lie in no order."""
    cache = make_cache(model, most_rows, is_fp8)
    decode = FusedDecode(model, cache, most_rows, layer_weights(model)) if fused else LayersDecode(model, cache)
    state = DecodeState(most_rows, cache, model.config.vocab_size)
    generator = torch.Generator().manual_seed(3)
    pages = torch.randperm(4 * most_rows, generator=generator).view(most_rows, 4).int()
    logits = []
    rows = 0
    for step in range(STEPS):
        if step % 3 == 0 and rows < most_rows:
            new = slice(rows, rows + most_rows // 5)
            state.page_table_RP[new] = pages[new]
            state.length_R[new] = 0
            state.lengths += [0] * (most_rows // 5)
            rows += most_rows // 5
        state.token_R[:rows] = torch.randint(0, 320, (rows,), generator=generator)
        logits.append(F.pad(decode(state, rows).float(), (0, 0, 0, most_rows - rows)))
        state.count_step(rows)
        state.lengths = [length + 1 for length in state.lengths]
    return torch.stack(logits)


def distances(logits_SRV: torch.Tensor, exact_SRV: torch.Tensor) -> torch.Tensor:
    """Return the distance of each row of each step. Some are large, where random layers amplify small differences."""
    distance_SR = (logits_SRV - exact_SRV).norm(dim=-1) / exact_SRV.norm(dim=-1)
    return distance_SR[exact_SRV.any(dim=-1)]


@torch.inference_mode()
@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("rope", [{}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}])
def test_same_as_the_model(attn_input_format: str, rope: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"attn_input_format": attn_input_format}
    if rope:
        fields["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    exact = logits_of(make_model(**fields), fused=False)
    model = make_model(**fields).to(torch.bfloat16)
    fused, plain = logits_of(model, fused=True), logits_of(model, fused=False)
    distance, usual = distances(fused, exact), distances(plain, exact)
    assert distance.median() < 1.1 * usual.median() < 0.01
    assert (distance < 0.05).float().mean() > 0.9


@torch.inference_mode()
@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
def test_over_an_fp8_cache(attn_input_format: str) -> None:
    exact = logits_of(make_model(attn_input_format=attn_input_format), fused=False)
    model = make_model(attn_input_format=attn_input_format).to(torch.bfloat16)
    fused, plain = (logits_of(model, fused, is_fp8=True) for fused in (True, False))
    distance, usual = distances(fused, exact), distances(plain, exact)
    assert 0.01 < distance.mean() < 1.1 * usual.mean() < 0.2
    assert distance.median() < 1.1 * usual.median()


@torch.inference_mode()
def test_more_rows_than_one_launch_takes() -> None:
    """8 to 40 rows: on either side of the limit of `linear`."""
    exact = logits_of(make_model(), fused=False, most_rows=40)
    model = make_model().to(torch.bfloat16)
    fused, plain = (logits_of(model, fused, most_rows=40) for fused in (True, False))
    distance, usual = distances(fused, exact), distances(plain, exact)
    assert distance.median() < 1.1 * usual.median() < 0.01
    assert (distance < 0.05).float().mean() > 0.9


def in_fp8(parameter: torch.Tensor) -> Weight:
    scale = parameter.detach().abs().max().float().view(1) / 448
    return Weight((parameter.detach().float() / scale).to(torch.float8_e4m3fn), scale)


class Layer:
    """The products behind a layer's attention, and the next projection, for as many rows as cuBLAS multiplies."""

    def __init__(self, fp8: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).bfloat16()

        def weight(out_features: int, in_features: int) -> torch.Tensor:
            return randn(out_features, in_features) * in_features**-0.5

        context, self.hidden, self.activation, self.qkv = randn(40, 64), randn(40, 64), randn(40, 96), randn(40, 80)
        attention_norm, mlp_norm = randn(64), randn(64)
        self.products = [
            Product(context, weight(64, 64), self.hidden, residual=self.hidden),
            Product(self.hidden, weight(192, 64), self.activation, None, mlp_norm, 1e-5, swiglu=True),
            Product(self.activation, weight(64, 96), self.hidden, residual=self.hidden),
            Product(self.hidden, weight(80, 64), self.qkv, None, attention_norm, 1e-5),
        ]
        for number in fp8:
            rounded = in_fp8(self.products[number].weight)
            self.products[number] = self.products[number]._replace(weight=rounded.values, scale=rounded.scale)

    def outputs(self) -> list[torch.Tensor]:
        return [self.hidden, self.activation, self.qkv]


def multiply_by_single_operations(product: Product) -> None:
    input_BK, weight_NK = product.input, product.weight
    if product.norm_weight is not None:
        input_BK = F.rms_norm(input_BK, input_BK.shape[-1:], product.norm_weight, product.epsilon)
    finish(product, F.linear(input_BK, weight_NK))


def finish(product: Product, product_BN: torch.Tensor) -> None:
    """Do what follows a product of two matrices."""
    if product.swiglu:
        gate_BF, up_BF = product_BN.float().chunk(2, dim=-1)
        product_BN = F.silu(gate_BF) * up_BF
    product.output.copy_(product_BN if product.residual is None else product_BN + product.residual)


@torch.inference_mode()
@pytest.mark.parametrize(("first", "last"), list(combinations(range(5), 2)))
def test_many_rows_round_where_single_operations_would(first: int, last: int) -> None:
    """Bits are equal wherever a chain begins and ends: any part of a layer may lie between FP8 weights."""
    fused, single = Layer(), Layer()
    multiply_many(fused.products[first:last])
    for product in single.products[first:last]:
        multiply_by_single_operations(product)
    for one, other, before in zip(fused.outputs(), single.outputs(), Layer().outputs(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, before) == all(product.output is not one for product in fused.products[first:last])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, {"residual": torch.ones(40, 64).bfloat16()}),
        (1, {"input": torch.ones(40, 64).bfloat16()}),
        (1, {"norm_weight": None}),
    ],
)
def test_a_sum_that_no_norm_follows(number: int, change: dict[str, Any]) -> None:
    """A residual that is not the output, a norm of other rows, and no norm."""
    fused, single = Layer(), Layer()
    for layer in (fused, single):
        layer.products[number] = layer.products[number]._replace(**change)
    multiply_many(fused.products)
    for product in single.products:
        multiply_by_single_operations(product)
    for one, other in zip(fused.outputs(), single.outputs(), strict=True):
        assert torch.equal(one, other)


@torch.inference_mode()
def test_additions_are_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms include both additions of a layer, so no addition is a separate pass."""
    added = []

    def record(*arguments: Any, addend: torch.Tensor | None, **others: Any) -> None:
        added.append(addend is not None)
        rms_norm(*arguments, addend=addend, **others)

    monkeypatch.setattr(fused_decode, "rms_norm", record)
    multiply_many(Layer().products)
    assert added == [True, True]
    multiply_many(Layer(fp8=(0, 1, 2, 3)).products)
    assert added == [True] * 4


@torch.inference_mode()
@pytest.mark.parametrize("fp8", [(0,), (1,), (2,), (3,), (1, 2), (0, 1, 2, 3)])
def test_many_rows_with_fp8_weights(fp8: tuple[int, ...]) -> None:
    """Rows are rounded to FP8 where a weight is FP8, each by itself; nothing else changes."""
    fused, single = Layer(fp8), Layer(fp8)
    multiply_many(fused.products)
    for product in single.products:
        input_BK = product.input
        if product.norm_weight is not None:
            input_BK = F.rms_norm(input_BK, input_BK.shape[-1:], product.norm_weight, product.epsilon)
        if product.scale is None:
            product_BN = F.linear(input_BK, product.weight)
        else:  # the scales of rows round nothing where an operator follows that takes them
            scale_B1 = input_BK.float().abs().amax(1, keepdim=True) / 448
            rounded_BK = (input_BK.float() / scale_B1).to(torch.float8_e4m3fn).double()
            weight_NK = product.weight.double() * product.scale.double()
            product_BN = (rounded_BK @ weight_NK.T).bfloat16().float() * scale_B1
        finish(product, product_BN)
    is_stored = [True, 2 not in fp8, True]  # of the outputs: the activation is not, where an FP8 product reads it
    for one, other in compress(zip(fused.outputs(), single.outputs(), strict=True), is_stored):
        # A number next to the middle between two numbers of E4M3 may be rounded to either.
        distance_B = (one.double() - other.double()).norm(dim=1) / other.double().norm(dim=1)
        assert distance_B.median() < 2**-8 and distance_B.max() < 0.05


@torch.inference_mode()
def test_more_than_few_rows_are_rounded_to_fp8_beside_fp8_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = logits_of(make_model(), fused=False, most_rows=30)
    model = make_model().to(torch.bfloat16)
    monkeypatch.setattr(weights_module, "_weight", in_fp8)
    found = logits_of(model, fused=True, most_rows=30)
    with monkeypatch.context() as patch:
        patch.setattr(fused_decode, "MOST_WIDENING_ROWS", 32)
        weights_alone = logits_of(model, fused=True, most_rows=30)
    assert torch.equal(found[:3], weights_alone[:3]), "6 rows stay as they are"
    assert not (found[-3:] == weights_alone[-3:]).all(dim=-1).any(), "30 rows are rounded"
    distance, usual = distances(found[-3:], exact[-3:]), distances(weights_alone[-3:], exact[-3:])
    assert 0.01 < usual.median() < distance.median() < 2 * usual.median() < 0.2
    exact, found = (logits_of(model, fused=fused, most_rows=40) for fused in (False, True))
    assert 0.01 < distances(found[-3:], exact[-3:]).median() < 0.2, "more rows than a launch of `linear` takes"


@torch.inference_mode()
def test_fp8_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 values with a scale give the same results as widened weights."""
    model = make_model().to(torch.bfloat16)
    values = {}

    def quantized(parameter: torch.Tensor) -> Weight:
        values[parameter.data_ptr()] = weight = in_fp8(parameter)
        return weight

    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "_weight", quantized)
        from_fp8 = logits_of(model, fused=True)
    for parameter in model.parameters():
        if (weight := values.get(parameter.data_ptr())) is not None:
            assert weight.scale is not None
            parameter.data = (weight.values.float() * weight.scale).to(torch.bfloat16)
    widened = logits_of(model, fused=True)
    # Widening rounds: the products differ by as much as bfloat16 weights do.
    distance = distances(from_fp8, widened)
    assert distance.median() < 0.01
    assert (distance < 0.05).float().mean() > 0.9


@torch.inference_mode()
def test_tells_what_it_takes() -> None:
    model = make_model().to(torch.bfloat16)

    def takes(model: NVLlamaForCausalLM, rows: int, page_size: int) -> bool:
        return takes_fused_decode(model, rows, page_size, layer_weights(model))

    assert takes(model, ROWS, PAGE_SIZE)
    assert not takes(model, 257, PAGE_SIZE)
    assert not takes(model, ROWS, 24)
    assert not takes(make_model(), ROWS, PAGE_SIZE)  # float32
    assert not takes(make_model(head_dim=32).to(torch.bfloat16), ROWS, PAGE_SIZE)
    assert not takes(make_model(hidden_size=96).to(torch.bfloat16), ROWS, PAGE_SIZE)
    adapted = get_peft_model(model, LoraConfig(target_parameters=["self_attention.proj.weight"]))
    # The products have more operands than the weights.
    assert "parameters of its own kind" in str(decode_problem(model, make_cache(model), ROWS)[0])
    assert decode_problem(adapted.merge_and_unload(), make_cache(model), ROWS)[0] is None


@torch.inference_mode()
def test_weights_are_the_model_s_own() -> None:
    model = make_model().to(torch.bfloat16)
    decode = FusedDecode(model, make_cache(model), ROWS, layer_weights(model))
    layer = model.model.layers[1]
    assert decode.layers[1].fc1_FE.values.data_ptr() == layer.layernorm_mlp.fc1_weight.data_ptr()
    assert decode.layers[1].qkv_QE.values.data_ptr() == layer.self_attention.layernorm_qkv.weight.data_ptr()
    assert decode.head.values.data_ptr() == model.lm_head.weight.data_ptr()
