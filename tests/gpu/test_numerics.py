"""Transformer Engine layers against the reference layers and against transformers.

Bounds: bfloat16 rounds at 2^-9 ≈ 0.002 relative, and every implementation rounds in its own places. So an
implementation must be as close to a float32 run as transformers' own bfloat16 model. `NO_WORSE` allows a quarter more
for the order of summation.
"""

from __future__ import annotations

import pytest
import torch

from gpu.small_llama import LENGTHS, batch, relative
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]

NO_WORSE = 1.25


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": 16},
        {"num_key_value_heads": 1},
        {"head_dim": 128},
        {"head_dim": 96},
        {"head_dim": 80},
        {"head_dim": 256, "num_attention_heads": 8},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["gqa", "mha", "mqa", "dim128", "dim96", "dim80", "dim256", "tied", "yarn", "llama3"],
)
@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
def test_logits(fields, attn_input_format, make_llama, measured, fused_attention):
    exact = make_llama(**fields)
    ids_BS, mask_BS = batch(left=attn_input_format == "bshd")
    real = mask_BS.bool()
    with torch.no_grad():
        exact_logits = exact(ids_BS, attention_mask=mask_BS).logits[real]
        hf = exact.bfloat16()
        te = convert_llama_hf_to_te(hf, attn_input_format=attn_input_format)
        reference = convert_llama_hf_to_te(hf, attn_input_format=attn_input_format, layer_implementation="reference")
        hf_error = relative(hf(ids_BS, attention_mask=mask_BS).logits[real], exact_logits)
        te_logits = te(ids_BS, attention_mask=mask_BS).logits[real]
        reference_logits = reference(ids_BS, attention_mask=mask_BS).logits[real]
    assert type(te.model.layers[0]).__module__.startswith("transformer_engine")
    measured(
        "TE bf16 against float32, bound: transformers bf16", relative(te_logits, exact_logits), NO_WORSE * hf_error
    )
    measured("reference bf16 against float32", relative(reference_logits, exact_logits), NO_WORSE * hf_error)
    # Two roundings of the same numbers differ by at most the sum of their errors.
    measured("TE bf16 against reference bf16", relative(te_logits, reference_logits), 2 * NO_WORSE * hf_error)


def test_loss_and_gradients(make_llama, measured, fused_attention):
    exact = make_llama(num_hidden_layers=3)
    ids_BS, mask_BS = batch()
    labels_BS = ids_BS.masked_fill(mask_BS == 0, -100)
    te_exact = convert_llama_hf_to_te(exact, layer_implementation="reference")
    hf = exact.bfloat16()
    te = convert_llama_hf_to_te(hf)
    reference = convert_llama_hf_to_te(hf, layer_implementation="reference")
    losses = {}
    for name, model in (("exact", te_exact), ("te", te), ("reference", reference)):
        losses[name] = model(ids_BS, attention_mask=mask_BS, labels=labels_BS).loss
        losses[name].backward()
    measured("loss of TE bf16 against float32", abs(losses["te"].item() - losses["exact"].item()), 0.01)
    gradients = {name: parameter.grad for name, parameter in te_exact.named_parameters()}
    for name, parameter in te.named_parameters():
        own = relative(reference.get_parameter(name).grad, gradients[name])
        # A norm's weight has few elements and a gradient that nearly cancels, so allow an absolute rounding error too.
        measured(
            f"gradient of {name}, bound: reference bf16", relative(parameter.grad, gradients[name]), 1.5 * own + 2e-3
        )


@pytest.mark.parametrize("mask_type", ["padding_causal", "causal"])
def test_thd_equals_bshd(mask_type, make_llama, measured, fused_attention):
    hf = make_llama().bfloat16()
    ids_BS, mask_BS = batch(left=True)
    packed = convert_llama_hf_to_te(hf)
    padded = convert_llama_hf_to_te(hf, attn_input_format="bshd", self_attn_mask_type=mask_type)
    with torch.no_grad():
        logits = [model(ids_BS, attention_mask=mask_BS).logits[mask_BS.bool()] for model in (packed, padded)]
    measured("thd against bshd", relative(*logits), 0.02)


