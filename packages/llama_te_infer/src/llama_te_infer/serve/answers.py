"""How the generating endpoints write an answer: whole, or in events as tokens come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..engine.logprobs import TokenLogprobs
from ..engine.outputs import Completion, RequestOutput, TokenEvent
from ..sampling_params import SamplingParams
from .errors import ApiError
from .observation import vllm_reason
from .protocol.answers import VllmReason
from .protocol.sampling import StreamOptions
from .server import Server
from .streams import DONE, encode, event
from .usage import Usage


class Piece(NamedTuple):
    """Consecutive tokens of one text: all of them, or those since the last piece.

    Attributes:
        prompt_index: The number of the prompt in the request.
        index: The number of the text among those for the prompt.
        token_ids: The tokens.
        text: Theirs, as far as it can be read.
        logprobs: For each token, or empty.
        finish_reason: Of the last piece.
        stop_reason: Of the last piece.
        prompt_logprobs: For each token of the prompt, on the first piece, if the request asks for them.
    """

    # A tuple, since each token makes one, and a frozen dataclass takes three times as long to make.
    prompt_index: int
    index: int  # type: ignore[assignment]  # tuples have a method of this name
    token_ids: list[int]
    text: str
    logprobs: Sequence[TokenLogprobs | None]
    finish_reason: VllmReason | None
    stop_reason: str | int | None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None

    @classmethod
    def whole(cls, prompt_index: int, completion: Completion, output: RequestOutput) -> Piece:
        """Return all of a text of a request's output."""
        return cls(
            prompt_index,
            completion.index,
            completion.token_ids,
            completion.text,
            completion.logprobs or (),
            vllm_reason(completion.finish_reason),
            completion.stop_reason,
            output.prompt_logprobs,
        )

    @classmethod
    def of_events(cls, prompt_index: int, index: int, events: Sequence[TokenEvent]) -> Piece:
        """Return what the engine's events say about one text."""
        reason = events[-1].finish_reason
        return cls(
            prompt_index,
            index,
            [each.token_id for each in events if each.token_id is not None],
            "".join(each.text for each in events),
            [each.logprobs for each in events if each.logprobs is not None],
            None if reason is None else vllm_reason(reason),
            events[-1].stop_reason,
            events[0].prompt_logprobs,
        )


class Answer(ABC):
    """Writes the answer to one request in the shape of its endpoint.

    Args:
        server: The engine and the settings.
        prompts: The tokens of each prompt.
        params: How to continue them.

    Attributes:
        usage: The tokens read and written so far; the subclasses count what they write.
    """

    def __init__(self, server: Server, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        self.server, self.prompts, self.params = server, prompts, params
        self.usage = Usage(sum(map(len, prompts)))

    @abstractmethod
    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the answer as one object; `outputs` has one output for each prompt."""

    def begin(self) -> Iterator[bytes]:
        """Yield the events before the first token."""
        return iter(())

    def write(self, prompt_index: int, tokens: Sequence[TokenEvent]) -> bytes:
        """Return the events for further tokens of a prompt's texts."""
        by_choice: dict[int, list[TokenEvent]] = {}
        for token in tokens:
            by_choice.setdefault(token.index, []).append(token)
        pieces = (Piece.of_events(prompt_index, index, own) for index, own in by_choice.items())
        return b"".join(part for piece in pieces for part in self.events(piece))

    @abstractmethod
    def events(self, piece: Piece) -> Iterator[bytes]:
        """Yield the events for further tokens of one text."""

    @abstractmethod
    def end(self) -> Iterator[bytes]:
        """Yield the events after the last token."""

    @abstractmethod
    def failure(self, error: ApiError) -> Iterator[bytes]:
        """Yield the events with which a stream ends after an error."""


class ChunkedAnswer(Answer):
    """Writes an answer whose stream consists of chunks with choices: completions and chats.

    Args:
        server: As of `Answer`.
        prompts: As of `Answer`.
        params: As of `Answer`.
        head: The fields with which the answer and each chunk begin.
        options: The request's.
        is_plain: Whether the chunks of one text, but for the first and the last, differ in the text alone.
    """

    def __init__(
        self,
        server: Server,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        head: dict[str, Any],
        options: StreamOptions | None,
        is_plain: bool,
    ) -> None:
        super().__init__(server, prompts, params)
        self.head, self._options = head, options
        self._reports_each = options is not None and bool(options.continuous_usage_stats)
        self._is_plain = is_plain and not self._reports_each
        # What stands before and behind the text in a chunk, by the numbers of the prompt and the choice.
        self._plain_chunks: dict[tuple[int, int], tuple[bytes, bytes]] = {}

    @abstractmethod
    def choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the choices of the chunks for further tokens."""

    def write(self, prompt_index: int, tokens: Sequence[TokenEvent]) -> bytes:
        """Return the chunks for further tokens of a prompt's texts."""
        around = self._plain_chunks.get((prompt_index, tokens[0].index))
        if around is not None and _continue_one_text(tokens):
            # Nearly all tokens are of this kind, and a new chunk takes ten times as long.
            text = tokens[0].text if len(tokens) == 1 else "".join(token.text for token in tokens)
            if text:
                self.usage.completion += len(tokens)
                return around[0] + encode(text) + around[1]
        written = super().write(prompt_index, tokens)
        if self._is_plain:
            for key in {(prompt_index, token.index) for token in tokens} - self._plain_chunks.keys():
                self._plain_chunks[key] = self._around_text(*key)
        return written

    def _around_text(self, prompt_index: int, index: int) -> tuple[bytes, bytes]:
        text = "text"  # the last of this name in the chunk, whatever the head has
        (chunk,) = self.events(Piece(prompt_index, index, [], text, (), None, None, None))
        before, _, behind = chunk.rpartition(encode(text))
        return before, behind

    def events(self, piece: Piece) -> Iterator[bytes]:
        """Yield a chunk for each of the piece's choices."""
        for choice in self.choices(piece):
            chunk = {**self.head, "choices": [choice]}
            yield event(chunk | {"usage": self.usage.to_dict()} if self._reports_each else chunk)

    def end(self) -> Iterator[bytes]:
        """Yield the usage, if the request asks for it."""
        if self._options is not None and self._options.include_usage:
            yield event({**self.head, "choices": [], "usage": self.usage.to_dict()})
        yield DONE

    def failure(self, error: ApiError) -> Iterator[bytes]:
        """Yield the error."""
        yield event(error.body())
        yield DONE


def _continue_one_text(tokens: Sequence[TokenEvent]) -> bool:
    """Return whether the tokens are of one text and do not end it."""
    index = tokens[0].index
    return all(token.index == index and token.finish_reason is None for token in tokens)
