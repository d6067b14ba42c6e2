"""How an endpoint describes its body in the OpenAPI schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def body_of(body_class: type[BaseModel]) -> dict[str, Any]:
    """Return the part of the OpenAPI schema for a body that the endpoint reads itself, within its limits."""
    schema = body_class.model_json_schema(ref_template=f"#/components/schemas/{body_class.__name__}.{{model}}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
