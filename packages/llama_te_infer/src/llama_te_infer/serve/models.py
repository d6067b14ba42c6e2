"""What is served, its tokenizer, and whether it works: `/v1/models`, `/tokenize`, `/health` and so on."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .. import __version__
from .errors import ApiError
from .protocol.tokens import DetokenizeRequest, TokenizeRequest
from .requests import body_of
from .server import Server, refusals
from .tools import ToolUse

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the names of the model."""
    server: Server = request.app.state.server
    return {"object": "list", "data": [_model(server, name) for name in server.settings.model_names]}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """Describe the model."""
    server: Server = request.app.state.server
    return _model(server, server.model_name(name))


def _model(server: Server, name: str) -> dict[str, Any]:
    limit = server.engine.max_sequence_length
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "llama-te",
        "root": server.settings.model_names[0],
        "max_model_len": limit,
    }


@router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
async def tokenize(request: Request) -> dict[str, Any]:
    """Return the tokens of a text or of a conversation."""
    server: Server = request.app.state.server
    body = await server.read(request, TokenizeRequest)
    server.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Give either prompt or messages.", "prompt")
    with refusals():
        if body.prompt is not None:
            tokens = await server.tokens_of(body.prompt, body.add_special_tokens is not False)
        else:
            tokens = await server.tokens_of_chat(body, ToolUse.of(body.tools))
    answer = {"tokens": tokens, "count": len(tokens), "max_model_len": server.engine.max_sequence_length}
    texts = [server.token_texts.text_of(token) for token in tokens] if body.return_token_strs else None
    return answer | {"token_strs": texts}


@router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
async def detokenize(request: Request) -> dict[str, Any]:
    """Return the text of tokens."""
    server: Server = request.app.state.server
    body = await server.read(request, DetokenizeRequest)
    server.model_name(body.model)
    size = len(server.tokenizer)
    wrong = [token for token in body.tokens if not 0 <= token < size]
    if wrong:
        raise ApiError(400, f"tokens has {wrong[0]}, but the tokenizer knows 0 to {size - 1}.", "tokens")
    return {"prompt": server.text_of(body.tokens)}


@router.get("/health")
async def health(request: Request) -> Response:
    """Answer 200 while the engine works; 503 after a step has failed, until a step succeeds."""
    server: Server = request.app.state.server
    failure = server.engine.failure
    if failure is not None:
        raise ApiError(503, f"The engine's last step failed: {type(failure).__name__}.")
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Answer 200 while the server takes requests, also while they wait for the end of a pause; 503 otherwise."""
    server: Server = request.app.state.server
    if server.engine.is_draining:
        raise ApiError(503, "The server is shutting down.")
    if server.engine.is_asleep:
        raise ApiError(503, "The engine is asleep.")
    return await health(request)


@router.get("/version")
async def version() -> dict[str, str]:
    """Return the version of llama-te-infer."""
    return {"version": __version__}
