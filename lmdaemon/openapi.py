"""The OpenAPI 3.1 document of both sides, made from the settings in force, and the limits that it and `api` share.

Called by `api`, which serves it as `/openapi.json`. It must say exactly what the handlers do: tests/test_openapi.py has
a fuzzer read it and hold the running daemon to every word. Sources: contract, sections 4 and 5; protocol.md.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmdaemon.config import Listen, Operator, Settings, endpoint_key
from lmdaemon.dialects import REQUEST_MAX, Dialect
from lmdaemon.masks import SHOWN_MAX
from lmdaemon.model import ID_MAX, TOKEN_MAX
from lmdaemon.version import __version__

BULK_IDS_MAX = 10_000
BULK_BODY_MAX = 4 * 1024 * 1024
ATTRIBUTES_MAX = 4096  # bytes of JSON
IDLE_MAX_S = 30 * 86400
PAGE_DEFAULT, PAGE_MAX = 100, 1000

# Of an id: neither C0 nor DEL nor C1. Lone surrogates cannot stand in JSON that is UTF-8, and no regex needs to say so.
_PLAIN = "^[^\\u0000-\\u001f\\u007f-\\u009f]+$"
_HASHED = _PLAIN.replace("[^", "[^&=")
_WEBHOOK_ID = "^msg_[1-9][0-9]{0,17}_[0-9a-f]{20}$"
_CURSOR = "^[1-9][0-9]{0,17}$"
_SINK = {"type": "string", "pattern": "^(http|plugin:[^\\u0000-\\u001f\\u007f-\\u009f]+)$", "maxLength": ID_MAX}
_INTEGERS = {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}  # those a JSON reader keeps exactly

Json = dict[str, Any]


def document(settings: Settings) -> Json:
    """OpenAPI 3.1 of the private and the public listener; each path names the server it is found at."""
    operators = list(settings.operators.values())
    secured = bool(settings.api_tokens)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lmdaemon",
            "version": __version__,
            "description": (
                "SessionExpired as a daemon: the private session API, and the public endpoints that receive notices. "
                "Every error of the private side is a problem document (RFC 9457); a method that a path does not list "
                "is answered with 405 and an Allow header that names those it has, but HEAD, which every path has that "
                "has GET. Times are RFC 3339 in UTC."
            ),
        },
        "tags": [
            {"name": "sessions", "description": "Opened, touched and closed by game servers."},
            {"name": "deliveries", "description": "One for each end of a session and sink of its operator."},
            {"name": "operators", "description": "Those in the configuration, and what holds them back."},
            {"name": "daemon", "description": "The daemon itself."},
            {"name": "notices", "description": "The public side: SessionExpired as received."},
        ],
        "paths": _paths(settings, operators, secured=secured),
        "components": {
            "schemas": _schemas(operators),
            "responses": _problems() | _refusals(),
            "parameters": _path_parameters(operators),
        }
        | ({"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}} if secured else {}),
    }


def _paths(settings: Settings, operators: Sequence[Operator], *, secured: bool) -> Json:
    private = _server(settings.api.listen, "The private side.", tls="api" in settings.tls)
    public = _server(settings.server.listen, "The public side.", tls="server" in settings.tls)
    paths: Json = {
        path: {"servers": [private]}
        | {method: _secured(method, call) if secured else _open(method, call) for method, call in calls.items()}
        | ({"parameters": [_ref("parameters", name) for name in ("operator", "sessionId", "id") if _in(name, path)]})
        for path, calls in _private_calls().items()
    }
    paths["/health"] = {"servers": [private, public]} | _health_calls(secured=secured)
    for path, served in _served(operators).items():
        call = _notice_call(served)
        # An endpoint may have the path of a private call: the listeners are two, a document has each path once.
        if path in paths:
            paths[path]["post"] = call | {"servers": [public], "parameters": []}
        else:
            paths[path] = {"servers": [public], "post": call}
    return paths


def _in(name: str, path: str) -> bool:
    return f"{{{name}}}" in path


def _server(listen: Listen, description: str, *, tls: bool) -> Json:
    scheme, port = "https" if tls else "http", f":{listen.port}"
    if listen.unix:
        return {"url": f"{scheme}://localhost", "description": f"{description} Over the unix socket {listen.unix}."}
    if listen.host in ("0.0.0.0", "::"):  # noqa: S104 - everywhere: the reader knows by which name
        host = {"default": "localhost", "description": "Any address of the daemon's machine."}
        return {"url": f"{scheme}://{{host}}{port}", "description": description, "variables": {"host": host}}
    host_text = f"[{listen.host}]" if ":" in listen.host else listen.host
    return {"url": f"{scheme}://{host_text}{port}", "description": description}


# -- the private side


def _private_calls() -> dict[str, Json]:
    operator, sessions = "/v1/operators/{operator}", "/v1/operators/{operator}/sessions"
    one, delivery = sessions + "/{sessionId}", "/v1/deliveries/{id}"
    session, page = _ref("schemas", "Session"), _page_parameters()
    opening = _call(
        "sessions",
        "openSession",
        "Open a session",
        {
            200: ("Open already, with the same playerId and token; it counts as a touch", session),
            201: ("Opened", session),
        },
        problems=(400, 404, 408, 409, 413, 415, 503),
        body=_ref("schemas", "Opening"),
    )
    showing = _call(
        "sessions",
        "getSession",
        "Show a session with its deliveries",
        {200: ("The session", _ref("schemas", "SessionWithDeliveries"))},
        problems=(400, 404, 503),
    )
    return {
        sessions + "/touch": {
            "post": _call(
                "sessions",
                "touchSessions",
                f"Note activity of many sessions, at most {BULK_BODY_MAX} bytes",
                {200: ("How many were touched, and which could not be", _ref("schemas", "BulkTouched"))},
                problems=(400, 404, 408, 413, 415, 503),
                body=_ref("schemas", "BulkTouch"),
            ),
            # A session may be called "touch", and then this is its path.
            "put": opening | {"operationId": "openSessionTouch", "summary": "Open the session with the id `touch`"},
            "get": showing | {"operationId": "getSessionTouch", "summary": "Show the session with the id `touch`"},
        },
        one: {"put": opening, "get": showing},
        one + "/touch": {
            "post": _call(
                "sessions",
                "touchSession",
                "Note activity of a session",
                {204: ("Noted", None)},
                problems=(400, 404, 410, 503),
            )
        },
        one + "/close": {
            "post": _call(
                "sessions",
                "closeSession",
                "Close a session, because its game was closed",
                {200: ("The session, also when it had ended before", session)},
                problems=(400, 404, 503),
            )
        },
        sessions: {
            "get": _call(
                "sessions",
                "listSessions",
                "List the sessions of an operator, newest first",
                {200: ("A page", _ref("schemas", "SessionPage"))},
                problems=(400, 404, 503),
                parameters=[
                    _query("state", {"enum": ["active", "ended"]}, "Only those in this state."),
                    _query("playerId", _ref("schemas", "Id"), "Only those of this player."),
                    *page,
                ],
            )
        },
        "/v1/deliveries": {
            "get": _call(
                "deliveries",
                "listDeliveries",
                "List deliveries, newest first",
                {200: ("A page", _ref("schemas", "DeliveryPage"))},
                problems=(400, 503),
                parameters=[
                    _query("operator", _ref("schemas", "Id"), "Only those of this operator, configured or not."),
                    _query(
                        "sink", _SINK, "Only those for this sink: `http`, or a plug-in that is configured or has any."
                    ),
                    _query("state", _ref("schemas", "DeliveryState"), "Only those in this state."),
                    *page,
                ],
                links=("getDelivery", "retryDelivery"),
            )
        },
        delivery: {
            "get": _call(
                "deliveries",
                "getDelivery",
                "Show a delivery with its attempts",
                {200: ("The delivery", _ref("schemas", "DeliveryWithHistory"))},
                problems=(404, 503),
            )
        },
        delivery + "/retry": {
            "post": _call(
                "deliveries",
                "retryDelivery",
                "Make a dead delivery due again",
                {202: ("The delivery as it is now", _ref("schemas", "Delivery"))},
                problems=(404, 409, 503),
            )
        },
        operator + "/deliveries/retry": {
            "post": _call(
                "deliveries",
                "retryDeliveries",
                "Make the dead deliveries of an operator due again, ten a second; one call at a time",
                {202: ("How many", _object(retried=_count()))},
                problems=(400, 404, 408, 409, 413, 415, 503),
                body=_ref("schemas", "RetrySince"),
                body_required=False,
            )
        },
        "/v1/operators": {
            "get": _call(
                "operators",
                "listOperators",
                "List the configured operators",
                {200: ("All of them", _object(items=_list(_ref("schemas", "Operator"))))},
                problems=(400, 503),
            )
        },
        operator + "/hold": {
            "post": _call(
                "operators",
                "holdOperator",
                "Stop sending to an operator; ends are still recorded",
                {200: ("The operator, held", _ref("schemas", "Operator"))},
                problems=(404, 503),
            )
        },
        operator + "/release": {
            "post": _call(
                "operators",
                "releaseOperator",
                "Resume sending to an operator, whatever held it back",
                {200: ("The operator, released", _ref("schemas", "Operator"))},
                problems=(404, 503),
            )
        },
        "/metrics": {
            "get": _call(
                "daemon",
                "getMetrics",
                "Show the metrics for Prometheus",
                {200: ("Prometheus text format 0.0.4", {"type": "string"})},
                media="text/plain",
            )
        },
        "/openapi.json": {
            "get": _call(
                "daemon",
                "getOpenapi",
                "Show this document",
                {200: ("OpenAPI 3.1", {"type": "object", "required": ["openapi", "info", "paths", "components"]})},
            )
        },
    }


def _call(
    tag: str,
    name: str,
    summary: str,
    answers: Mapping[int, tuple[str, Json | None]],
    *,
    problems: Iterable[int] = (),
    parameters: Sequence[Json] = (),
    body: Json | None = None,
    body_required: bool = True,
    media: str = "application/json",
    links: Sequence[str] = (),
) -> Json:
    """One operation of the private side; `links` name those that take the id of what a page begins with.

    A 500 is a bug, and answered as a problem too.
    """
    call: Json = {"tags": [tag], "operationId": name, "summary": summary}
    if parameters:
        call["parameters"] = list(parameters)
    if body is not None:
        call["requestBody"] = {"required": body_required, "content": {"application/json": {"schema": body}}}
    call["responses"] = {
        str(status): {"description": description} | ({"content": {media: {"schema": schema}}} if schema else {})
        for status, (description, schema) in answers.items()
    } | {str(status): _ref("responses", _PROBLEMS[status][0]) for status in sorted((*problems, 500))}
    if links:
        first = {"id": "$response.body#/items/0/id"}
        call["responses"]["200"]["links"] = {name: {"operationId": name, "parameters": first} for name in links}
    return call


def _secured(method: str, call: Json) -> Json:
    return _refusing(call, 401, *[403] * (method != "get")) | {"security": [{"bearer": []}]}


def _open(method: str, call: Json) -> Json:
    """What a page in a browser could have sent is refused where no token is asked for."""
    return _refusing(call, 421, *[403] * (method != "get"))


def _refusing(call: Json, *statuses: int) -> Json:
    refusals = {str(status): _ref("responses", _PROBLEMS[status][0]) for status in statuses}
    return call | {"responses": call["responses"] | refusals}


def _health_calls(*, secured: bool) -> Json:
    """Served by both listeners: in full by the private one, to those who have its token."""
    media = {"application/health+json": {"schema": _ref("schemas", "Health")}}
    misdirected = {} if secured else {"421": _ref("responses", _PROBLEMS[421][0])}
    get: Json = {
        "tags": ["daemon"],
        "operationId": "getHealth",
        "summary": "Show the state of the daemon; in public, or without the token, no more than its status",
        "security": [{"bearer": []}, {}] if secured else [],
        "responses": {
            "200": {"description": "It passes, or warns", "content": media},
            "503": {"description": "It fails", "content": media},
            "500": _ref("responses", _PROBLEMS[500][0]),
        }
        | misdirected,
    }
    bare = {"200": {"description": "It passes, or warns"}, "503": {"description": "It fails"}} | misdirected
    head = get | {"operationId": "headHealth", "summary": "Tell by the status alone", "responses": bare}
    return {"get": get, "head": head}


def _path_parameters(operators: Sequence[Operator]) -> Json:
    names = {"enum": [operator.name for operator in operators]} if operators else {}
    return {
        "operator": _in_path("operator", {"type": "string"} | names, "A configured operator; 404 for any other."),
        "sessionId": _in_path(
            "sessionId",
            _ref("schemas", "Id"),
            "Percent-encoded UTF-8, read strictly: a slash is %2F, and a broken escape is refused. `.` and `..` are "
            "%2E and %2E%2E: notices may bring them, but no session can be opened under them.",
        ),
        "id": _in_path("id", _ref("schemas", "WebhookId"), "The delivery's `webhook-id`."),
    }


def _in_path(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": schema, "description": description}


def _query(name: str, schema: Json, description: str) -> Json:
    """A parameter of a page. Any other one is refused, and so is one given twice."""
    return {"name": name, "in": "query", "schema": schema, "description": description}


def _page_parameters() -> list[Json]:
    limit = {"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE_DEFAULT}
    return [
        _query("limit", limit, "How many at most; a page also ends at 1 MiB, or when enough was looked at for one."),
        _query("after", _ref("schemas", "Cursor"), "The `next` of the page before, until that is null."),
    ]


# -- the public side


def _served(operators: Iterable[Operator]) -> dict[str, list[Operator]]:
    """The operators of each endpoint path, spelled as where it stands first: case and a trailing slash do not count."""
    spelled: dict[str, str] = {}
    served: dict[str, list[Operator]] = {}
    for operator in operators:
        for path in operator.paths:
            served.setdefault(spelled.setdefault(endpoint_key(path), path), []).append(operator)
    return served


def _notice_call(operators: Sequence[Operator]) -> Json:
    dialects = list({dialect.name: dialect for operator in operators for dialect in operator.receives}.values())
    shapes: dict[str, list[Json]] = {}
    for dialect in dialects:
        senders = [operator.provider_id for operator in operators if dialect in operator.receives]
        shapes.setdefault(dialect.content_type, []).append(_notice(dialect, sorted(set(senders))))
    refusals = [408, 413, 415, 503] + [403] * any(operator.allow_from for operator in operators)
    answered = {"description": "Taken, or refused: `error` tells", "content": _json(_answer(dialects))}
    names = ", ".join(dialect.name for dialect in dialects)
    return {
        "tags": ["notices"],
        "summary": "Report that a session has expired",
        "description": f"Dialects: {names}. Case, repeated slashes and one at the end of the path do not matter.",
        "security": [],
        "requestBody": {
            "required": True,
            "description": "At most 16 KiB, not compressed.",
            "content": {
                media: {"schema": found[0] if len(found) == 1 else {"anyOf": found}} for media, found in shapes.items()
            },
        },
        "responses": {"200": answered}
        | {str(status): _ref("responses", _REFUSALS[status][0]) for status in sorted(refusals)},
    }


def _notice(dialect: Dialect, provider_ids: Sequence[str]) -> Json:
    """A notice in one dialect."""
    fields = {
        name: _field(meaning, dialect, required=meaning in dialect.required) for meaning, name in dialect.fields.items()
    }
    fields[dialect.fields["provider"]] |= {"examples": list(provider_ids)}
    return {
        "title": f"Notice in dialect {dialect.name}",
        "type": "object",
        "required": sorted(dialect.required_names),
        "properties": fields,
    } | ({} if dialect.extra else {"additionalProperties": False})


def _field(meaning: str, dialect: Dialect, *, required: bool) -> Json:
    text = _text({"token": TOKEN_MAX, "request": REQUEST_MAX}.get(meaning, ID_MAX))
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


def _answer(dialects: Iterable[Dialect]) -> Json:
    codes = {0}
    for dialect in dialects:
        codes |= {dialect.codes.of(meaning) for meaning in dialect.codes.__struct_fields__}
    return _object(error={"type": "integer", "enum": sorted(codes)}, description={"type": "string"})


# -- answers that are errors

_PROBLEMS = {
    400: ("BadRequest", "Something in the request breaks its rule; `detail` says which"),
    401: ("Unauthorized", "No valid bearer token was given"),
    403: (
        "Forbidden",
        "A change with a token that may only read, or with an Origin and without a token",
    ),
    404: ("NotFound", "There is no such operator, session or delivery"),
    405: ("MethodNotAllowed", "The path has no such method"),
    408: ("RequestTimeout", "The body came too slowly or broke off"),
    409: ("Conflict", "It is not in a state for this; a session that has ended comes along"),
    410: ("Gone", "The session has ended, and comes along"),
    413: ("ContentTooLarge", "The body is too long"),
    415: ("UnsupportedMediaType", "The body is not application/json, or compressed; `detail` says what was seen"),
    421: ("MisdirectedRequest", "Host is neither loopback nor the configured address, and no token is asked for"),
    500: ("InternalServerError", "A bug; the log has its traceback"),
    503: ("ServiceUnavailable", "Nothing can be stored now, and nothing was"),
}
_REFUSALS = {
    403: ("AddressNotAllowed", "The notice comes from an address that is not allowed"),
    408: ("NoticeTooSlow", "The body came too slowly or broke off"),
    413: ("NoticeTooLarge", "The body is longer than 16 KiB"),
    415: ("NoticeUnreadable", "No dialect of this path has this Content-Type, or the body is compressed"),
    503: ("NoticeNotStored", "It could not be stored, and was not; to be repeated"),
}
_HEADERS: Mapping[int, Json] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    405: {"Allow": {"schema": {"type": "string"}, "description": "The methods that the path has."}},
    503: {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds to wait."}},
}


def _problems() -> Json:
    return {
        name: {
            "description": description,
            "content": {"application/problem+json": {"schema": _problem(status)}},
        }
        | _headers(status)
        for status, (name, description) in _PROBLEMS.items()
    }


def _problem(status: int) -> Json:
    if status == 410:
        return {"allOf": [_ref("schemas", "Problem"), {"required": ["session"]}]}
    return _ref("schemas", "Problem")


def _refusals() -> Json:
    schema = _object(error={"type": "integer"}, description={"type": "string"})
    return {
        name: {"description": description, "content": _json(schema)} | _headers(status)
        for status, (name, description) in _REFUSALS.items()
    }


def _headers(status: int) -> Json:
    headers = {name: {"required": True} | header for name, header in _HEADERS.get(status, {}).items()}
    return {"headers": headers} if headers else {}


# -- schemas


def _schemas(operators: Sequence[Operator]) -> Json:
    delivery, session = _delivery(), _session()
    return {
        "Id": _text(ID_MAX) | {"description": "Opaque; compared as it is."},
        "WebhookId": {"type": "string", "pattern": _WEBHOOK_ID},
        "Cursor": {"type": "string", "pattern": _CURSOR},
        "DeliveryState": {"type": "string", "enum": ["pending", "delivered", "dead"]},
        "Opening": _opening(operators),
        "BulkTouch": _object(sessionIds=_list(_ref("schemas", "Id")) | {"maxItems": BULK_IDS_MAX}),
        "BulkTouched": _object(
            touched=_count(), unknown=_list(_ref("schemas", "Id")), ended=_list(_ref("schemas", "Id"))
        ),
        "RetrySince": _object(
            since={"type": "string", "format": "date-time", "description": "Not ahead of now."}, optional=["since"]
        ),
        "Session": _object(**session),
        "SessionWithDeliveries": _object(**session, deliveries=_list(_ref("schemas", "Delivery"))),
        "SessionPage": _page("Session"),
        "Delivery": _object(**delivery),
        "DeliveryWithHistory": _object(**delivery, history=_list(_ref("schemas", "Attempt"))),
        "DeliveryPage": _page("Delivery"),
        "Attempt": _object(
            at=_time(),
            durationMs=_count(),
            status=_or_null({"type": "integer"}),
            code=_or_null({"type": "number"}),
            error=_or_null({"type": "string"}),
            detail={"type": "string", "description": "What is known of the error besides."},
            answer=_or_null({"type": "string", "maxLength": SHOWN_MAX})
            | {"description": "Of a failure: how the answer began, secrets masked; null if there was none."},
            optional=["detail", "answer"],
        ),
        "Operator": _operator(),
        "Problem": _object(
            type={"type": "string", "format": "uri-reference"},
            title={"type": "string"},
            status={"type": "integer", "minimum": 400, "maximum": 599},
            detail={"type": "string"},
            session=_ref("schemas", "Session"),
            optional=["session"],
        ),
        "Health": {"oneOf": [_object(status=_STATUS), _ref("schemas", "HealthReport")]},
        "HealthReport": _health_report(),
    }


_STATUS = {"type": "string", "enum": ["pass", "warn", "fail"]}


def _opening(operators: Sequence[Operator]) -> Json:
    """The body that opens a session. What a dialect must send, its sessions have to be opened with."""
    need_token = [operator.name for operator in operators if "token" in operator.sends.required]
    optional = ["idleTimeoutSeconds", "attributes"]
    token = _text(TOKEN_MAX) | {"description": "A secret, never returned."}
    if not need_token or len(need_token) < len(operators):
        optional.append("token")
        if need_token:
            token["description"] += f" Required for {', '.join(need_token)}."
    hashed = [operator.name for operator in operators if "hash" in operator.sends.fields]
    note = f"For {', '.join(hashed)} no id and no token may have & or =, which separate the fields that are hashed."
    return ({"description": note} if hashed else {}) | _object(
        playerId=_ref("schemas", "Id"),
        token=token,
        idleTimeoutSeconds={"type": "integer", "minimum": 1, "maximum": IDLE_MAX_S},
        attributes={
            "type": "object",
            "description": f"At most {ATTRIBUTES_MAX} bytes as JSON, nested at most 250 levels. Integers are kept "
            "exactly up to 64 bits, longer ones refused; so are fractions and exponents beyond 2^53.",
        },
        optional=optional,
    )


def _session() -> Json:
    reasons = ["inactivity", "max_lifetime", "closed", "reported"]
    return {
        "operator": {"type": "string"},
        "sessionId": _ref("schemas", "Id"),
        "playerId": _ref("schemas", "Id"),
        "state": {"type": "string", "enum": ["active", "ended"]},
        "reason": {"type": ["string", "null"], "enum": [*reasons, None]},
        "openedAt": _time(),
        "lastSeenAt": _time(),
        "expiresAt": _or_null(_time()) | {"description": "If nothing more is heard; null once it has ended."},
        "endedAt": _or_null(_time()),
        "idleTimeoutSeconds": {"type": "number", "minimum": 1},
        "attributes": {"type": "object"},
    }


def _delivery() -> Json:
    return {
        "id": _ref("schemas", "WebhookId"),
        "operator": {"type": "string"},
        "sessionId": _ref("schemas", "Id"),
        "sink": _SINK,
        "state": _ref("schemas", "DeliveryState"),
        "attempts": _count(),
        "createdAt": _time(),
        "nextAttemptAt": _or_null(_time())
        | {
            "description": "When it can be tried: not before a Retry-After, the breaker's next probe and the pace of "
            "retries by hand allow it. Null while the operator is held, and once it is settled."
        },
        "settledAt": _or_null(_time()),
        "lastStatus": _or_null({"type": "integer"}) | {"description": "HTTP status of the last attempt."},
        "lastCode": _or_null({"type": "number"}) | {"description": "Its `error`."},
        "lastError": _or_null({"type": "string"}) | {"description": "Why it failed, in a word or two."},
    }


def _operator() -> Json:
    return _object(
        operator={"type": "string"},
        notify={"type": "boolean"},
        dialect={"type": "string"},
        held={"type": "boolean"},
        heldReason=_or_null({"type": "string"}),
        breaker={"type": "string", "enum": ["closed", "open", "half-open"]},
        live=_count(),
        pending=_count(),
        dead=_count(),
        oldestPendingSeconds=_or_null({"type": "number", "minimum": 0}),
        notBefore=_or_null(_time())
        | {"description": "Until when a Retry-After or the breaker puts the next attempt off."},
    )


def _health_report() -> Json:
    def check(optional: Sequence[str] = (), **figures: Json) -> Json:
        one = _object(status=_STATUS, time=_time(), **figures, optional=optional)
        return _list(one) | {"minItems": 1, "maxItems": 1}

    output: Json = {"type": "string", "description": "What is wrong."}
    loop = check(observedValue={"type": "number", "minimum": 0}, observedUnit={"type": "string"})
    figures: Json = {"pending": _count(), "dead": _count(), "oldestPendingSeconds": {"type": "number", "minimum": 0}}
    names = _list({"type": "string"})
    return _object(
        status=_STATUS,
        version={"type": "string"},
        description={"type": "string"},
        checks=_object(
            store=check(sessions=_count(), waiting=_count(), walBytes=_count(), output=output, optional=["output"]),
            sweeper=loop,
            dispatcher=loop,
            listeners=check(output=output, optional=["output"]),
            expiry=check(ended=_count(), of=_count(), output=output, optional=["ended", "of", "output"]),
            deliveries=check(**figures, output=output, optional=[*figures, "output"]),
            operators=check(held=names, broken=names),
            config=check(output=output, optional=["output"]),
            certificates=check(output=output, optional=["output"]),
        ),
    )


def _page(kind: str) -> Json:
    return _object(
        items=_list(_ref("schemas", kind)) | {"maxItems": PAGE_MAX}, next=_or_null(_ref("schemas", "Cursor"))
    )


def _object(optional: Sequence[str] = (), **members: Json) -> Json:
    """An object of exactly these members."""
    required = [name for name in members if name not in optional]
    return {
        "type": "object",
        "properties": members,
        "additionalProperties": False,
    } | ({"required": required} if required else {})


def _text(longest: int) -> Json:
    return {"type": "string", "minLength": 1, "maxLength": longest, "pattern": _PLAIN}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _count() -> Json:
    return {"type": "integer", "minimum": 0}


def _time() -> Json:
    return {"type": "string", "format": "date-time"}


def _or_null(schema: Json) -> Json:
    if "$ref" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return schema | {"type": [schema["type"], "null"]}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}
