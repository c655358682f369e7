"""Records what a simulated operator received, and judges signatures, bodies, times and duplicates. What is wrong with a
notice is a list of words of `FAULTS`. Secrets are masked in the journal file.
"""

import base64
import hashlib
import hmac
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from lmdaemon.dialects import BadNotice, Dialect, Parsed, check_hash, content_of, parse
from lmdaemon.masks import MASK
from lmdaemon.retry import JITTER, RETRY_AFTER_MAX_S
from lmdaemon.workbench.script import EVER, Answer, ScriptError, Span

CLOCK_OFF_S = 300  # how far a signature's time may be off, in both directions (Standard Webhooks: five minutes)
EVIDENCE_MAX = 100  # faults that are reported one by one; all are counted
EARLY_S = 0.05  # how much shorter a wait may look because of clock and network

# What a sender must never do, and what each word means
FAULTS: Mapping[str, str] = {
    "malformed": "the body is no notice of the dialect",
    "unsigned": "there is no signature, though a secret is known",
    "wrong_signature": "no signature fits the secret, or its time is more than five minutes off",
    "wrong_hash": "the hash does not fit the key of `--hash-key-file`",
    "changed": "a repeat has another body than the first attempt",
    "doubled": "a second webhook-id for a session that has one",
    "too_soon": "a repeat came before its wait on the schedule, or a Retry-After, was over",
}
COUNTED = ("notices", "sessions", "accepted", "repeated", "accepted_again", *FAULTS)


class Notice(NamedTuple):
    """One request as it was received. `at_s` is monotonic, for intervals; `wall_s` is epoch."""

    at_s: float
    wall_s: float
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Told:
    """All attempts with one webhook-id; of notices without a webhook-id, all attempts for one session. `digest` is the
    SHA-256 of the first body.
    """

    webhook_id: str
    digest: str
    attempts: int = 0
    accepted: int = 0  # attempts that were answered with success
    last_at_s: float = 0.0
    wait_s: float = 0.0  # the wait that the last answer asked for (Retry-After)


class Arrival(NamedTuple):
    """What is known about a notice before it is answered."""

    session: str
    webhook_id: str
    attempt: int
    faults: Sequence[str]
    digest: str


