"""Replicas of the server on Ray Serve. It needs the extras `serve` and `ray`.

    serve run llama_te_infer.serve.ray:app model=./llama replicas=2

A request passes Ray Serve's proxy, then the `Ingress`, then one `Replica`, which has an engine and the application of
`create_app`. Ray Serve does not repeat a request whose replica is lost; the ingress does, as long as the client has
nothing of the answer. The ingress computes nothing, so it runs without a GPU.
"""

# Ray Serve reads the type of `app`'s argument from its annotation, which must not be a string.

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, Json
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import Message, Receive, Scope

from .command import keys_of_environment, load_engine, make_parser
from .errors import ApiError, api_error_of
from .server import content_of
from .streams import DONE, KEEP_ALIVE, event

_UNLIMITED = 1 << 20  # the queue for the replicas has the limit
ATTEMPTS = 3  # a request that ends each of its replicas must not end them all
# Options of `llama-te-serve` that Ray Serve has itself, and where.
_OF_RAY_SERVE = {
    "host": "`serve run` with --config, or `serve.start(http_options={'host': ...})`",
    "port": "`serve run` with --config, or `serve.start(http_options={'port': ...})`",
    "enable_rl": "`llama-te-serve` for each GPU, since such a request would reach one replica alone",
    "log_level": "`deployment={'logging_config': {'log_level': ...}}`",
}
# Its public name, in `ray.serve.llm`, needs vLLM.
_PREFIX_ROUTER = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"
_PREFIX_CHARACTERS = 8192


class Arguments(BaseModel):
    """The arguments of `app`: the ones of `application`, with each option of `llama-te-serve` by its name."""

    model_config = ConfigDict(extra="allow")

    model: str
    replicas: int = Field(1, ge=1)
    num_gpus: float = Field(1, ge=0)
    ingress_replicas: int = Field(1, ge=1)
    prefix_routing: bool = False
    deployment: dict[str, Any] | Json[dict[str, Any]] = Field(default_factory=dict)


def app(arguments: Arguments) -> serve.Application:
    """Return the application for `serve run` and for Ray Serve's configuration files. See `application`."""
    return application(**dict(arguments))


