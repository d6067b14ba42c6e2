"""`/v1/responses`: answers conversations in items, without state."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from ..engine.outputs import RequestOutput
from ..sampling_params import SamplingParams
from .answers import Answer, Piece
from .chat import logprobs_of
from .errors import ApiError
from .messages import text_of
from .protocol.responses import INCLUDES_LOGPROBS, ResponsesRequest
from .protocol.tokens import ChatFields
from .requests import body_of
from .sending import respond
from .server import Server, new_id, refusals
from .streams import typed_event
from .tool_calls import Arguments, CallBegin, Text
from .tools import ToolUse, new_call_id

router = APIRouter()


@router.post("/v1/responses", openapi_extra=body_of(ResponsesRequest))
async def create_response(request: Request) -> Response:
    """Answer a conversation."""
    return await respond(request, ResponsesRequest, _answer)


async def _answer(server: Server, body: ResponsesRequest, name: str) -> ResponseAnswer:
    wants_logprobs = INCLUDES_LOGPROBS in (body.include or ())
    if body.top_logprobs and not wants_logprobs:
        raise ApiError(400, f'top_logprobs={body.top_logprobs} needs include=["{INCLUDES_LOGPROBS}"].', "top_logprobs")
    tools = ToolUse.of(body.chat_tools(), body.chat_tool_choice(), body.parallel_tool_calls)
    with refusals():
        params = body.sampling_params(
            server.settings.default_params,
            max_tokens=body.max_output_tokens,
            logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
            prompt_logprobs=None,
        )
        form = None if body.text is None else body.text.structured_outputs()
        if form is not None:
            if params.structured_outputs is not None:
                raise ValueError("text.format and structured_outputs both give the text a form: leave one of them out.")
            params = replace(params, structured_outputs=form)
        prompt = await server.tokens_of_chat(ChatFields.model_validate({"messages": _messages(body)}), tools)
        params = server.params_with_tools(params, tools)
    return ResponseAnswer(server, prompt, params, tools, body, name)


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the conversation as chats have it."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for index, item in enumerate(body.input):
        place = f"input.{index}"
        match item.get("type", "message" if "role" in item else None):
            case "message":
                content = text_of(item.get("content"), f"{place}.content")
                messages.append({"role": item.get("role"), "content": content})
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                # Calls belong to the message of the assistant before them.
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                content = text_of(item.get("output"), f"{place}.output")
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
            case kind:
                allowed = "message, function_call or function_call_output"
                raise ApiError(400, f"{place}.type={kind!r} is not supported: give {allowed}.", f"{place}.type")
    if not messages:
        raise ApiError(400, "input=[] is not possible: give a text or at least one item.", "input")
    return messages


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseAnswer(Answer):
    """Writes a response, whole or in events.

    Both come of the same events, so that the items of a stream are those of the whole response.
    """

    def __init__(
        self,
        server: Server,
        prompt: list[int],
        params: SamplingParams,
        tools: ToolUse,
        body: ResponsesRequest,
        name: str,
    ) -> None:
        super().__init__(server, [prompt], params)
        self._body = body
        self._reader = server.answer_reader(tools)
        self._output: list[dict[str, Any]] = []  # items; the last one may be open
        self._is_open = False
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text has not come yet
        self._count = 0  # of events
        self._response: dict[str, Any] = {
            "id": new_id("resp", body.request_id),
            "object": "response",
            "created_at": server.now(),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": name,
            "output": self._output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "background": False,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}}
            if body.text is None or body.text.format is None
            else body.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": body.tool_choice.model_dump()
            if isinstance(body.tool_choice, BaseModel)
            else body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the response."""
        for _ in self._events(Piece.whole(0, outputs[0].outputs[0], outputs[0])):
            pass
        return self._with_usage()

    def begin(self) -> Iterator[bytes]:
        """Yield the response without output."""
        yield self._encoded("response.created", response=self._response)
        yield self._encoded("response.in_progress", response=self._response)

    def events(self, piece: Piece) -> Iterator[bytes]:
        """Yield the events for further tokens."""
        for kind, fields in self._events(piece):
            yield self._encoded(kind, **fields)

    def end(self) -> Iterator[bytes]:
        """Yield the complete response."""
        yield self._encoded(f"response.{self._response['status']}", response=self._with_usage())

    def failure(self, error: ApiError) -> Iterator[bytes]:
        """Yield the response as far as it came, with the error."""
        self._response |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        yield self._encoded("response.failed", response=self._response)

    def _encoded(self, kind: str, **fields: Any) -> bytes:
        self._count += 1
        return typed_event({"type": kind, "sequence_number": self._count - 1, **fields})

    def _events(self, piece: Piece) -> Iterator[tuple[str, dict[str, Any]]]:
        body = self._body
        self.usage.completion += len(piece.token_ids)
        if piece.logprobs:
            self._logprobs += logprobs_of(
                piece, self.server.token_texts, body.top_logprobs or 0, body.return_tokens_as_token_ids
            )
        for part in self._reader.read(piece.text, is_end=piece.finish_reason is not None):
            match part:
                case Text(text):
                    if not self._is_open or self._output[-1]["type"] != "message":
                        yield from self._close()
                        yield from self._open_message()
                    yield from self._add_text(text)
                case CallBegin(name=name):
                    yield from self._close()
                    yield from self._open_call(name)
                case Arguments(text=text):
                    self._output[-1]["arguments"] += text
                    yield "response.function_call_arguments.delta", {**self._place(), "delta": text}
        if piece.finish_reason is not None:
            if not self._output:
                yield from self._open_message()
            is_complete = piece.finish_reason == "stop"
            yield from self._close("completed" if is_complete else "incomplete")
            self._finish(None if is_complete else "abort" if piece.finish_reason == "abort" else "max_output_tokens")

    def _finish(self, missing: Literal["abort", "max_output_tokens"] | None) -> None:
        self._response |= {
            "status": "incomplete" if missing else "completed",
            "completed_at": None if missing else self.server.now(),
            "incomplete_details": {"reason": missing} if missing else None,
        }

    def _with_usage(self) -> dict[str, Any]:
        usage = self.usage
        return self._response | {
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached or 0, "cache_write_tokens": 0},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt + usage.completion,
            }
        }

    # --- items --------------------------------------------------------------------------------------------------------

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _open(self, item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        self._output.append(item)
        self._is_open = True
        yield "response.output_item.added", {"output_index": len(self._output) - 1, "item": item}

    def _open_message(self) -> Iterator[tuple[str, dict[str, Any]]]:
        message = {"id": _new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant"}
        yield from self._open({**message, "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._output[-1]["content"].append(part)
        yield "response.content_part.added", {**self._place(), "content_index": 0, "part": part}

    def _open_call(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        call = {"id": _new_id("fc"), "type": "function_call", "status": "in_progress"}
        yield from self._open({**call, "call_id": new_call_id(), "name": name, "arguments": ""})

    def _add_text(self, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        (part,) = self._output[-1]["content"]
        logprobs, self._logprobs = self._logprobs, []
        part["text"] += text
        part["logprobs"] += logprobs
        delta = {"content_index": 0, "delta": text, "logprobs": logprobs}
        yield "response.output_text.delta", {**self._place(), **delta}

    def _close(self, status: str = "completed") -> Iterator[tuple[str, dict[str, Any]]]:
        """Complete the last item, if it is open."""
        if not self._is_open:
            return
        self._is_open = False
        item, place = self._output[-1], self._place()
        if item["type"] == "message":
            (part,) = item["content"]
            part["logprobs"] += self._logprobs
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield "response.output_text.done", {**place, "content_index": 0, **done}
            yield "response.content_part.done", {**place, "content_index": 0, "part": part}
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", {**place, **done}
        self._logprobs = []
        item["status"] = status
        yield "response.output_item.done", {"output_index": place["output_index"], "item": item}
