"""The fields that completions and chats share: OpenAI's names, then the further ones that vLLM's server has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ...sampling_params import SamplingParams, shown
from .strict import ListOf, OnlyFalse, Strict
from .structured_outputs import ResponseFormat, StructuredOutputsFields, form_of
from .unsupported import FOR_ALL, Unsupported, without_unsupported

SEEDS = 2**63


class StreamOptions(Strict):
    """How a stream reports the number of tokens."""

    include_usage: bool | None = Field(None, description="End with a chunk that has the usage and no choices.")
    continuous_usage_stats: bool | None = Field(None, description="Report the usage so far in each chunk.")
    include_obfuscation: OnlyFalse | None = Field(None, description="Only false: no chunk has padding.")


class GeneratingFields(Strict):
    """The fields of every endpoint that writes texts."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = FOR_ALL

    model: str | None = Field(None, description="A name that /v1/models lists; the served model by default.")
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None

    # OpenAI's fields that change no answer here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    # vLLM's fields that change no answer here.
    include_reasoning: bool | None = None
    session_id: str | None = None
    spaces_between_special_tokens: bool | None = None


class SamplingFields(GeneratingFields):
    """How to continue a prompt."""

    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="Numbers to add to logits, by token id.")
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = Field(None, description="Equal seeds give equal texts.")
    stop: str | ListOf[str] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(None, description="The form of the text, such as a JSON schema.")

    # vLLM's further fields.
    structured_outputs: StructuredOutputsFields | None = Field(
        None, description="The form of the text: a JSON schema, a regular expression, choices or a grammar."
    )
    top_k: int | None = Field(None, description="0 or -1 for all tokens.")
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: ListOf[int] | None = None
    allowed_token_ids: ListOf[int] | None = None
    bad_words: ListOf[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    use_beam_search: bool | None = Field(None, description="Search with best_of or n beams, and return the n best.")
    best_of: int | None = Field(None, description="The number of beams.")
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(None, description='Log-probabilities name tokens as "token_id:42".')
    request_id: str | None = Field(None, max_length=256, description="The end of the answer's id.")

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported(cls, fields: Any) -> Any:
        return without_unsupported(fields, cls.unsupported)

    def sampling_params(
        self, defaults: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """Return the engine's parameters.

        Args:
            defaults: Fields of `SamplingParams` for what the request leaves out.
            max_tokens: The most tokens to write; `None` for as many as fit.
            logprobs: As in `SamplingParams`.
            prompt_logprobs: As in `SamplingParams`.

        Raises:
            ValueError: A value is out of range, or values contradict each other.
        """
        given: dict[str, Any] = {
            name: value
            for name in (
                *("frequency_penalty", "presence_penalty", "n", "stop", "temperature", "top_p", "top_k", "min_p"),
                *("repetition_penalty", "min_tokens", "stop_token_ids", "allowed_token_ids", "bad_words"),
                *("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"),
                *("length_penalty", "early_stopping"),
            )
            if (value := getattr(self, name)) is not None
        }
        if self.logit_bias:
            given["logit_bias"] = _by_token(self.logit_bias)
        if (form := form_of(self.response_format, self.structured_outputs)) is not None:
            given["structured_outputs"] = form
        if self.seed is not None:
            given["seed"] = self.seed % SEEDS
        if self.top_k == -1:
            given["top_k"] = 0
        if self.use_beam_search:
            n = self.n or 1
            given["num_beams"] = max(n, self.best_of or n)
            of_draws = ("temperature", "top_p", "top_k", "min_p", "logprobs_mode")
            defaults = {name: value for name, value in defaults.items() if name not in of_draws}
        elif self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of={self.best_of} needs use_beam_search=true: it is the number of beams.")
        elif given.get("temperature", defaults.get("temperature")) == 0 and given.get("n", 1) > 1:
            raise ValueError(f"n={self.n} with temperature=0 gives equal answers: raise the temperature, or give n=1.")
        more = {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        return SamplingParams(**{**defaults, **given, **more})


def _by_token(bias: Mapping[str, float]) -> dict[int, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise ValueError(f'logit_bias={{{shown(key)}: ...}} is not possible: its keys are token ids, such as "42".')
    return {int(key): value for key, value in bias.items()}
