"""Checks the daemon's answers against its OpenAPI document. Members that the document does not describe count as
errors.
"""

import copy
from functools import cache
from typing import Any

import jsonschema_rs

from lmdaemon.web import openapi


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """A copy of the document in which no object may have further members. (Clients must expect further members in
    answers; for the tests, each must be documented.)
    """
    found = copy.deepcopy(document)
    for name, schema in found["components"]["schemas"].items():
        # the dialect of a notice says whether it may have further members
        is_notice = name.startswith("Notice") and name != "NoticeAnswer"
        if "properties" in schema and not is_notice:
            schema["additionalProperties"] = False
    return found


@cache
def _validator(name: str) -> jsonschema_rs.Draft202012Validator:
    document = closed({"components": {"schemas": openapi.schemas()}})
    schema = {"$ref": f"#/components/schemas/{name}", **document}
    return jsonschema_rs.Draft202012Validator(schema, validate_formats=True)


def complaints(name: str, value: Any) -> list[str]:
    """What is wrong with a value, checked against the schema of this name."""
    return [f"{error.instance_path}: {error.message}" for error in _validator(name).iter_errors(value)]
