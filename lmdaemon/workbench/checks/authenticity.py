"""Checks of what proves who the sender is: signatures, hash, token, credentials, certificates. A check of something
that is not configured is skipped.
"""

from typing import Any

from lmdaemon.config import target
from lmdaemon.tls import Profile
from lmdaemon.workbench import explain
from lmdaemon.workbench.bench import Bench, Check, Finding, Skip, accepted, changed
from lmdaemon.workbench.exchanges import Exchange

OLD_S = 600
# Checks that show, when they pass, that the endpoint verifies the sender
PROOFS = (
    "authenticity.signature",
    "authenticity.hash",
    "authenticity.token",
    "authenticity.credentials",
    "authenticity.client-certificate",
)


def _refusal(bench: Bench, one: Exchange, case: str, verdict: Any = "fail") -> Finding | None:
    """A finding if the notice was not refused: it was accepted, or the endpoint failed. Any 4xx and any error code is a
    refusal.
    """
    if one.accepted:
        return Finding(verdict, f"{case}: accepted", (one,))
    if one.status is not None and one.status >= 500:
        return Finding("fail", f"{case}: {bench.said(one)}", (one,))
    if one.code is not None and one.code == bench.dialect.codes.of("retry"):
        return Finding("fail", f"{case}: {bench.said(one)}: a sender would repeat it for days", (one,))
    return None


async def signature(bench: Bench) -> Finding:
    """A notice with a wrong signature, or with none, is refused.

    A signature that is not checked, or only if it is there, proves nothing.
    """
    _need_keys(bench)
    await bench.accepted()
    body = bench.notices.body(bench.notices.fields())
    good = bench.notices.headers(body, bench.now_s())
    other = bench.notices.body(bench.notices.fields())
    without = {name: value for name, value in good.items() if name not in ("webhook-timestamp", "webhook-signature")}
    cases = (
        ("the signature of another body", other, good),
        ("no signature at all", body, without),
    )
    for case, sent, headers in cases:
        one = await bench.wire.send(sent, headers)
        if found := _refusal(bench, one, case):
            return found
    return Finding("pass", "a wrong and a missing signature are refused")


async def timestamp(bench: Bench) -> Finding:
    """A signature of ten minutes ago is refused.

    Otherwise somebody who has seen a notice once can send it again at any time.
    """
    _need_keys(bench)
    await bench.accepted()
    body = bench.notices.body(bench.notices.fields())
    one = await bench.wire.send(body, bench.notices.headers(body, bench.now_s() - OLD_S))
    if found := _refusal(bench, one, f"signed {OLD_S // 60} minutes ago"):
        return found
    return Finding("pass", f"a signature of {OLD_S // 60} minutes ago is refused")


async def rotation(bench: Bench) -> Finding:
    """Of several signatures one that fits is enough.

    While the secret is changed a notice carries two signatures.
    """
    _need_keys(bench)
    await bench.accepted()
    body = bench.notices.body(bench.notices.fields())
    headers = bench.notices.headers(body, bench.now_s())
    headers["webhook-signature"] = f"v1,{'A' * 43}= {headers['webhook-signature']}"
    return accepted(bench, await bench.wire.send(body, headers), told="accepted when one of two signatures fits")


def _need_keys(bench: Bench) -> None:
    if not bench.operator.signing_keys:
        raise Skip("no signing secret is configured (--signing-secret-file)")


async def hash_wrong(bench: Bench) -> Finding:
    """A hash of another secret, or of other values, is refused.

    The hash is what proves the sender in this dialect.
    """
    _need_hash(bench)
    await bench.accepted()
    fields = bench.notices.fields()
    hashed = bench.notices.hashed(fields)
    altered = hashed | {bench.dialect.fields["player"]: f"{bench.notices.player}-other"}
    cases = (
        ("hashed with another secret", bench.notices.body(fields, key="lmcheck-wrong-key")),
        ("altered after it was hashed", bench.notices.written(altered)),
    )
    for case, body in cases:
        if found := _refusal(bench, await bench.post(body), case):
            return found
    return Finding("pass", "a hash that does not fit is refused")


async def hash_case(bench: Bench) -> Finding:
    """A hash in upper case is accepted.

    Some MD5 functions write upper case.
    """
    _need_hash(bench)
    await bench.accepted()
    hashed = bench.notices.hashed(bench.notices.fields())
    name = bench.dialect.fields["hash"]
    return accepted(bench, await bench.post(bench.notices.written(hashed | {name: hashed[name].upper()})))


async def hash_whole(bench: Bench) -> Finding:
    """A parameter that is not on the provider's page is part of the hash, too.

    The hash covers every parameter received; a fixed list of names breaks with the first new one.
    """
    _need_hash(bench)
    await bench.accepted()
    fields = bench.notices.fields() | {"aNewField": "1", "zLast": ""}
    one = await bench.post(bench.notices.body(fields))
    return accepted(bench, one, told="a further parameter is part of the hash")


