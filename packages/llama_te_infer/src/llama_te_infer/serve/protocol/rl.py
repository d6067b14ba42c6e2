"""The requests with which a trainer pauses the engine and gives it weights, as vLLM's server has them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...engine.control import PauseMode
from ...sampling_params import shown
from ..errors import ApiError
from .strict import Strict
from .unsupported import FOR_PAUSES, FOR_WEIGHTS, without_unsupported


class Query(BaseModel):
    """A query: texts, of which each field makes its type."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        return without_unsupported(fields, FOR_PAUSES)


class _ModeQuery(Query):
    mode: PauseMode = Field(
        "abort",
        description="What happens to requests in progress: abort ends them, wait lets them finish, and keep lets them "
        "go on afterwards.",
    )


class PauseQuery(_ModeQuery):
    """The query of `/pause`."""

    clear_cache: bool = Field(True, description="Forget cached prefixes, unless the mode is keep.")


class SleepQuery(_ModeQuery):
    """The query of `/sleep`."""

    level: Literal[1] = Field(1, description="The cache is given back, and the weights stay on the device.")

    @field_validator("level", mode="before")
    @classmethod
    def _level(cls, level: Any) -> Any:
        if str(level) != "1":
            raise ApiError(
                400,
                f"level={shown(level)} is not possible: the weights stay on the device, so give level=1, or leave it "
                "out. /pause keeps the cache as well.",
                "level",
            )
        return 1


class UpdateInfo(Strict):
    """Where the new weights are."""

    checkpoint: str = Field(
        min_length=1,
        description="A folder with the Transformer Engine or the Hugging Face layout, a GGUF file, or a hub id.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_transfers(cls, fields: Any) -> Any:
        return without_unsupported(fields, FOR_WEIGHTS, "update_info.")


class UpdateWeightsRequest(Strict):
    """Copy the weights of a checkpoint into the model."""

    update_info: UpdateInfo
