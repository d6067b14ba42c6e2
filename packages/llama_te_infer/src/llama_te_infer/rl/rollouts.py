"""Completions for TRL's `GRPOTrainer`, by an engine on the model that it trains.

Written for TRL 1.16, of whose trainer it reads public attributes alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..engine.live_engine import LiveEngine
from ..sampling_params import SamplingParams

Rollout = Callable[[list[Any], Any], dict[str, list[Any]]]


def rollout_func(*, dtype: torch.dtype | None = None, **engine_options: Any) -> Rollout:
    """Return a `rollout_func` for TRL's `GRPOTrainer`.

        trainer = GRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=data, rollout_func=rollout_func())

    The engine runs the trainer's own model: there is no second copy of the weights, and nothing to transfer. It sleeps
    while the trainer trains. The trainer's settings say how to draw: `temperature`, `top_p`, `top_k`, `min_p`,
    `repetition_penalty`, `max_completion_length`, and `generation_kwargs` with fields of `SamplingParams`. Texts end at
    the trainer's EOS tokens. Log-probabilities are those of the distribution that tokens are drawn from.

    The function that is returned raises a ValueError if the model is not an `NVLlamaForCausalLM` with its weights in
    this process, or if a setting is not possible.

    Args:
        dtype: Write in this dtype, by a copy of the weights that is in memory only during rollouts. So a model that is
            trained in float32 writes by the kernels in bfloat16; its log-probabilities then have bfloat16's errors.
            `None` computes as the trainer does.
        engine_options: Arguments of `Engine`, such as `max_batch_size`; by default it is as large as needed.
    """
    live = LiveEngine(dtype=dtype, **engine_options)

    def roll_out(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        prompt_ids = _tokens_of(prompts, trainer)
        # The completions of a prompt are side by side. As one request they share the prompt's pages.
        groups: list[tuple[list[int], int]] = []
        for prompt, copies in itertools.groupby(prompt_ids):
            count = len(list(copies))
            groups += [(prompt, min(live.most_rows, count - done)) for done in range(0, count, live.most_rows)]
        params = _params_of(trainer)
        names_texts = params.stop or params.bad_words or params.structured_outputs is not None
        autocast = trainer.accelerator.autocast() if dtype is None else contextlib.nullcontext()
        with autocast, warnings.catch_warnings():
            # accelerate replaces `forward` by one under autocast, which the engine passes by.
            warnings.filterwarnings("ignore", "The engine calls the model's decoder")
            outputs = live.generate(
                _model_of(trainer),
                [prompt for prompt, _ in groups],
                [dataclasses.replace(params, n=count) for _, count in groups],
                trainer.processing_class if names_texts else None,  # other completions need not be decoded here
            )
        completions = [completion for output in outputs for completion in output.outputs]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [completion.token_ids for completion in completions],
            "logprobs": [[each.logprob for each in completion.logprobs or ()] for completion in completions],
        }

    return roll_out


def _tokens_of(prompts: list[Any], trainer: Any) -> list[list[int]]:
    """Return the tokens of texts or conversations, as the trainer would make them."""
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        ids: list[list[int]] = tokenizer(text=prompts)["input_ids"]
        return ids
    conversations: list[list[int]] = tokenizer.apply_chat_template(
        prompts,
        tools=trainer.tools or None,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )["input_ids"]
    return conversations


def _params_of(trainer: Any) -> SamplingParams:
    fields: dict[str, Any] = {
        "max_tokens": trainer.max_completion_length,
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k,
        "min_p": trainer.min_p,
        "repetition_penalty": trainer.repetition_penalty,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    return SamplingParams(
        **{
            **fields,
            "ignore_eos": True,  # the model's own may be others than the trainer's
            "stop_token_ids": [token for token in trainer.eos_token_ids if token is not None],
            "logprobs": 0,
            "logprobs_mode": "processed",
            **(trainer.args.generation_kwargs or {}),
        }
    )


def _model_of(trainer: Any) -> Any:
    """Return the model without wrappers; adapters stay in its layers."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "the trainer spreads the model's weights over processes (FSDP), and no process has all of them: make an "
            "Engine on a copy of the model, call its update_weights(trainer.model) in a rollout_func of your own, or "
            "train with DistributedDataParallel."
        )
    return model
