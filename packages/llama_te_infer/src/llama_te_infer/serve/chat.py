"""`/v1/chat/completions`: answers conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..engine.outputs import RequestOutput
from ..sampling_params import SamplingParams
from .answers import ChunkedAnswer, Piece
from .errors import ApiError
from .protocol.chat import ChatRequest
from .requests import body_of
from .sending import respond
from .server import Server, new_id, refusals
from .token_texts import TokenTexts, prompt_logprobs_of
from .tool_calls import Arguments, CallBegin, Part, Text
from .tools import AnswerReader, ToolUse, new_call_id

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    return await respond(request, ChatRequest, _answer)


async def _answer(server: Server, body: ChatRequest, name: str) -> ChatAnswer:
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, f"top_logprobs={body.top_logprobs} needs logprobs=true.", "top_logprobs")
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(400, "prompt_logprobs with stream=true is not possible: leave one out.", "prompt_logprobs")
    tools = ToolUse.of(body.tools, body.tool_choice, body.parallel_tool_calls)
    with refusals():
        params = body.sampling_params(
            server.settings.default_params,
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        prompt = await server.tokens_of_chat(body, tools)
        params = server.params_with_tools(params, tools)
    return ChatAnswer(server, prompt, params, tools, body, name)


class ChatAnswer(ChunkedAnswer):
    """Writes an answer to a conversation, whole or in chunks."""

    def __init__(
        self,
        server: Server,
        prompt: list[int],
        params: SamplingParams,
        tools: ToolUse,
        body: ChatRequest,
        name: str,
    ) -> None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = {"id": new_id("chatcmpl", body.request_id), "object": kind, "created": server.now(), "model": name}
        is_plain = tools.mode == "none" and not body.logprobs and not body.return_token_ids
        super().__init__(server, [prompt], params, head, body.stream_options, is_plain)
        self._body, self._tools = body, tools
        self._texts: dict[int, AnswerReader] = {}  # of each choice that has begun

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the answer."""
        (output,) = outputs
        choices = [self._whole_choice(Piece.whole(0, completion, output)) for completion in output.outputs]
        answer = {**self.head, "choices": choices, "usage": self.usage.to_dict()}
        if self._body.prompt_logprobs is not None and output.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs_of(
                self.server.token_texts, output.prompt_token_ids, output.prompt_logprobs, self._body.prompt_logprobs
            )
        return answer | ({"prompt_token_ids": output.prompt_token_ids} if self._body.return_token_ids else {})

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        reader = self.server.answer_reader(self._tools)
        delta = _delta(reader.read(piece.text, is_end=True))
        message = {"role": "assistant", "content": None if reader.num_calls else "", "refusal": None, **delta}
        for call in message.get("tool_calls", ()):
            del call["index"]
        return {"index": piece.index, "message": message, **self._about(piece, reader)}

    def choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the role before the first piece of a choice, and each piece."""
        reader = self._texts.get(piece.index)
        if reader is None:
            reader = self._texts[piece.index] = self.server.answer_reader(self._tools)
            role = {"role": "assistant", "content": "" if self._tools.mode == "none" else None}
            yield {"index": piece.index, "delta": role, "logprobs": None, "finish_reason": None}
        delta = _delta(reader.read(piece.text, is_end=piece.finish_reason is not None))
        about = self._about(piece, reader)
        # Text that may become a call waits, and a chunk without it says nothing, unless it has other news.
        if delta or any(about.values()):
            yield {"index": piece.index, "delta": delta, **about}

    def _about(self, piece: Piece, reader: AnswerReader) -> dict[str, Any]:
        """Return what a choice says about its text, whole or in chunks."""
        body = self._body
        self.usage.completion += len(piece.token_ids)
        about: dict[str, Any] = {
            "logprobs": {
                "content": logprobs_of(
                    piece, self.server.token_texts, body.top_logprobs or 0, body.return_tokens_as_token_ids
                ),
                "refusal": None,
            }
            if body.logprobs
            else None,
            "finish_reason": "tool_calls"
            if reader.num_calls and piece.finish_reason == "stop"
            else piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        return about | ({"token_ids": piece.token_ids} if body.return_token_ids else {})


def _delta(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the fields of a message for parts of its text; each call has one entry."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        match part:
            case Text(text):
                delta["content"] = delta.get("content", "") + text
            case CallBegin(index, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "id": new_call_id(), "type": "function", "function": function}
            case Arguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    return delta | ({"tool_calls": list(calls.values())} if calls else {})


def logprobs_of(piece: Piece, texts: TokenTexts, count: int, as_token_ids: bool | None = None) -> list[dict[str, Any]]:
    """Return OpenAI's list of log-probabilities.

    Args:
        piece: The tokens.
        texts: The texts of tokens.
        count: The number of most likely tokens at each position.
        as_token_ids: Name tokens by their ids.
    """

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        name, content = texts.name_of(token_id, as_token_ids), texts.bytes_of(token_id)
        return {"token": name, "logprob": logprob, "bytes": list(content)}

    return [
        entry(token_id, here.logprob) | {"top_logprobs": [entry(*pair) for pair in here.top[:count]]}
        for token_id, here in zip(piece.token_ids, piece.logprobs, strict=True)
        if here is not None
    ]
