"""`/v1/completions`: continues texts and token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..engine.logprobs import TokenLogprobs
from ..engine.outputs import RequestOutput
from ..sampling_params import SamplingParams
from .answers import ChunkedAnswer, Piece
from .protocol.completions import CompletionRequest
from .requests import body_of
from .sending import respond
from .server import Server, new_id, refusals
from .token_texts import TokenTexts, prompt_logprobs_of

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue one prompt or several."""
    return await respond(request, CompletionRequest, _answer)


async def _answer(server: Server, body: CompletionRequest, name: str) -> CompletionAnswer:
    prompt_logprobs = [body.prompt_logprobs, body.logprobs if body.echo else None]
    with refusals():
        params = body.sampling_params(
            server.settings.default_params,
            max_tokens=1 if body.scores_alone else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=max((wanted for wanted in prompt_logprobs if wanted is not None), default=None),
        )
        prompts = [await server.tokens_of(prompt, body.add_special_tokens is not False) for prompt in body.prompts()]
    return CompletionAnswer(server, prompts, params, body, name)


class CompletionAnswer(ChunkedAnswer):
    """Writes a completion, whole or in chunks."""

    def __init__(
        self, server: Server, prompts: Sequence[list[int]], params: SamplingParams, body: CompletionRequest, name: str
    ) -> None:
        head = {
            "id": new_id("cmpl", body.request_id),
            "object": "text_completion",
            "created": server.now(),
            "model": name,
        }
        is_plain = body.logprobs is None and not body.return_token_ids and not body.scores_alone
        super().__init__(server, prompts, params, head, body.stream_options, is_plain)
        self._body, self._texts = body, server.token_texts
        self._lists: dict[int, LogprobLists] = {}  # of each choice that has begun

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the completion."""
        choices = [
            self._choice(Piece.whole(prompt_index, completion, output))
            for prompt_index, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return {**self.head, "choices": choices, "usage": self.usage.to_dict()}

    def choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield one choice for each piece."""
        yield self._choice(piece)

    def _choice(self, piece: Piece) -> dict[str, Any]:
        body, prompt = self._body, self.prompts[piece.prompt_index]
        if body.scores_alone:
            piece = piece._replace(text="", token_ids=[], logprobs=(), finish_reason="length", stop_reason=None)
        self.usage.completion += len(piece.token_ids)
        index = piece.prompt_index * (body.n or 1) + piece.index
        is_first = index not in self._lists
        as_token_ids = body.return_tokens_as_token_ids
        lists = self._lists.setdefault(index, LogprobLists(self._texts, body.logprobs or 0, as_token_ids))
        text, token_ids, logprobs = piece.text, piece.token_ids, piece.logprobs
        if body.echo and is_first:
            text = self.server.text_of(prompt) + text
            token_ids, logprobs = prompt + token_ids, [*(piece.prompt_logprobs or ()), *logprobs]
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None if body.logprobs is None else lists.add(token_ids, logprobs),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if body.prompt_logprobs is not None and is_first:
            here = piece.prompt_logprobs
            choice["prompt_logprobs"] = here and prompt_logprobs_of(self._texts, prompt, here, body.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"prompt_token_ids": prompt if is_first else None, "token_ids": piece.token_ids}
        return choice


class LogprobLists:
    """The lists that OpenAI's completions have for log-probabilities.

    Args:
        texts: The texts of tokens.
        count: The number of most likely tokens at each position; the written token comes in addition.
        as_token_ids: Name tokens by their ids.
    """

    def __init__(self, texts: TokenTexts, count: int, as_token_ids: bool | None = None) -> None:
        self._texts, self._count, self._as_token_ids, self._offset = texts, count, as_token_ids, 0

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Return the lists of further tokens.

        Args:
            token_ids: The tokens.
            logprobs: Theirs; `None` for the first token of a prompt.
        """
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._texts.text_of(token_id))
        return {
            "tokens": list(map(self._name, token_ids)),
            "token_logprobs": [None if each is None else each.logprob for each in logprobs],
            "top_logprobs": [
                None if each is None else self._top(token_id, each)
                for token_id, each in zip(token_ids, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, logprobs: TokenLogprobs) -> dict[str, float]:
        pairs = [*logprobs.top[: self._count], (token_id, logprobs.logprob)]
        top: dict[str, float] = {}
        for token, logprob in pairs:
            top.setdefault(self._name(token), logprob)  # several tokens may have one text
        return top

    def _name(self, token_id: int) -> str:
        return self._texts.name_of(token_id, self._as_token_ids)
