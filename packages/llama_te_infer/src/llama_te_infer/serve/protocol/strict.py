"""What the bodies of all requests are made of."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Item = TypeVar("Item")
ListOf = Annotated[list[Item], Field(fail_fast=True)]
"""A list that is refused at its first wrong item: pydantic takes a kilobyte for each error, and a body has millions."""
MAX_PARTS = 16_384  # prompts, messages or documents of one request
PartsOf = Annotated[list[Item], Field(fail_fast=True, max_length=MAX_PARTS)]
"""A list of dicts or lists, of which Python makes some hundred bytes each: they must not be millions."""


class Strict(BaseModel):
    """A part of a request: no unknown fields, no conversions of types, no NaN.

    OpenAI allows null for each optional field; it means the default.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
