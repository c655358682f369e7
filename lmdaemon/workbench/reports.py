"""A report as text, JUnit XML and HTML. Answers are text that others have written, so they are escaped in every
format.
"""

import re
from collections.abc import Iterator, Mapping
from html import escape
from itertools import groupby
from typing import Any
from xml.etree import ElementTree

from lmdaemon.dialects import Dialect
from lmdaemon.model import counted
from lmdaemon.version import __version__
from lmdaemon.workbench import explain
from lmdaemon.workbench.checks import BY_HAND
from lmdaemon.workbench.runner import Report, Result

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_INDENT = " " * 12


def heading_lines(url: str, dialect: Dialect) -> Iterator[str]:
    """The target and the dialect's fields and codes, which the provider's page may not list."""
    yield f"Checking {url} (dialect {dialect.name})"
    yield f"  Fields: {', '.join(dialect.fields.values())}; `error`: {explain.codes(dialect)}"


def result_lines(result: Result) -> Iterator[str]:
    """One check: its verdict and, if something is wrong, why it matters, what to do, and the exchanges that show it."""
    yield f"  {result.verdict:<8}  {result.check.id:<33} {result.text}"
    if result.verdict not in ("warn", "fail"):
        return
    yield f"{_INDENT}{result.check.title}"
    yield f"{_INDENT}Why: {result.check.why}"
    yield f"{_INDENT}Do:  {result.hint}"
    if result.verdict == "fail":
        for one in result.evidence:
            yield from (_INDENT + "| " + line for line in exchange_lines(one))


def exchange_lines(one: Mapping[str, Any]) -> Iterator[str]:
    """A request and its answer as text."""
    request, answer = one["request"], one["answer"]
    yield f"{request['method']} {request['url']}"
    yield from _message(request)
    if answer is None:
        yield f"No answer ({one['durationMs']} ms): {one['cause']}" + (f" ({one['detail']})" if one["detail"] else "")
        return
    yield f"HTTP {answer['status']} ({one['durationMs']} ms)"
    yield from _message(answer)


def _message(message: Mapping[str, Any]) -> Iterator[str]:
    for name, value in message["headers"].items():
        yield f"{name}: {value}"
    yield ""
    body = message["body"]
    yield from (body[:2000] + ("…" if len(body) > 2000 else "")).splitlines()
    yield ""


def summary_lines(report: Report) -> Iterator[str]:
    """The end of a report as text: what only people can check, and how many checks passed."""
    yield ""
    yield "Only people can check:"
    yield from (f"  - {one}" for one in BY_HAND)
    yield ""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in report.counts.items())
    yield f"{counts}; {counted(report.requests, 'request')} in {report.duration_ms / 1000:.1f} s; run {report.run}"
    for verdict in ("warn", "fail"):
        if named := [result.check.id for result in report.results if result.verdict == verdict]:
            yield f"{verdict}: {', '.join(named)}"
    if report.stopped:
        yield f"NOT EVERYTHING WAS TRIED: {report.stopped}"
    elif named:
        yield f"To run only these again: --only {','.join(named)}"


def junit(report: Report) -> str:
    """JUnit XML. Each group is a suite, each check a case; a warning is a passed case with the warning in
    system-out.
    """
    root = ElementTree.Element("testsuites", name="lmdaemon check", time=_seconds(report.duration_ms))
    for group, some in groupby(report.results, lambda result: result.check.group):
        results = list(some)
        verdicts = [result.verdict for result in results]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=group,
            tests=str(len(results)),
            failures=str(verdicts.count("fail")),
            errors="0",
            skipped=str(verdicts.count("skipped")),
            time=_seconds(sum(result.duration_ms for result in results)),
            timestamp=report.started_at.strftime("%Y-%m-%dT%H:%M:%S"),
            hostname=_xml(report.url),
        )
        for result in results:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                name=result.check.id,
                classname=f"lmdaemon.check.{group}",
                time=_seconds(result.duration_ms),
            )
            if result.verdict == "fail":
                failure = ElementTree.SubElement(case, "failure", message=_xml(result.text), type=result.check.id)
                failure.text = _xml("\n".join(result_lines(result)))
            elif result.verdict == "skipped":
                ElementTree.SubElement(case, "skipped", message=_xml(result.text))
            else:
                ElementTree.SubElement(case, "system-out").text = _xml("\n".join(result_lines(result)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _seconds(span_ms: int) -> str:
    return f"{span_ms / 1000:.3f}"


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2rem; text-transform: capitalize; }
details, .check { border-left: .4rem solid; padding: .3rem .8rem; margin: .4rem 0; }
.pass { border-color: #2a8a3e; } .warn { border-color: #b7791f; } .fail { border-color: #c53030; }
.skipped { border-color: #888; } .verdict { font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8886; padding: .6rem; font-size: .85rem; }
"""


def html(report: Report) -> str:
    """An HTML page without scripts or references to other files, so that it can be attached to a ticket."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in report.counts.items())
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{escape(f'{counts}: {report.url}')}</title><style>{_STYLE}</style></head><body>",
        "<h1>SessionExpired endpoint</h1>",
        f"<p>{escape(report.url)}, dialect {escape(report.dialect)}<br>",
        f"{report.started_at:%Y-%m-%d %H:%M:%S} UTC, {report.duration_ms / 1000:.1f} s,",
        f"{counted(report.requests, 'request')}, run {escape(report.run)}, lmdaemon {escape(__version__)}</p>",
        f"<p class=verdict>{escape(counts)}</p>",
        *_html_lists(report),
    ]
    if report.stopped:
        parts.append(f"<p class=verdict>Not everything was tried: {escape(report.stopped)}</p>")
    for group, results in groupby(report.results, lambda result: result.check.group):
        parts.append(f"<h2>{escape(group)}</h2>")
        parts += map(_html_result, results)
    parts.append("<h2>Only people can check</h2><ul>")
    parts += [f"<li>{_marked(one)}</li>" for one in BY_HAND]
    parts.append("</ul></body></html>\n")
    return "\n".join(parts)


def _html_lists(report: Report) -> Iterator[str]:
    """Links to the checks that failed, and to those that warn."""
    for verdict in ("fail", "warn"):
        ids = [escape(result.check.id) for result in report.results if result.verdict == verdict]
        if ids:
            links = ", ".join(f'<a href="#{one}">{one}</a>' for one in ids)
            yield f'<p class="check {verdict}"><span class=verdict>{verdict}</span> {links}</p>'


def _marked(text: str) -> str:
    """Text as HTML, in which text between backticks is marked as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _html_result(result: Result) -> str:
    check = result.check
    head = (
        f"<span class=verdict>{result.verdict}</span> <code>{escape(check.id)}</code> {_marked(check.title)}"
        f"<br>{_marked(result.text)}"
    )
    if result.verdict not in ("warn", "fail"):
        return f'<div id="{escape(check.id)}" class="check {result.verdict}">{head}</div>'
    shown = "".join(f"<pre>{escape(chr(10).join(exchange_lines(one)))}</pre>" for one in result.evidence)
    return (
        f'<details open id="{escape(check.id)}" class="{result.verdict}"><summary>{head}</summary>'
        f"<p>Why: {_marked(check.why)}<br>Do: {_marked(result.hint)}</p>{shown}</details>"
    )
