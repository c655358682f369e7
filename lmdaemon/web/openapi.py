"""The OpenAPI 3.1 document of both sides. A pure function of the settings; `api` serves it as `/openapi.json`.

Clients are generated from it, so what goes into a client's code must not depend on the operators that are configured:
operator names are described by a pattern and not listed, every call has a fixed name, and the name of a notice comes
from its path. Of the private side only servers and security differ from daemon to daemon. Requests and answers are
described by the types that the code itself uses (`shapes`); in tests/web/test_openapi.py a fuzzer compares the running
daemon with the document.
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
from lmdaemon.version import __version__
from lmdaemon.web import bodies
from lmdaemon.web.calls import Call
from lmdaemon.web.problems import KINDS
from lmdaemon.web.routes import CALLS, HEALTH, TAGS

_HASHED = shapes.PLAIN.replace("[^", "[^&=")
# The range of integers that orjson reads exactly
_INTEGERS = {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}

_DESCRIPTION = """\
SessionExpired as a daemon: the private session API for game servers and administrators, and the public endpoints that \
receive notices.

Every 2xx means that the change is on disk. Every error of the private side is a problem document (RFC 9457). Every \
path that has GET has HEAD, too. Any other method that a path does not list is answered with 405 and an `Allow` header \
that names the path's methods; an `Expect` other than `100-continue` is answered with 417. Times are RFC 3339 in UTC. \
An answer may get further members in a later version; a request must not have any that is not listed."""

Json = dict[str, Any]


def document(settings: Settings) -> Json:
    """OpenAPI 3.1 of the private and the public listener. Paths without `servers` of their own belong to the private
    one.
    """
    operators = list(settings.operators.values())
    private, public = _server(settings, "api"), _server(settings, "server")
    notices = _unlike(_dialects(operators), "Notice", "")
    paths = _private_paths(settings, [private, public])
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
        "tags": [
            {"name": name, "description": description}
            for name, description in (TAGS | {"notices": "The public side: SessionExpired as received."}).items()
        ],
        "paths": paths,
        "components": {
            "schemas": schemas() | _notices(operators, notices),
            "responses": {
                name: {"description": told, "content": _content("application/json", shapes.NoticeAnswer)}
                | _headers(status)
                for status, (name, told) in _REFUSALS.items()
            },
            "parameters": dict(_PARAMETERS),
            "securitySchemes": {name: one for name, one in _SECURITY_SCHEMES.items() if name in used},
        },
    }


# -- servers and security

_LISTENERS = {"api": "The private side.", "server": "The public side."}
_SECURITY_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A token of `token_file`, or of `read_token_file` for what changes nothing.",
    },
    "clientCertificate": {"type": "mutualTLS", "description": "From the CA in the listener's `client_ca_file`."},
}


def _server(settings: Settings, listener: str) -> Json:
    description = _LISTENERS[listener]
    listen = settings.api.listen if listener == "api" else settings.server.listen
    scheme = "https" if listener in settings.tls else "http"
    if listen.unix:
        return {"url": f"{scheme}://localhost", "description": f"{description} Over the unix socket {listen.unix}."}
    if listen.host in ("0.0.0.0", "::"):  # noqa: S104 - all addresses; the reader fills in one
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


def _private_paths(settings: Settings, servers: Sequence[Json]) -> Json:
    paths: Json = {}
    for call in CALLS:
        item = paths.setdefault(call.path, {})
        if needed := [_ref("parameters", name) for name in _PARAMETERS if f"{{{name}}}" in call.path]:
            item["parameters"] = needed
        item[call.method.lower()] = _operation(call)
    _tell_of_health(paths[HEALTH], settings, servers)
    return paths