@pytest.mark.parametrize("between", [False, True], ids=["packed", "padding between"])
def test_packed_sequences(between, make_llama, measured, fused_attention):
    """Packed sequences give the same results as each sequence alone, with and without padding between them."""
    te = convert_llama_hf_to_te(make_llama().bfloat16())
    ids_BS, _ = batch()
    rows = [ids_BS[row, :length] for row, length in enumerate(LENGTHS)]
    multiple = 16 if between else 1
    padded = [torch.nn.functional.pad(row, (0, -len(row) % multiple)) for row in rows]
    cu, cu_padded = (
        torch.tensor([0, *(len(row) for row in part)], device="cuda").cumsum(0).int() for part in (rows, padded)
    )
    arguments = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 128, "max_length_k": 128}
    if between:
        arguments |= {"cu_seq_lens_q_padded": cu_padded, "cu_seq_lens_k_padded": cu_padded, "pad_between_seqs": True}
    labels = torch.cat(padded)[None].clone()
    outputs = te(torch.cat(padded)[None], labels=labels, **arguments)
    outputs.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in te.parameters())
    with torch.no_grad():
        for row, start in zip(rows, cu_padded.tolist(), strict=False):
            alone = te(row[None]).logits[0]
            together = outputs.logits[0, start : start + len(row)]
            measured(f"packed against alone, {len(row)} tokens", relative(together, alone), 0.02)


def test_meta_init(measured, fused_attention):
    with torch.device("meta"):
        model = NVLlamaForCausalLM(
            NVLlamaConfig(
                hidden_size=512,
                intermediate_size=1024,
                num_hidden_layers=2,
                num_attention_heads=8,
                vocab_size=1024,
                tie_word_embeddings=True,
            )
        )
    model.init_empty_weights()
    model = model.bfloat16()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    qkv = model.model.layers[1].self_attention.layernorm_qkv
    assert torch.equal(qkv.layer_norm_weight, torch.ones_like(qkv.layer_norm_weight))
    measured("spread of QKV weights from 0.02", abs(float(qkv.weight.float().std()) - 0.02), 1e-3)
    ids = torch.randint(0, 1024, (2, 64), device="cuda")
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_checkpoints_keep_no_extra_state(make_llama, tmp_path, fused_attention):
    te = convert_llama_hf_to_te(make_llama(num_hidden_layers=2).bfloat16())
    assert not [name for name in te.state_dict() if "extra_state" in name]
    te.load_state_dict(te.state_dict(), strict=True)
    te.save_pretrained(tmp_path, max_shard_size="20MB")
    again = NVLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cuda")
    assert type(again.model.layers[0]).__module__.startswith("transformer_engine")
    for (name, x), y in zip(te.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    ids = torch.randint(3, 8192, (2, 40), device="cuda")
    with torch.no_grad():
        assert torch.equal(te(ids).logits, again(ids).logits)


@pytest.mark.parametrize("recipe", [None, "DelayedScaling", "Float8CurrentScaling"])
def test_gradient_checkpointing(recipe, make_llama, measured, fused_attention):
    from transformer_engine.common import recipe as recipes

    hf = make_llama(num_hidden_layers=2).bfloat16()
    arguments = {} if recipe is None else {"layer_precision": ["fp8", "fp8"]}
    gradients = []
    for checkpointing in (False, True):
        plain = convert_llama_hf_to_te(hf, **arguments)
        model = NVLlamaForCausalLM(plain.config, fp8_recipe=None if recipe is None else getattr(recipes, recipe)())
        model.to(device="cuda", dtype=torch.bfloat16).load_state_dict(plain.state_dict())
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.randint(3, 8192, (2, 64), generator=torch.Generator().manual_seed(0)).cuda()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    worst = max(relative(x, y) for x, y in zip(*gradients, strict=True))
    measured("gradients with against without checkpointing", worst, 1e-3)
