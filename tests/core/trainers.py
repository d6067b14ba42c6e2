"""transformers' Trainers for tests, and their training data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer, TrainingArguments

from llama_te_core import DataCollatorWithFlattening

TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>"
)
PADDED = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
PACKED = DataCollatorWithFlattening(PADDED)


def samples(count: int = 24) -> list[dict[str, Any]]:
    """Make sequences of 3 to 19 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    texts = [torch.randint(3, 257, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts]


def make_trainer(
    model: nn.Module, folder: Path, collator: Any, data: list[dict[str, Any]] | None = None, **arguments: Any
) -> Trainer:
    data = samples() if data is None else data
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings | arguments),
        train_dataset=data,
        eval_dataset=data[:8],
        data_collator=collator,
    )


def history(trainer: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
