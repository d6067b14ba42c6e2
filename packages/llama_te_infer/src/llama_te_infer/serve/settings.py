"""What an operator sets: about the server, and about the engine behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .tool_calls import TOOL_FORMATS, ToolFormat


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the HTTP server.

    Attributes:
        model_names: The names under which requests may ask for the model; answers have the first one.
        api_keys: A request needs one of them as bearer token; without any, every request is allowed.
        default_params: Fields of `SamplingParams` that hold where a request leaves them out, such as the temperature of
            the model's `generation_config.json`.
        chat_template: Instead of the tokenizer's own.
        tool_formats: The formats in which an answer may call tools if the model decides; none refuses such requests.
        max_body_bytes: Most bytes of a request's body.
        request_timeout: Seconds after which a request ends with status 408; `None` for never.
        keep_alive_interval: Seconds without an event after which a stream gets a comment, so that no proxy ends it.
        enable_rl: Whether there are endpoints that pause the engine, let it sleep and give it other weights.
        allowed_origins: Origins of other web pages that may call the API (CORS); "*" for all.
        log_requests: Log each request: with its "parameters", or with its "content" as well, which are prompts and
            texts. `None` for no lines.
        log_interval: Seconds between two lines with the load and the tokens a second; `None` for no such lines.
        otlp_traces_endpoint: Address of an OpenTelemetry collector that gets a span for each request.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    default_params: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    tool_formats: tuple[ToolFormat, ...] = TOOL_FORMATS
    max_body_bytes: int = 16 << 20
    request_timeout: float | None = None
    keep_alive_interval: float = 15.0
    enable_rl: bool = False
    allowed_origins: tuple[str, ...] = ()
    log_requests: Literal["parameters", "content"] | None = None
    log_interval: float | None = 10.0
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not self.model_names:
            raise ValueError("model_names=() is not possible: give at least one name.")


@dataclass(frozen=True)
class EngineSettings:
    """Settings of the model and the engine.

    Attributes:
        model: A folder with the Transformer Engine or the Hugging Face layout, a GGUF file, or a hub id. All but the
            first need llama-te-convert.
        dtype: "auto" for the checkpoint's own, or a name such as "bfloat16".
        device: Such as "cuda:0"; by default a GPU if there is one.
        fp8_recipe: Compute all layers in FP8 with this recipe: "delayed", "current" or "block".
        tokenizer: The folder or hub id of another tokenizer.
        revision: Of a hub repository.
        max_batch_size: As in `Engine`, and so on.
        max_sequence_length: See there.
        page_size: See there.
        total_num_pages: See there.
        gpu_memory_utilization: See there.
        prefill_budget: See there.
        prefix_caching: See there.
        kv_cache_dtype: See there.
    """

    model: str
    dtype: str = "auto"
    device: str | None = None
    fp8_recipe: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    max_batch_size: int = 256
    max_sequence_length: int | None = None
    page_size: int = 64
    total_num_pages: int | None = None
    gpu_memory_utilization: float | None = None
    prefill_budget: int = 2048
    prefix_caching: bool = True
    kv_cache_dtype: str = "auto"