@dataclass
class Journal:
    """The notices of one run, and what was wrong with them.

    `schedule` are the waits in seconds before each repeat, `keys` the signing secrets, `hash_key` the key of a dialect
    with a hash. Without `keys`, signatures are not verified; without `hash_key`, hashes are not. `write` gets a JSON
    line for each notice; it must not raise.
    """

    dialect: Dialect
    schedule: Sequence[float]
    keys: Sequence[bytes] = ()
    hash_key: str | None = None
    write: Callable[[str], None] | None = None
    tally: Counter[str] = field(default_factory=Counter)
    evidence: list[str] = field(default_factory=list)
    sessions: dict[str, Told] = field(default_factory=dict)  # by session id: the attempts with its first webhook-id
    _deliveries: dict[str, Told] = field(default_factory=dict)

    def arrived(self, notice: Notice) -> Arrival:
        """Judges and counts one notice. `answered` must be called for it afterwards."""
        faults = list(self._signature_faults(notice))
        try:
            parsed = parse(notice.body, self._content(notice), [self.dialect])
            session = parsed.session_id
            faults += self._hash_faults(parsed)
        except BadNotice as error:
            faults.append("malformed")
            session = f"? ({error.description})"
        webhook_id = notice.headers.get("webhook-id", "")
        digest = hashlib.sha256(notice.body).hexdigest()
        key = webhook_id or session
        known = self._deliveries.get(key)
        if known is None:
            known = self._deliveries[key] = Told(webhook_id, digest)
            if "malformed" not in faults:
                if self.sessions.setdefault(session, known) is not known:
                    faults.append("doubled")
                else:
                    self.tally["sessions"] += 1
        else:
            self.tally["repeated"] += 1
            if known.digest != digest:
                faults.append("changed")
            if notice.at_s - known.last_at_s < self._wait_s(known) - EARLY_S:
                faults.append("too_soon")
        known.attempts += 1
        known.last_at_s = notice.at_s
        self.tally["notices"] += 1
        for fault in faults:
            self.tally[fault] += 1
            if len(self.evidence) < EVIDENCE_MAX:
                self.evidence.append(f"{fault}: {webhook_id or 'no id'}, session {session}, attempt {known.attempts}")
        return Arrival(session, webhook_id, known.attempts, faults, digest)

    def answered(self, arrival: Arrival, notice: Notice, answer: Answer) -> str:
        """Notes what was answered; returns the line for people."""
        known = self._deliveries[arrival.webhook_id or arrival.session]
        known.wait_s = _seconds(answer.retry_after)
        if answer.accepts:
            self.tally["accepted_again" if known.accepted else "accepted"] += 1
            known.accepted += 1
        at = datetime.fromtimestamp(notice.wall_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        said = describe(answer)
        if self.write is not None:
            line = {
                "at": at,
                "number": self.tally["notices"],
                "session": arrival.session,
                "webhookId": arrival.webhook_id or None,
                "attempt": arrival.attempt,
                "bodySha256": arrival.digest,
                "headers": {name: _shown(name, value) for name, value in notice.headers.items()},
                "answer": said,
                "faults": list(arrival.faults),
            }
            self.write(json.dumps(line))
        wrong = f"  {', '.join(arrival.faults).upper()}" if arrival.faults else ""
        return f"{at}  {arrival.session}  attempt {arrival.attempt}  {said}{wrong}"

    def _content(self, notice: Notice) -> str:
        content = content_of(notice.headers.get("content-type", ""))
        if content != self.dialect.content:
            raise BadNotice("bad_parameters", "Content-Type is not the dialect's")
        return content

    def _wait_s(self, known: Told) -> float:
        """The shortest wait allowed before the next attempt."""
        step = known.attempts - 1
        scheduled_s = self.schedule[step] * (1 - JITTER) if step < len(self.schedule) else 0.0
        return max(scheduled_s, min(known.wait_s, RETRY_AFTER_MAX_S))

    def _hash_faults(self, parsed: Parsed) -> Sequence[str]:
        if self.hash_key is None or "hash" not in self.dialect.fields:
            return ()
        try:
            check_hash(parsed, self.hash_key)
        except BadNotice:
            return ("wrong_hash",)
        return ()

    def _signature_faults(self, notice: Notice) -> Sequence[str]:
        if not self.keys:
            return ()
        given = notice.headers.get("webhook-signature", "").split()
        stamp = notice.headers.get("webhook-timestamp", "")
        if not given:
            return ("unsigned",)
        signed = f"{notice.headers.get('webhook-id', '')}.{stamp}.".encode() + notice.body
        good = {f"v1,{base64.b64encode(hmac.digest(key, signed, 'sha256')).decode()}" for key in self.keys}
        in_time = bool(re.fullmatch(r"[0-9]{1,12}", stamp)) and abs(int(stamp) - notice.wall_s) <= CLOCK_OFF_S
        return () if in_time and good & set(given) else ("wrong_signature",)


def _seconds(text: str) -> float:
    return float(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0.0


def _shown(name: str, value: str) -> str:
    return MASK if name in ("authorization", "webhook-signature", "cookie") else value


def describe(answer: Answer) -> str:
    """An answer of a script, in words."""
    parts = [f"after {answer.after_s:g} s"] if answer.after_s else []
    parts.append(answer.kind)
    parts += [str(answer.number)] if answer.number or answer.kind == "error" else []
    parts += [f"{answer.span_s:g} s"] if answer.span_s else []
    parts += [answer.text] if answer.text else []
    parts += [f"retry-after {answer.retry_after}"] if answer.retry_after else []
    return " ".join(parts)


# -- expectations


def read_expectations(text: str) -> dict[str, Span]:
    """A TOML file of counts: `notices = 3`, `accepted = "2+"`, `repeated = "1-5"`. Raises ScriptError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScriptError(str(error)) from None
    expected = {}
    for name, value in document.items():
        if name not in COUNTED:
            raise ScriptError(f"{name}: is not known; known are {', '.join(COUNTED)}")
        found = re.fullmatch(r"([0-9]{1,9})(?:(\+)|-([0-9]{1,9}))?", str(value))
        if found is None or isinstance(value, bool):
            raise ScriptError(f'{name}: must be a count, "N-M" or "N+" (got {value!r})')
        span = Span(int(found[1]), EVER if found[2] else int(found[3] or found[1]))
        if span.last < span.first:
            raise ScriptError(f'{name}: N must be at most M in "N-M" (got {value!r})')
        expected[name] = span
    return expected


def missed(tally: Mapping[str, int], expected: Mapping[str, Span]) -> list[str]:
    """The counts that are not as expected. Faults of the sender that the file does not name are expected to be 0."""
    wanted = {fault: Span(0, 0) for fault in FAULTS} | dict(expected)
    return [
        f"{name}: {_range(span)} expected, {tally.get(name, 0)} seen"
        for name, span in wanted.items()
        if tally.get(name, 0) not in span
    ]


def _range(span: Span) -> str:
    if span.last == EVER:
        return f"{span.first} or more"
    return str(span.first) if span.first == span.last else f"{span.first} to {span.last}"


def verdict(journal: Journal, expected: Mapping[str, Span]) -> dict[str, Any]:
    """The result of a run as JSON."""
    wrong = missed(journal.tally, expected)
    return {
        "good": not wrong,
        "counts": {name: journal.tally.get(name, 0) for name in COUNTED},
        "missed": wrong,
        "neverAccepted": [session for session, told in journal.sessions.items() if not told.accepted][:EVIDENCE_MAX],
        "evidence": journal.evidence,
    }
