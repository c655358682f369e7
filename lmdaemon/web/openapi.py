"""The OpenAPI 3.1 document of both sides. A pure function of the settings; `api` serves it as `/openapi.json`.

Others generate clients from it, so nothing that a client is made of depends on who is configured today: operators are
a pattern and not a list, every call has a name that stays, and a notice's name comes from its path. Of the private side
only servers and security differ from daemon to daemon. What is taken and answered is described by the types that the
code itself uses (`shapes`); tests/web/test_openapi.py has a fuzzer hold the running daemon to every word.
"""

import re
import ssl
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_type_hints, is_typeddict

import msgspec

from lmdaemon import shapes
from lmdaemon.config.settings import Operator, Settings
from lmdaemon.config.values import NAME, endpoint_key
from lmdaemon.dialects import REQUEST_MAX, Dialect
from lmdaemon.model import ID_MAX, MEANINGS, TOKEN_MAX
from lmdaemon.shapes import BULK_BODY_MAX, PAGE_DEFAULT, PAGE_MAX
from lmdaemon.version import __version__

_HASHED = shapes.PLAIN.replace("[^", "[^&=")
_INTEGERS = {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}  # those a JSON reader keeps exactly

_DESCRIPTION = """\
SessionExpired as a daemon: the private session API for game servers and administrators, and the public endpoints that \
receive notices.

Every 2xx means that it is on disk. Every error of the private side is a problem document (RFC 9457). A method that a \
path does not list is answered with 405 and an `Allow` header that names those it has, but HEAD, which every path has \
that has GET; an `Expect` other than `100-continue` is answered with 417. Times are RFC 3339 in UTC. An answer may get \
further members in a later version; a request must not have any that is not listed."""

_TAGS = {
    "sessions": "Opened, touched and closed by game servers.",
    "deliveries": "One for each end of a session and sink of its operator.",
    "operators": "Those in the configuration, and what holds them back.",
    "daemon": "The daemon itself.",
    "notices": "The public side: SessionExpired as received.",
}

Json = dict[str, Any]


def document(settings: Settings) -> Json:
    """OpenAPI 3.1 of the private and the public listener. What names no server of its own is the private one's."""
    operators = list(settings.operators.values())
    private, public = _server(settings, "api"), _server(settings, "server")
    notices = _unlike(_dialects(operators), "Notice", "")
    paths = _private_paths() | {"/health": _health(settings, [private, public])}
    security = _security(settings, "api", bearer=bool(settings.api_tokens))
    public_security = _security(settings, "server", bearer=False)
    used = {name for needed in security + public_security for name in needed}
    also = {"servers": [public], "security": public_security}
    _add_endpoints(paths, operators, notices, also)
    return {
        "openapi": "3.1.0",
        "info": {"title": "lmdaemon", "version": __version__, "description": _DESCRIPTION},
        "servers": [private],
        "security": security,
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas() | _notices(operators, notices),
            "responses": _errors(_PROBLEMS, "application/problem+json", shapes.Problem)
            | _errors(_REFUSALS, "application/json", shapes.NoticeAnswer),
            "parameters": dict(_PARAMETERS),
            "securitySchemes": {name: one for name, one in _SECURITY_SCHEMES.items() if name in used},
        },
    }


# -- where and by whom

_LISTENERS = {"api": "The private side.", "server": "The public side."}
_SECURITY_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A token of `token_file`, or of `read_token_file` for what changes nothing.",
    },
    "clientCertificate": {"type": "mutualTLS", "description": "Of the CA in the listener's `client_ca_file`."},
}


def _server(settings: Settings, listener: str) -> Json:
    description = _LISTENERS[listener]
    listen = settings.api.listen if listener == "api" else settings.server.listen
    scheme = "https" if listener in settings.tls else "http"
    if listen.unix:
        return {"url": f"{scheme}://localhost", "description": f"{description} Over the unix socket {listen.unix}."}
    if listen.host in ("0.0.0.0", "::"):  # noqa: S104 - everywhere: the reader knows by which name
        host = {"default": "localhost", "description": "Any name or address of the daemon's machine."}
        url = f"{scheme}://{{host}}:{listen.port}"
        return {"url": url, "description": description, "variables": {"host": host}}
    host_text = f"[{listen.host}]" if ":" in listen.host else listen.host
    return {"url": f"{scheme}://{host_text}:{listen.port}", "description": description}


