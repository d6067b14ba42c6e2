"""Compiles the grammars of requests by llguidance."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..runner.grammar import Grammar
from ..runner.mask_workers import SECONDS_IN_RESERVE
from ..structured_outputs import GrammarError, StructuredOutputs

MAX_GRAMMARS = 64  # that are kept
MAX_SECONDS = 5.0  # of CPU time for a grammar and its first mask

_END = "<|end of the grammar|>"  # a token that no model has


class GrammarCompiler:
    """Compiles grammars for the texts of one model, and keeps the last ones. Any thread may call it.

    Args:
        tokenizer: A tokenizer of transformers; `None` for an engine without texts.
        vocab_size: Tokens of the model.
        eos_token_ids: The model's EOS tokens.
    """

    def __init__(self, tokenizer: Any | None, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, tuple(eos_token_ids)
        self._kept: OrderedDict[StructuredOutputs, Grammar | GrammarError] = OrderedDict()
        self._lock = threading.Lock()
        self._tokens: tuple[Any, int] | None = None  # llguidance's tokenizer, and its end token
        self._tokens_lock = threading.Lock()

    def prepare(self) -> None:
        """Make llguidance's view of the tokenizer, so that the first request need not wait for it.

        It takes a second or two, in which llguidance and tokenizers let no other thread run Python code. Where it is
        not possible, `compile` says why.
        """
        if self._tokenizer is not None:
            with suppress(ImportError, ValueError):
                self._llguidance_tokens()

    def compile(self, form: StructuredOutputs) -> Grammar:
        """Return the grammar of a form. The first call takes a second or two more, unless `prepare` has been called.

        Raises:
            GrammarError: llguidance refuses the form.
            ValueError: There is no tokenizer, or llguidance does not know this kind of tokenizer.
            ImportError: llguidance is not installed.
        """
        with self._lock:
            grammar = self._kept.get(form)
            if grammar is not None:
                self._kept.move_to_end(form)
        if grammar is None:
            try:
                grammar = self._compile(form)
            except GrammarError as refusal:
                grammar = refusal
            with self._lock:
                self._kept[form] = grammar
                while len(self._kept) > MAX_GRAMMARS:
                    self._kept.popitem(last=False)
        if isinstance(grammar, GrammarError):
            raise GrammarError(*grammar.args)
        return grammar

    def _compile(self, form: StructuredOutputs) -> Grammar:
        if self._tokenizer is None:
            raise ValueError(
                f"structured_outputs has {form.kind}, which needs text, but the engine has no tokenizer: give it one."
            )
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise ImportError(
                "structured_outputs needs llguidance: pip install 'llama-te-infer[structured-outputs]'."
            ) from error
        tokens, end_token = self._llguidance_tokens()
        try:
            source = _source(form)
        except Exception as error:  # of any kind: llguidance's reader of GBNF is Python code
            raise _refusal(form, str(error)) from error
        begin = time.thread_time()
        # With llguidance's own limits a mask takes longer, and only `compute_masks` bounds its time.
        limits = LLParserLimits(
            initial_lexer_fuel=50_000, step_max_items=5_000, max_grammar_size=100_000, verbose_errors=False
        )
        matcher = LLMatcher(tokens, source, log_level=0, limits=limits)
        grammar = Grammar(matcher, end_token, -(-tokens.vocab_size // 32), self._vocab_size, self._eos_token_ids)
        begin_of_mask = time.thread_time()
        is_empty = grammar.is_empty()
        end = time.thread_time()
        if matcher.is_error():
            raise _refusal(form, matcher.get_error())
        if is_empty:
            raise _refusal(form, "no text but the empty one fits")
        for what, seconds, most in (
            ("before", end - begin, MAX_SECONDS),
            ("for", end - begin_of_mask, SECONDS_IN_RESERVE),
        ):
            if seconds > most:
                raise GrammarError(
                    f"structured_outputs has {form.kind} that takes {seconds:.1f} s {what} the first token, and "
                    f"{most:g} s is the limit: give a simpler one."
                )
        return grammar

    def _llguidance_tokens(self) -> tuple[Any, int]:
        with self._tokens_lock:
            if self._tokens is None:
                self._tokens = _tokens_of(self._tokenizer, self._vocab_size)
            return self._tokens


def _tokens_of(tokenizer: Any, vocab_size: int) -> tuple[Any, int]:
    """Return llguidance's view of a tokenizer, and the id of its end token."""
    from llguidance import LLTokenizer
    from tokenizers import AddedToken

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"structured_outputs needs a fast tokenizer of transformers, but the engine's is a "
            f"{type(tokenizer).__name__}."
        )
    backend = copy.copy(backend)
    backend.no_padding()
    backend.no_truncation()
    # The engine knows which of the model's tokens end a text, so llguidance gets an end token of its own.
    backend.add_special_tokens([AddedToken(_END, special=True)])
    end_token = backend.token_to_id(_END)
    try:
        tokens = LLTokenizer(backend.to_str(), n_vocab=max(vocab_size, end_token + 1), eos_token=end_token)
    except Exception as error:
        raise ValueError(f"structured_outputs: llguidance does not know this tokenizer: {error}") from error
    return tokens, end_token


def _source(form: StructuredOutputs) -> str:
    """Return the form as llguidance takes it."""
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    if form.regex is not None:
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(form.regex, 'dws')}/")
    if form.choice is not None:
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, form.choice))}")
    if form.grammar is not None:
        return grammar_from("grammar", form.grammar)
    schema = '{"type": "object"}' if form.json is None else str(form.json)
    is_flexible, pattern = not form.disable_any_whitespace, form.whitespace_pattern
    if pattern is None:
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": is_flexible})
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": pattern})


def _refusal(form: StructuredOutputs, problem: str) -> GrammarError:
    return GrammarError(f"structured_outputs has {form.kind} that llguidance refuses: {problem.strip()}")
