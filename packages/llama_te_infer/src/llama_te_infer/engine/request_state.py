"""A request in the engine: the texts, log-probabilities and scores of its sequences, and how they become outputs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

from ..ops.greedy import NO_TOKEN
from ..runner.beam_search import BeamHistory, Hypothesis
from ..runner.sequence import Request, Sequence
from ..runner.stopping import NOT_FINITE
from .beam_texts import StoppingTexts
from .detokenizer import Detokenizer
from .logprobs import LogprobRecords, TokenLogprobs, read_record
from .outputs import Completion, RequestOutput, TokenEvent
from .statistics import RequestTimes


class RequestState:
    """Follows the texts of a request.

    Args:
        request: The request.
        tokenizer: A tokenizer of transformers; with `None` all texts are empty.
        on_token: Called with each event, until it raises.
        arrival: When the request arrived.

    Attributes:
        history: Of beam search; `begin_search` starts it anew. The engine has read all results of the old one by then.
        error: The exception that ended the request: see `RequestOutput`.
        lost_in: The error of the step in which the request was lost, in words. It gets no output then.
        arrival: When the request arrived.
        num_cached_tokens: Tokens of the prompt that came from the prefix cache.
        scheduled: When a step began to read the prompt.
        first_token: When the first token arrived.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Any | None,
        on_token: Callable[[TokenEvent], None] | None = None,
        arrival: float = 0.0,
    ) -> None:
        self.request, self.on_token = request, on_token
        self._tokenizer = tokenizer
        self.history: BeamHistory | None = None
        self.error: Exception | None = None
        self.lost_in: str | None = None
        self.arrival = arrival
        self.num_cached_tokens = 0
        self.scheduled: float | None = None
        self.first_token: float | None = None
        count = len(request.sequences)
        self._detokenizers = [detokenizer_of(request, tokenizer) for _ in range(count)]
        params = request.params
        self._logprobs = [LogprobRecords(params.logprobs or 0) for _ in range(count)]
        self._prompt_logprobs = LogprobRecords(params.prompt_logprobs or 0, before=1)
        self._scores: list[float | None] = [None] * count

    # --- what comes in ------------------------------------------------------------------------------------------------

    def add_token(self, sequence: Sequence, token: int, record: bytes | None = None) -> None:
        """Append a token to a sequence, and end the sequence if the stop rule says so.

        Args:
            sequence: The sequence.
            token: The token.
            record: Of its log-probabilities, if the request asks for them.

        Raises:
            FloatingPointError: It is `NO_TOKEN`.
            GrammarError: The text cannot go on in its grammar.
            Exception: The tokenizer's.
        """
        grammar = sequence.grammar
        if grammar is not None and grammar.has_failed:
            assert grammar.error is not None
            raise grammar.error
        if token == NO_TOKEN:
            raise FloatingPointError(NOT_FINITE)
        stop, detokenizer = self.request.stop, self._detokenizers[sequence.index]
        sequence.tokens.append(token)
        if record is not None:
            self._logprobs[sequence.index].append(record)
        written = len(sequence.tokens) - len(self.request.prompt)
        if not stop.ends_with(token, written):
            detokenizer.add(token, stop.may_end(written))
        elif self.request.params.include_stop_str_in_output:  # otherwise the text is without the token that ends it
            if token in stop.special_strings:
                detokenizer.add_end(stop.special_strings[token])
            else:
                detokenizer.add(token, may_stop=False)
        completes_grammar = grammar is not None and grammar.is_complete
        ending = stop.ending(token, written, detokenizer.stopped_by, completes_grammar)
        if ending is not None:
            detokenizer.end()
            sequence.finish_reason, sequence.stop_reason = ending

    def end(self, error: Exception | None = None) -> list[Sequence]:
        """End all unfinished sequences as "cancelled", or with "error" for an error, and return them.

        Where the tokenizer raises, the text stays as far as it is, and the exception becomes the request's `error`.

        Args:
            error: The exception that ends the request.
        """
        self.drop_beams()
        unfinished = [sequence for sequence in self.request.sequences if sequence.finish_reason is None]
        for sequence in unfinished:
            try:
                self._detokenizers[sequence.index].end()
            except Exception as failure:  # of any kind; the request ends in any case
                error = error or failure
        self.error = self.error or error
        for sequence in unfinished:
            sequence.finish_reason = "cancelled" if self.error is None else "error"
        return unfinished

    def add_prompt_logprobs(self, position: int, records: Items[bytes]) -> None:
        """Record log-probabilities of the prompt's tokens from a position on."""
        self._prompt_logprobs.write(position, records)

    def begin_search(self) -> None:
        """Begin a beam search, for the first time or again after the request was preempted."""
        params = self.request.params
        stop = self.request.stop
        self.history = BeamHistory(params.num_beams, stop, params.length_penalty, params.early_stopping)
        if stop.stop_strings or self.request.grammar is not None:
            empty = detokenizer_of(self.request, self._tokenizer)
            self.request.beam_texts = StoppingTexts(params.num_beams, stop, empty, self.request.begin_grammar())

    def keep_best(self) -> list[tuple[Sequence, Hypothesis]]:
        """Keep sequences for the `n` best results of the beam search; return both. A grammar may have fewer texts."""
        assert self.history is not None
        request = self.request
        best = self.history.best(request.params.n)
        del request.sequences[len(best) :]
        for sequence, hypothesis in zip(request.sequences, best, strict=True):
            self._scores[sequence.index] = hypothesis.score
            sequence.grammar = request.begin_grammar()
        return list(zip(request.sequences, best, strict=True))

    def drop_beams(self) -> None:
        """Keep only the sequences that become completions."""
        del self.request.sequences[self.request.params.n :]

    # --- what comes out -----------------------------------------------------------------------------------------------

    def event(self, sequence: Sequence, token: int | None, record: bytes | None = None) -> TokenEvent:
        """Return the event of a sequence's new token, with the text since the last event."""
        text = self._detokenizers[sequence.index].take(sequence.finish_reason is not None)
        is_first = len(sequence.tokens) - len(self.request.prompt) == (token is not None)
        return TokenEvent(
            self.request.id,
            sequence.index,
            token,
            text,
            None if record is None else read_record(record),
            sequence.finish_reason,
            sequence.stop_reason,
            self.error if sequence.finish_reason == "error" else None,
            self._read_prompt_logprobs() if is_first else None,
        )

    def output(self) -> RequestOutput:
        """Return the output. All sequences have ended."""
        request = self.request
        completions = [self._completion(sequence) for sequence in request.sequences]
        ends = [sequence.last_token for sequence in request.sequences if sequence.last_token is not None]
        return RequestOutput(
            request.id,
            request.prompt,
            completions,
            self._whole_prompt_logprobs(),
            self.error,
            self.num_cached_tokens,
            RequestTimes(self.arrival, self.scheduled, self.first_token, max(ends, default=None)),
        )

    def _completion(self, sequence: Sequence) -> Completion:
        assert sequence.finish_reason is not None
        logprobs: Any = self._logprobs[sequence.index] if self.request.params.logprobs is not None else None
        return Completion(
            sequence.index,
            sequence.written,
            self._detokenizers[sequence.index].text,
            sequence.finish_reason,
            sequence.stop_reason,
            logprobs,  # read by who wants them
            self._scores[sequence.index],
        )

    def _whole_prompt_logprobs(self) -> Any:
        """Return the prompt's log-probabilities, unread, if the request asks for them and the prompt was read."""
        if self.request.params.prompt_logprobs is None or len(self._prompt_logprobs) < len(self.request.prompt):
            return None
        return self._prompt_logprobs

    def _read_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        whole = self._whole_prompt_logprobs()
        return None if whole is None else whole.read()


def detokenizer_of(request: Request, tokenizer: Any | None) -> Detokenizer:
    """Return an empty text of a request."""
    params = request.params
    return Detokenizer(
        tokenizer, request.stop.stop_strings, params.skip_special_tokens, params.include_stop_str_in_output
    )
