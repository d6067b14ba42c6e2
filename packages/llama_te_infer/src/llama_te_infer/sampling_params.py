"""The parameters of a request: length, randomness, stop conditions and log-probabilities."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .integers import as_integer
from .structured_outputs import StructuredOutputs

MAX_LOGPROBS = 20
MIN_TEMPERATURE = 1e-6  # below it, logits / temperature would come close to float32's range
MAX_PENALTY = 2.0  # of presence and frequency
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 1e-4, 1e4  # keep logits within float32
MAX_BIAS = 100.0  # of a logit
MAX_INTEGER = 2**63 - 1  # what kernels and messages between processes hold
MAX_LENGTH_PENALTY = 5.0  # keeps length ** length_penalty a float32 for any length

_INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "n", "num_beams")


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    The sampler changes logits in this order: `structured_outputs`, `logit_bias`, forbidden tokens
    (`allowed_token_ids`, `bad_words`, ends before `min_tokens`), repetition, frequency and presence penalty,
    temperature, top-k, top-p, min-p.

    `num_beams > 1` selects beam search, which is deterministic; `temperature` may be 0 or left at 1.0. Beam search
    refuses parameters that would change its scores.

    Attributes:
        max_tokens: Most tokens to write, at least 1; `None` for as many as the engine's `max_sequence_length` and pages
            leave behind the prompt.
        min_tokens: Tokens to write before the sequence may end; until then EOS and stop tokens have no probability.
        temperature: Divides the logits; 0 takes the most likely token each time (the lowest id among equals).
        top_k: Draw only from tokens at least as likely as the k-th one; 0 for all.
        top_p: Draw only from the most likely tokens that together reach this probability.
        min_p: Draw only from tokens with at least `min_p` times the probability of the most likely one.
        repetition_penalty: Divides the positive logits of tokens in the prompt or the output, and multiplies their
            negative ones. From 0.0001 to 10,000.
        presence_penalty: Is subtracted from the logits of tokens that the output has. From -2 to 2.
        frequency_penalty: Is subtracted from the logit of a token as often as the output has the token. From -2 to 2.
        logit_bias: Numbers to add to the logits of tokens, by token id. From -100 to 100.
        allowed_token_ids: Only these tokens may be written. `None` for all. Becomes a tuple.
        bad_words: Words that must not be written; one word or several. Each is forbidden at the beginning of a text and
            behind a space: its last token gets no probability behind its other tokens in the output. Becomes a tuple.
        stop: Strings that end a sequence when they appear in its text; one string or several. A string that is a
            special token of the tokenizer ends it as a stop token does. Becomes a tuple.
        stop_token_ids: Tokens that end a sequence as EOS does. Becomes a tuple.
        ignore_eos: Go on after an EOS token.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the stop string, or the text of the token that ended the sequence, in the text.
        seed: Makes drawn tokens a function of the seed and the logits alone; `None` for a new seed each time.
        logprobs: The number of most likely tokens to report at each position, with their log-probabilities; at most 20.
            With 0 the engine reports the written token's log-probability alone; `None` reports nothing.
        logprobs_mode: `"raw"` reports the model's own log-probabilities, before the parameters above change them;
            `"processed"` those of the distribution that tokens are drawn from, after all parameters. Tokens without a
            probability are not among the most likely ones.
        prompt_logprobs: As `logprobs`, for each token of the prompt except the first. Always the model's own.
        structured_outputs: The form that the text must have. EOS and stop tokens have a probability where the form lets
            the text end, and the text ends where no token can follow, also before `min_tokens`. Stop tokens and strings
            that are a part of the form end the text there. Needs the extra `structured-outputs`.
        n: Continuations to return: independent draws, or the n best ones of beam search.
        num_beams: Width of beam search; 1 for none.
        length_penalty: Beam search divides a sequence's log-probability by its new tokens to this power. From -5 to 5.
        early_stopping: The rule once beam search has `num_beams` finished sequences. `True` ends the search; `False`
            ends it if no running beam would be better at its present length; `"never"` ends it if no running beam could
            become better.

    Raises:
        ValueError: A value is out of range, or values contradict each other.
    """

    max_tokens: int | None = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # a mapping has no hash
    allowed_token_ids: Sequence[int] | None = None
    bad_words: str | Sequence[str] = ()
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    seed: int | None = None
    logprobs: int | None = None
    logprobs_mode: Literal["raw", "processed"] = "raw"
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    n: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        self._need("stop", isinstance(self.stop, Iterable), "give a string or several")
        # A frozen dataclass can change its own fields in this way only.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        self._need("bad_words", isinstance(self.bad_words, Iterable), "give a word or several")
        words = (self.bad_words,) if isinstance(self.bad_words, str) else tuple(self.bad_words)
        object.__setattr__(self, "bad_words", words)
        for name in ("stop_token_ids", "allowed_token_ids"):
            tokens = getattr(self, name)
            if name == "stop_token_ids" or tokens is not None:
                is_list = isinstance(tokens, Iterable) and not isinstance(tokens, str | bytes)
                self._need(name, is_list, "give a list of token ids")
                object.__setattr__(self, name, tuple(map(_plain, tokens)))
        if self.logit_bias is not None:
            self._need("logit_bias", isinstance(self.logit_bias, Mapping), "give a dict from token ids to numbers")
            object.__setattr__(self, "logit_bias", {_plain(token): bias for token, bias in self.logit_bias.items()})
        for name in _INTEGERS:
            object.__setattr__(self, name, _plain(getattr(self, name)))
        self._check_values()
        if self.num_beams > 1:
            self._check_beam_search()
        else:
            self._check_no_beam_search()

    def _check_values(self) -> None:
        self._need(
            "max_tokens",
            self.max_tokens is None or _is_integer(self.max_tokens, 1),
            "give an integer of at least 1, or None for as many as fit",
        )
        self._need(
            "min_tokens",
            _is_integer(self.min_tokens, 0, MAX_INTEGER if self.max_tokens is None else self.max_tokens),
            f"give an integer from 0 to max_tokens={self.max_tokens}",
        )
        self._need(
            "temperature",
            _is_number(self.temperature, 0) and not 0 < self.temperature < MIN_TEMPERATURE,
            f"give 0 for the most likely token each time, or a number of at least {MIN_TEMPERATURE:g}",
        )
        self._need("top_k", _is_integer(self.top_k, 0), "give a number of tokens, or 0 for all")
        self._need(
            "top_p", _is_number(self.top_p, 0, 1) and self.top_p > 0, "give a number above 0 and at most 1, 1 for all"
        )
        self._need("min_p", _is_number(self.min_p, 0, 1), "give a number from 0, for all, to 1")
        self._need(
            "repetition_penalty",
            _is_number(self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
            f"give a number from {MIN_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g}; 1 changes nothing, more "
            "discourages repetition",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            self._need(
                name,
                _is_number(getattr(self, name), -MAX_PENALTY, MAX_PENALTY),
                f"give a number from {-MAX_PENALTY:g} to {MAX_PENALTY:g}; 0 changes nothing",
            )
        bias = self.logit_bias or {}
        self._need(
            "logit_bias",
            all(_is_integer(token, 0) and _is_number(value, -MAX_BIAS, MAX_BIAS) for token, value in bias.items()),
            f"give token ids from 0 on, each with a number from {-MAX_BIAS:g} to {MAX_BIAS:g}",
        )
        allowed = self.allowed_token_ids
        self._need(
            "allowed_token_ids",
            allowed is None or (len(allowed) > 0 and all(_is_integer(token, 0) for token in allowed)),
            "give at least one token id from 0 on, or None for all tokens",
        )
        self._need(
            "bad_words",
            all(isinstance(word, str) and word.strip() for word in self.bad_words),
            "give words that are not empty",
        )
        self._need("stop", all(isinstance(text, str) and text for text in self.stop), "give strings that are not empty")
        self._need(
            "stop_token_ids", all(_is_integer(token, 0) for token in self.stop_token_ids), "give token ids from 0 on"
        )
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            self._need(name, isinstance(getattr(self, name), bool), "give True or False")
        self._need(
            "seed",
            self.seed is None or _is_integer(self.seed, 0),
            "give an integer from 0 to 2**63 - 1, or None for a new one each time",
        )
        for name in ("logprobs", "prompt_logprobs"):
            self._need(
                name,
                getattr(self, name) is None or _is_integer(getattr(self, name), 0, MAX_LOGPROBS),
                f"give a number of tokens from 0 to {MAX_LOGPROBS}, or None to report nothing",
            )
        self._need("logprobs_mode", self.logprobs_mode in ("raw", "processed"), 'give "raw" or "processed"')
        self._need(
            "structured_outputs",
            self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputs),
            "give a StructuredOutputs, or None for any text",
        )
        self._need("n", _is_integer(self.n, 1), "give an integer of at least 1")
        self._need("num_beams", _is_integer(self.num_beams, 1), "give an integer of at least 1, 1 for no beam search")
        self._need(
            "length_penalty",
            _is_number(self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY),
            f"give a number from {-MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g}",
        )
        self._need(
            "early_stopping",
            isinstance(self.early_stopping, bool) or self.early_stopping == "never",
            'give True, False or "never"',
        )

    def _check_beam_search(self) -> None:
        beams = f"num_beams={self.num_beams}"
        self._need(
            "temperature", self.temperature in (0, 1), f"beam search draws nothing, so leave it out with {beams}"
        )
        for name, neutral in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            self._need(name, getattr(self, name) == neutral, f"beam search draws nothing, so leave it out with {beams}")
        changing: tuple[tuple[str, Any], ...] = (
            ("repetition_penalty", 1),
            ("presence_penalty", 0),
            ("frequency_penalty", 0),
            ("logit_bias", None),
            ("allowed_token_ids", None),
            ("bad_words", ()),
        )
        for name, neutral in changing:
            self._need(
                name,
                getattr(self, name) == neutral,
                f"it would change the scores of beams, so leave it out with {beams}, or take num_beams=1",
            )
        self._need(
            "logprobs_mode",
            self.logprobs_mode == "raw",
            f"beam search reports the model's own log-probabilities, so leave it out with {beams}",
        )
        self._need("n", self.n <= self.num_beams, f"beam search has no more results than beams; {beams}")

    def _check_no_beam_search(self) -> None:
        for name, neutral in (("length_penalty", 1), ("early_stopping", False)):
            self._need(
                name, getattr(self, name) == neutral, "it is for beam search; leave it out, or give num_beams above 1"
            )
        self._need(
            "n",
            self.n == 1 or self.temperature > 0,
            "with temperature=0 all continuations are equal; give n=1, temperature above 0, or num_beams of at least n",
        )

    def _need(self, name: str, condition: bool, what_to_do: str) -> None:
        if not condition:
            raise ValueError(f"{name}={shown(getattr(self, name))} is not possible: {what_to_do}.")


def shown(value: object) -> str:
    """Return the repr of a value for a message, cut where it is long: a client may send megabytes."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = 8


def checked_params(params: object) -> SamplingParams:
    """Return the parameters of a request; the default ones for `None`.

    Raises:
        ValueError: They are something else.
    """
    if params is None:
        return SamplingParams()
    if isinstance(params, SamplingParams):
        return params
    if isinstance(params, Mapping):
        raise ValueError(f"params={params!r} is a dict: pass SamplingParams(**params).")
    raise ValueError(f"params is a {type(params).__name__}: pass a SamplingParams, or a list with one for each prompt.")


def _plain(value: Any) -> Any:
    """Return an integer of NumPy or torch as an `int`, and anything else as it is."""
    integer = as_integer(value)
    return value if integer is None else integer


def _is_integer(value: object, least: int, most: int = MAX_INTEGER) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: object, least: float, most: float = math.inf) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and least <= value <= most
    except OverflowError:  # an integer beyond all floats
        return False
