"""transformers' `generate_batch` for our models: the interface of its continuous batching, computed by an `Engine`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .engine.live_engine import LiveEngine
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import GenerationConfig

_LIVE = "_live_engine"  # the attribute of a model that has its engine
_READ = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "length_penalty", "early_stopping", "do_sample"),
    *("max_new_tokens", "max_length", "min_new_tokens", "num_beams", "num_return_sequences"),
)
_NEUTRAL = {"typical_p": 1.0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "num_beam_groups": 1}
# Fields that change no text: how transformers computes, what it returns, and where a file comes from.
_WITHOUT_EFFECT = (
    *("eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "disable_compile", "compile_config"),
    *("continuous_batching_config", "return_dict_in_generate", "output_scores", "output_logits"),
    *("transformers_version", "_from_model_config"),
)


def generate_batch(
    model: Any,
    inputs: list[list[int]],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: Any | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Continue prompts of tokens; a model's `generate_batch` calls this.

    The model keeps an engine that sleeps between calls, so weights may be trained meanwhile.

    Args:
        model: An `NVLlamaForCausalLM`.
        inputs: The prompts.
        generation_config: How to continue them; the model's own by default.
        continuous_batching_config: `return_logprobs=True` fills `logprobs`, by the distribution that tokens are drawn
            from. The other fields tune transformers' own implementation and have no effect.
        options: `max_new_tokens`, in place of that of `generation_config`. `progress_bar`, `persistent_manager` and
            `warmup` have no effect.

    Returns:
        By the requests' ids, transformers' `GenerationOutput` for each text, in the order of the prompts.

    Raises:
        ValueError: The configuration has a field that the engine does not have.
        TypeError: An option is unknown.
    """
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

    config = model.generation_config if generation_config is None else generation_config
    max_new_tokens = options.pop("max_new_tokens", None)
    for name in ("progress_bar", "persistent_manager", "warmup"):
        options.pop(name, None)
    if options.pop("record_timestamps", False):
        raise ValueError("record_timestamps=True is not possible: use Engine.stream, whose events come one by one.")
    if options:
        raise TypeError(f"generate_batch() got an unexpected keyword argument {next(iter(options))!r}")
    if not inputs:
        return {}
    params = _params_of(model, config)
    if getattr(continuous_batching_config, "return_logprobs", False):
        params = dataclasses.replace(params, logprobs=0)
        if params.num_beams == 1:
            params = dataclasses.replace(params, logprobs_mode="processed")
    live: LiveEngine = vars(model).setdefault(_LIVE, LiveEngine())
    prompts = [list(prompt) for prompt in inputs]
    each = [_with_lengths(params, prompt, config, max_new_tokens) for prompt in prompts]
    results: dict[str, Any] = {}
    for number, output in enumerate(live.generate(model, prompts, each)):
        children = [f"req_{number}__child#{index}" for index in range(len(output.outputs) - 1)]
        for name, completion in zip([*children, f"req_{number}"], output.outputs, strict=True):
            results[name] = GenerationOutput(
                request_id=name,
                prompt_ids=list(output.prompt_token_ids),
                generated_tokens=completion.token_ids,
                logprobs=[here.logprob for here in completion.logprobs or ()],
                status=RequestStatus.FINISHED,
            )
    return results


def _params_of(model: Any, config: Any) -> SamplingParams:
    """Return the parameters that a generation configuration means, but for the lengths.

    Raises:
        ValueError: The configuration has a field that the engine does not have.
    """
    for name, value in config.to_diff_dict().items():
        is_neutral = value in (None, False, [], {}, 0) or value == _NEUTRAL.get(name)
        if name not in _READ and name not in _WITHOUT_EFFECT and not is_neutral:
            raise ValueError(
                f"generation_config has {name}={value!r}, which generate_batch does not know: leave it out, or use "
                "model.generate on a padded batch."
            )
    beams = config.num_beams or 1
    wanted = ["repetition_penalty"]
    wanted += ["temperature", "top_k", "top_p", "min_p"] if config.do_sample else []
    wanted += ["length_penalty", "early_stopping"] if beams > 1 else []
    fields = {name: value for name in wanted if (value := getattr(config, name)) is not None}
    ending = model.config.eos_token_id if config.eos_token_id is None else config.eos_token_id
    ending = [] if ending is None else [ending] if isinstance(ending, int) else ending
    return SamplingParams(
        **{"temperature": 0, **fields},
        max_tokens=None,
        num_beams=beams,
        n=config.num_return_sequences or 1,
        ignore_eos=True,  # the configuration's EOS tokens count alone
        stop_token_ids=[token for token in ending if 0 <= token < model.config.vocab_size],
    )


def _with_lengths(params: SamplingParams, prompt: list[int], config: Any, max_new_tokens: int | None) -> SamplingParams:
    if max_new_tokens is None:
        max_new_tokens = config.max_new_tokens
    if max_new_tokens is None and config.max_length is not None:
        max_new_tokens = config.max_length - len(prompt)
    if max_new_tokens is None:
        raise ValueError("generation_config has no max_new_tokens and no max_length: give one of them.")
    return dataclasses.replace(params, max_tokens=max_new_tokens, min_tokens=config.min_new_tokens or 0)
