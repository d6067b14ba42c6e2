"""The ASGI application: its endpoints, and what each request passes through."""

from __future__ import annotations

import functools
import hmac

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..engine.client import EngineClient
from ..sampling_params import shown
from . import chat, completions, metrics, models, page, pooling, responses, rl
from .errors import ERRORS, ApiError, api_error_of
from .observation import HttpContext, http_context
from .requests import openapi_of
from .server import Server
from .settings import ServerSettings

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
# An orchestrator, Prometheus and the page ask these without a key.
OPEN_PATHS = ("/health", "/ready", "/metrics", *page.PATHS)


def create_app(engine: EngineClient, settings: ServerSettings) -> FastAPI:
    """Return the application.

    Args:
        engine: An engine with a tokenizer; the caller closes it after the application.
        settings: The operator's settings.
    """
    app = FastAPI(title="llama-te", version=__version__, docs_url=None, redoc_url=None)
    app.state.server = Server(engine, settings)
    for module in (completions, chat, responses, pooling, models, metrics, page):
        app.include_router(module.router)
    if settings.enable_rl:
        app.include_router(rl.router)
    # FastAPI calls this once, at the first request for the schema.
    app.openapi = functools.cache(lambda: openapi_of(app, bool(settings.api_keys)))  # type: ignore[method-assign]
    for error in (*ERRORS, HTTPException):
        app.add_exception_handler(error, _answer_error)
    app.add_middleware(ApiKeys, keys=settings.api_keys)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Observer, metrics=app.state.server.metrics)
    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    headers = {}
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})  # such as Allow
        error = ApiError(error.status_code, f"{request.method} {shown(request.url.path)}: {error.detail}.")
    answer = api_error_of(error)
    return JSONResponse(answer.body(), answer.status, answer.headers | headers)


class Observer:
    """Gives each request an id, counts the answers, and answers errors that no one expects.

    Args:
        app: The application behind it.
        metrics: The server's.
    """

    def __init__(self, app: ASGIApp, metrics: metrics.Metrics) -> None:
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        context = HttpContext.of(scope["path"], headers)
        http_context.set(context)
        has_begun = False

        async def send_on(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["X-Request-Id"] = context.request_id
                handler = getattr(scope.get("route"), "path", "none")
                # A client may make up methods, and each would be a time series for ever.
                method = scope["method"] if scope["method"] in METHODS else "other"
                self._metrics.count_http(handler, method, message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except Exception as error:
            answer = api_error_of(error)
            if not has_begun:  # otherwise uvicorn closes the connection
                await JSONResponse(answer.body(), answer.status)(scope, receive, send_on)


class ApiKeys:
    """Refuses requests without one of the keys.

    Args:
        app: The application behind it.
        keys: The keys; without any, every request passes.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(scope):
            error = ApiError(401, "The request has no valid API key: send it as 'Authorization: Bearer KEY'.")
            response = JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})
            await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        # All keys are compared, so that the time tells nothing about them.
        matches = [hmac.compare_digest(token.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
