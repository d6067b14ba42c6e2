"""Errors in the shape of OpenAI's API: which status they have, and what a client is told."""

from __future__ import annotations

import itertools
import re
from typing import Any

from pydantic import ValidationError

from ..engine.client import DrainingError, EngineFailedError, QueueFullError
from .logs import log_failure

RETRY_SECONDS = 1  # after a full queue
_TRIED = ("str", "int", "float", "bool")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An error that a client gets.

    Args:
        status: The HTTP status.
        message: What is wrong, what is allowed and what to do.
        param: The field of the request that it is about.
        code: OpenAI's code for programs, such as "model_not_found".
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        if self.status == 408:
            return {"x-should-retry": "false"}  # OpenAI's clients would send the request again, in vain
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """Return the answer's content."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error_of(error: BaseException) -> ApiError:
    """Return the error that a client gets for an exception. The log gets one that no one expects."""
    match error:
        case ApiError():
            return error
        case ValidationError():
            return _of_fields(error)
        case QueueFullError():
            return ApiError(429, f"The server is busy: {error}")
        case DrainingError():
            return ApiError(503, "The server is shutting down: send the request to another one.")
        case EngineFailedError():
            return ApiError(500, f"The request has ended, since {error}")
        case TimeoutError():
            return ApiError(408, "The request has taken longer than the server allows.")
        case ValueError():
            named = re.match(r"(\w+)(?:=|\[| has )", str(error))
            return ApiError(400, str(error), named[1] if named else None)
        case _:
            log_failure(error)  # its message can hold paths and prompts
            return ApiError(500, "The server failed to answer this request.")


def _of_fields(error: ValidationError) -> ApiError:
    """Name the first field that does not fit; for an unknown one, say so."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON: {first['msg']}.")
    # Behind a field that may have several types comes the type that was tried, such as "list[int]".
    parts = itertools.takewhile(lambda part: str(part) not in _TRIED and "[" not in str(part), first["loc"])
    place = ".".join(map(str, parts))
    name = place or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{place} is no field of this request: leave it out.", name, "unknown_parameter")
    value = repr(first["input"])
    shown = value if len(value) < 80 else f"{value[:77]}..."
    return ApiError(400, f"{place or 'The body'}={shown} is not possible: {first['msg']}.", name)