def application(
    model: str,
    *,
    replicas: int = 1,
    num_gpus: float = 1,
    ingress_replicas: int = 1,
    prefix_routing: bool = False,
    deployment: Mapping[str, Any] | None = None,
    **options: Any,
) -> serve.Application:
    """Return an application for `ray.serve.run`.

    Args:
        model: A folder, GGUF file or hub id that each node of the cluster can read.
        replicas: The number of replicas. `deployment={"autoscaling_config": {...}}` lets Ray Serve choose it.
        num_gpus: GPUs of a replica; 0 runs it on the CPU.
        ingress_replicas: The number of processes that pass requests on. One lost takes its requests with it.
        prefix_routing: Send a prompt to a replica that has seen its beginning, unless that one has far more to do.
        deployment: Options of `ray.serve.deployment` for the replicas, such as `max_ongoing_requests` or
            `ray_actor_options={"num_cpus": 8}`. They take precedence.
        options: Options of `llama-te-serve`, such as `max_batch_size=64`. `drain_timeout` is the time that a replica
            has for its requests when it ends; `max_requests` is the number of requests that wait for all replicas.

    Raises:
        ValueError: An option is unknown or has a wrong value.
    """
    parsed = _parse(model, options)
    # Here, since the replicas do not see this process's environment.
    parsed.api_key = [*parsed.api_key, *keys_of_environment()]
    fields: dict[str, Any] = {
        "num_replicas": replicas,
        # What does not fit into an engine's batch waits in the ingress: another replica may be free first.
        "max_ongoing_requests": parsed.max_batch_size,
        "max_queued_requests": parsed.max_requests,
        "graceful_shutdown_timeout_s": parsed.drain_timeout,
        **(deployment or {}),
    }
    if prefix_routing:
        # Ray's defaults ignore the load and keep all prompts. Nobody should wait for a full replica beside a free one.
        most = min(8, fields["max_ongoing_requests"] // 2)
        router: dict[str, Any] = {"request_router_class": _PREFIX_ROUTER}
        router["request_router_kwargs"] = {"imbalanced_threshold": most, "do_eviction": True}
        fields.setdefault("request_router_config", router)
    fields["ray_actor_options"] = {"num_gpus": num_gpus, **fields.get("ray_actor_options", {})}
    if "autoscaling_config" in fields:
        del fields["num_replicas"]
    running = serve.deployment(Replica, **fields).bind(parsed)
    ingress = serve.deployment(
        Ingress,
        num_replicas=ingress_replicas,
        max_ongoing_requests=_UNLIMITED,
        graceful_shutdown_timeout_s=fields["graceful_shutdown_timeout_s"],
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(running, max_body_bytes=parsed.max_body_bytes, sends_prompts=prefix_routing)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}: the options are those of `llama-te-serve --help`.")


def _parse(model: str, options: Mapping[str, Any]) -> argparse.Namespace:
    words = [model]
    for name, value in options.items():
        if name in _OF_RAY_SERVE:
            raise ValueError(f"{name}={value!r} has no effect on a replica: use {_OF_RAY_SERVE[name]}.")
        flag = f"--{name.replace('_', '-')}"
        match value:
            case None | False:
                continue
            case True | "true" | "True":
                words.append(flag)
            case list() | tuple():
                words += [flag, *map(str, value)]
            case _:
                words.append(f"{flag}={value}")
    return make_parser(_Parser).parse_args(words)


@dataclass(frozen=True)
class HttpRequest:
    """A request on its way to a replica.

    Attributes:
        method: Such as "POST".
        path: Its path, without the application's prefix.
        query: What follows "?".
        headers: Names in lower case, and values.
        body: All of it.
        prompt: The beginning of its prompt; Ray's `PrefixCacheAffinityRouter` reads an attribute of this name.
    """

    method: str
    path: str
    query: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes
    prompt: str


@dataclass(frozen=True)
class Beginning:
    """The first part of an answer: its status, its headers, and the first bytes of its body."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


class Ingress:
    """Passes requests on to the replicas, and repeats those whose replica is lost.

    Args:
        replicas: The handle of the replicas.
        max_body_bytes: Most bytes of a request's body.
        sends_prompts: Whether the replicas are chosen by prompts.
    """

    def __init__(self, replicas: DeploymentHandle[Any], max_body_bytes: int, sends_prompts: bool) -> None:
        self._replicas = replicas.options(stream=True)
        self._max_body_bytes, self._sends_prompts = max_body_bytes, sends_prompts

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        try:
            body = await content_of(request, self._max_body_bytes)
            scope = request.scope
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            prompt = prompt_of(body) if self._sends_prompts else ""
            sent = HttpRequest(request.method, path, scope["query_string"], scope["headers"], body, prompt)
            parts = self._parts(sent)
            beginning = await anext(parts)
            assert isinstance(beginning, Beginning)
        except Exception as error:
            answer = _error_of(error)
            return JSONResponse(answer.body(), answer.status, answer.headers)
        response = StreamingResponse(_bodies(beginning, parts), beginning.status)
        # Ray Serve adds this header itself, with the id that it has sent to the replica.
        response.raw_headers = [header for header in beginning.headers if header[0].lower() != b"x-request-id"]
        return response

    async def _parts(self, request: HttpRequest) -> AsyncIterator[Beginning | bytes]:
        """Yield the answer of a replica; of another one if the first is lost before it has told the client anything."""
        has_begun = False
        for attempt in range(1, ATTEMPTS + 1):
            answer = self._replicas.answer.remote(request)
            try:
                async for part in answer:
                    body = part.body if isinstance(part, Beginning) else part
                    has_begun = has_begun or bool(body.replace(KEEP_ALIVE, b""))
                    yield part
                return
            except RayActorError:
                if has_begun or attempt == ATTEMPTS:
                    raise
            except BaseException:  # the client has left
                answer.cancel()
                raise


async def _bodies(beginning: Beginning, parts: AsyncIterator[Beginning | bytes]) -> AsyncIterator[bytes]:
    """Yield the body of an answer, which ends with an event if its replica is lost."""
    yield beginning.body
    try:
        async for part in parts:
            if isinstance(part, bytes):
                yield part
            elif part.status == beginning.status:  # of the second replica, after keep-alives of the first
                yield part.body
            else:
                yield event(json.loads(part.body)) + DONE
    except Exception as error:
        yield event(_error_of(error).body()) + DONE


def prompt_of(body: bytes) -> str:
    """Return the beginning of the prompt in a request's body, or "/" if there is none."""
    try:
        content = json.loads(body)
        prompt = content.get("messages") or content["prompt"]
    except (ValueError, LookupError, AttributeError, RecursionError):
        return "/"
    # The router divides by the number of characters.
    return (prompt if isinstance(prompt, str) else json.dumps(prompt))[:_PREFIX_CHARACTERS] or "/"


def _error_of(error: Exception) -> ApiError:
    match error:
        case BackPressureError():
            return ApiError(429, "The server is busy: all replicas have enough to do. Try again later.")
        case DeploymentUnavailableError():
            return ApiError(503, "No replica is running: try again later.")
        case RayActorError():
            return ApiError(503, "The replica that answered this request is lost: send the request again.")
        case _:
            return api_error_of(error)


class Replica:
    """One engine, and the application over it.

    Args:
        options: Of `llama-te-serve`.

    Attributes:
        engine: The engine.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        # Not in the ingress, which needs no torch.
        from .app import create_app

        # It limits no requests: Ray Serve counts those that it sends.
        self.engine, settings = load_engine(options)
        self._app = create_app(self.engine, settings)

    async def answer(self, request: HttpRequest) -> AsyncIterator[Beginning | bytes]:
        """Yield the answer to a request: its beginning, then at each time all bytes since the last part."""
        messages: asyncio.Queue[Message] = asyncio.Queue()
        answering = asyncio.ensure_future(self._app(_scope_of(request), _receive_of(request), messages.put))
        answering.add_done_callback(lambda _: messages.put_nowait(_END))
        try:
            start = await messages.get()
            if start is _END:
                await answering  # it has raised an exception
            bodies = _bodies_of(messages)
            yield Beginning(start["status"], start["headers"], await anext(bodies))
            async for body in bodies:
                yield body
        finally:
            answering.cancel()

    def check_health(self) -> None:
        """Raise the error of the engine's last step, if it failed; Ray Serve then replaces the replica."""
        if self.engine.failure is not None:
            raise self.engine.failure

    def __del__(self) -> None:
        """End the engine. Ray Serve calls this once all requests have ended or their time is over."""
        if hasattr(self, "engine"):
            self.engine.close()


_END: Message = {"type": "http.response.body", "body": b"", "more_body": False}


def _scope_of(request: HttpRequest) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers),
    }


def _receive_of(request: HttpRequest) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": request.body}]

    async def receive() -> Message:
        if not messages:
            await asyncio.get_running_loop().create_future()  # if the client leaves, Ray Serve cancels the task
        return messages.pop()

    return receive


async def _bodies_of(messages: asyncio.Queue[Message]) -> AsyncIterator[bytes]:
    """Yield the bytes of an application's messages, each time all that wait."""
    is_complete = False
    while not is_complete:
        waiting = [await messages.get()]
        while not messages.empty():
            waiting.append(messages.get_nowait())
        is_complete = not waiting[-1].get("more_body")
        yield b"".join(message.get("body", b"") for message in waiting)
