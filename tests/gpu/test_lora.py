"""LoRA by PEFT on the weights of Transformer Engine layers: an adapter's results, gradients and merged weights.

The oracle is the same adapter on reference layers in float32. The bound for results is the error of layers without an
adapter; for gradients it is the error of reference layers in bfloat16. e5m2 rounds 32 times as coarsely.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from gpu.small_llama import MODEL, batch, relative
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core.lora import on_weights

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]

NO_WORSE = 1.25
Measured = Callable[[str, float, float], None]


def adapted(hf: LlamaForCausalLM, dtype: torch.dtype, config: LoraConfig | None = None, **fields: Any) -> PeftModel:
    """Add an adapter with nonzero weights, the same for all layer implementations."""
    base = convert_llama_hf_to_te(hf, **fields).to(dtype)
    if config is None:
        config = on_weights(LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    model = get_peft_model(base, config)
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:  # DoRA's magnitudes stay the weights' norms
                parameter.copy_(torch.randn(parameter.shape, device="cuda", generator=generator) * 0.05)
    return model


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {} if request.param == "bf16" else {"layer_precision": ["fp8"] * MODEL["num_hidden_layers"]}


@pytest.mark.parametrize("precision", ["bf16", "fp8"], indirect=True)
def test_logits_and_gradients(precision: dict[str, Any], make_llama, measured: Measured, fused_attention) -> None:
    hf = make_llama()
    ids_BS, mask_BS = batch()
    arguments = {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": ids_BS.masked_fill(mask_BS == 0, -100)}
    real = mask_BS.bool()

    def logits_of(model: Any) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids_BS, attention_mask=mask_BS).logits[real]
        return logits

    exact = adapted(hf, torch.float32, layer_implementation="reference")
    rounded = adapted(hf, torch.bfloat16, layer_implementation="reference")
    model = adapted(hf, torch.bfloat16, **precision)
    for each in (exact, rounded, model):
        each(**arguments).loss.backward()
    expected, logits = logits_of(exact), logits_of(model)
    with exact.disable_adapter(), model.disable_adapter():
        plain, plain_logits = logits_of(exact), logits_of(model)
    alone = relative(plain_logits, plain)
    assert relative(expected, plain) > 5 * alone, "the adapter is lost in the layers' own errors"
    measured("logits against float32, bound: the layers' without adapter", relative(logits, expected), 2 * alone)

    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(learning) == 2 * 4 * MODEL["num_hidden_layers"]
    errors = {}
    for name in learning:
        gradient, in_bf16, in_fp32 = (each.get_parameter(name).grad for each in (model, rounded, exact))
        errors[name] = (relative(gradient, in_fp32), (32 if precision else NO_WORSE) * relative(in_bf16, in_fp32))
    worst = max(errors, key=lambda name: errors[name][0] / errors[name][1])
    measured(f"gradients against float32, worst: {worst}", *errors[worst])

    merged = model.merge_and_unload()
    measured("merged, logits against the adapter's", relative(logits_of(merged), logits), 2 * NO_WORSE * alone)


@pytest.mark.parametrize("precision", ["bf16", "fp8"], indirect=True)
def test_the_adapter_alone_learns(precision: dict[str, Any], make_llama, measured: Measured) -> None:
    hf = make_llama(num_hidden_layers=2)
    precision = {name: value[:2] for name, value in precision.items()}
    ids_BS, mask_BS = batch()
    labels_BS = ids_BS.masked_fill(mask_BS == 0, -100)
    losses = {}
    for name, dtype, fields in (
        ("exact", torch.float32, {"layer_implementation": "reference"}),
        ("te", torch.bfloat16, precision),
    ):
        model = adapted(hf, dtype, **fields)
        before = {key: weight.clone() for key, weight in model.named_parameters() if not weight.requires_grad}
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
        losses[name] = []
        for _ in range(20):
            loss = model(input_ids=ids_BS, attention_mask=mask_BS, labels=labels_BS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
        assert all(torch.equal(weight, before[key]) for key, weight in model.named_parameters() if key in before)
    assert losses["exact"][-1] < losses["exact"][0] - 0.5
    falls = {name: values[0] - values[-1] for name, values in losses.items()}
    missing = abs(falls["te"] / falls["exact"] - 1)
    measured("fall of the loss in 20 steps, relative difference from float32", missing, 0.1 if precision else 0.01)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"], indirect=True)
def test_projections(precision, use_dora: bool, make_llama, measured: Measured, fused_attention) -> None:
    """Adapters of transformers' projections, against reference layers in float32, which other tests hold to PEFT."""
    hf = make_llama()
    ids_BS, mask_BS = batch()
    real = mask_BS.bool()
    options = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}

    def make(dtype: torch.dtype, **fields: Any) -> PeftModel:
        return adapted(hf, dtype, LoraConfig(**options, use_dora=use_dora), **fields)

    def logits_of(model: Any) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids_BS, attention_mask=mask_BS).logits[real]
        return logits

    exact, rounded = (make(dtype, layer_implementation="reference") for dtype in (torch.float32, torch.bfloat16))
    model = make(torch.bfloat16, **precision)
    expected, logits = logits_of(exact), logits_of(model)
    with exact.disable_adapter(), model.disable_adapter():
        plain, plain_logits = logits_of(exact), logits_of(model)
    alone = relative(plain_logits, plain)
    assert relative(expected, plain) > 5 * alone, "the adapter is lost in the layers' own errors"
    measured("logits against float32, bound: the layers' without adapter", relative(logits, expected), 2 * alone)
    labels_BS = ids_BS.masked_fill(mask_BS == 0, -100)
    for each in (exact, rounded, model):
        each(input_ids=ids_BS, attention_mask=mask_BS, labels=labels_BS).loss.backward()
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(learning) == (3 if use_dora else 2) * 7 * MODEL["num_hidden_layers"]
    errors = {}
    for name in learning:
        gradient, in_bf16, in_fp32 = (each.get_parameter(name).grad for each in (model, rounded, exact))
        errors[name] = (relative(gradient, in_fp32), (32 if precision else NO_WORSE) * relative(in_bf16, in_fp32))
    worst = max(errors, key=lambda name: errors[name][0] / errors[name][1])
    measured(f"gradients against float32, worst: {worst}", *errors[worst])
    ids = model.generate(ids_BS[:1], attention_mask=mask_BS[:1], max_new_tokens=4, do_sample=False)
    assert ids.shape[1] == ids_BS.shape[1] + 4
    merged = model.merge_and_unload()
    measured("merged, logits against the adapter's", relative(logits_of(merged), logits), 2 * NO_WORSE * alone)
