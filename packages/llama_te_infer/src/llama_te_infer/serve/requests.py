"""How an endpoint describes its body in the OpenAPI schema, and what the schema says of all endpoints."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

_SCHEMAS = "#/components/schemas/"
_JSON = "application/json"
_EVENTS = "text/event-stream"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What is wrong, what is allowed and what to do."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field of the request that it is about."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def body_of(body_class: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI schema of a body that the endpoint reads itself within its limits, and of the stream."""
    schema = body_class.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}")
    part: dict[str, Any] = {"requestBody": {"required": True, "content": {_JSON: {"schema": schema}}}}
    if "stream" in body_class.model_fields:
        part["responses"] = {"200": {"content": {_EVENTS: {"schema": {}}}}}
    return part


def openapi_of(app: FastAPI, needs_key: bool) -> dict[str, Any]:
    """Return the OpenAPI schema of an application.

    Args:
        app: The application, with all endpoints.
        needs_key: Whether requests need a key.
    """
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = schema.setdefault("components", {})
    # FastAPI describes errors of its own here, which this server does not send.
    components["schemas"] = {"Error": _ERROR}
    components["responses"] = {
        "Error": {"description": "Why there is no answer", "content": {_JSON: {"schema": {"$ref": f"{_SCHEMAS}Error"}}}}
    }
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    for methods in schema["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            operation["responses"] |= {status: {"$ref": "#/components/responses/Error"} for status in ("4XX", "5XX")}
            if "requestBody" in operation:
                content = operation["requestBody"]["content"][_JSON]
                content["schema"] = _as_component(content["schema"], components["schemas"])
    return schema


def _as_component(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Move a body's schema and those that it refers to among the components, and return the reference to it."""
    own = dict(schema)
    schemas |= own.pop("$defs", {})
    schemas[own["title"]] = own
    return {"$ref": f"{_SCHEMAS}{own['title']}"}
