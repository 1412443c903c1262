"""Text that is safe to print: names and captions from data, and what the user gave."""

from __future__ import annotations

import re


def printable(text: str) -> str:
    """Replace halves of broken emoji, which no font and no UTF-8 file takes, and what steers a terminal."""
    encodable = text.encode(errors="replace").decode()
    return "".join(
        letter if letter.isprintable() or letter.isspace() else "\N{REPLACEMENT CHARACTER}"
        for letter in encodable
    )


def public(text: str) -> str:
    """Remove what may be a secret from every URL in the text: user, password and query.

    A checksum behind them stays.
    """
    return re.sub(r"://(?:[^\s/?#]*@)?([^\s?]*)(?:\?(?:(?!#sha256=)\S)*)?", r"://\1", text)


def one_line(text: str) -> str:
    """Return `printable` text without line breaks, which could imitate lines of our own."""
    return " ".join(printable(text).split())
