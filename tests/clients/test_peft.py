"""PEFT adapts both models alike.

Bound: see `conftest.BOUND`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from clients.conftest import BOUND, Pair, history, training_collator
from llama_te_convert.cli import main as convert
from llama_te_core.lora import on_weights

TEXTS = ["The sky is blue.", "Two and two make four, as everybody knows.", "Yes.", "Fire is hot and water is wet."]
PROMPTS = ["The sky is", "Two and two make"]
# These two projections are the same in both layouts, so the adapters are the same too.
HF_MODULES = ["o_proj", "down_proj"]
TE_WEIGHTS = ["self_attention.proj.weight", "layernorm_mlp.fc2_weight"]


def adapted(pair: Pair, **options: Any) -> list[PeftModel]:
    """Give both models an adapter with the same random numbers."""
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    configs = [LoraConfig(target_modules=HF_MODULES, **options)]
    configs.append(on_weights(LoraConfig(target_parameters=TE_WEIGHTS, **options)))
    models = []
    for model, config in zip(pair, configs, strict=True):
        torch.manual_seed(0)
        models.append(get_peft_model(model, config))
    return models


def train(model: Any, tokenizer: Any) -> list[float]:
    settings: dict[str, Any] = {"output_dir": "trained", "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(per_device_train_batch_size=2, **settings),
        train_dataset=[tokenizer(text) for text in TEXTS * 2],
        data_collator=training_collator(tokenizer),
    )
    trainer.train()
    losses = history(trainer)
    assert len(losses) == 3
    return losses


def test_lora_trains_saves_loads_and_merges(pair: Pair, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    mask, options = inputs["attention_mask"].bool(), {"max_new_tokens": 12, "do_sample": False}
    hf, te = adapted(pair)
    assert te.get_nb_trainable_parameters()[0] == hf.get_nb_trainable_parameters()[0]
    assert train(te, tokenizer) == pytest.approx(train(hf, tokenizer), abs=BOUND)
    expected, wanted = hf(**inputs).logits[mask], hf.generate(**inputs, **options)
    assert torch.allclose(te(**inputs).logits[mask], expected, atol=1e-3)
    assert torch.equal(te.generate(**inputs, **options), wanted)
    with hf.disable_adapter(), te.disable_adapter():
        assert torch.allclose(te(**inputs).logits[mask], hf(**inputs).logits[mask], atol=BOUND)
        assert not torch.allclose(te(**inputs).logits[mask], expected, atol=1e-2)
    te.save_pretrained("adapter")
    merged = te.merge_and_unload()
    assert torch.allclose(merged(**inputs).logits[mask], expected, atol=1e-3)
    assert torch.equal(merged.generate(**inputs, **options), wanted)


def test_an_adapter_of_all_weights_goes_to_hugging_face(folders: tuple[Path, Path], tokenizer: Any) -> None:
    """`adapter-to-hf` gives an adapter with which transformers' Llama computes the same."""
    hf, te = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    te = get_peft_model(te, on_weights(LoraConfig(r=4, task_type="CAUSAL_LM")))
    train(te, tokenizer)
    te.save_pretrained("adapter")
    assert convert(["adapter-to-hf", "adapter", "adapter-hf", "--base", str(folders[0])]) == 0
    hf = PeftModel.from_pretrained(hf, "adapter-hf")
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    mask = inputs["attention_mask"].bool()
    assert torch.allclose(te.eval()(**inputs).logits[mask], hf(**inputs).logits[mask], atol=1e-3)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(te.generate(**inputs, **options), hf.generate(**inputs, **options))


def test_prompt_tuning(pair: Pair, tokenizer: Any) -> None:
    """Virtual tokens stand before each text, in training and in generation."""
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    models = []
    for model in pair:
        torch.manual_seed(0)
        models.append(get_peft_model(model, config))
    hf, te = models
    assert train(te, tokenizer) == pytest.approx(train(hf, tokenizer), abs=BOUND)
    # One row: PEFT puts virtual tokens before padding on the left, and transformers' Llama counts the gap as positions.
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False}
    # The oracle has no cache: PEFT 0.21 looks for `past_key_values`, which transformers 5.24 calls `cache`, and so puts
    # the virtual tokens before each new token of transformers' Llama.
    expected = hf.generate(**inputs, **options, use_cache=False)
    for use_cache in (False, True):
        assert torch.equal(te.generate(**inputs, **options, use_cache=use_cache), expected)


def test_all_linear_means_all_projections(pair: Pair) -> None:
    """`target_modules="all-linear"` adapts every projection."""
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    hf = get_peft_model(pair.hf, LoraConfig(**options))
    te = get_peft_model(pair.te, LoraConfig(**options))
    # The fused weights share one A, so the adapter is somewhat smaller.
    assert te.get_nb_trainable_parameters()[0] > 0.6 * hf.get_nb_trainable_parameters()[0]
