"""`/v1/completions`: continues texts and token ids."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..engine.client import RequestStream
from ..engine.outputs import Completion, RequestOutput, TokenLogprobs
from .errors import ApiError
from .protocol.completions import CompletionRequest
from .requests import body_of
from .server import Server, new_id, refusals
from .streams import KEEP_ALIVE, by_choice, event, event_stream, events_of
from .token_texts import TokenTexts
from .usage import Usage

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue one prompt or several."""
    server: Server = request.app.state.server
    body = await server.read(request, CompletionRequest)
    name = server.model_name(body.model)
    scores_alone = bool(body.echo) and body.max_tokens == 0
    prompt_logprobs = [body.prompt_logprobs, body.logprobs if body.echo else None]
    if body.stream and body.echo and body.logprobs is not None:
        raise ApiError(400, "stream=true with echo=true and logprobs is not possible: leave one of them out.", "stream")
    with refusals():
        params = body.sampling_params(
            server.settings.default_params,
            max_tokens=1 if scores_alone else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=max((wanted for wanted in prompt_logprobs if wanted is not None), default=None),
        )
        prompts = [await server.tokens_of(prompt, body.add_special_tokens is not False) for prompt in body.prompts()]
    streams = await server.begin(prompts, params)
    answer = _Answer(server, body, name, prompts, scores_alone)
    if body.stream:
        return event_stream(streams, answer.chunks(streams))
    return JSONResponse(answer.whole(await server.finish(request, streams)))


class _Answer:
    """Writes an answer, whole or in chunks."""

    def __init__(
        self, server: Server, body: CompletionRequest, name: str, prompts: Sequence[list[int]], scores_alone: bool
    ) -> None:
        self.server, self.body, self.prompts, self.scores_alone = server, body, prompts, scores_alone
        self.head = {"id": new_id("cmpl"), "object": "text_completion", "created": server.now(), "model": name}
        self.choices_each = body.n or 1

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        usage = Usage(sum(map(len, self.prompts)))
        choices = []
        for index, output in enumerate(outputs):
            for completion in output.outputs:
                usage.completion += 0 if self.scores_alone else len(completion.token_ids)
                choices.append(self._choice(index, output, completion))
        return {**self.head, "choices": choices, "usage": usage.to_dict()}

    def _choice(self, index: int, output: RequestOutput, completion: Completion) -> dict[str, Any]:
        body, text, token_ids = self.body, completion.text, completion.token_ids
        logprobs: Sequence[TokenLogprobs | None] | None = completion.logprobs
        if self.scores_alone:
            text, token_ids, logprobs = "", [], []
        if body.echo:
            text = self.server.text_of(output.prompt_token_ids) + text
            token_ids = output.prompt_token_ids + token_ids
            if body.logprobs is not None:
                logprobs = [*(output.prompt_logprobs or ()), *(logprobs or ())]
        choice: dict[str, Any] = {
            "index": index * self.choices_each + completion.index,
            "text": text,
            "logprobs": None,
            "finish_reason": "length" if self.scores_alone else completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if body.logprobs is not None:
            choice["logprobs"] = LogprobLists(self.server.token_texts, body.logprobs).add(token_ids, logprobs or ())
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_of(self.server.token_texts, output, body.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": completion.token_ids}
        return choice

    async def chunks(self, streams: Sequence[RequestStream]) -> AsyncIterator[bytes]:
        body, texts = self.body, self.server.token_texts
        options = body.stream_options
        reports_each = bool(options and options.continuous_usage_stats)
        usage = Usage(sum(map(len, self.prompts)))
        lists: dict[int, LogprobLists] = {}
        async for prompt_index, events in events_of(self.server, streams):
            if not events:
                yield KEEP_ALIVE
            for index, own in by_choice(events).items():
                number = prompt_index * self.choices_each + index
                is_first = number not in lists
                so_far = lists.setdefault(number, LogprobLists(texts, body.logprobs or 0))
                token_ids = [each.token_id for each in own if each.token_id is not None]
                usage.completion += len(token_ids)
                text = "".join(each.text for each in own)
                if is_first and body.echo:
                    text = self.server.text_of(self.prompts[prompt_index]) + text
                choice: dict[str, Any] = {
                    "index": number,
                    "text": text,
                    "logprobs": None,
                    "finish_reason": own[-1].finish_reason,
                    "stop_reason": own[-1].stop_reason,
                }
                if body.logprobs is not None:
                    choice["logprobs"] = so_far.add(token_ids, [each.logprobs for each in own])
                if body.return_token_ids:
                    choice["token_ids"] = token_ids
                    choice["prompt_token_ids"] = self.prompts[prompt_index] if is_first else None
                content = {**self.head, "choices": [choice]}
                yield event(content | {"usage": usage.to_dict()} if reports_each else content)
        if options and options.include_usage:
            yield event({**self.head, "choices": [], "usage": usage.to_dict()})


class LogprobLists:
    """The lists that OpenAI's completions have for log-probabilities.

    Args:
        texts: The texts of tokens.
        count: The number of most likely tokens at each position; the written token comes in addition.
    """

    def __init__(self, texts: TokenTexts, count: int) -> None:
        self._texts, self._count, self._offset = texts, count, 0

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Return the lists of further tokens.

        Args:
            token_ids: The tokens.
            logprobs: Theirs; `None` for the first token of a prompt.
        """
        tokens = [self._texts.text_of(token_id) for token_id in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
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
            top.setdefault(self._texts.text_of(token), logprob)  # several tokens may have one text
        return top


def prompt_logprobs_of(
    texts: TokenTexts, output: RequestOutput, count: int
) -> list[dict[str, dict[str, Any]] | None] | None:
    """Return the log-probabilities of a prompt as vLLM's server does: for each token a dict by token id.

    Args:
        texts: The texts of tokens.
        output: The request's output.
        count: The number of most likely tokens; the prompt's own token comes in addition.
    """
    if output.prompt_logprobs is None:
        return None
    positions: list[dict[str, dict[str, Any]] | None] = []
    for token_id, here in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
        pairs = () if here is None else ((token_id, here.logprob), *here.top[:count])
        positions.append(
            {str(token): {"logprob": logprob, "decoded_token": texts.text_of(token)} for token, logprob in pairs}
            or None
        )
    return positions
