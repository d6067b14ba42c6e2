"""The OpenAPI schema: how an endpoint describes its body, and what the schema says of all endpoints and answers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter

from .protocol.answers import ANSWERS, EVENTS, Error

_SCHEMAS = "#/components/schemas/"
_JSON = "application/json"
_STREAM = "text/event-stream"


def body_of(body_class: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI schema of a body that the endpoint reads itself within its limits."""
    schema = body_class.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}")
    return {"requestBody": {"required": True, "content": {_JSON: {"schema": schema}}}}


def query_of(query_class: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI schema of a query that the endpoint reads itself."""
    properties = query_class.model_json_schema()["properties"]
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in properties.items()
        ]
    }


def openapi_of(app: FastAPI, needs_key: bool) -> dict[str, Any]:
    """Return the OpenAPI schema of an application.

    Args:
        app: The application, with all endpoints.
        needs_key: Whether requests need a key.
    """
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = schema.setdefault("components", {})
    # FastAPI describes errors of its own here, which this server does not send.
    schemas: dict[str, Any] = {}
    components["schemas"] = schemas
    error = {"schema": _answer(Error, schemas)}
    components["responses"] = {"Error": {"description": "Why there is no answer", "content": {_JSON: error}}}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            # FastAPI does not know these types: it would check each answer against its own.
            for media_type, contents in ((_JSON, ANSWERS), (_STREAM, EVENTS)):
                if path in contents:
                    content = {"schema": _answer(contents[path], schemas)}
                    operation["responses"]["200"]["content"][media_type] = content
            operation["responses"].pop("422", None)
            operation["responses"] |= {status: {"$ref": "#/components/responses/Error"} for status in ("4XX", "5XX")}
            if "requestBody" in operation:
                content = operation["requestBody"]["content"][_JSON]
                content["schema"] = _as_component(content["schema"], schemas)
    return schema


def _answer(answer: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Describe a type of answers among the components, and return the reference to it."""
    return _as_component(TypeAdapter(answer).json_schema(ref_template=f"{_SCHEMAS}{{model}}"), schemas)


def _as_component(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Move a schema and those that it refers to among the components, and return the reference to it."""
    own = dict(schema)
    new = own.pop("$defs", {})
    if "title" not in own:  # a union of others
        schemas |= new
        return own
    schemas |= {**new, own["title"]: own}
    return {"$ref": f"{_SCHEMAS}{own['title']}"}
