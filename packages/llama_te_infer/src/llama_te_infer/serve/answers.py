"""What the generating endpoints share: they read a request, run it, and answer whole or in events as tokens come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ..engine.client import RequestStream
from ..engine.outputs import Completion, RequestOutput, TokenEvent, TokenLogprobs
from ..runner.stopping import FinishReason
from ..sampling_params import SamplingParams
from .errors import ApiError
from .protocol.sampling import GeneratingFields, StreamOptions
from .server import Server
from .streams import DONE, KEEP_ALIVE, by_choice, event, event_stream, events_of
from .usage import Usage


@dataclass(frozen=True)
class Piece:
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

    prompt_index: int
    index: int
    token_ids: list[int]
    text: str
    logprobs: Sequence[TokenLogprobs | None]
    finish_reason: FinishReason | None
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
            completion.finish_reason,
            completion.stop_reason,
            output.prompt_logprobs,
        )

    @classmethod
    def of_events(cls, prompt_index: int, index: int, events: Sequence[TokenEvent]) -> Piece:
        """Return what the engine's events say about one text."""
        return cls(
            prompt_index,
            index,
            [each.token_id for each in events if each.token_id is not None],
            "".join(each.text for each in events),
            [each.logprobs for each in events if each.logprobs is not None],
            events[-1].finish_reason,
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

    @abstractmethod
    def events(self, piece: Piece) -> Iterator[bytes]:
        """Yield the events for further tokens."""

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
    """

    def __init__(
        self,
        server: Server,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        head: dict[str, Any],
        options: StreamOptions | None,
    ) -> None:
        super().__init__(server, prompts, params)
        self.head, self._options = head, options

    @abstractmethod
    def choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the choices of the chunks for further tokens."""

    def events(self, piece: Piece) -> Iterator[bytes]:
        """Yield a chunk for each of the piece's choices."""
        reports_each = self._options is not None and self._options.continuous_usage_stats
        for choice in self.choices(piece):
            chunk = {**self.head, "choices": [choice]}
            yield event(chunk | {"usage": self.usage.to_dict()} if reports_each else chunk)

    def end(self) -> Iterator[bytes]:
        """Yield the usage, if the request asks for it."""
        if self._options is not None and self._options.include_usage:
            yield event({**self.head, "choices": [], "usage": self.usage.to_dict()})
        yield DONE

    def failure(self, error: ApiError) -> Iterator[bytes]:
        """Yield the error."""
        yield event(error.body())
        yield DONE


Body = TypeVar("Body", bound=GeneratingFields)


async def respond(
    request: Request, body_class: type[Body], make: Callable[[Server, Body, str], Awaitable[Answer]]
) -> Response:
    """Answer a request of a generating endpoint.

    Args:
        request: The request.
        body_class: Its pydantic model.
        make: Makes the answer of the server, the request's body and the model's name.

    Raises:
        ApiError: The request is refused, or failed before anything was sent.
    """
    server: Server = request.app.state.server
    body = await server.read(request, body_class)
    answer = await make(server, body, server.model_name(body.model))
    streams = await server.begin(answer.prompts, answer.params)
    if body.stream:
        return event_stream(streams, _events(streams, answer), answer.failure)
    outputs = await server.finish(request, streams)
    answer.usage.cached = _cached(outputs)
    return JSONResponse(answer.whole(outputs))


async def _events(streams: Sequence[RequestStream], answer: Answer) -> AsyncIterator[bytes]:
    for part in answer.begin():
        yield part
    async for prompt_index, events in events_of(answer.server, streams):
        if not events:
            yield KEEP_ALIVE
        for index, own in by_choice(events).items():
            for part in answer.events(Piece.of_events(prompt_index, index, own)):
                yield part
    answer.usage.cached = _cached([stream.output for stream in streams])
    for part in answer.end():
        yield part


def _cached(outputs: Sequence[RequestOutput | None]) -> int:
    """Return how many tokens of the prompts came from the prefix cache."""
    return sum(output.num_cached_tokens for output in outputs if output is not None)
