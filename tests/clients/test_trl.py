"""TRL's trainers log the same numbers for both models.

Bound: see `conftest.BOUND`, for losses; gradient norms are compared relative to their size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from clients.conftest import BOUND, Pair, history
from llama_te_core.lora import on_weights

TEXTS = ["The sky is blue.", "Two and two make four, as everybody knows.", "Yes.", "Fire is hot and water is wet."]
SETTINGS: dict[str, Any] = {
    "output_dir": "trained",
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def logs_of(trainer: Any, *names: str) -> dict[str, list[float]]:
    """Train, and return what the trainer logged."""
    trainer.train()
    logs = {name: history(trainer, name) for name in names}
    assert all(len(values) == 3 for values in logs.values()), logs
    return logs


def assert_same(
    ours: dict[str, list[float]], expected: dict[str, list[float]], bound: float = BOUND, relative: float = 0
) -> None:
    for name, values in expected.items():
        allowed = max(relative, 1e-3) if name == "grad_norm" else relative
        assert ours[name] == pytest.approx(values, abs=bound, rel=allowed), name


def fine_tune(model: Any, tokenizer: Any, data: Dataset, **settings: Any) -> dict[str, list[float]]:
    trainer = SFTTrainer(model, args=SFTConfig(**SETTINGS | settings), train_dataset=data, processing_class=tokenizer)
    return logs_of(trainer, "loss", "grad_norm", "mean_token_accuracy", "entropy")


@pytest.mark.parametrize(
    "settings",
    [{}, {"padding_free": True, "max_length": None}, {"gradient_checkpointing": True}],
    ids=["padded", "padding free", "checkpointing"],
)
def test_sft_on_texts(settings: dict[str, Any], pair: Pair, tokenizer: Any) -> None:
    data = Dataset.from_dict({"text": TEXTS * 4})
    # The oracle computes padded batches in all cases.
    expected = fine_tune(pair.hf, tokenizer, data, gradient_accumulation_steps=2)
    assert_same(fine_tune(pair.te, tokenizer, data, gradient_accumulation_steps=2, **settings), expected)


def test_sft_on_packed_rows(pair: Pair, tokenizer: Any) -> None:
    settings = {"packing": True, "max_length": 64}
    data = Dataset.from_dict({"text": TEXTS * 8})
    assert_same(fine_tune(pair.te, tokenizer, data, **settings), fine_tune(pair.hf, tokenizer, data, **settings))


def test_sft_on_the_answers_of_chats(pair: Pair, tokenizer: Any) -> None:
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in (("2+2?", "Four."), ("Is the sky blue?", "Yes, on most days."))
    ]
    data = Dataset.from_dict({"messages": chats * 6})
    settings = {"assistant_only_loss": True, "max_length": None}
    expected = fine_tune(pair.hf, tokenizer, data, **settings)
    assert_same(fine_tune(pair.te, tokenizer, data, padding_free=True, **settings), expected)


def prefer(model: Any, tokenizer: Any, **arguments: Any) -> dict[str, list[float]]:
    rows = [("The sky is", " blue", " made of stone"), ("Two and two make", " four", " five"), ("Fire is", " hot", "")]
    names = ("prompt", "chosen", "rejected")
    data = Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows * 4])
    args = DPOConfig(**SETTINGS | {"beta": 0.1})
    trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, **arguments)
    return logs_of(trainer, "loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")


def test_dpo_from_folders(folders: tuple[Path, Path], tokenizer: Any) -> None:
    """The trainer loads the model and its reference by the folder's name."""
    expected, ours = (prefer(str(folder), tokenizer) for folder in folders)
    assert_same(ours, expected, bound=1e-3)  # log-probabilities of tens of tokens, near 100
    assert expected["loss"][2] != pytest.approx(expected["loss"][0], abs=1e-2), "nothing was learned"


def test_dpo_with_an_adapter(pair: Pair, tokenizer: Any) -> None:
    """The reference is the model without its adapter. These two projections are the same in both layouts."""
    options = {"r": 4, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    expected = prefer(pair.hf, tokenizer, peft_config=LoraConfig(target_modules=["o_proj", "down_proj"], **options))
    weights = ["self_attention.proj.weight", "layernorm_mlp.fc2_weight"]
    torch.manual_seed(0)
    ours = prefer(pair.te, tokenizer, peft_config=on_weights(LoraConfig(target_parameters=weights, **options)))
    assert_same(ours, expected, bound=1e-3)
    assert expected["rewards/margins"][0] == 0 != expected["rewards/margins"][2]


def reward_letters(completions: list[str], **columns: Any) -> list[float]:
    """Reward the share of small letters in each text."""
    return [sum(letter.islower() for letter in text) / (1 + len(text)) for text in completions]


def reinforce(model: Any, tokenizer: Any, **settings: Any) -> tuple[dict[str, list[float]], list[list[str]]]:
    texts: list[list[str]] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        texts.append(list(completions))
        return reward_letters(completions)

    options = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 8, "beta": 0.05}
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(**SETTINGS | options | settings),
        train_dataset=Dataset.from_dict({"prompt": ["The sky is", "Two and two make", "Yes, because"] * 2}),
        processing_class=tokenizer,
    )
    return logs_of(trainer, "loss", "grad_norm", "reward", "kl", "completions/mean_length"), texts


def test_grpo_from_folders(folders: tuple[Path, Path], tokenizer: Any) -> None:
    """Both sample with the same seed, so that the same logits give the same texts."""
    (expected, expected_texts), (ours, texts) = (reinforce(str(folder), tokenizer) for folder in folders)
    assert texts == expected_texts
    assert len(set(expected_texts[0])) > 1
    assert_same(ours, expected)


def test_grpo_with_its_default_autocast(folders: tuple[Path, Path], tokenizer: Any) -> None:
    """GRPOTrainer computes float32 weights under bfloat16 autocast, generation included.

    Both models round. Transformers' numbers differ from those in float32 by up to 4 percent, ours by up to 3.
    """
    (expected, expected_texts), (ours, texts) = (
        reinforce(str(folder), tokenizer, bf16=True, gradient_checkpointing=True) for folder in folders
    )
    assert texts == expected_texts
    assert_same(ours, expected, relative=0.04)
