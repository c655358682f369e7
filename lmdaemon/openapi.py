"""The OpenAPI document (placeholder while being written)."""

from typing import Any

from lmdaemon.config import Settings


def document(settings: Settings) -> dict[str, Any]:
    """OpenAPI 3.1 of both sides."""
    return {"openapi": "3.1.0"}
