"""FP8 and FP4 on the GPU: supported modes, their distance from bfloat16, and refusals.

Bounds: e4m3, the format of weights and activations, has 3 bits of mantissa where bfloat16 has 7, so it rounds 16 times
as coarsely; logits may be 16 times as far from a float32 run as a bfloat16 run is. Gradients pass through e5m2, which
has 2 bits: 32 times. A separate test checks that FP8 rounds as it should: it compares with reference layers that round
every operand of every product to FP8 in plain PyTorch.
"""

from __future__ import annotations

import pytest
import torch
from transformer_engine.common import recipe as recipes

from gpu.small_llama import MODEL, batch, relative
from llama_te_convert import convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM, calibrate

hopper, blackwell = pytest.mark.hopper, pytest.mark.blackwell
LOGITS, GRADIENTS = 16, 32

HOPPER_RECIPES = ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"]
RECIPES = [
    *(pytest.param(name, marks=hopper) for name in HOPPER_RECIPES),
    *(pytest.param(name, marks=blackwell) for name in ("Float8CurrentScaling", "MXFP8BlockScaling")),
]


def build(plain: NVLlamaForCausalLM, **arguments) -> NVLlamaForCausalLM:
    """Build a model with recipes and the weights of a model without recipes."""
    model = NVLlamaForCausalLM(plain.config, **arguments).to(device="cuda", dtype=torch.bfloat16)
    model.load_state_dict(plain.state_dict())
    return model


def bfloat16_errors(hf, ids_BS, mask_BS, labels_BS) -> tuple[float, dict[str, float]]:
    """Return relative errors of the logits and each gradient of a bfloat16 run on TE, against a float32 run of `hf`."""
    results = []
    for dtype, implementation in ((torch.float32, "reference"), (torch.bfloat16, "transformer_engine")):
        model = convert_llama_hf_to_te(hf, layer_implementation=implementation).to(dtype)
        outputs = model(ids_BS, attention_mask=mask_BS, labels=labels_BS)
        outputs.loss.backward()
        results.append((outputs.logits[mask_BS.bool()].detach(), {n: p.grad for n, p in model.named_parameters()}))
    (exact, exact_gradients), (rounded, gradients) = results
    return relative(rounded, exact), {name: relative(gradients[name], exact_gradients[name]) for name in gradients}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
def test_fp8_forward_and_backward(name, attn_input_format, make_llama, measured, fused_attention):
    hf = make_llama()
    ids_BS, mask_BS = batch()
    labels_BS = ids_BS.masked_fill(mask_BS == 0, -100)
    logit_error, gradient_errors = bfloat16_errors(hf, ids_BS, mask_BS, labels_BS)
    hf = hf.bfloat16()
    fields = {"attn_input_format": attn_input_format}
    plain = convert_llama_hf_to_te(hf, **fields)
    quantized = convert_llama_hf_to_te(hf, layer_precision=["fp8"] * 6, **fields)
    model = build(quantized, fp8_recipe=getattr(recipes, name)())
    for _ in range(3):  # delayed scaling looks back on earlier steps
        model.zero_grad()
        outputs = model(ids_BS, attention_mask=mask_BS, labels=labels_BS)
        outputs.loss.backward()
    expected = plain(ids_BS, attention_mask=mask_BS, labels=labels_BS)
    expected.loss.backward()
    real = mask_BS.bool()
    error = relative(outputs.logits[real], expected.logits[real])
    measured("logits against bf16", error, LOGITS * logit_error)
    assert error > 2 * logit_error, "hardly further off than bf16 is: did FP8 run at all?"
    measured("loss against bf16", abs(outputs.loss.item() - expected.loss.item()), 0.05)
    worst = ("", 0.0, 1.0)
    for parameter_name, parameter in model.named_parameters():
        gradient_error = relative(parameter.grad, plain.get_parameter(parameter_name).grad)
        bound = GRADIENTS * gradient_errors[parameter_name]
        if gradient_error / bound > worst[1] / worst[2]:
            worst = (parameter_name, gradient_error, bound)
    measured(f"gradients against bf16, worst: {worst[0]}", *worst[1:])


