"""Reads from the options which endpoint a command talks to: an operator of the configuration, or any URL."""

import argparse
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from lmdaemon import textfile
from lmdaemon.commands.arguments import argument, file
from lmdaemon.commands.configured import configured
from lmdaemon.commands.shared import Usage, reason, secret_file
from lmdaemon.config import target
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import DeliveryTable, Operator, Policy, Settings
from lmdaemon.config.target import Target
from lmdaemon.config.values import duration, whsec
from lmdaemon.dialects import SHIPPED
from lmdaemon.log import NOT_A_URL, safe_url
from lmdaemon.model import id_problem
from lmdaemon.tls import Pem, Profile
from lmdaemon.workbench.bench import changed

RECIPIENT = (
    argument(
        "--dialect",
        metavar="NAME",
        help=f"{', '.join(SHIPPED)}, or one of the configuration (default: the operator's, or v4)",
    ),
    argument(
        "--provider-id", metavar="ID", help="instead of the operator's (default without an operator: luckymonaco)"
    ),
    argument("--ca-file", type=file, metavar="FILE", help="certificates of a private CA"),
    argument("--hash-key-file", type=file, metavar="FILE", help="file with the hash key, if any"),
    argument("--signing-secret-file", type=file, metavar="FILE", help="file with whsec_ secrets, if any"),
    argument("--timeout", metavar="SPAN", help='such as "500ms" or "10s" (default: the operator\'s, or 10s)'),
)


def recipient(args: argparse.Namespace, command: str) -> Operator:
    """The operator of the configuration as changed by RECIPIENT's options, or one made of these options alone.

    Raises Usage.
    """
    dialects = dict(SHIPPED)
    operator = stranger()
    if args.operator or args.config or args.dialect not in (None, *SHIPPED):
        of_operator = [f"operators.{args.operator}"] if args.operator else []
        settings = configured(args, "sessions", "delivery", "dialects", *of_operator)
        # A [dialects.NAME] table is found here only if an operator of the file uses it
        for one in settings.operators.values():
            dialects |= {dialect.name: dialect for dialect in (one.sends, *one.receives)}
        if args.operator:
            operator = _configured(settings, args.operator, command)
    changes: dict[str, Any] = {}
    if args.url:
        changes |= {"url": args.url, "target": _checked_url(args.url), "allow_private_network": True}
    if args.dialect:
        if args.dialect not in dialects:
            raise Usage(f"--dialect: must be one of {', '.join(dialects)} (got {args.dialect!r})")
        changes["sends"] = dialects[args.dialect]
    if args.provider_id:
        changes["provider_id"] = checked_id(args.provider_id, "--provider-id")
    if args.hash_key_file:
        changes["hash_key"] = secret_file(args.hash_key_file, "--hash-key-file")
    if args.signing_secret_file:
        changes["signing_keys"] = signing_keys(args.signing_secret_file)
    if args.ca_file:
        ca = Pem(args.ca_file, "")
        changes |= {"ca_file": ca, "tls": _trusting(ca, operator)}
    if args.timeout:
        changes["policy"] = changed(operator.policy, timeout_s=checked_span(args.timeout, "--timeout"))
    operator = changed(operator, **changes)
    if not operator.url and args.operator:
        raise Usage(f"{command}: operator {args.operator!r} has no url; give it one, or --url")
    if not operator.url:
        raise Usage(f"{command}: give --url, or an operator of the configuration that has a url")
    return operator


def stranger() -> Operator:
    """The operator for `--url` alone, with the defaults of the configuration where no option changes them."""
    return Operator(
        name="(none)",
        provider_id="luckymonaco",
        sends=SHIPPED["v4"],
        receives=(),
        paths=(),
        accept_unknown=True,
        token_check="present",  # noqa: S106 - a mode, not a token
        partner_tokens=(),
        hash_key=None,
        allow_from=(),
        auth_none=False,
        notify=True,
        url="",
        target=None,
        idle_s=0,
        lifetime_s=0,
        mass_expiry="warn",
        policy=Policy(DeliveryTable().timeout, (), 0, 1),
        allow_private_network=True,
        ca_file=None,
        client_cert_file=None,
        client_key_file=None,
        tls=Profile(None, None, None),
        signing_keys=(),
    )


def _configured(settings: Settings, name: str, command: str) -> Operator:
    if name not in settings.operators:
        known = ", ".join(settings.operators) or "none"
        raise Usage(f"{command}: {settings.file} has no operator {name!r}; known are {known}")
    at = f"operators.{name}."
    # The daemon hashes, signs and encrypts with these. Without them, the result would differ from the daemon's.
    sending = tuple(at + key for key in ("hash_key_", "signing_secret_", "ca_file", "client_"))
    missing = [warning for warning in settings.warnings if warning.startswith(sending) and ": unchecked: " in warning]
    if missing:
        raise ConfigError([f"{settings.file}: {finding.replace(' unchecked:', '', 1)}" for finding in missing])
    return settings.operators[name]


def _trusting(ca: Pem, operator: Operator) -> Profile:
    """The operator's client certificate together with this CA. Raises Usage."""
    profile = Profile(ca, operator.client_cert_file, operator.client_key_file)
    try:
        profile.context  # noqa: B018 - loads the file now, so that an error in it is reported
    except OSError as error:
        raise Usage(f"--ca-file: {ca.path} cannot be used: {reason(error)}") from None
    return profile


def signing_keys(path: Path) -> tuple[bytes, ...]:
    """The signing secrets in a file, one a line. Raises Usage."""
    option = "--signing-secret-file"
    lines = textfile.entries(secret_file(path, option))
    if not lines:
        raise Usage(f"{option}: must not have comments alone")
    found: list[bytes] = []
    for number, line in lines:
        try:
            found.append(whsec(line))
        except ValueError as error:
            raise Usage(f"{option}: line {number}: {error}") from None
    return tuple(found)


def _checked_url(text: str) -> Target:
    try:
        return target.read(text)
    except ValueError as error:
        shown = safe_url(text)
        got = "" if shown == NOT_A_URL else f" (got {shown!r})"
        raise Usage(f"--url: {error}{got}") from None


def checked_id(text: str, option: str) -> str:
    """The text, if it is an id. Raises Usage with a text that names the option."""
    problem = id_problem(text)
    if problem:
        raise Usage(f"{option}: {problem}")
    return text


def checked_span(text: str, option: str) -> float:
    """A duration of an option in seconds, more than zero. Raises Usage."""
    try:
        span = duration(text)
    except ValueError as error:
        raise Usage(f"{option}: {error} (got {text!r})") from None
    if span <= 0:
        raise Usage(f"{option}: must not be zero")
    return span


def is_loopback(operator: Operator) -> bool:
    """Whether the URL's host is a loopback address or "localhost". Other names are not looked up."""
    host = (operator.target.url.raw_host or "") if operator.target else ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".") == "localhost"
