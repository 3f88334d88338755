"""The JSON schema of rlaif.toml, for editors."""

from __future__ import annotations

from typing import Any

from rlaif.config.fields import METADATA
from rlaif.config.models import Config

DRAFT = "http://json-schema.org/draft-07/schema#"
"""The newest draft that Taplo and most editors support."""


def json_schema() -> dict[str, Any]:
    """Return the schema, with the description and details of each setting."""
    schema = Config.model_json_schema(ref_template="#/definitions/{model}")
    schema["definitions"] = schema.pop("$defs")
    simplified: dict[str, Any] = _simplify(schema)
    return {"$schema": DRAFT, **simplified, "title": "rlaif.toml", "description": "Settings of an rlaif run."}


def _simplify(schema: Any) -> Any:
    """Return ``schema`` without titles and without null, which TOML does not have."""
    if isinstance(schema, list):
        return [_simplify(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    details = schema.pop(METADATA, {}).get("details")
    if details:
        schema["description"] = f"{schema['description']}. {details}"
    if isinstance(schema.get("title"), str):
        del schema["title"]
    if schema.get("default", "") is None or "$ref" in schema:
        schema.pop("default", None)
    options = schema.get("anyOf")
    if options and {"type": "null"} in options:
        options = [option for option in options if option != {"type": "null"}]
        if len(options) == 1:
            del schema["anyOf"]
            schema = {**options[0], **schema}
        else:
            schema["anyOf"] = options
    return {name: _simplify(value) if name not in ("default", "examples") else value for name, value in schema.items()}
