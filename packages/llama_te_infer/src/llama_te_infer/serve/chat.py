"""`/v1/chat/completions`: answers conversations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..engine.client import RequestStream
from ..engine.outputs import Completion, RequestOutput, TokenLogprobs
from .errors import ApiError
from .protocol.chat import ChatRequest
from .requests import body_of
from .server import Server, new_id, refusals
from .streams import KEEP_ALIVE, by_choice, event, event_stream, events_of
from .token_texts import TokenTexts
from .usage import Usage

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    server: Server = request.app.state.server
    body = await server.read(request, ChatRequest)
    name = server.model_name(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, f"top_logprobs={body.top_logprobs} needs logprobs=true.", "top_logprobs")
    with refusals():
        params = body.sampling_params(
            server.settings.default_params,
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=None,
        )
        prompt = await server.tokens_of_chat(body)
    streams = await server.begin([prompt], params)
    answer = _Answer(server, body, name, prompt)
    if body.stream:
        return event_stream(streams, answer.chunks(streams))
    (output,) = await server.finish(request, streams)
    return JSONResponse(answer.whole(output))


class _Answer:
    """Writes an answer, whole or in chunks."""

    def __init__(self, server: Server, body: ChatRequest, name: str, prompt: list[int]) -> None:
        self.server, self.body, self.prompt = server, body, prompt
        self.head = {"id": new_id("chatcmpl"), "created": server.now(), "model": name}

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        usage = Usage(len(self.prompt), sum(len(completion.token_ids) for completion in output.outputs))
        answer = {
            **self.head,
            "object": "chat.completion",
            "choices": [self._choice(completion) for completion in output.outputs],
            "usage": usage.to_dict(),
        }
        return answer | ({"prompt_token_ids": self.prompt} if self.body.return_token_ids else {})

    def _choice(self, completion: Completion) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.logprobs is not None:
            choice["logprobs"] = self._logprobs(completion.token_ids, completion.logprobs)
        return choice | ({"token_ids": completion.token_ids} if self.body.return_token_ids else {})

    async def chunks(self, streams: Sequence[RequestStream]) -> AsyncIterator[bytes]:
        options, head = self.body.stream_options, {**self.head, "object": "chat.completion.chunk"}
        reports_each = bool(options and options.continuous_usage_stats)
        usage = Usage(len(self.prompt))
        begun: set[int] = set()
        async for _, events in events_of(self.server, streams):
            if not events:
                yield KEEP_ALIVE
            for index, own in by_choice(events).items():
                if index not in begun:
                    begun.add(index)
                    yield event({**head, "choices": [_delta(index, {"role": "assistant", "content": ""})]})
                token_ids = [each.token_id for each in own if each.token_id is not None]
                usage.completion += len(token_ids)
                choice = _delta(index, {"content": text} if (text := "".join(each.text for each in own)) else {})
                choice |= {"finish_reason": own[-1].finish_reason, "stop_reason": own[-1].stop_reason}
                if self.body.logprobs:
                    logprobs = [each.logprobs for each in own if each.logprobs is not None]
                    choice["logprobs"] = self._logprobs(token_ids, logprobs)
                if self.body.return_token_ids:
                    choice["token_ids"] = token_ids
                content = {**head, "choices": [choice]}
                yield event(content | {"usage": usage.to_dict()} if reports_each else content)
        if options and options.include_usage:
            yield event({**head, "choices": [], "usage": usage.to_dict()})

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        texts, count = self.server.token_texts, self.body.top_logprobs or 0
        content = [
            _token(texts, token_id, here.logprob)
            | {"top_logprobs": [_token(texts, *pair) for pair in here.top[:count]]}
            for token_id, here in zip(token_ids, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _token(texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    content = texts.bytes_of(token_id)
    return {"token": texts.text_of(token_id), "logprob": logprob, "bytes": list(content)}
