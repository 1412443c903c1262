"""Makes text from data and users safe to print."""

from __future__ import annotations

import json
import re
import sys
from typing import Any


def printable(text: str) -> str:
    """Replace control characters, and surrogates that cannot be encoded as UTF-8."""
    encodable = text.encode(errors="replace").decode()
    return "".join(
        letter if letter.isprintable() or letter.isspace() else "\N{REPLACEMENT CHARACTER}"
        for letter in encodable
    )


def json_line(record: Any) -> str:
    """Return JSON for a terminal: letters of every script are kept, and all control characters escaped."""
    text = json.dumps(record, ensure_ascii=False, default=str)
    return "".join(letter if letter.isprintable() else json.dumps(letter).strip('"') for letter in text)


def public(text: str) -> str:
    """Remove user, password and query, which may be secrets, from every URL in the text; keep checksums."""
    return re.sub(r"://(?:[^\s/?#]*@)?([^\s?]*)(?:\?(?:(?!#sha256=)\S)*)?", r"://\1", text)


def one_line(text: str) -> str:
    """Return `printable` text on one line, so that it cannot imitate other messages."""
    return " ".join(printable(text).split())


def note(text: str) -> None:
    """Print a line to stderr."""
    print(one_line(text), file=sys.stderr, flush=True)
