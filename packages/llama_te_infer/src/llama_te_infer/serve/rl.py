"""`/pause`, `/sleep`, `/update_weights` and so on: a trainer gives the engine new weights while clients wait.

The operator turns these endpoints on. Their names, parameters and answers are those of vLLM's server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request

from ..sampling_params import shown
from .errors import ApiError
from .protocol.rl import PauseQuery, Query, SleepQuery, UpdateWeightsRequest
from .requests import body_of, query_of
from .server import Server, content_of

QueryType = TypeVar("QueryType", bound=Query)

MOST_BYTES = 1 << 10  # of a body that must be empty


def _refuse_other_pages(request: Request) -> None:
    """Refuse requests that a page of another origin sends from a user's browser: a POST without a body needs no CORS.

    Raises:
        ApiError: It is one.
    """
    origin, allowed = request.headers.get("origin"), request.app.state.server.settings.allowed_origins
    if origin is None or not {origin, "*"}.isdisjoint(allowed):
        return
    if origin.partition("://")[2] != request.headers.get("host"):
        raise ApiError(403, f"Origin={shown(origin)} may not do this: see --allowed-origins.")


router = APIRouter(dependencies=[Depends(_refuse_other_pages)])


@router.post("/pause", openapi_extra=query_of(PauseQuery))
async def pause(request: Request) -> dict[str, Any]:
    """Let new requests wait, and answer when the engine computes nothing any more."""
    query = await _query_of(request, PauseQuery)
    with _conflicts():
        await _server(request).engine.pause(query.mode, query.clear_cache)
    return {"status": "paused"}


@router.post("/resume", openapi_extra=query_of(Query))
async def resume(request: Request) -> dict[str, Any]:
    """Let requests run again."""
    await _query_of(request, Query)
    with _conflicts():
        await _server(request).engine.resume()
    return {"status": "resumed"}


@router.get("/is_paused")
async def is_paused(request: Request) -> dict[str, Any]:
    """Say whether new requests wait."""
    return {"is_paused": _server(request).engine.is_paused}


@router.post("/sleep", openapi_extra=query_of(SleepQuery))
async def sleep(request: Request) -> dict[str, Any]:
    """Pause, and give the memory of the cache, the CUDA graphs and the workspaces back."""
    query = await _query_of(request, SleepQuery)
    with _conflicts():
        await _server(request).engine.sleep(query.mode)
    return {"status": "sleeping"}


@router.post("/wake_up", openapi_extra=query_of(Query))
async def wake_up(request: Request) -> dict[str, Any]:
    """Take the memory again, and let requests run."""
    await _query_of(request, Query)
    with _conflicts():
        await _server(request).engine.wake()
    return {"status": "awake"}


@router.get("/is_sleeping")
async def is_sleeping(request: Request) -> dict[str, Any]:
    """Say whether the engine has given its memory back."""
    return {"is_sleeping": _server(request).engine.is_asleep}


@router.post("/reset_prefix_cache", openapi_extra=query_of(Query))
async def reset_prefix_cache(request: Request) -> dict[str, Any]:
    """Forget all cached prefixes."""
    await _query_of(request, Query)
    with _conflicts():
        await _server(request).engine.reset_prefix_cache()
    return {"success": True}


@router.post("/update_weights", openapi_extra=body_of(UpdateWeightsRequest))
async def update_weights(request: Request) -> dict[str, Any]:
    """Load a checkpoint of the model's size, and copy its weights into the model."""
    _check_query(request, Query)
    body = await _server(request).read(request, UpdateWeightsRequest, needs_admission=False)
    try:
        await _server(request).engine.update_weights(body.update_info.checkpoint)
    except (OSError, ValueError) as error:
        raise ApiError(400, f"update_info.checkpoint: {error}", "update_info.checkpoint") from error
    return {"message": "Weights updated"}


@contextmanager
def _conflicts() -> Iterator[None]:
    """Turn what the engine refuses in its present state into answers with status 409."""
    try:
        yield
    except ValueError as error:
        raise ApiError(409, str(error)) from error


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


async def _query_of(request: Request, query_class: type[QueryType]) -> QueryType:
    """Return the query of a request without a body.

    Raises:
        ApiError: It has a body.
        pydantic.ValidationError: The query has other fields.
    """
    query = _check_query(request, query_class)
    content = await content_of(request, MOST_BYTES)
    if content.strip() not in (b"", b"{}", b"null"):
        names = ", ".join(query_class.model_fields) or "none"
        raise ApiError(400, f"The body must be empty: parameters stand in the address. This endpoint has {names}.")
    return query


def _check_query(request: Request, query_class: type[QueryType]) -> QueryType:
    return query_class.model_validate(dict(request.query_params))
