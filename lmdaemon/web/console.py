"""Serves the console, a page for the person on call. It consists of static files; their script calls the private API
from the browser.

The files hold nothing that is secret, so they need no token; every call that they make does. The script never
interprets an answer as HTML (it sets `textContent` only), and the policy below forbids the browser to load or run
anything else than these files.
"""

import gzip
from pathlib import Path

from aiohttp import web

from lmdaemon.web.calls import Context
from lmdaemon.web.problems import Problem

PATHS = ("/console", "/console/", "/console/{file}")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # The browser checks for a new version each time, so that an upgrade never mixes files of two versions
    "Cache-Control": "no-cache",
}
_KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


class Console:
    """Serves the files while `[api] console` is true."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._files: dict[str, tuple[bytes, str]] = {}
        self._packed: dict[str, bytes] = {}  # the gzip bytes of files that are compressed in the package
        for file in Path(__file__).with_name("console_files").iterdir():
            name, body = file.name.removesuffix(".gz"), file.read_bytes()
            if name != file.name:
                self._packed[name], body = body, gzip.decompress(body)
            kind = _KINDS.get(name[name.rfind(".") :])
            if kind is not None:
                self._files[name] = body, kind

    async def serve(self, request: web.Request) -> web.Response:
        """GET /console/ and its files. Raises Problem."""
        if not self._context.settings.api.console:
            raise Problem("unknown-path", "the console is not served here: [api] console is false")
        if request.path == "/console":  # a relative redirect, which keeps the path prefix of a proxy
            return web.Response(status=308, headers={"Location": "console/", **_HEADERS})
        name = request.match_info.get("file", "index.html")
        found = self._files.get(name)
        if found is None:
            raise Problem("unknown-path", f"nothing is served at {request.path!r}")
        (body, kind), headers = found, dict(_HEADERS)
        if name in self._packed:
            headers["Vary"] = "Accept-Encoding"
            if "gzip" in request.headers.get("Accept-Encoding", ""):
                body, headers["Content-Encoding"] = self._packed[name], "gzip"
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)
