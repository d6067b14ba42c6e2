"""What the bodies of all requests are made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Item = TypeVar("Item")
ListOf = Annotated[list[Item], Field(fail_fast=True)]
"""A list that is refused at its first wrong item: pydantic takes a kilobyte for each error, and a body has millions."""
MAX_PARTS = 16_384  # prompts, messages or documents of one request
PartsOf = Annotated[list[Item], Field(fail_fast=True, max_length=MAX_PARTS)]
"""A list of dicts or lists, of which Python makes some hundred bytes each: they must not be millions."""


def _checked_bool(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    raise ValueError("give false, or leave it out")


OnlyFalse = Annotated[Literal[False], BeforeValidator(_checked_bool)]
"""A switch that cannot be on; pydantic's literal alone takes 0 for false."""


class Strict(BaseModel):
    """A part of a request: no unknown fields, no conversions of types, no NaN.

    OpenAI allows null for each optional field; it means the default.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
