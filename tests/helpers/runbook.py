"""The runbook of the console, made of docs/operating.md: `make runbook` writes it anew."""

import gzip
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "lmdaemon/web/console_files/runbook.json.gz"


def entries() -> dict[str, list[str]]:
    """The health checks, and the alerts that their entries mention, each with its lines."""
    told = sections()
    found = [title for title in told if title.startswith("health: ")]
    for title in found:  # `found` grows during this loop
        named = re.findall(r"Lmdaemon[A-Z]\w+", " ".join(told[title]))
        found += [name for name in dict.fromkeys(named) if name in told and name not in found]
    return {title: told[title] for title in sorted(found, key=list(told).index)}


def sections() -> dict[str, list[str]]:
    """The lines of each alert and health check, without links; `code` and **words** keep their marks."""
    text = (ROOT / "docs/operating.md").read_text()
    found = re.findall(r"^### ((?:Lmdaemon|health: ).*?)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    return {
        title: [
            re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(line.split()))
            for line in re.findall(r"^- (.*?)(?=^- |\Z)", body, re.MULTILINE | re.DOTALL)
        ]
        for title, body in found
    }


if __name__ == "__main__":
    lines = [f"{json.dumps(title)}: {json.dumps(text, ensure_ascii=False)}" for title, text in entries().items()]
    FILE.write_bytes(gzip.compress(("{\n" + ",\n".join(lines) + "\n}\n").encode(), mtime=0))
