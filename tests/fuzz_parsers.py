"""Coverage-guided fuzzing of all parsers of what peers send: `make fuzz`, for SECONDS (60).

A crash ends the run and prints the input that caused it; that input then belongs into the tests. It is not part of
`make test`, because it never ends by itself.
"""

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["lmdaemon"]):
    from lmdaemon import retry
    from lmdaemon.dialects import SHIPPED, BadNotice, answered_code, check_hash, content_of, parse
    from lmdaemon.web.requests import decode_segment

BY_CONTENT = {
    content: [dialect for dialect in SHIPPED.values() if dialect.content == content] for content in ("json", "form")
}


def one_input(data: bytes) -> None:
    """Parses one input. Parsers may refuse it (BadNotice); any other exception is a finding."""
    provider = atheris.FuzzedDataProvider(data)
    content = provider.PickValueInList(["json", "form"])
    body = provider.ConsumeBytes(2000)
    with contextlib.suppress(BadNotice):
        parsed = parse(body, content, BY_CONTENT[content])
        if "hash" in parsed.dialect.fields:
            check_hash(parsed, "testKey")
    answered_code(body)
    text = body.decode("latin-1")
    content_of(text)
    wait_s = retry.retry_after_s(text, 1_790_000_000.0)
    assert wait_s is None or 0 <= wait_s <= retry.RETRY_AFTER_MAX_S
    with contextlib.suppress(ValueError):
        decode_segment(text)


atheris.Setup(sys.argv, one_input)
atheris.Fuzz()
