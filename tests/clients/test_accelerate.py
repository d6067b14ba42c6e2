"""accelerate prepares, trains, generates with, saves and dispatches both models alike.

Bound: see `conftest.BOUND`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from clients.conftest import BOUND, Pair, training_collator

TEXTS = ["The sky is blue.", "Two and two make four, as everybody knows.", "Yes.", "Fire is hot and water is wet."]


@pytest.fixture(autouse=True)
def _fresh_state() -> Any:
    """Let each test choose its mixed precision anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerator_for(mixed_precision: str, **arguments: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision=mixed_precision, **arguments)


def train(model: PreTrainedModel, tokenizer: Any, mixed_precision: str) -> tuple[list[float], PreTrainedModel]:
    """Train for three steps of two accumulated batches; return the losses and the prepared model."""
    accelerator = accelerator_for(mixed_precision, gradient_accumulation_steps=2)
    samples = [tokenizer(text) for text in TEXTS * 3]
    loader = DataLoader(samples, batch_size=2, collate_fn=training_collator(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prepared, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    losses = []
    for batch in loader:
        with accelerator.accumulate(prepared):
            output = prepared(**batch)
            assert output.logits.dtype == torch.float32
            accelerator.backward(output.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(output.loss.item())
    return losses, prepared


def test_training_in_float32(pair: Pair, tokenizer: Any) -> None:
    (expected, _), (ours, _) = (train(model, tokenizer, "no") for model in pair)
    assert len(ours) == 6 and expected[0] - expected[5] > 0.1
    assert ours == pytest.approx(expected, abs=BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 weights", "bfloat16 weights"])
def test_mixed_precision(dtype: torch.dtype, make_pair: Any, tokenizer: Any) -> None:
    """Accelerate computes under autocast and makes all outputs float32, the cache included."""
    pair = make_pair(dtype=dtype)
    (expected, hf), (ours, te) = (train(model, tokenizer, "bf16") for model in pair)
    assert ours == pytest.approx(expected, abs=2e-2)  # measured: 4e-3
    inputs = tokenizer(["The sky is", "Two and two make"], return_tensors="pt", padding=True)
    texts = []
    for model in (hf, te):
        ids = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
        output = model(**inputs, use_cache=True)
        assert output.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
        texts.append(tokenizer.batch_decode(ids))
    assert texts[1] == texts[0]


def test_state_saved_and_loaded(pair: Pair, tokenizer: Any) -> None:
    accelerator = accelerator_for("no")
    model = accelerator.prepare(pair.te)
    accelerator.save_state("state")
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state("state")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    accelerator.unwrap_model(model).save_pretrained("saved", save_function=accelerator.save)
    ids = tokenizer("The sky", return_tensors="pt")["input_ids"]
    again = AutoModelForCausalLM.from_pretrained("saved")(ids).logits
    assert torch.equal(again, pair.te(ids).logits)
    assert torch.allclose(again, pair.hf(ids).logits, atol=BOUND)


@pytest.mark.parametrize("way", ["cpu_offload", "load_checkpoint_and_dispatch", "device_map"])
def test_weights_elsewhere(way: str, pair: Pair, folders: tuple[Path, Path], tokenizer: Any) -> None:
    """Hooks bring a module's weights when the module runs."""
    folder = folders[1]
    if way == "cpu_offload":
        model = cpu_offload(pair.te, execution_device=torch.device("cpu"))
    elif way == "device_map":
        model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    else:
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= {"model.norm": "cpu", "lm_head": "cpu"}
        model = load_checkpoint_and_dispatch(
            empty,
            folder,
            device_map=places,
            offload_folder="offloaded",
            no_split_module_classes=empty._no_split_modules,
        )
    inputs = tokenizer(["The sky is", "Two and two make"], return_tensors="pt", padding=True)
    hf = AutoModelForCausalLM.from_pretrained(folders[0])
    with torch.no_grad():
        mask = inputs["attention_mask"].bool()
        assert torch.allclose(model(**inputs).logits[mask], hf(**inputs).logits[mask], atol=BOUND)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), hf.generate(**inputs, **options))
