"""Advice for an endpoint that did not accept a valid notice, without which most other checks say nothing. Pure."""

import json
from urllib.parse import parse_qsl

from lmdaemon.config.settings import Operator
from lmdaemon.dialects import Dialect
from lmdaemon.workbench import explain
from lmdaemon.workbench.exchanges import Answer, Exchange

_SUCCESS = 'Answer {"error": 0, "description": "Success"}, as application/json, with status 200.'
_UNANSWERED = {
    "connect": "Start the server, or correct host and port of the URL; a firewall may be in the way.",
    "dns": "Correct the host name in the URL, or its DNS records.",
    "timeout": "Store the notice, answer, and do the slow work afterwards. To wait longer in a run: --timeout.",
    "private_address": "If that is meant: `allow_private_network` of the operator, or the target named by --url.",
    "connection_lost": "The server closed the connection: look into its log for what it raised. If the port speaks "
    "TLS, the URL must begin with https://.",
    "bad_http": "Something other than an HTTP server listens there, or HTTPS where the URL says http://.",
}


def of_valid(one: Exchange, operator: Operator) -> str:
    """The next step; empty if the check's own hint is enough."""
    if one.answer is None:
        if one.cause == "tls":
            return _of_tls(one.detail)
        step = _UNANSWERED.get(one.cause, "")
        return f"{step} See also connection.tls." if step and one.asked.url.startswith("https:") else step
    return _of_status(one.answer, operator) or _of_code(one, operator) or _SUCCESS


def _of_tls(detail: str) -> str:
    if "WRONG_VERSION" in detail or "HTTP_REQUEST" in detail:
        return "The port speaks no TLS: write http:// if that is meant, or give the port that speaks TLS."
    return "See connection.tls. The certificate of a private CA is named by --ca-file, or by `ca_file` of the operator."


def _of_status(answer: Answer, operator: Operator) -> str:
    if answer.status == 401:
        return "Write user and password into the URL as the provider will: https://USER:PASSWORD@HOST/PATH."
    if answer.status == 403:
        return (
            "Something before the endpoint refuses the request: a firewall, a proxy, a list of addresses, a CSRF guard."
        )
    if answer.status in (404, 405):
        return "The server knows no POST at this path: compare it with your route; a trailing slash counts."
    if answer.status == 415:
        return f"Accept the Content-Type of the dialect, {operator.sends.content_type}."
    if answer.status >= 500:
        return "Look into the server's log for what it raised, or find out why the proxy before it does not reach it."
    return ""


def _of_code(one: Exchange, operator: Operator) -> str:
    if one.code is None or one.code == 0:
        return ""
    if one.code == operator.sends.codes.of("retry") or one.code == operator.sends.codes.of("final"):
        return "Look into the server's log for what went wrong inside."
    if explain.meaning_of(one.code, operator.sends) == "bad hash":
        return (
            f"The hash is MD5 in hex of {_hashed(one.asked.body, operator.sends)!r} followed by the key: every field "
            "but the hash, decoded, sorted by name. If you hash the same, the key of --hash-key-file is not yours."
        )
    return (
        "The endpoint refuses values that it does not know. Give values that it knows: a test player of its own "
        "(--player, --token-file), open sessions of that player (--session-file), the provider's id "
        f"instead of {operator.provider_id} (--provider-id), "
        f"or the dialect that it was written for instead of {operator.sends.name} (--dialect)."
    )


def _hashed(body: bytes, dialect: Dialect) -> str:
    """The text of which the hash of this notice was made, without the key."""
    fields = dict(parse_qsl(body.decode())) if dialect.content == "form" else json.loads(body)
    return "&".join(f"{name}={value}" for name, value in sorted(fields.items()) if name != dialect.fields["hash"])
