"""Two models with the same weights for each client library: transformers' own Llama, the oracle, and ours."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import DataCollatorForLanguageModeling, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llama_te_convert import convert_llama_hf_to_te

# wandb and the like would otherwise look for an account.
os.environ.setdefault("WANDB_DISABLED", "true")

# Differences of float32 numbers after a few steps with another order of summation. Measured: 2e-5.
BOUND = 1e-4

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Pair(NamedTuple):
    """A model of transformers and its conversion."""

    hf: PreTrainedModel
    te: PreTrainedModel


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test write into a folder of its own: clients write logs and caches into the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with Llama 3's parts: ByteLevel, a beginning of sequence, a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


@pytest.fixture
def make_pair(tiny_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Callable[..., Pair]:
    """Return a function that makes the two models, with the given fields of the conversion."""

    def make(
        model_class: type[PreTrainedModel] = LlamaForCausalLM,
        hf_fields: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        **te_fields: Any,
    ) -> Pair:
        fields = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "num_hidden_layers": 2}
        hf = tiny_llama(model_class, **fields | (hf_fields or {})).to(dtype)
        return Pair(hf, convert_llama_hf_to_te(hf, **te_fields))

    return make


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """Return the two models in float32."""
    return make_pair()


@pytest.fixture
def folders(pair: Pair, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> tuple[Path, Path]:
    """Return the folders of the two models' checkpoints, with their tokenizer."""
    for name, model in pair._asdict().items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / "hf", tmp_path / "te"


def training_collator(tokenizer: PreTrainedTokenizerFast) -> DataCollatorForLanguageModeling:
    """Return a collator of batches with padding on the right.

    Padding on the left would give other losses: transformers' Llama predicts a sequence's first token from padding, and
    ours leaves that prediction out.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def history(trainer: Any, name: str = "loss") -> list[float]:
    """Return what a Trainer logged under a name."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