def _operation(call: Call) -> Json:
    """One operation of the private side."""
    operation: Json = {"tags": [call.tag], "operationId": call.name}
    operation |= {"summary": call.summary, "description": call.description}
    if call.takes is not None and call.has_body:
        required = bool(bodies.required(call.takes))
        operation["requestBody"] = {"required": required, "content": _content("application/json", call.takes)}
    elif call.takes is not None and (parameters := _query(call.takes)):
        operation["parameters"] = parameters
    operation["responses"] = {
        str(status): {"description": told} | ({"content": _content(call.media, kind)} if kind else {})
        for status, (told, kind) in call.answers.items()
    } | _problems(call.may_fail_with)
    if call.links:
        first = {"id": "$response.body#/items/0/id"}
        operation["responses"]["200"]["links"] = {
            name: {"operationId": name, "parameters": first} for name in call.links
        }
    if call.events:
        operation["x-events"] = {name: _schema(kind) for name, kind in call.events.items()}
        kinds = [_schema(kind) for kind in dict.fromkeys(call.events.values())]
        stream = operation["responses"]["200"]["content"][call.media]
        stream["schema"] |= {"contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    return operation


def _problems(codes: Iterable[tuple[str, int]]) -> Json:
    """The responses of these problems by status. Each description says what its codes mean and what a client does."""
    by_status: dict[str, list[str]] = {}
    for code, status in codes:
        _, meaning, to_do = KINDS[code]
        by_status.setdefault(str(status), []).append(f"`{code}`: {meaning} {to_do}")
    return {
        status: {"description": "\n\n".join(told), "content": _content("application/problem+json", shapes.Problem)}
        | _headers(int(status))
        for status, told in sorted(by_status.items())
    }


def _headers(status: int) -> Json:
    headers = {name: {"required": True} | one for name, one in _HEADERS.get(status, {}).items()}
    return {"headers": headers} if headers else {}


def _query(kind: type[shapes.Request]) -> list[Json]:
    """The members of a type as query parameters."""
    found: list[Json] = []
    schema = msgspec.json.schema_components([kind], ref_template=_TEMPLATE)[1][kind.__name__]
    for name, member in schema["properties"].items():
        description = member.pop("description")
        found.append({"name": name, "in": "query", "schema": _hoist(member, {}), "description": description})
    return found


def _tell_of_health(item: Json, settings: Settings, servers: Sequence[Json]) -> None:
    """Describes /health, which both listeners serve; only the private one shows details, and only with its token."""
    item["servers"] = servers
    get = item["get"]
    if settings.api_tokens:
        anybody = _security(settings, "api", bearer=False) or [{}]
        get["security"] = _security(settings, "api", bearer=True) + anybody
    bare = {status: {"description": one["description"]} for status, one in get["responses"].items()}
    item["head"] = get | {
        "operationId": "headHealth",
        "summary": "Tell the state of the daemon by the status alone",
        "responses": bare,
    }


def _content(media: str, kind: Any) -> Json:
    return {media: {"schema": _schema(kind)}}


def _in_path(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": schema, "description": description}


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


# -- the public side


def _add_endpoints(paths: Json, operators: Iterable[Operator], notices: Mapping[str, str], also: Json) -> None:
    """Adds each endpoint with the operators that it serves.

    Case and a trailing slash make no difference in a path; it is spelled as in the first operator that has it. An
    endpoint may have the same path as a private call, because the listeners are different; the document then has both
    under one path.
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
                "description": "Taken if `error` is 0, else refused",
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
    """The dialects that these operators accept."""
    return {dialect.name: dialect for operator in operators for dialect in operator.receives}


def _unlike(keys: Iterable[str], prefix: str, empty: str) -> dict[str, str]:
    """For each key (a path, or the name of a dialect) a name that can be used in code; equal names get a number."""
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
    if not required:  # an optional field that is empty counts as absent
        choices.append({"const": ""})
        if dialect.content == "json":
            choices.append({"type": "null"})
    return {"anyOf": choices} if len(choices) > 1 else dict(text)


# -- answers that are errors

_REFUSALS = {
    403: ("AddressNotAllowed", "The notice comes from an address that is not in the operator's `allow_from`"),
    408: ("NoticeTooSlow", "The body came too slowly or broke off"),
    413: ("NoticeTooLarge", "The body is longer than 16 KiB"),
    415: ("NoticeUnreadable", "No dialect of this path has this Content-Type, or the body is compressed"),
    500: ("NoticeFailed", "A bug; the notice should be sent again"),
    503: ("NoticeNotStored", "The notice could not be stored; it should be sent again"),
}
_HEADERS: Mapping[int, Json] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    503: {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds to wait."}},
}


# -- schemas, of the types in `shapes`

_TAKEN = {call.takes for call in CALLS if call.takes is not None and call.has_body}
_ANSWERED = {kind for call in CALLS for _, kind in call.answers.values() if isinstance(kind, type)} - {str}
_ANSWERED |= {kind for call in CALLS for kind in call.events.values()}


def schemas() -> Json:
    """Every named type. Its members are in the order in which `shapes` has them."""
    named: Json = {}
    kinds = sorted(_TAKEN | _ANSWERED | {shapes.Problem, shapes.NoticeAnswer}, key=lambda kind: kind.__name__)
    for name, schema in msgspec.json.schema_components(kinds, ref_template=_TEMPLATE)[1].items():
        kind = getattr(shapes, name)
        if is_typeddict(kind):
            schema["properties"] = {member: schema["properties"][member] for member in get_type_hints(kind)}
        _hoist(schema, named)
    return named


def _schema(kind: Any) -> Json:
    """The schema of one type, or a reference to it if it has a name."""
    found: Json = _hoist(msgspec.json.schema_components([kind], ref_template=_TEMPLATE)[0][0], {})
    return found


def _hoist(value: Any, named: Json) -> Any:
    """Moves every schema that has a title, at any depth, into `named`, and puts a reference in its place."""
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