def _security(settings: Settings, listener: str, *, bearer: bool) -> list[Json]:
    tls = settings.tls.get(listener)
    needs_certificate = tls and tls.context and tls.context.verify_mode == ssl.CERT_REQUIRED
    needed: Json = {"bearer": []} if bearer else {}
    if needs_certificate:
        needed["clientCertificate"] = []
    return [needed] if needed else []


# -- the private side


def _private_paths() -> Json:
    operator, sessions = "/v1/operators/{operator}", "/v1/operators/{operator}/sessions"
    one, delivery = sessions + "/{sessionId}", "/v1/deliveries/{id}"
    calls = {
        ("put", one): _call(
            "sessions",
            "openSession",
            "Open a session",
            "It can be repeated after a lost answer. `.` and `..` are refused as ids: clients resolve "
            "them as parts of the path.",
            {
                200: ("Open already, with the same playerId and token: it counts as a touch", shapes.Session),
                201: ("Opened", shapes.Session),
            },
            problems=(404, 409, 503),
            body=shapes.Opening,
        ),
        ("get", one): _call(
            "sessions",
            "getSession",
            "Show a session with its deliveries",
            "Reading never counts as activity.",
            {200: ("The session", shapes.SessionWithDeliveries)},
            problems=(400, 404, 503),
        ),
        ("post", one + "/touch"): _call(
            "sessions",
            "touchSession",
            "Note activity of a session",
            "It counts from when the request arrived. A few touches per idle timeout are plenty.",
            {204: ("Noted", None)},
            problems=(400, 404, 410, 503),
        ),
        ("post", sessions + "/touch"): _call(
            "sessions",
            "touchSessions",
            "Note activity of many sessions",
            f"At most {BULK_BODY_MAX} bytes. Costs a fraction of single touches. A session may have the id "
            "`touch`: openSession and getSession reach it at this path.",
            {200: ("How many were touched, and which could not be", shapes.BulkTouched)},
            problems=(404, 503),
            body=shapes.BulkTouch,
        ),
        ("post", one + "/close"): _call(
            "sessions",
            "closeSession",
            "Close a session, because its game was closed",
            "The first end counts: a session that had ended before is answered as it is.",
            {200: ("The session, also when it had ended before", shapes.Session)},
            problems=(400, 404, 503),
        ),
        ("get", sessions): _call(
            "sessions",
            "listSessions",
            "List the sessions of an operator",
            "A page, newest first.",
            {200: ("A page", shapes.SessionPage)},
            problems=(400, 404, 503),
            parameters=[
                _query("state", shapes.SessionState, "Only those in this state."),
                _query("playerId", shapes.PlayerId, "Only those of this player."),
                *_PAGE_PARAMETERS,
            ],
        ),
        ("get", "/v1/deliveries"): _call(
            "deliveries",
            "listDeliveries",
            "List deliveries",
            "A page, newest first.",
            {200: ("A page", shapes.DeliveryPage)},
            problems=(400, 503),
            parameters=[
                _query("operator", shapes.Id, "Only those of this operator, configured or not."),
                _query("sink", shapes.Sink, "Only those for `http`, or a plug-in that is configured or has any."),
                _query("state", shapes.StateOfDelivery, "Only those in this state."),
                *_PAGE_PARAMETERS,
            ],
            links=("getDelivery", "retryDelivery"),
        ),
        ("get", delivery): _call(
            "deliveries",
            "getDelivery",
            "Show a delivery with its attempts",
            "`history` has what each attempt met with.",
            {200: ("The delivery", shapes.DeliveryWithHistory)},
            problems=(404, 503),
        ),
        ("post", delivery + "/retry"): _call(
            "deliveries",
            "retryDelivery",
            "Make a dead delivery due again",
            "409 if it is not dead, or can never be sent because a fact that its dialect needs is not known.",
            {202: ("The delivery as it is now", shapes.Delivery)},
            problems=(404, 409, 503),
        ),
        ("post", operator + "/deliveries/retry"): _call(
            "deliveries",
            "retryDeliveries",
            "Make the dead deliveries of an operator due again",
            "At most ten a second become due. 409 while another call does so for this operator.",
            {202: ("How many", shapes.RetriedDeliveries)},
            problems=(404, 409, 503),
            body=shapes.RetrySince,
            body_required=False,
        ),
        ("get", "/v1/operators"): _call(
            "operators",
            "listOperators",
            "List the configured operators",
            "With what waits for each of them, and what holds it back.",
            {200: ("All of them", shapes.OperatorList)},
            problems=(400, 503),
        ),
        ("post", operator + "/hold"): _call(
            "operators",
            "holdOperator",
            "Stop sending to an operator",
            "Ends are still recorded, and their deliveries wait. The time held does not count as their age.",
            {200: ("The operator, held", shapes.Operator)},
            problems=(404, 503),
        ),
        ("post", operator + "/release"): _call(
            "operators",
            "releaseOperator",
            "Resume sending to an operator",
            "Whatever held it back: a hold or its breaker.",
            {200: ("The operator, released", shapes.Operator)},
            problems=(404, 503),
        ),
        ("get", "/metrics"): _call(
            "daemon",
            "getMetrics",
            "Show the metrics for Prometheus",
            "Prometheus text format 0.0.4.",
            {200: ("The metrics", str)},
            media="text/plain",
        ),
        ("get", "/openapi.json"): _call(
            "daemon", "getOpenapi", "Show this document", "OpenAPI 3.1.", {200: ("OpenAPI 3.1", dict[str, Any])}
        ),
    }
    paths: Json = {}
    for (method, path), call in calls.items():
        parameters = [_ref("parameters", name) for name in _PARAMETERS if f"{{{name}}}" in path]
        paths.setdefault(path, {"parameters": parameters})[method] = call
    return paths