@hopper
@blackwell
def test_fp8_is_rounding_to_e4m3(make_llama, measured, fused_attention, monkeypatch):
    """Current scaling against an independent computation: operands rounded to e4m3 with the scale of their maximum."""
    hf = make_llama(num_hidden_layers=1).bfloat16()
    ids_BS, mask_BS = batch()
    model = build(convert_llama_hf_to_te(hf, layer_precision=["fp8"]), fp8_recipe=recipes.Float8CurrentScaling())
    plain = convert_llama_hf_to_te(hf)
    emulated = convert_llama_hf_to_te(hf, layer_implementation="reference")
    linear = torch.nn.functional.linear

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = torch.finfo(torch.float8_e4m3fn).max / x.abs().max().float()
        return ((x.float() * scale).to(torch.float8_e4m3fn).float() / scale).to(x.dtype)

    def rounded_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        is_head = weight.shape[0] == hf.config.vocab_size
        return linear(x, weight, bias) if is_head else linear(rounded(x), rounded(weight), bias)

    real = mask_BS.bool()
    with torch.no_grad():
        fp8 = model(ids_BS, attention_mask=mask_BS).logits[real]
        bf16 = plain(ids_BS, attention_mask=mask_BS).logits[real]
        monkeypatch.setattr(torch.nn.functional, "linear", rounded_linear)
        expected = emulated(ids_BS, attention_mask=mask_BS).logits[real]
    own, emulation = relative(fp8, bf16), relative(expected, bf16)
    measured("size of FP8's error against the emulation's", abs(own / emulation - 1), 0.1)
    # Two unrelated roundings of this size would differ by √2 times the size. These two share most roundings; they
    # differ for numbers with another last bit in bfloat16: TE rounds float32 to FP8, the emulation by way of bfloat16.
    measured("FP8 against the emulation, in sizes of the error", relative(fp8, expected) / own, 0.75)


@hopper
@blackwell
def test_mixed_layers(make_llama, measured, fused_attention):
    """Only the configured layers run in FP8: without such layers the result equals bf16's, bit for bit."""
    hf = make_llama().bfloat16()
    plain = convert_llama_hf_to_te(hf)
    ids = torch.randint(3, 8192, (2, 64), device="cuda")
    errors = []
    with torch.no_grad():
        expected = plain(ids).logits
        for precision in ([None] * 6, [None, None, None, "fp8", None, None], ["fp8"] * 6):
            arguments = {"fp8_recipe": recipes.Float8CurrentScaling()}
            model = build(convert_llama_hf_to_te(hf, layer_precision=precision), **arguments)
            errors.append(relative(model(ids).logits, expected))
    assert errors[0] == 0.0
    assert 0.0 < errors[1] < errors[2]
    # Errors of layers are independent, so six add up to about the square root of six of one.
    measured("one FP8 layer of six, in errors of all six", errors[1] / errors[2], 0.8)


@hopper
@blackwell
def test_fp8_recipe_alone_warns_and_runs_everywhere(make_llama, fused_attention):
    plain = convert_llama_hf_to_te(make_llama(num_hidden_layers=2).bfloat16())
    with pytest.warns(UserWarning, match="without layer_precision"):
        model = build(plain, fp8_recipe=recipes.Float8CurrentScaling())
    ids = torch.randint(3, 8192, (2, 64), device="cuda")
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, plain(ids).logits)


@hopper
@blackwell
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["DelayedScaling", "Float8CurrentScaling"])
def test_quantized_model_init(tied, name, measured, fused_attention):
    fields = {**MODEL, "tie_word_embeddings": tied, "layer_precision": ["fp8"] * 5 + [None]}
    config = NVLlamaConfig(**fields, use_quantized_model_init=True)
    recipe = getattr(recipes, name)()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = NVLlamaForCausalLM(config, fp8_recipe=recipe)
        with torch.device("meta"):
            empty = NVLlamaForCausalLM(config, fp8_recipe=recipe)
        empty.init_empty_weights()
    finally:
        torch.set_default_dtype(torch.float32)
    for built in (model, empty):
        kinds = [type(layer.layernorm_mlp.fc1_weight.data).__name__ for layer in built.model.layers]
        assert kinds[0] == kinds[4] != kinds[5]
        assert "Float8" in kinds[0]
        assert (built.lm_head.weight is built.model.embed_tokens.weight) is tied
        spread = float(built.model.layers[0].layernorm_mlp.fc1_weight.dequantize().float().std())
        measured("spread of quantized weights from 0.03", abs(spread - 0.03), 2e-3)
        ids = torch.randint(3, 8192, (2, 64), device="cuda")
        loss = built(ids, labels=ids).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(built.model.layers[0].layernorm_mlp.fc1_weight.grad).all()
    # A model with FP8 weights alone saves an ordinary checkpoint.
    hf = convert_llama_te_to_hf(model)
    dequantized = model.model.layers[0].layernorm_mlp.fc2_weight.dequantize()
    assert torch.equal(hf.model.layers[0].mlp.down_proj.weight, dequantized)


