"""`/v1/embeddings` and `/score`, of a model that computes embeddings or classes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from ..engine.pooling import PoolingEngine
from .errors import ApiError
from .protocol.pooling import EmbeddingRequest, ScoreRequest
from .requests import body_of
from .server import Server, new_id, refusals

if TYPE_CHECKING:
    import torch

router = APIRouter()


@router.post("/v1/embeddings", openapi_extra=body_of(EmbeddingRequest))
async def embeddings(request: Request) -> dict[str, Any]:
    """Return embeddings: final hidden states of last tokens, of length 1."""
    server: Server = request.app.state.server
    engine = _engine_of(server, "embeddings")
    body = await server.read(request, EmbeddingRequest)
    name = server.model_name(body.model)
    if engine.classes is not None:
        raise ApiError(404, "The served model is a classifier and has no embeddings: ask /score.")
    inputs = _inputs(body)
    size = _dimensions(engine, body.dimensions)
    adds_special = body.add_special_tokens is not False
    with refusals():
        prompts = [await server.tokens_of(each, adds_special) for each in inputs]
        vectors = (await server.wait(request, engine.pool(prompts)))[:, :size]
    if body.use_activation is not False:
        vectors = _normalized(vectors)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format == "base64")}
        for index, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": name, "usage": _usage(prompts)}


@router.post("/score", openapi_extra=body_of(ScoreRequest))
@router.post("/v1/score", openapi_extra=body_of(ScoreRequest))
async def score(request: Request) -> dict[str, Any]:
    """Score pairs of texts: by the classifier's only class, or by the cosine between two embeddings."""
    server: Server = request.app.state.server
    engine = _engine_of(server, "scores")
    body = await server.read(request, ScoreRequest)
    name = server.model_name(body.model)
    if engine.classes not in (None, 1):
        raise ApiError(
            404, f"The served model has {engine.classes} classes, and a score needs one with a single class."
        )
    with refusals():
        pairs = body.pairs()
        if engine.classes is None:
            if body.use_activation is False:
                raise ValueError("use_activation=False has no effect on a cosine: leave it out.")
            prompts = [await server.tokens_of(text) for pair in pairs for text in pair]
        else:
            prompts = [await engine.tokenize_pair(first, second) for first, second in pairs]
        vectors = await server.wait(request, engine.pool(prompts))
    if engine.classes is None:
        vectors = _normalized(vectors)
        scores = (vectors[::2] * vectors[1::2]).sum(-1)
    else:
        scores = vectors[:, 0] if body.use_activation is False else vectors[:, 0].sigmoid()
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores.tolist())]
    head = {"id": new_id("score"), "object": "list", "created": server.now(), "model": name}
    return {**head, "data": data, "usage": _usage(prompts)}


def _engine_of(server: Server, what: str) -> PoolingEngine:
    if not isinstance(server.engine, PoolingEngine):
        raise ApiError(
            404,
            f"The served model writes text. For {what} start another server: llama-te-serve MODEL --convert embed, "
            "or one with a checkpoint for sequence classification.",
        )
    return server.engine


def _inputs(body: EmbeddingRequest) -> Sequence[str | list[int]]:
    given: Any = body.input
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise ApiError(400, "input=[] is not possible: give a text, token ids, or a list of either.", "input")
    inputs: Sequence[str | list[int]] = given
    return inputs


def _dimensions(engine: PoolingEngine, asked: int | None) -> int:
    """Return how many numbers an embedding has."""
    config = engine.model.config
    size: int = config.hidden_size
    if asked is None or asked == size:
        return size
    trained = getattr(config, "matryoshka_dimensions", None)
    is_trained = asked in trained if trained else bool(getattr(config, "is_matryoshka", False)) and asked < size
    if not is_trained:
        listed = ", ".join(map(str, [*(trained or ()), size]))
        raise ApiError(400, f"dimensions={asked} is not possible: the model was trained for {listed}.", "dimensions")
    return asked


def _normalized(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _encoded(vector: torch.Tensor, as_base64: bool) -> str | list[float]:
    if as_base64:
        return base64.b64encode(vector.contiguous().numpy().astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def _usage(prompts: Sequence[list[int]]) -> dict[str, int]:
    tokens = sum(map(len, prompts))
    return {"prompt_tokens": tokens, "total_tokens": tokens}