def _call(
    tag: str,
    name: str,
    summary: str,
    description: str,
    answers: Mapping[int, tuple[str, Any]],
    *,
    problems: Iterable[int] = (),
    parameters: Sequence[Json] = (),
    body: Any = None,
    body_required: bool = True,
    media: str = "application/json",
    links: Sequence[str] = (),
) -> Json:
    """One operation of the private side; `links` name those that take the id of what a page begins with."""
    call: Json = {"tags": [tag], "operationId": name, "summary": summary, "description": description}
    refused = {*problems, 401, 403, 421, 500}
    if parameters:
        call["parameters"] = list(parameters)
    if body is not None:
        call["requestBody"] = {"required": body_required, "content": _content("application/json", body)}
        refused |= {400, 408, 413, 415}
    call["responses"] = {
        str(status): {"description": told} | ({"content": _content(media, kind)} if kind else {})
        for status, (told, kind) in answers.items()
    } | {str(status): _ref("responses", _PROBLEMS[status][0]) for status in sorted(refused)}
    if links:
        first = {"id": "$response.body#/items/0/id"}
        call["responses"]["200"]["links"] = {name: {"operationId": name, "parameters": first} for name in links}
    return call


def _health(settings: Settings, servers: Sequence[Json]) -> Json:
    """Served by both listeners: in full by the private one, to those who have its token."""
    anybody = _security(settings, "api", bearer=False) or [{}]
    problems = {str(status): _ref("responses", _PROBLEMS[status][0]) for status in (421, 500)}
    get: Json = {
        "tags": ["daemon"],
        "operationId": "getHealth",
        "summary": "Show the state of the daemon",
        "description": "In public, or without the token, `status` alone.",
        "responses": {
            "200": {"description": "It passes, or warns"},
            "503": {"description": "It fails"},
        },
    }
    if settings.api_tokens:
        get["security"] = _security(settings, "api", bearer=True) + anybody
    head = get | {
        "operationId": "headHealth",
        "summary": "Tell the state of the daemon by the status alone",
        "responses": get["responses"] | {"421": problems["421"]},
    }
    content = {"content": _content("application/health+json", shapes.Health)}
    shown = {status: answer | content for status, answer in get["responses"].items()}
    return {"servers": servers, "get": get | {"responses": shown | problems}, "head": head}


def _content(media: str, kind: Any) -> Json:
    return {media: {"schema": _schema(kind)}}


def _query(name: str, kind: Any, description: str) -> Json:
    """A parameter of a page. Any other one is refused, and so is one given twice."""
    return {"name": name, "in": "query", "schema": _schema(kind), "description": description}