@hopper
@blackwell
def test_calibration(make_llama, measured, fused_attention):
    """Calibration sees small activations, which a scale of 1 puts among e4m3's coarsest numbers. Weights stay.

    The test divides norms' weights and multiplies the next products' weights, so the model's function stays the same.
    """
    hf = make_llama().bfloat16()
    for layer in hf.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data.mul_(2**-9)
        attention, mlp = layer.self_attn, layer.mlp
        for product in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            product.weight.data.mul_(2**9)
    ids_BS, mask_BS = batch()
    plain = convert_llama_hf_to_te(hf)
    model = build(
        convert_llama_hf_to_te(hf, layer_precision=["fp8"] * 6), fp8_recipe=recipes.DelayedScaling(amax_history_len=4)
    ).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    errors = []
    with torch.no_grad():
        expected = plain(ids_BS, attention_mask=mask_BS).logits[mask_BS.bool()]
        for _ in range(2):
            errors.append(relative(model(ids_BS, attention_mask=mask_BS).logits[mask_BS.bool()], expected))
            calibrate(model, [{"input_ids": ids_BS, "attention_mask": mask_BS}] * 4)
    measured("error with learned scales, as a part of that without", errors[1] / errors[0], 0.5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@hopper
@blackwell
def test_quantized_weights_from_a_checkpoint(make_llama, tmp_path, measured, fused_attention):
    """Converting and loading quantize the weights, and a saved checkpoint is an ordinary one."""
    hf = make_llama(num_hidden_layers=2).bfloat16()
    fields = {"layer_precision": ["fp8", None], "use_quantized_model_init": True}
    converted = convert_llama_hf_to_te(hf, **fields)
    converted.save_pretrained(tmp_path)
    loaded = NVLlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map="cuda", fp8_recipe=recipes.DelayedScaling()
    )
    plain = convert_llama_hf_to_te(hf)
    for model in (converted, loaded):
        kinds = [type(layer.layernorm_mlp.fc1_weight.data).__name__ for layer in model.model.layers]
        assert "Float8" in kinds[0]
        assert kinds[1] == "Tensor"
        weight, wanted = (m.model.layers[0].layernorm_mlp.fc1_weight for m in (model, plain))
        # e4m3 halves the distance of neighbours at most 3 times below the value: 2^-4 at worst, 2^-5 or so on average.
        measured("quantized weight against the checkpoint's", relative(weight.dequantize(), wanted), 2**-4)
        ids = torch.randint(3, 8192, (2, 64), device="cuda")
        with torch.no_grad():
            assert torch.isfinite(model(ids).logits).all()


@hopper
@pytest.mark.parametrize("name", ["MXFP8BlockScaling", "NVFP4BlockScaling"])
def test_blackwell_formats_are_refused(name):
    recipe = getattr(recipes, name)()
    entry, argument = ("fp4", "fp4_recipe") if name.startswith("NVFP4") else ("fp8", "fp8_recipe")
    config = NVLlamaConfig(**MODEL, layer_precision=[entry] * 6)
    with pytest.raises(
        RuntimeError, match=rf"{name} needs compute capability 10\.0.*has 9\.0.*Float8BlockScaling"
    ) as error:
        NVLlamaForCausalLM(config, **{argument: recipe})
    assert torch.cuda.get_device_name() in str(error.value)


@blackwell
def test_nvfp4_forward_and_backward(make_llama, measured, fused_attention):
    """This test has never run, for lack of a Blackwell GPU. The last layers stay out of FP4, as TE recommends."""
    hf = make_llama().bfloat16()
    plain = convert_llama_hf_to_te(hf)
    model = build(
        convert_llama_hf_to_te(hf, layer_precision=["fp4"] * 4 + ["fp8", None]),
        fp8_recipe=recipes.MXFP8BlockScaling(),
        fp4_recipe=recipes.NVFP4BlockScaling(),
    )
    ids = torch.randint(3, 8192, (2, 128), device="cuda")
    outputs, expected = model(ids, labels=ids), plain(ids, labels=ids)
    outputs.loss.backward()
    # e2m1 has one bit of mantissa, bfloat16 has seven. Block scales recover part of the difference.
    measured("logits against bf16", relative(outputs.logits, expected.logits), 0.7)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@hopper
@blackwell
def test_token_count_is_refused_with_what_to_pad_to(make_llama):
    plain = convert_llama_hf_to_te(
        make_llama(num_hidden_layers=2).bfloat16(), layer_precision=["fp8"] * 2, attn_input_format="bshd"
    )
    model = build(plain, fp8_recipe=recipes.Float8CurrentScaling())
    with pytest.raises(ValueError, match=r"21 tokens.*multiples of 16: pad to 32"):
        model(torch.randint(3, 8192, (3, 7), device="cuda"))
    with torch.no_grad():
        assert torch.isfinite(model(torch.randint(3, 8192, (1, 8), device="cuda")).logits).all()


@hopper
@blackwell
def test_packing_pads_for_fp8_by_itself(make_llama, measured, fused_attention):
    hf = make_llama(num_hidden_layers=2)
    ids = torch.randint(3, 8192, (3, 7), device="cuda")
    logit_error, _ = bfloat16_errors(hf, ids, torch.ones_like(ids), ids)
    hf = hf.bfloat16()
    model = build(convert_llama_hf_to_te(hf, layer_precision=["fp8"] * 2), fp8_recipe=recipes.Float8CurrentScaling())
    plain = convert_llama_hf_to_te(hf)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    with torch.no_grad():
        measured("logits against bf16", relative(outputs.logits, plain(ids).logits), LOGITS * logit_error)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
