"""What the endpoints share: the engine, the settings, and how they read requests and wait for answers."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
import warnings
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from ..engine.client import DrainingError, EngineClient, QueueFullError, RequestStream
from ..engine.outputs import RequestOutput
from ..engine.tokenization import special_tokens_of, tokens_of_chats
from ..sampling_params import SamplingParams, shown
from ..structured_outputs import MAX_CHARACTERS, GrammarError, StructuredOutputs
from .errors import ApiError, api_error_of
from .logs import RequestLog, ThroughputLog, logger
from .messages import for_template, writes_tools
from .metrics import Metrics
from .observation import HttpContext, ServedRequest, http_context
from .protocol.tokens import ChatFields
from .settings import ServerSettings
from .token_texts import TokenTexts
from .tool_calls import CALL_TAG
from .tools import AnswerReader, ToolUse, schema_of

Body = TypeVar("Body", bound=BaseModel)
Answer = TypeVar("Answer")

# So many of the largest bodies may arrive at a time, since all of them are in memory.
BODIES_AT_A_TIME = 16


class Server:
    """The engine behind the endpoints.

    Args:
        engine: It has a tokenizer.
        settings: The operator's settings.
    """

    def __init__(self, engine: EngineClient, settings: ServerSettings) -> None:
        if engine.tokenizer is None:
            raise ValueError("the engine has no tokenizer: a server needs one for texts.")
        self.engine, self.settings = engine, settings
        self.token_texts = TokenTexts(engine.tokenizer)
        self.tokenizer = engine.tokenizer
        self._special_tokens = special_tokens_of(engine.tokenizer)
        self.created = self.now()
        self.metrics = Metrics(engine, settings.model_names[0])
        self._log = None
        if settings.log_requests is not None:
            self._log = RequestLog(self.text_of if settings.log_requests == "content" else None)
        self._throughput = None if settings.log_interval is None else ThroughputLog(engine, settings.log_interval)
        self._tracing = None
        if settings.otlp_traces_endpoint is not None:
            from . import tracing

            self._tracing = tracing.Tracing(tracing.otlp_exporter(settings.otlp_traces_endpoint))
        self._logged_failure: BaseException | None = None
        self._arriving = [0]  # bytes of bodies
        # What the functions between a request and its template take themselves.
        functions = (engine.tokenize_chat, tokens_of_chats, engine.tokenizer.apply_chat_template)
        self._template_arguments = {"self"}.union(
            name
            for function in functions
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        )

    @staticmethod
    def now() -> int:
        """Return the time for an answer, in seconds since 1970."""
        return int(time.time())

    # --- requests -----------------------------------------------------------------------------------------------------

    async def read(self, request: Request, body_class: type[Body], *, needs_admission: bool = True) -> Body:
        """Return the body of a request.

        Args:
            request: The request.
            body_class: Its pydantic model.
            needs_admission: Whether the request is one for the engine's queue.

        Raises:
            ApiError: The body is too large, or announced as something else than JSON.
            pydantic.ValidationError: It is no JSON, or has other fields.
            QueueFullError: The engine's queue is full, or too many bodies arrive.
            DrainingError: The server is about to end.
        """
        if needs_admission:
            self.engine.check_admission()
        _check_format(request)
        content = await content_of(request, self.settings.max_body_bytes, self._arriving)
        return body_class.model_validate_json(content)

    def model_name(self, name: str | None) -> str:
        """Return the name of the model for an answer.

        Raises:
            ApiError: The request asks for another model.
        """
        names = self.settings.model_names
        if name is not None and name not in names:
            listed = ", ".join(names)
            raise ApiError(
                404, f"model={shown(name)} is not served here: ask for {listed}.", "model", "model_not_found"
            )
        return name or names[0]

    async def tokens_of(self, prompt: str | list[int], add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            ValueError: It is no prompt.
        """
        return await self.engine.tokenize(prompt, add_special_tokens)

    def chat_template(self, tools: ToolUse) -> str:
        """Return the source of the chat template; some tokenizers have one of its own for tools.

        Raises:
            ValueError: There is none.
        """
        template: str = self.tokenizer.get_chat_template(self.settings.chat_template, tools.for_template)
        return template

    async def tokens_of_chat(self, body: ChatFields, tools: ToolUse) -> list[int]:
        """Return the tokens of a conversation, as the chat template writes it.

        Args:
            body: The request.
            tools: Its tools.

        Raises:
            ApiError: A message has something that is no text, or a variable of the template cannot be given.
            ValueError: The messages do not fit the template.
        """
        template = self.chat_template(tools)
        continues = bool(body.continue_final_message)
        options: dict[str, Any] = {
            "continue_final_message": continues,
            "add_generation_prompt": not continues
            if body.add_generation_prompt is None
            else body.add_generation_prompt,
            "chat_template": template,
            "documents": body.documents,
            "tools": tools.for_template,
        }
        variables = body.chat_template_kwargs or {}
        if taken := sorted(self._template_arguments & variables.keys()):
            raise ApiError(
                400,
                f"chat_template_kwargs has {taken[0]!r}, which is no variable of a template: leave it out. Options of "
                "the template that requests may set, such as add_generation_prompt, are fields of their own.",
                "chat_template_kwargs",
            )
        if tools.for_template and not writes_tools(template):
            warnings.warn(
                "The chat template does not write tools, so a system message describes them in Hermes' format. "
                "--chat-template can give another template.",
                stacklevel=2,
            )
        messages = for_template(body.messages or [], template, tools.for_template)
        try:
            return await self.engine.tokenize_chat(messages, **options, **variables)
        except ValueError as error:
            refusal = api_error_of(error)
            refusal.param = refusal.param or "messages"
            raise refusal from error

    def params_with_tools(self, params: SamplingParams, tools: ToolUse) -> SamplingParams:
        """Return the parameters with which the model can call tools, and must if a call is required.

        Raises:
            ApiError: The operator does not let the model decide whether it calls tools.
            ValueError: The parameters have another form for the text.
        """
        if tools.mode == "none":
            return params
        if tools.mode == "auto" and not self.settings.tool_formats:
            message = 'tool_choice="auto" is turned off on this server: give "required", "none" or a function.'
            raise ApiError(400, message, "tool_choice")
        if CALL_TAG in self._special_tokens:
            params = replace(params, skip_special_tokens=False)  # else the text would not show the tag
        template = self.chat_template(tools)
        has_tags = CALL_TAG in template or not writes_tools(template)
        form = params.structured_outputs
        schema = None if form is None else schema_of(form)
        if tools.mode == "required" and form is not None and schema is None:
            raise ValueError("tool_choice requires a call, so structured_outputs cannot give the text another form.")
        if tools.mode == "auto" and form is None:
            grammar = tools.strict_grammar(self._special_tokens.values())
        else:
            grammar = tools.grammar("hermes" if has_tags else "llama3_json", schema)
        if grammar is not None and len(grammar) > MAX_CHARACTERS:
            message = (
                f"tools make a grammar of {len(grammar):,} characters, and {MAX_CHARACTERS:,} is the limit where calls "
                'must fit the schemas: shorten these, or leave out strict with tool_choice="auto".'
            )
            raise ApiError(400, message, "tools")
        return params if grammar is None else replace(params, structured_outputs=StructuredOutputs(grammar=grammar))

    def answer_reader(self, tools: ToolUse) -> AnswerReader:
        """Return what finds the calls of tools in the text of an answer."""
        return AnswerReader(tools, self.settings.tool_formats)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt, with its special tokens."""
        text: str = self.tokenizer.decode(token_ids)
        return text

    # --- the engine ---------------------------------------------------------------------------------------------------

    async def begin(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[RequestStream]:
        """Begin a request of the engine for each prompt; all of them or none.

        Raises:
            ApiError: One does not fit, or the queue is full.
        """
        context = http_context.get(HttpContext())
        streams: list[RequestStream] = []
        try:
            for index, prompt in enumerate(prompts):
                own_id = f"{context.request_id}-{index}" if len(prompts) > 1 else context.request_id
                request = ServedRequest(own_id, self.settings.model_names[0], prompt, params, context)
                with refusals(f"prompt[{index}]: " if len(prompts) > 1 else ""):
                    streams.append(await self._begin(request))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    async def _begin(self, request: ServedRequest) -> RequestStream:
        if self._log is not None:
            self._log.begin(request)
        try:
            stream = await self.engine.stream(
                request.prompt_token_ids, request.params, functools.partial(self._end, request)
            )
        except BaseException as error:
            if self._log is not None:
                self._log.refuse(request, error)
            raise
        if self._throughput is not None:
            self._throughput.wake()
        return stream

    def _end(self, request: ServedRequest, output: RequestOutput | None, error: Exception | None) -> None:
        """Count, log and trace a request that has ended."""
        request.output, request.error = output, error
        cause = error and (error.__cause__ or error)
        if cause is not None and cause is not self._logged_failure and not isinstance(cause, DrainingError):
            self._logged_failure = cause  # once for all requests that it ends
            logger.error("Requests have ended, since %s", error)
        self.metrics.end(request)
        if self._log is not None:
            self._log.end(request)
        if self._tracing is not None:
            self._tracing.end(request)

    async def finish(self, request: Request, streams: Sequence[RequestStream]) -> list[RequestOutput]:
        """Wait for the outputs of requests. All of them end if the client leaves or the time is over.

        Raises:
            ApiError: A request failed, the client has left, or the time is over.
        """
        try:
            outputs = await self.wait(request, _all_of(streams))
        finally:
            for stream in streams:
                stream.close()
        for output in outputs:
            self.check_output(output)
        return outputs

    def check_output(self, output: RequestOutput) -> None:
        """Raise an `ApiError` for a request that has failed, or that the end of the server has ended.

        A pause of the engine may end a request, too. Its answer has the tokens so far, and the finish reason says it.
        """
        for completion in output.outputs:
            if completion.finish_reason == "cancelled" and self.engine.is_draining:
                raise ApiError(503, "The server is shutting down: send the request to another one.")
            if completion.finish_reason == "error" and isinstance(output.error, GrammarError):
                raise api_error_of(output.error)  # the request contradicts itself
            if completion.finish_reason == "error":
                raise ApiError(500, f"The request has failed: {output.error}")

    async def wait(self, request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
        """Return the answer to a request; stop working on it if the client leaves or the time is over.

        Raises:
            ApiError: The client has left, or the time is over.
        """
        try:
            async with asyncio.timeout(self.settings.request_timeout):
                return await while_connected(request.receive, answer)
        except (ClientDisconnect, TimeoutError) as error:
            raise api_error_of(error) from error


async def content_of(request: Request, limit: int, arriving: list[int] | None = None) -> bytes:
    """Return the body of a request.

    Args:
        request: The request.
        limit: Most bytes.
        arriving: The number of bytes of all bodies that are arriving, which this function keeps.

    Raises:
        ApiError: The body has more bytes.
        QueueFullError: All bodies together have more bytes than `BODIES_AT_A_TIME` of the largest.
    """
    too_large = ApiError(413, f"The body has more than {limit:,} bytes, which is the limit: send less.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    content, arriving = bytearray(), [0] if arriving is None else arriving
    try:
        async for part in request.stream():
            content += part
            arriving[0] += len(part)
            if len(content) > limit:
                raise too_large
            if arriving[0] > BODIES_AT_A_TIME * limit:
                raise QueueFullError("too many long requests arrive at the same time: try again later.")
        return bytes(content)
    finally:
        arriving[0] -= len(content)


def _check_format(request: Request) -> None:
    """Refuse bodies that are announced as something else than JSON.

    A page of another origin may send other types without asking (CORS), so they must not reach an engine.
    """
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"Content-Type={shown(given)} is not possible: send JSON as application/json.")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(415, f"Content-Encoding={shown(encoding)} is not possible: send the body as it is.")


async def _all_of(streams: Sequence[RequestStream]) -> list[RequestOutput]:
    return [await stream.finish() for stream in streams]


async def while_connected(receive: Receive, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """Return the answer; stop working on it if the client closes the connection.

    Args:
        receive: Returns what the client sends. The body has been read, so only the end of the connection can follow.
        answer: The work.

    Raises:
        ClientDisconnect: The client has closed it.
    """
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        for each in (task, gone):
            each.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextmanager
def refusals(prefix: str = "") -> Iterator[None]:
    """Turn what the engine and its parameters refuse into errors of the client's request."""
    try:
        yield
    except ValueError as error:
        refusal = api_error_of(error)
        refusal.message = prefix + refusal.message
        raise refusal from error


def new_id(prefix: str, request_id: str | None = None) -> str:
    """Return the id of the answer to the current HTTP request, such as "cmpl-0f3…".

    Args:
        prefix: Its beginning.
        request_id: The client's own id; that of the HTTP request by default.
    """
    return f"{prefix}-{request_id or http_context.get(HttpContext()).request_id}"
