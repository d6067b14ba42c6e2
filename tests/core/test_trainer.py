"""transformers' Trainer gives the same results on our models as on transformers' own Llama, also with packed batches.

Bound: the difference in float32 losses after a few steps of AdamW with another order of summation. Measured: 1e-5.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, PreTrainedModel, Trainer

from core.trainers import PACKED, PADDED, TOKENIZER, history, make_trainer, samples
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core import DataCollatorWithFlattening, NVLlamaForCausalLM

BOUND = 1e-4


@pytest.fixture(params=["thd", "bshd", "packed"])
def way(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Return the format of the layers, and the collator."""
    return ("thd", PACKED) if request.param == "packed" else (request.param, PADDED)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 2},  # num_items_in_batch: batches of different lengths
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"label_smoothing_factor": 0.1},
    ],
    ids=["plain", "accumulation", "checkpointing", "reentrant checkpointing", "label smoothing"],
)
def test_losses_are_those_of_transformers(
    way: tuple[str, Any], arguments: dict[str, Any], tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    attn_input_format, collator = way
    hf = tiny_llama()
    te = convert_llama_hf_to_te(hf, attn_input_format=attn_input_format)
    expected = make_trainer(hf, tmp_path, PADDED, **arguments)
    trainer = make_trainer(te, tmp_path, collator, **arguments)
    for each in (expected, trainer):
        each.train()
    assert history(trainer) == pytest.approx(history(expected), abs=BOUND)
    assert history(trainer, "grad_norm") == pytest.approx(history(expected, "grad_norm"), rel=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], abs=BOUND)


def test_saves_resumes_and_loads_the_best(way: tuple[str, Any], tiny_llama, tmp_path: Path) -> None:
    attn_input_format, collator = way

    def fresh(folder: str) -> Trainer:
        model = convert_llama_hf_to_te(tiny_llama(), attn_input_format=attn_input_format)
        # "Best" means the highest loss here, so that the last checkpoint is not the best.
        options = {"max_steps": 6, "load_best_model_at_end": True, "greater_is_better": True}
        every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
        return make_trainer(model, tmp_path / folder, collator, **options, **every)

    whole = fresh("whole")
    whole.train()
    evaluated = history(whole, "eval_loss")
    best = max(evaluated)
    assert evaluated[-1] < best - 1e-2, "the last is as good: nothing to load"
    assert whole.state.best_metric == best
    assert whole.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)

    resumed = fresh("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert history(resumed)[-2:] == history(whole)[-2:]

    saved = NVLlamaForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    state = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    assert make_trainer(saved, tmp_path, collator).evaluate()["eval_loss"] == pytest.approx(evaluated[-1], abs=1e-6)
    assert state["global_step"] == 6


def test_predicts(way: tuple[str, Any], tiny_llama, tmp_path: Path) -> None:
    attn_input_format, collator = way
    model = convert_llama_hf_to_te(tiny_llama(), attn_input_format=attn_input_format)
    output = make_trainer(model, tmp_path, collator).predict(samples(8))
    assert output.predictions.shape[:2] == output.label_ids.shape
    assert output.predictions.shape[2] == 257


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_a_step_of_several_batches_is_a_step_of_one_large(kind: str, packed: bool, tiny_llama, tmp_path: Path) -> None:
    data = samples()
    for number, sample in enumerate(data):
        tokens = [token % 3 for token in sample["input_ids"]]
        sample["labels"] = number % 3 if kind == "SequenceClassification" else tokens
    of_tokens = kind == "TokenClassification"
    collator: Any = DataCollatorForTokenClassification(TOKENIZER) if of_tokens else DataCollatorWithPadding(TOKENIZER)
    if packed:
        collator = DataCollatorWithFlattening(collator, separator_id=None)
    runs = []
    for rows, batches in ((8, 1), (4, 2)):
        hf = tiny_llama(getattr(transformers, f"LlamaFor{kind}"), num_labels=3, classifier_dropout=0.0)
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batches, "max_steps": 3}
        trainer = make_trainer(convert_llama_hf_to_te(hf), tmp_path, collator, data, **sizes)
        trainer.train()
        runs.append(history(trainer))
    assert runs[1] == pytest.approx(runs[0], abs=BOUND)
