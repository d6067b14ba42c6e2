"""The grammars of texts: which tokens may follow, as masks that the sampler applies.

llguidance computes a mask on the host, from the tokens written so far. The runner asks for the masks of a step when the
device already computes the model's part of that step.

Shapes: B rows of the batch, M texts with a grammar, W words of 32 tokens each.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..ops.greedy import NO_TOKEN
from ..structured_outputs import GrammarError
from .mask_workers import SECONDS_IN_RESERVE, SECONDS_OF_A_MASK, Allowance, MaskTask, MaskWorkers
from .stopping import StopRule

TOO_SLOW = (
    "structured_outputs: llguidance needs too long for the next token of this text. A request has "
    f"{SECONDS_IN_RESERVE:g} s, and {1000 * SECONDS_OF_A_MASK:g} ms more for each token: give a simpler form."
)
NOTHING_ALLOWED = (
    "structured_outputs: the grammar allows no token here that allowed_token_ids, bad_words and min_tokens allow: "
    "leave them out, or allow more."
)


class TokenMasks(NamedTuple):
    """The tokens that rows may write.

    Attributes:
        index_B: int32, each row's mask; -1 of a row that may write all tokens.
        bits_MW: int32; the lowest bit of a mask's first word is token 0. 1 for a token that may follow.
    """

    index_B: torch.Tensor
    bits_MW: torch.Tensor


class Grammar:
    """A compiled grammar for texts of one model.

    Args:
        matcher: An `llguidance.LLMatcher` at the beginning of a text.
        end_token: llguidance's own end token. It is no token of the model: its bit says that the text may end.
        words: W.
        vocab_size: Tokens of the model.
        eos_token_ids: The model's EOS tokens.
    """

    def __init__(self, matcher: Any, end_token: int, words: int, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.matcher, self.end_token, self.words = matcher, end_token, words
        self.eos_token_ids = tuple(eos_token_ids)
        self.unknown_W = np.zeros(words, np.uint32)  # tokens that the model does not have
        _set_bits(self.unknown_W, [end_token, *range(vocab_size, 32 * words)])

    def is_empty(self) -> bool:
        """Return whether no token can follow at the beginning of a text."""
        # llguidance adds a word to vocabularies of whole words.
        mask_W = np.frombuffer(self.matcher.compute_bitmask(), np.uint32)[: self.words]
        return not (mask_W & ~self.unknown_W).any()

    def begin(
        self,
        stop: StopRule,
        allowance: Allowance,
        allowed: Iterable[int] | None = None,
        bad_words: Sequence[Sequence[int]] = (),
    ) -> GrammarText:
        """Return a text without tokens.

        Args:
            stop: When the text ends. End tokens may follow where the grammar lets the text end.
            allowance: The time for its masks.
            allowed: The request's `allowed_token_ids`.
            bad_words: The tokens of each word that must not be written.
        """
        forbidden_W = np.zeros(self.words, np.uint32)
        if allowed is not None:
            _set_bits(forbidden_W, allowed)
            forbidden_W = ~forbidden_W
        _set_bits(forbidden_W, [word[0] for word in bad_words if len(word) == 1])
        ends_W = np.zeros(self.words, np.uint32)
        _set_bits(ends_W, stop.end_tokens)
        words = [(list(word[:-1]), word[-1]) for word in bad_words if len(word) > 1]
        return GrammarText(self, self.matcher.deep_copy(), stop, allowance, ends_W, forbidden_W, words)


class GrammarText:
    """How far a text has come in its grammar. `Grammar.begin` makes one.

    Attributes:
        is_complete: Whether no token can follow.
        error: Why the text cannot go on.
        has_failed: Whether its last token was chosen all the same.
        allowance: The time for its masks.
    """

    def __init__(
        self,
        grammar: Grammar,
        matcher: Any,
        stop: StopRule,
        allowance: Allowance,
        ends_W: np.ndarray,
        forbidden_W: np.ndarray,
        bad_words: list[tuple[list[int], int]],
    ) -> None:
        self.grammar, self.matcher, self.stop, self.allowance = grammar, matcher, stop, allowance
        self.ends_W, self.forbidden_W = ends_W, forbidden_W
        self._bad_words = bad_words  # of several tokens: those before the last one, and the last one
        self._written: list[int] = []
        self.is_complete = False
        self.error: GrammarError | None = None
        self.has_failed = False

    def copy(self) -> GrammarText:
        """Return a text with the same tokens that continues in its own way."""
        other = copy.copy(self)
        other.matcher, other._written = self.matcher.deep_copy(), list(self._written)
        return other

    def add(self, token: int) -> None:
        """Add a token. A token that ends the text is not part of it."""
        if self.error is not None:
            self.has_failed = True
        elif token in self.stop.end_tokens or token == NO_TOKEN:
            return
        elif self._spend_time(self.matcher.consume_token, token):
            self._written.append(token)
            self.is_complete = self.matcher.is_stopped()
        else:
            self.has_failed = True
            self.error = GrammarError(f"structured_outputs: llguidance does not take token {token}: {self._problem()}")

    def accepts(self, token: int) -> bool:
        """Return whether a token may follow that does not end the text."""
        return self.error is None and self._spend_time(self.matcher.validate_tokens, [token]) == 1

    def is_complete_with(self, token: int) -> bool:
        """Return whether no token could follow this one, which `accepts` has accepted."""
        self._spend_time(self.matcher.consume_token, token)
        is_complete: bool = self.matcher.is_stopped()
        self.matcher.rollback(1)
        return is_complete

    def finish_mask(self, mask_W: np.ndarray) -> None:
        """Complete the mask that llguidance has computed for the next token."""
        grammar = self.grammar
        if self.allowance.seconds < 0:
            self.error = GrammarError(TOO_SLOW)
        may_end = bool(mask_W[grammar.end_token >> 5] >> np.uint32(grammar.end_token & 31) & 1)
        mask_W &= ~grammar.unknown_W
        if self.matcher.is_error():
            self.error = GrammarError(f"structured_outputs: llguidance has stopped in this text: {self._problem()}")
        self.is_complete = self.error is None and not mask_W.any()
        # A token that the tokenizer takes for text may be an EOS token of the model.
        _clear_bits(mask_W, grammar.eos_token_ids)
        if may_end:
            mask_W |= self.ends_W
        mask_W &= ~self.forbidden_W
        # The sampler forbids these tokens too. Here they show whether any token is left.
        if not self.stop.may_end(len(self._written)):
            mask_W &= ~self.ends_W
        _clear_bits(mask_W, [last for before, last in self._bad_words if self._written[-len(before) :] == before])
        if not mask_W.any():
            if not self.is_complete and self.error is None:
                self.error = GrammarError(NOTHING_ALLOWED)
            mask_W.fill(0xFFFFFFFF)  # the text has ended, and the sampler needs some token

    def give_up(self, mask_W: np.ndarray) -> None:
        """Complete the mask instead that llguidance takes too long for."""
        self.error = GrammarError(TOO_SLOW)
        mask_W.fill(0xFFFFFFFF)

    def _spend_time(self, function: Callable[[Any], int], argument: Any) -> int:
        """Call a function of llguidance in the time of the request. It takes no longer than the mask before."""
        begin = time.thread_time()
        result = function(argument)
        self.allowance.spend(time.thread_time() - begin, is_mask=False)
        return result

    def _problem(self) -> str:
        return str(self.matcher.get_error()).split("\n", 1)[0] or "of an unknown reason"


def compute_masks(texts: Sequence[GrammarText | None], pin_memory: bool) -> torch.Tensor:
    """Return the tokens that may follow each text, int32 [M, W], on the host. All tokens may follow `None`.

    Args:
        texts: At least one of them is not `None`.
        pin_memory: Whether a GPU will read the masks.
    """
    words = next(text.grammar.words for text in texts if text is not None)
    bits_MW = torch.full((len(texts), words), -1, dtype=torch.int32, pin_memory=pin_memory)
    mask_MW = bits_MW.numpy().view(np.uint32)
    first: dict[GrammarText, int] = {}  # a text may have several rows
    for row, text in enumerate(texts):
        if text is not None:
            first.setdefault(text, row)
    tasks = {
        text: MaskTask(text.matcher, bits_MW.data_ptr() + 4 * words * row, 4 * words, bits_MW, text.allowance)
        for text, row in first.items()
        if text.error is None
    }
    _workers().compute(tasks.values())
    if any(task.is_given_up for task in tasks.values()):
        bits_MW = torch.empty_like(bits_MW, pin_memory=pin_memory).copy_(bits_MW)  # llguidance still writes the other
        mask_MW = bits_MW.numpy().view(np.uint32)
    for text, task in tasks.items():
        if task.is_given_up:
            text.give_up(mask_MW[first[text]])
        else:
            text.finish_mask(mask_MW[first[text]])
    for row, text in enumerate(texts):
        if text is not None and first[text] != row:
            mask_MW[row] = mask_MW[first[text]]
    return bits_MW


@functools.cache
def _workers() -> MaskWorkers:
    return MaskWorkers()


def _set_bits(mask_W: np.ndarray, tokens: Iterable[int]) -> None:
    for token in tokens:
        mask_W[token >> 5] |= np.uint32(1 << (token & 31))


def _clear_bits(mask_W: np.ndarray, tokens: Iterable[int]) -> None:
    for token in tokens:
        mask_W[token >> 5] &= ~np.uint32(1 << (token & 31))
