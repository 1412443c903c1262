"""Makes text from data and users safe to print."""

from __future__ import annotations

import re


def printable(text: str) -> str:
    """Replace control characters, and surrogates that cannot be encoded as UTF-8."""
    encodable = text.encode(errors="replace").decode()
    return "".join(
        letter if letter.isprintable() or letter.isspace() else "\N{REPLACEMENT CHARACTER}"
        for letter in encodable
    )


def public(text: str) -> str:
    """Remove user, password and query, which may be secrets, from every URL in the text; keep checksums."""
    return re.sub(r"://(?:[^\s/?#]*@)?([^\s?]*)(?:\?(?:(?!#sha256=)\S)*)?", r"://\1", text)


def one_line(text: str) -> str:
    """Return `printable` text on one line, so that it cannot imitate other messages."""
    return " ".join(printable(text).split())