def _need_hash(bench: Bench) -> None:
    if not bench.notices.is_hashed:
        raise Skip("the dialect has no hash" if "hash" not in bench.dialect.fields else "no hash key is given")


async def token(bench: Bench) -> Finding:
    """A wrong token is refused with its code.

    The token is the only thing in this dialect that not everybody knows.
    """
    if "token" not in bench.dialect.required:
        raise Skip(f"dialect {bench.dialect.name} needs no token")
    await bench.accepted()
    one = (await bench.tell(bench.notices.fields(token="lmcheck-wrong-token"))).exchange  # noqa: S106 - made up
    if found := _refusal(bench, one, "a wrong token", "warn"):
        return found
    codes = bench.dialect.codes
    if one.code not in {codes.of("bad_token"), codes.of("unknown_session")}:
        expected = f"where `error` {explain.named(codes.of('bad_token'), bench.dialect)} is expected"
        return Finding("warn", f"a wrong token: {bench.said(one)}, {expected}", (one,))
    return Finding("pass", bench.said(one))


async def credentials(bench: Bench) -> Finding:
    """Without the URL's user and password a notice is refused.

    Credentials that are sent but not checked prove nothing.
    """
    if bench.operator.target is None or bench.operator.target.authorization is None:
        raise Skip("the URL has no user and password")
    await bench.accepted()
    body = bench.notices.body(bench.notices.fields())
    headers = bench.notices.headers(body, bench.now_s())
    without = {name: value for name, value in headers.items() if name != "Authorization"}
    for case, sent in (("without credentials", without), ("a wrong password", without | {"Authorization": _wrong()})):
        if found := _refusal(bench, await bench.wire.send(body, sent), case):
            return found
    return Finding("pass", "refused without user and password")


def _wrong() -> str:
    read = target.read("https://lmcheck:wrong-password@lmcheck.invalid/")
    return read.authorization or ""


async def client_certificate(bench: Bench) -> Finding:
    """Without a client certificate a notice is refused.

    Mutual TLS that is optional proves nothing.
    """
    if bench.operator.client_cert_file is None or not bench.is_https:
        raise Skip("no client certificate is configured")
    await bench.accepted()
    bare = changed(bench.operator, tls=Profile(bench.operator.ca_file, None, None))
    body = bench.notices.body(bench.notices.fields())
    one = await bench.post(body, operator=bare, silence_counts=False)
    if found := _refusal(bench, one, "without a client certificate"):
        return found
    return Finding("pass", "refused without a client certificate")


async def anything(bench: Bench) -> Finding:
    """Something proves the sender.

    Otherwise everybody who finds the URL can end players' sessions; a URL is no secret.
    """
    tried = {name: bench.found[name].verdict for name in PROOFS if name in bench.found}
    proven = [name.partition(".")[2] for name, verdict in tried.items() if verdict == "pass"]
    refused_with_another_code = tried.get("authenticity.token") == "warn" and not any(
        one.accepted for one in bench.found["authenticity.token"].evidence
    )
    if proven or refused_with_another_code:
        return Finding("pass", f"by {', '.join(proven or ['token'])}")
    await bench.accepted()
    if bench.untried.intersection(PROOFS):
        raise Skip("not everything that may prove the sender was tried")
    return Finding(
        "warn",
        "NOTHING THAT CAN BE SEEN FROM HERE PROVES THE SENDER: whoever knows the URL can end your players' sessions",
    )


CHECKS = (
    Check(
        "authenticity.signature",
        "Verify webhook-signature over id.timestamp.body as received, before parsing (standardwebhooks.com).",
        signature,
    ),
    Check(
        "authenticity.timestamp",
        "Refuse when webhook-timestamp is more than five minutes from your clock.",
        timestamp,
    ),
    Check(
        "authenticity.rotation",
        "Split webhook-signature at spaces and try each.",
        rotation,
    ),
    Check(
        "authenticity.hash",
        "Compute the hash over what was received and compare it in constant time.",
        hash_wrong,
    ),
    Check(
        "authenticity.hash-case",
        "Compare without regard to case.",
        hash_case,
    ),
    Check(
        "authenticity.hash-whole",
        "Sort and hash all parameters but the hash itself, empty ones too.",
        hash_whole,
    ),
    Check(
        "authenticity.token",
        "Compare the token with that of the session, or with the one agreed upon, in constant time.",
        token,
    ),
    Check(
        "authenticity.credentials",
        "Check the Authorization header; answer 401.",
        credentials,
    ),
    Check(
        "authenticity.client-certificate",
        "Make the server ask for the certificate and verify it (ssl_verify_client on).",
        client_certificate,
    ),
    Check(
        "authenticity.anything",
        "Ask the provider for a signature, a client certificate or a token of your own, or allow only its addresses "
        "(which cannot be seen from here).",
        anything,
        "summary",
    ),
)
