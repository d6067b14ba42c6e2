"""What an operator sets about the server, apart from the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the HTTP server.

    Attributes:
        model_names: The names under which requests may ask for the model; answers have the first one.
        api_keys: A request needs one of them as bearer token; without any, every request is allowed.
        default_params: Fields of `SamplingParams` that hold where a request leaves them out, such as the temperature of
            the model's `generation_config.json`.
        chat_template: Instead of the tokenizer's own.
        max_body_bytes: Most bytes of a request's body.
        request_timeout: Seconds after which a request ends with status 408; `None` for never.
        keep_alive_interval: Seconds without an event after which a stream gets a comment, so that no proxy ends it.
        allowed_origins: Origins of other web pages that may call the API (CORS); "*" for all.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    default_params: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    max_body_bytes: int = 16 << 20
    request_timeout: float | None = None
    keep_alive_interval: float = 15.0
    allowed_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.model_names:
            raise ValueError("model_names=() is not possible: give at least one name.")