def _in_path(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": schema, "description": description}


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


# -- the public side


def _add_endpoints(paths: Json, operators: Iterable[Operator], notices: Mapping[str, str], also: Json) -> None:
    """Each endpoint with the operators that it serves, spelled as where it stands first, for case and a trailing slash
    do not count. It may have the path of a private call: the listeners are two, a document has each path once.
    """
    served: dict[str, tuple[str, list[Operator]]] = {}
    for operator in operators:
        for path in operator.paths:
            served.setdefault(endpoint_key(path), (path, []))[1].append(operator)
    names = _unlike(served, "report", "Notice")
    for key, (path, sharing) in served.items():
        call = _notice_call(names[key], sharing, notices) | also
        paths[path] = paths.get(path, {}) | {"post": call | ({"parameters": []} if path in paths else {})}


def _notice_call(name: str, operators: Sequence[Operator], notices: Mapping[str, str]) -> Json:
    dialects = _dialects(operators).values()
    shown: dict[str, list[Json]] = {}
    for dialect in dialects:
        shown.setdefault(dialect.content_type, []).append(_ref("schemas", notices[dialect.name]))
    codes = "".join(f"\n- {dialect.name}: {_codes(dialect)}" for dialect in dialects)
    return {
        "tags": ["notices"],
        "operationId": name,
        "summary": "Report that a session has expired",
        "description": "A repeat is answered like the first. Case, repeated slashes and one at the end of the path do "
        f"not matter. What `error` means in the answer, by the dialect of the notice:\n{codes}\n\n"
        "`retry` is also the answer to notices of unknown sessions beyond the operator's `unknown_per_minute`.",
        "requestBody": {
            "required": True,
            "description": "At most 16 KiB, not compressed.",
            "content": {
                media: {"schema": found[0] if len(found) == 1 else {"anyOf": found}} for media, found in shown.items()
            },
        },
        "responses": {
            "200": {
                "description": "Taken, or refused: `error` tells",
                "content": _content("application/json", shapes.NoticeAnswer),
            }
        }
        | {str(status): _ref("responses", name) for status, (name, _) in _REFUSALS.items()},
    }


def _codes(dialect: Dialect) -> str:
    meanings: dict[int, list[str]] = {0: ["taken"]}
    for meaning in MEANINGS:
        meanings.setdefault(dialect.codes.of(meaning), []).append(f"`{meaning}`")
    return ", ".join(f"{code} {' or '.join(found)}" for code, found in meanings.items())


def _dialects(operators: Iterable[Operator]) -> dict[str, Dialect]:
    """What these operators receive."""
    return {dialect.name: dialect for operator in operators for dialect in operator.receives}


def _unlike(keys: Iterable[str], prefix: str, empty: str) -> dict[str, str]:
    """For each of the keys (paths, names of dialects) a name that code can have, told apart by a number if need be."""
    names: dict[str, str] = {}
    for key in keys:
        words = re.findall("[A-Za-z0-9]+", key.replace("sessionexpired", "SessionExpired"))
        name = prefix + ("".join(word[0].upper() + word[1:] for word in words) or empty)
        alike = sum(re.fullmatch(f"{name}(_[0-9]+)?", other, re.IGNORECASE) is not None for other in names.values())
        names[key] = f"{name}_{alike + 1}" if alike else name
    return names


def _notices(operators: Sequence[Operator], notices: Mapping[str, str]) -> Json:
    return {
        notices[name]: _notice(dialect, sorted({one.provider_id for one in operators if dialect in one.receives}))
        for name, dialect in _dialects(operators).items()
    }


def _notice(dialect: Dialect, provider_ids: Sequence[str]) -> Json:
    """A notice in one dialect."""
    fields = {
        name: _field(meaning, dialect, required=meaning in dialect.required) for meaning, name in dialect.fields.items()
    }
    fields[dialect.fields["provider"]] |= {"examples": list(provider_ids)}
    return {
        "description": f"SessionExpired in dialect {dialect.name}.",
        "type": "object",
        "required": sorted(dialect.required_names),
        "properties": fields,
    } | ({} if dialect.extra else {"additionalProperties": False})


def _field(meaning: str, dialect: Dialect, *, required: bool) -> Json:
    text: Json = {"type": "string"} | shapes.text({"token": TOKEN_MAX, "request": REQUEST_MAX}.get(meaning, ID_MAX))
    if "hash" in dialect.fields and meaning != "hash":
        text["pattern"] = _HASHED
    choices = [text]
    if dialect.content == "json":
        choices.append(_INTEGERS)
    if not required:  # sent empty it counts as absent
        choices.append({"const": ""})
        if dialect.content == "json":
            choices.append({"type": "null"})
    return {"anyOf": choices} if len(choices) > 1 else dict(text)


# -- answers that are errors

_PROBLEMS = {
    400: ("BadRequest", "Something in the request breaks its rule; `detail` says which"),
    401: ("Unauthorized", "No valid bearer token was given, and one is configured"),
    403: ("Forbidden", "A change with a token that may only read, or with another Origin and without a token"),
    404: ("NotFound", "There is no such operator, session or delivery"),
    408: ("RequestTimeout", "The body came too slowly or broke off"),
    409: ("Conflict", "It is not in a state for this; a session that has ended comes along"),
    410: ("Gone", "The session has ended, and comes along"),
    413: ("ContentTooLarge", "The body is too long"),
    415: ("UnsupportedMediaType", "The body is not application/json, or compressed; `detail` says what was seen"),
    421: ("MisdirectedRequest", "Host is neither loopback nor the configured address, and no token is configured"),
    500: ("InternalServerError", "A bug; the log has its traceback"),
    503: ("ServiceUnavailable", "Nothing can be stored now, and nothing was"),
}
_REFUSALS = {
    403: ("AddressNotAllowed", "The notice comes from an address that is not in the operator's `allow_from`"),
    408: ("NoticeTooSlow", "The body came too slowly or broke off"),
    413: ("NoticeTooLarge", "The body is longer than 16 KiB"),
    415: ("NoticeUnreadable", "No dialect of this path has this Content-Type, or the body is compressed"),
    500: ("NoticeFailed", "A bug; to be repeated"),
    503: ("NoticeNotStored", "It could not be stored, and was not; to be repeated"),
}
_HEADERS: Mapping[int, Json] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    503: {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds to wait."}},
}


def _errors(errors: Mapping[int, tuple[str, str]], media: str, kind: Any) -> Json:
    found: Json = {}
    for status, (name, description) in errors.items():
        found[name] = {"description": description, "content": _content(media, kind)}
        if status in _HEADERS:
            found[name]["headers"] = {header: {"required": True} | one for header, one in _HEADERS[status].items()}
    return found


# -- schemas, of the types in `shapes`

_REQUESTS = (shapes.Opening, shapes.BulkTouch, shapes.RetrySince)
_ANSWERS = (
    *(shapes.BulkTouched, shapes.SessionWithDeliveries, shapes.SessionPage, shapes.DeliveryWithHistory),
    *(shapes.DeliveryPage, shapes.RetriedDeliveries, shapes.OperatorList, shapes.Problem, shapes.Health),
    shapes.NoticeAnswer,
)


def schemas() -> Json:
    """Every named type, its members in the order in which they are written there."""
    named: Json = {}
    for name, schema in msgspec.json.schema_components((*_REQUESTS, *_ANSWERS), ref_template=_TEMPLATE)[1].items():
        kind = getattr(shapes, name)
        if is_typeddict(kind):
            schema["properties"] = {member: schema["properties"][member] for member in get_type_hints(kind)}
        if kind in _REQUESTS:
            schema["additionalProperties"] = False
        _hoist(schema, named)
    return named


def _schema(kind: Any) -> Json:
    """Of one type; a reference where it has a name."""
    found: Json = _hoist(msgspec.json.schema_components([kind], ref_template=_TEMPLATE)[0][0], {})
    return found


def _hoist(value: Any, named: Json) -> Any:
    """Moves what has a title to `named`, at any depth, and leaves references to it."""
    if isinstance(value, list):
        return [_hoist(one, named) for one in value]
    if not isinstance(value, dict):
        return value
    schema = {key: _hoist(inner, named) for key, inner in value.items()}
    if not isinstance(schema.get("title"), str):
        return schema
    name = schema.pop("title")
    named[name] = schema
    return _ref("schemas", name)


_TEMPLATE = "#/components/schemas/{name}"
_PAGE_PARAMETERS = (
    {
        "name": "limit",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE_DEFAULT},
        "description": "How many at most; a page also ends at 1 MiB, or when enough was looked at for one.",
    },
    _query("after", shapes.Cursor, "The `next` of the page before, until that is null."),
)
_PARAMETERS: Mapping[str, Json] = {
    "operator": _in_path(
        "operator",
        {"type": "string", "pattern": f"^{NAME.pattern}$", "examples": ["acme"]},
        "A configured operator; 404 for any other.",
    ),
    "sessionId": _in_path(
        "sessionId",
        _schema(shapes.SessionId),
        "Percent-encoded UTF-8, read strictly: a slash is %2F, and a broken escape is refused. `.` and `..`, which "
        "notices may bring, are %2E and %2E%2E.",
    ),
    "id": _in_path("id", _schema(shapes.WebhookId), "The delivery's `webhook-id`."),
}
