"""The contract of `llama_te_core.compat.transformer_engine`, held to Transformer Engine itself."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from llama_te_core.compat import transformer_engine as compat
from llama_te_core.train.finite_updates import FiniteUpdates

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]


def moved(name: str) -> str:
    import transformer_engine

    return (
        f"transformer_engine {transformer_engine.__version__} has moved or changed {name}: adapt "
        "llama_te_core/compat/transformer_engine.py"
    )


def quantized_linear() -> Any:
    te = compat.transformer_engine()
    with te.quantized_model_init(enabled=True, recipe=compat.make_recipe("Float8CurrentScaling")):
        return te.Linear(64, 32, bias=False, params_dtype=torch.bfloat16, device="cuda")


def test_the_features_for_inspection_are_in_the_package() -> None:
    assert compat.debug_features().is_dir(), moved("debug/features")


def test_modules_and_weights_are_recognised() -> None:
    linear = quantized_linear()
    assert compat.is_module_of_transformer_engine(linear), moved("the modules' package")
    assert compat.holds_quantized_weights(linear), moved("primary_weights_in_fp8")
    assert compat.is_quantized(linear.weight) and not compat.is_quantized(torch.ones(1)), moved("QuantizedTensor")


def test_its_inference_params_are_recognised() -> None:
    from transformer_engine.pytorch.attention import InferenceParams

    sizes = {"max_batch_size": 2, "max_sequence_length": 32, "num_heads_kv": 1, "head_dim_k": 16}
    params = InferenceParams(**sizes, dtype=torch.bfloat16, qkv_format="thd", max_ctx_len=32)
    assert compat.is_inference_params(params) and not compat.is_inference_params(object()), moved("InferenceParams")
    read = ("head_dim_v", "is_paged", "max_ctx_len", "input_qkv_format", "cu_seqlens_q", "sequences", "cache_manager")
    assert all(hasattr(params, name) for name in read), moved("an attribute of InferenceParams")
    assert type(params.cache_manager).__name__ == "NonPagedKVCacheManager", moved("NonPagedKVCacheManager")


def test_an_active_quantized_model_init_is_seen() -> None:
    te = compat.transformer_engine()
    assert not compat.quantizes_new_weights(), moved("FP8GlobalStateManager")
    with te.quantized_model_init(enabled=True, recipe=compat.make_recipe("Float8CurrentScaling")):
        assert compat.quantizes_new_weights(), moved("FP8GlobalStateManager")
        with te.quantized_model_init(enabled=False):
            assert not compat.quantizes_new_weights(), moved("FP8GlobalStateManager")


@pytest.mark.parametrize("name", ["Float8CurrentScaling", "Float8BlockScaling"])
def test_a_quantized_weight_on_the_host_is_read(name: str) -> None:
    te = compat.transformer_engine()
    with te.quantized_model_init(enabled=True, recipe=compat.make_recipe(name)):
        weight = te.Linear(256, 128, bias=False, params_dtype=torch.bfloat16, device="cuda").weight
    expected = weight.dequantize().cpu()
    torch.testing.assert_close(compat.dequantized(weight.detach().cpu()), expected, rtol=0, atol=0)
    torch.cuda.synchronize()  # an illegal memory access would show here


def test_the_parts_of_a_weight_in_fp8_make_its_values() -> None:
    weight = quantized_linear().weight
    parts = compat.fp8_parts(weight)
    assert parts is not None, moved("Float8Tensor")
    values, scale = parts
    assert values.dtype == torch.float8_e4m3fn and values.shape == weight.shape and scale.shape == (1,)
    # TE rounds to the weight's own dtype.
    torch.testing.assert_close((values.float() * scale).to(weight.dtype), weight.detach().dequantize())
    held = {part.data_ptr() for part in compat.held_tensors(weight)}
    assert {values.data_ptr(), scale.data_ptr()} <= held, moved("the tensors of a Float8Tensor")


def test_a_module_quantizes_the_values_that_it_has() -> None:
    linear = quantized_linear()
    expected = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    linear.weight = torch.nn.Parameter(expected.clone())
    compat.quantize_in_place(linear)
    assert compat.is_quantized(linear.weight), moved("param_init_meta")
    assert (linear.weight.dequantize() - expected).abs().max() < 0.07 * expected.abs().max()


def test_a_quantized_weight_takes_a_group() -> None:
    te = compat.transformer_engine()
    assert "amax_reduction_group" in inspect.getsource(te.Float8Tensor) or hasattr(
        quantized_linear().weight, "amax_reduction_group"
    ), moved("amax_reduction_group")


def test_a_layer_takes_a_softmax_scale() -> None:
    te = compat.transformer_engine()
    layer = te.TransformerLayer(64, 64, 4, device="cuda")
    compat.set_softmax_scale(layer, 0.125)
    scales = [
        module.softmax_scale
        for module in layer.self_attention.core_attention.modules()
        if hasattr(module, "softmax_scale")
    ]
    assert scales and set(scales) == {0.125}, moved("softmax_scale")


def test_a_layer_says_how_many_processes_share_a_sequence() -> None:
    te = compat.transformer_engine()
    layer = te.TransformerLayer(64, 64, 4, device="cuda")
    assert compat.context_ranks(layer) == 1, moved("cp_size")
    source = inspect.getsource(type(layer.self_attention).set_context_parallel_group)
    assert "self.cp_size = " in source, moved("cp_size")


def test_the_state_of_delayed_scaling_is_read_and_set() -> None:
    te = compat.transformer_engine()
    recipe = compat.make_recipe("DelayedScaling", amax_history_len=4)
    one, two = (te.Linear(64, 32, bias=False, params_dtype=torch.bfloat16, device="cuda") for _ in range(2))
    assert compat.delayed_scaling_state(one) == {}
    with te.autocast(enabled=True, recipe=recipe):
        one(torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)).sum().backward()
    state = compat.delayed_scaling_state(one)
    assert set(state) == {"scale_fwd", "scale_bwd", "amax_history_fwd", "amax_history_bwd"}, moved("fp8_meta")
    compat.set_delayed_scaling_state(two, state)
    copied = compat.delayed_scaling_state(two)
    assert all(torch.equal(copied[name], value) for name, value in state.items()), moved("init_fp8_meta_tensors")


def test_the_optimizer_keeps_master_weights() -> None:
    weight = quantized_linear().weight
    plain = torch.nn.Parameter(torch.ones(8, device="cuda"))
    first = torch.randn(32, 64, device="cuda")
    groups = [{"params": [weight, plain], "weight_decay": 0.0}]
    optimizer = compat.fused_adam(groups, lambda each: each is weight, {weight: first}, {"lr": 1e-3})
    assert torch.equal(optimizer.state[weight][compat.MASTER_WEIGHT], first), moved("FusedAdam")
    assert compat.MASTER_WEIGHT not in optimizer.state[plain]


@pytest.mark.parametrize("quantized", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(quantized: bool) -> None:
    """The fused AdamW of torch decides on the device; for Transformer Engine's FusedAdam the host reads the flag."""
    weight = quantized_linear().weight if quantized else torch.nn.Parameter(torch.ones(32, 64, device="cuda"))
    groups = [{"params": [weight], "weight_decay": 0.1}]
    optimizer = (
        compat.fused_adam(groups, lambda each: True, {}, {"lr": 1e-2})
        if quantized
        else torch.optim.AdamW(groups, lr=1e-2, fused=True)
    )
    updates = FiniteUpdates(optimizer, torch.device("cuda"))

    def values() -> dict[str, torch.Tensor]:
        kept = {name: value.clone() for name, value in optimizer.state[weight].items()}
        return kept | {"weight": (weight.dequantize() if quantized else weight).detach().clone()}

    one = torch.ones((), device="cuda")
    seen = []
    steps = ((one, one, 1.0), (one, one * math.nan, math.nan), (one * math.inf, one, 1.0), (one, one, 1.0))
    for loss, norm, gradient in steps:
        weight.grad = torch.full((32, 64), gradient, dtype=weight.dtype, device="cuda")
        torch.cuda.set_sync_debug_mode("default" if quantized else "error")
        try:
            updates.step(loss, norm)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.append(values())
    first, *others = seen
    assert all(value.isfinite().all() for value in first.values()) and first["exp_avg"].ne(0).all()
    for other in others:
        assert all(torch.equal(first[name], value) for name, value in other.items())
