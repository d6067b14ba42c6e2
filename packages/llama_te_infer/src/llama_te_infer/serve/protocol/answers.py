"""The answers of all endpoints, for the OpenAPI schema. Answers are dicts when the server writes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes the one of `typing` from Python 3.12 on

VllmReason = Literal["stop", "length", "abort", "error"]
"""Why a completion has ended. "abort" is the end by a pause of the engine."""

# --- what several endpoints share -------------------------------------------------------------------------------------


class ErrorDetails(TypedDict):
    """What is wrong with a request, or with the server."""

    message: Annotated[str, Field(description="What is wrong, what is allowed and what to do.")]
    type: str
    param: Annotated[str | None, Field(description="The field of the request that it is about.")]
    code: str | None


class Error(TypedDict):
    """Why there is no answer, or why a stream ends."""

    error: ErrorDetails


class CachedTokens(TypedDict):
    """Tokens of the prompts that came from the prefix cache."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[CachedTokens]


class LikelyToken(TypedDict):
    """A token that was likely at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(LikelyToken):
    """A token of the text, and the most likely ones at its position."""

    top_logprobs: list[LikelyToken]


class PromptLogprob(TypedDict):
    """The log-probability of a token at a position of the prompt."""

    logprob: float
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CalledFunction(TypedDict):
    """The name of a function, and its arguments as JSON."""

    name: str
    arguments: str


# --- completions ------------------------------------------------------------------------------------------------------


class CompletionLogprobs(TypedDict):
    """Lists with one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """A text that continues a prompt, or a part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: VllmReason | None
    stop_reason: str | int | None
    prompt_logprobs: NotRequired[PromptLogprobs | None]
    prompt_token_ids: NotRequired[list[int] | None]
    token_ids: NotRequired[list[int]]


class CompletionChunk(TypedDict):
    """A part of a completion. The event behind the last one is "[DONE]"."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage]


class Completion(CompletionChunk):
    """A completion."""

    usage: Usage  # type: ignore[misc]  # a chunk need not have it


# --- chats ------------------------------------------------------------------------------------------------------------


class ChatLogprobs(TypedDict):
    """Log-probabilities of the tokens of a message."""

    content: list[TokenLogprob]
    refusal: None


class ToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    """An answer to a conversation."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoiceEnd(TypedDict):
    """How the text of a choice ended, and about its tokens."""

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: VllmReason | Literal["tool_calls"] | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[list[int]]


class ChatChoice(ChatChoiceEnd):
    """One of the answers."""

    message: ChatMessage


class ChatCompletion(TypedDict):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]


class CalledFunctionDelta(TypedDict):
    """The name of a function, or a further part of its arguments."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The beginning of a call, or a further part of its arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


class ChatDelta(TypedDict):
    """A part of a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(ChatChoiceEnd):
    """A part of one of the answers."""

    delta: ChatDelta


class ChatCompletionChunk(TypedDict):
    """A part of the answers to a conversation. The event behind the last one is "[DONE]"."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage]


# --- responses --------------------------------------------------------------------------------------------------------

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(TypedDict):
    """A message of the model."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCall(TypedDict):
    """A call of a function, with its arguments as JSON."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class InputTokens(TypedDict):
    """Tokens of the prompt in the prefix cache: found there, and written by this request alone."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokens(TypedDict):
    """Tokens of the answer that are reasoning."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens read and written."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class ResponseError(TypedDict):
    """Why a response has failed."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(TypedDict):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens", "abort"]


class Response(TypedDict):
    """An answer in items, with the fields of its request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | FunctionCall]
    parallel_tool_calls: bool
    previous_response_id: None
    background: Literal[False]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class Event(TypedDict):
    """An event of a response."""

    sequence_number: int


class ResponseStateEvent(Event):
    """The response begins or ends."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: Response


class ItemEvent(Event):
    """An item begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputMessage | FunctionCall


class EventInItem(Event):
    """An event within an item."""

    item_id: str
    output_index: int


class ContentPartEvent(EventInItem):
    """The text of a message begins or ends."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: OutputText


class TextDeltaEvent(EventInItem):
    """A further part of a text."""

    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: list[TokenLogprob]


class TextDoneEvent(EventInItem):
    """A text is complete."""

    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: list[TokenLogprob]


class ArgumentsDeltaEvent(EventInItem):
    """A further part of the arguments of a call."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(EventInItem):
    """The arguments of a call are complete."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


ResponseEvent = (
    ResponseStateEvent
    | ItemEvent
    | ContentPartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
)

# --- embeddings and scores --------------------------------------------------------------------------------------------


class PoolingUsage(TypedDict):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    """Numbers, or the base64 of their bytes."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(TypedDict):
    """The embeddings of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PoolingUsage


class Score(TypedDict):
    """The score of a pair."""

    index: int
    object: Literal["score"]
    score: float


class ScoreList(TypedDict):
    """The scores of the pairs."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage


# --- the server -------------------------------------------------------------------------------------------------------


class Model(TypedDict):
    """A name of the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(TypedDict):
    """The names of the model."""

    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    """The tokens of a text, and their texts if the request asks for them."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """The text of tokens."""

    prompt: str


class Health(TypedDict):
    """All is well."""

    status: Literal["ok"]


class Version(TypedDict):
    """The version of llama-te-infer."""

    version: str


# --- reinforcement learning -------------------------------------------------------------------------------------------


class Paused(TypedDict):
    """The answer of `/pause` and `/resume`."""

    status: Literal["paused", "resumed"]


class IsPaused(TypedDict):
    """The answer of `/is_paused`."""

    is_paused: bool


class Slept(TypedDict):
    """The answer of `/sleep` and `/wake_up`."""

    status: Literal["sleeping", "awake"]


class IsSleeping(TypedDict):
    """The answer of `/is_sleeping`."""

    is_sleeping: bool


class CacheReset(TypedDict):
    """The answer of `/reset_prefix_cache`."""

    success: Literal[True]


class WeightsUpdated(TypedDict):
    """The answer of `/update_weights`."""

    message: str


ANSWERS: dict[str, Any] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": ChatCompletion,
    "/v1/responses": Response,
    "/v1/embeddings": EmbeddingList,
    "/score": ScoreList,
    "/v1/score": ScoreList,
    "/v1/models": ModelList,
    "/v1/models/{name}": Model,
    "/tokenize": Tokens,
    "/detokenize": Detokenized,
    "/health": Health,
    "/ready": Health,
    "/version": Version,
    "/pause": Paused,
    "/resume": Paused,
    "/is_paused": IsPaused,
    "/sleep": Slept,
    "/wake_up": Slept,
    "/is_sleeping": IsSleeping,
    "/reset_prefix_cache": CacheReset,
    "/update_weights": WeightsUpdated,
}
"""The JSON of each endpoint."""

EVENTS: dict[str, Any] = {
    "/v1/completions": CompletionChunk | Error,
    "/v1/chat/completions": ChatCompletionChunk | Error,
    "/v1/responses": ResponseEvent,
}
"""The JSON in each event of an endpoint's stream."""
