"""What may be printed or recorded of names and captions that come from data, and of what the user gave."""

from __future__ import annotations

import re


def printable(text: str) -> str:
    """Without halves of broken emoji, which no font and no UTF-8 file takes, and what steers a terminal."""
    whole = text.encode(errors="replace").decode()
    return "".join(
        each if each.isprintable() or each.isspace() else "\N{REPLACEMENT CHARACTER}" for each in whole
    )


def public(text: str) -> str:
    """Remove from every URL in the text what may be a key: the user with the password, and the query."""
    return re.sub(r"://(?:[^\s/?#]*@)?([^\s?]*)(?:\?\S*)?", r"://\1", text)


def one_line(text: str) -> str:
    """The same without line breaks, which would pass for lines of our own."""
    return " ".join(printable(text).split())
