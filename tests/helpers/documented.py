"""The OpenAPI document as a judge of what the daemon answers: closed, for no answer may have a member that it hides."""

import copy
from functools import cache
from typing import Any

import jsonschema_rs

from lmdaemon.web import openapi


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with every object that it describes closed. Clients must expect more members; the tests do not."""
    found = copy.deepcopy(document)
    for name, schema in found["components"]["schemas"].items():
        is_notice = name.startswith("Notice") and name != "NoticeAnswer"  # its dialect says what it may have
        if "properties" in schema and not is_notice:
            schema["additionalProperties"] = False
    return found


@cache
def _validator(name: str) -> jsonschema_rs.Draft202012Validator:
    document = closed({"components": {"schemas": openapi.schemas()}})
    schema = {"$ref": f"#/components/schemas/{name}", **document}
    return jsonschema_rs.Draft202012Validator(schema, validate_formats=True)


def complaints(name: str, value: Any) -> list[str]:
    """What is wrong with a value as the schema of this name."""
    return [f"{error.instance_path}: {error.message}" for error in _validator(name).iter_errors(value)]
