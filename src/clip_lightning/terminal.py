"""What may be written to a terminal, of names and captions that come from data."""

from __future__ import annotations


def printable(text: str) -> str:
    """Without halves of broken emoji, which no font and no UTF-8 file takes, and what steers a terminal."""
    whole = text.encode(errors="replace").decode()
    return "".join(
        each if each.isprintable() or each.isspace() else "\N{REPLACEMENT CHARACTER}" for each in whole
    )


def one_line(text: str) -> str:
    """The same without line breaks, which would pass for lines of our own."""
    return " ".join(printable(text).split())
