"""The exceptions whose messages are meant for the user."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in what the user gave; names what was given, what was expected and the remedy.

    The command line prints it as one line without a traceback and exits with `status`.
    """

    status = 2

    def __init__(self, message: str) -> None:
        # torch puts the traceback of a loader process before the message
        traceback = r"(?s)^Caught .* in DataLoader worker process .*\n[\w.]+: (.*?)\n?$"
        super().__init__(re.sub(traceback, r"\1", message))


class RunFailed(UserError):
    """A failure although the input was right; names the reason and the remedy."""

    status = 1


class Diverged(RunFailed):
    """Training has diverged, which a search takes for a result."""


def check_option(name: str, value: object, is_valid: bool, expected: str) -> None:
    """Raise UserError unless the value of an option is valid."""
    if not is_valid:
        raise UserError(f"--{name} {value}: expected {expected}")


def reason_of(error: Exception, length: int = 200) -> str:
    """Return an error's message as one line of at most this length, or its kind if it has none."""
    return " ".join(str(error).split())[:length].rstrip(". ") or type(error).__name__


@contextlib.contextmanager
def as_user_error(problem: str, remedy: str) -> Iterator[None]:
    """Replace any exception but a `UserError` by one; libraries raise nearly every type for a bad file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"{problem} ({kind}: {reason_of(error, 400)}); {remedy}") from error
