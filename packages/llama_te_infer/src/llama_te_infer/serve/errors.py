"""Errors in the shape of OpenAI's API: which status they have, and what a client is told."""

from __future__ import annotations

import itertools
import re
from typing import Any

from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from ..engine.client import DrainingError, EngineFailedError, QueueFullError
from ..sampling_params import shown
from .logs import log_failure

RETRY_SECONDS = 1  # after a full queue
MOST_CHARACTERS = 100  # of a field's name in a message
MOST_WRONG_FIELDS = 10_000  # the first is named; pydantic takes a kilobyte for each
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


# The exceptions besides HTTPException that have an answer of their own.
ERRORS = (ApiError, ValidationError, ClientDisconnect, QueueFullError, DrainingError, EngineFailedError)


def api_error_of(error: BaseException) -> ApiError:
    """Return the error that a client gets for an exception. The log gets one that no one expects."""
    match error:
        case ApiError():
            return error
        case ValidationError():
            return _of_fields(error)
        case QueueFullError():
            return ApiError(429, f"The server is busy: {error}")
        case ClientDisconnect():
            return ApiError(499, "The client has closed the connection.")
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
    if (count := error.error_count()) > MOST_WRONG_FIELDS:
        return ApiError(400, f"The body has {count:,} fields and values that are not possible.")
    errors = error.errors(include_url=False, include_context=False)
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON: {errors[0]['msg']}.")
    # A field that may have several types has an error for each. The type that fits furthest was meant.
    field = errors[0]["loc"][:1]
    meant = max((each for each in errors if each["loc"][:1] == field), key=_how_far)
    # Behind such a field comes the type that was tried, such as "list[int]".
    parts = itertools.takewhile(lambda part: str(part) not in _TRIED and "[" not in str(part), meant["loc"])
    place = ".".join(map(str, parts))
    if len(place) > MOST_CHARACTERS:
        place = f"{place[:MOST_CHARACTERS]}..."
    name = place or None
    if meant["type"] == "extra_forbidden":
        return ApiError(400, f"{place} is no field of this request: leave it out.", name, "unknown_parameter")
    return ApiError(400, f"{place or 'The body'}={shown(meant['input'])} is not possible: {meant['msg']}.", name)


def _how_far(error: Any) -> tuple[bool, int]:
    last = error["loc"][-1] if error["loc"] else None
    return error["type"] == "too_long", last if isinstance(last, int) else -1
